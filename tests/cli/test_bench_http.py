"""The whole of `phasewise bench` against a real server with known delays: counts, order and arithmetic, not speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import run
from tests.cli.sse_server import MODEL, SseServer, running


def bench(server: SseServer, tmp_path: Path, *flags: str, code: int = 0) -> dict[str, Any]:
    """Runs the command in this process and returns the JSON that it wrote."""
    output = tmp_path / "result.json"
    assert run(["bench", "--http", server.address, "--output", str(output), "--save-requests", *flags]) == code
    return json.loads(output.read_text())


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")


def test_a_closed_loop_keeps_its_concurrency_and_its_lengths(tmp_path: Path) -> None:
    with running(SseServer(first_delay_s=0.02, gap_s=0.005)) as server:
        result = bench(
            server, tmp_path, *("--concurrency", "3", "--num-requests", "9", "--prompt-tokens", "5:9"),
            *("--output-tokens", "4", "--warmup", "2"),
        )  # fmt: skip
    (point,) = result["points"]
    assert (point["mode"], point["value"], point["completed"], point["failed"]) == ("closed", 3, 9, 0)
    assert server.max_open == 3
    assert len(server.measured) == 2 + 9  # warm-up and measured
    assert all(0 <= token < 100 for body in server.bodies for token in body["prompt"])
    assert all(body["ignore_eos"] and body["max_tokens"] == 4 for body in server.measured)
    rows = point["rows"]
    assert sorted(len(body["prompt"]) for body in server.measured[2:]) == sorted(row["prompt_tokens"] for row in rows)
    assert [row["output_tokens"] for row in rows] == [4] * 9
    assert point["output_tokens"] == 36
    assert point["prompt_tokens"] == sum(row["prompt_tokens"] for row in rows)
    assert point["cached_tokens"] == 18
    assert point["ttft_s"]["count"] == point["e2e_s"]["count"] == 9
    assert point["tbt_s"]["count"] == 27
    assert point["ttft_s"]["p50"] >= 0.02
    assert point["e2e_s"]["p50"] >= 0.02 + 3 * 0.005
    assert point["wrong_length"] == 0
    assert point["output_tokens_per_s"] == pytest.approx(36 / point["duration_s"])
    assert result["target"]["model"] == MODEL
    assert result["target"]["tbt_basis"] == "tokens"
    assert "phasewise" in result["versions"]


def test_an_open_loop_sends_on_its_schedule_whatever_the_answers_do(tmp_path: Path) -> None:
    # The server says nothing before it has all 20: a load generator that waited for answers would never be done.
    plain = frozenset({"continuous_usage_stats", "return_token_ids"})
    with running(SseServer(hold_until=20, refused_fields=plain, card={"vocab_size": 100})) as server:
        result = bench(
            server, tmp_path, *("--rate", "200", "--num-requests", "20", "--output-tokens", "2", "--warmup", "0"),
        )  # fmt: skip
    (point,) = result["points"]
    assert point["completed"] == 20
    assert server.max_open == 20
    rows = point["rows"]
    scheduled = [row["scheduled_s"] for row in rows]
    assert scheduled == sorted(scheduled)
    assert all(row["sent_s"] >= row["scheduled_s"] for row in rows)
    assert point["lateness_s"]["count"] == 20
    again = SseServer()
    with running(again):
        repeated = bench(again, tmp_path, *("--rate", "200", "--num-requests", "20", "--output-tokens", "2"))
    assert [row["scheduled_s"] for row in repeated["points"][0]["rows"]] == scheduled
    assert sorted(body["prompt"] for body in again.measured[-20:]) == sorted(body["prompt"] for body in server.measured)


def test_a_sweep_has_a_point_per_value_with_prompts_of_its_own(tmp_path: Path) -> None:
    plot = tmp_path / "sweep.png"
    with running(SseServer()) as server:
        result = bench(
            server, tmp_path, *("--concurrency", "1,2", "--num-requests", "4", "--prompt-tokens", "8"),
            *("--output-tokens", "3", "--warmup", "0", "--plot", str(plot), "--slo", "ttft=60s,tbt=60s"),
        )  # fmt: skip
    assert [point["label"] for point in result["points"]] == ["concurrency 1", "concurrency 2"]
    prompts = [tuple(body["prompt"]) for body in server.measured]
    assert len(set(prompts)) == 8
    for point in result["points"]:
        assert point["slo"] == {"ttft_s": 60.0, "tbt_s": 60.0}
        assert point["slo_attainment"] == 1.0
        assert point["goodput_requests_per_s"] == pytest.approx(point["requests_per_s"])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_goodput_counts_what_met_the_slo_and_failures_miss_it(tmp_path: Path) -> None:
    with running(SseServer(first_delay_s=0.05, faults={5: "429"})) as server:
        flags = ("--num-requests", "20", "--prompt-tokens", "5:6", "--output-tokens", "2", "--slo", "ttft=1ms")
        result = bench(server, tmp_path, *flags)
        relaxed = bench(server, tmp_path, *flags[:-1], "ttft=60s")
    assert result["points"][0]["slo_attainment"] == 0.0
    assert result["points"][0]["goodput_requests_per_s"] == 0.0
    (point,) = relaxed["points"]
    assert 0 < point["completed"] < 20
    assert point["slo_attainment"] == point["completed"] / 20


@pytest.mark.parametrize(("way", "basis"), [("usage", "tokens"), ("ids", "tokens"), ("none", "events")])
def test_events_of_several_tokens(tmp_path: Path, way: str, basis: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused = {
        "usage": set(),
        "ids": {"continuous_usage_stats"},
        "none": {"continuous_usage_stats", "return_token_ids"},
    }
    with running(SseServer(tokens_per_event=4, refused_fields=frozenset(refused[way]))) as server:
        result = bench(server, tmp_path, *("--num-requests", "3", "--output-tokens", "10", "--warmup", "0"))
    (point,) = result["points"]
    assert result["target"]["tbt_basis"] == basis
    assert point["output_tokens"] == 30
    assert point["tokens_per_event"] == pytest.approx(10 / 3)
    assert point["tbt_s"]["count"] == (27 if basis == "tokens" else 6)
    if basis == "tokens":
        assert point["tbt_s"]["p50"] == 0.0  # most tokens came together with the one before them
    assert ("3.33 tokens per event" in capsys.readouterr().out) == (basis == "events")


def test_a_server_that_takes_the_field_but_does_not_answer_it_is_not_believed(tmp_path: Path) -> None:
    refused = frozenset({"continuous_usage_stats"})
    with running(SseServer(tokens_per_event=2, refused_fields=refused, sends_token_ids=False)) as server:
        result = bench(server, tmp_path, *("--num-requests", "2", "--output-tokens", "4", "--warmup", "0"))
    assert result["target"]["tbt_basis"] == "events"
    assert "return_token_ids" not in server.measured[-1]


def test_errors_are_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = {4: "429", 5: "error", 6: "cut"}
    with running(SseServer(faults=faults)) as server:
        result = bench(
            server, tmp_path, *("--num-requests", "40", "--prompt-tokens", "4:7", "--output-tokens", "3"),
            *("--concurrency", "4", "--warmup", "0"),
        )  # fmt: skip
    (point,) = result["points"]
    lengths = [len(body["prompt"]) for body in server.measured]
    assert point["errors"] == {
        reason: lengths.count(length)
        for reason, length in (("HTTP 429 overloaded", 4), ("stream error worker_lost", 5), ("stream cut short", 6))
    }
    assert point["completed"] == lengths.count(7) > 0
    assert point["ttft_s"]["count"] == point["completed"]
    assert "queue is full" in capsys.readouterr().out


def test_a_run_in_which_nothing_succeeds_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(SseServer(faults={256: "429"})) as server:
        result = bench(server, tmp_path, "--num-requests", "2", code=1)
    assert result["points"][0]["failed"] == 2
    assert "no request succeeded (HTTP 429 overloaded)" in capsys.readouterr().err


def test_a_request_that_takes_too_long_is_a_timeout(tmp_path: Path) -> None:
    with running(SseServer(faults={5: "silent"})) as server:
        result = bench(
            server, tmp_path, *("--num-requests", "2", "--prompt-tokens", "5", "--output-tokens", "2"),
            *("--timeout", "0.5", "--warmup", "0"), code=1,
        )  # fmt: skip
    assert result["points"][0]["errors"] == {"timeout": 2}


def test_answers_of_another_length_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(SseServer(ignores_length=True)) as server:
        result = bench(server, tmp_path, *("--num-requests", "3", "--output-tokens", "5"))
    assert result["points"][0]["wrong_length"] == 3
    assert "ignore_eos" in capsys.readouterr().out


def test_a_replayed_trace_keeps_order_lengths_and_shared_prefixes(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 1000, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]},
        {"timestamp": 1100, "input_length": 700, "output_length": 3, "hash_ids": [1, 3]},
        {"timestamp": 1050, "input_length": 512, "output_length": 9, "hash_ids": [4]},
    ]
    trace.write_text("\n".join(json.dumps(line) for line in lines))
    plot = tmp_path / "run.svg"
    with running(SseServer()) as server:
        result = bench(
            server, tmp_path, *("--trace", str(trace), "--time-scale", "0.5", "--max-output-tokens", "4"),
            *("--warmup", "0", "--plot", str(plot)),
        )  # fmt: skip
    (point,) = result["points"]
    assert (point["mode"], point["value"]) == ("replay", 0.5)
    assert [row["scheduled_s"] for row in point["rows"]] == pytest.approx([0.0, 0.025, 0.05])
    by_length = {len(body["prompt"]): body for body in server.measured}
    assert {length: body["max_tokens"] for length, body in by_length.items()} == {600: 2, 512: 4, 700: 3}
    assert by_length[600]["prompt"][:512] == by_length[700]["prompt"][:512] != by_length[512]["prompt"]
    assert result["workload"]["format"] == "mooncake"
    assert result["workload"]["clipped"] == 1
    assert plot.read_text().lstrip().startswith("<?xml")


def test_duration_ends_a_closed_loop(tmp_path: Path) -> None:
    with running(SseServer(first_delay_s=0.01)) as server:
        result = bench(server, tmp_path, *("--duration", "0.3", "--concurrency", "2", "--output-tokens", "1"))
    (point,) = result["points"]
    assert point["completed"] == len(point["rows"]) >= 2
    assert max(row["scheduled_s"] for row in point["rows"]) < 0.3


def test_ids_come_from_tokenize_or_the_flag_where_the_card_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(SseServer(card={})) as server:
        bench(server, tmp_path, *("--num-requests", "2", "--warmup", "0"))
        assert {token for body in server.measured for token in body["prompt"]} == {7, 11, 13}
        bench(server, tmp_path, *("--num-requests", "1", "--warmup", "0", "--vocab-size", "3"))
        assert set(server.measured[-1]["prompt"]) == {0, 1, 2}
        assert run(["bench", "--http", server.address, "--model", "other"]) == 1
    assert "does not serve 'other'; it serves tiny" in capsys.readouterr().err


def test_headers_and_extra_fields_are_sent_and_keys_stay_out_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--num-requests", "1", "--header", "Authorization: Bearer secret", "--extra-body", '{"top_k": 1}']
    monkeypatch.setattr("sys.argv", ["phasewise", "bench", *flags])
    with running(SseServer(status={"workers": []})) as server:
        result = bench(server, tmp_path, *flags)
    assert server.headers[-1]["authorization"] == "Bearer secret"
    assert server.measured[-1]["top_k"] == 1
    assert "secret" not in json.dumps(result)
    assert "--header 'Authorization: ***'" in result["command"]
    assert result["target"]["status"] == {"workers": []}


def test_a_server_without_models_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from starlette.applications import Starlette

    from tests.cli.sse_server import serve_app

    with serve_app(Starlette()) as address:
        assert run(["bench", "--http", address]) == 1
    error = capsys.readouterr().err
    assert "HTTP 404" in error and "OpenAI-compatible" in error and error.count("\n") == 1
