"""`phasewise doctor`: what it concludes from reports, and the command against a real HTTP server."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from cli.diagnosis import Cluster, Finding, Severity, conversions, findings
from cli.main import run
from phasewise.core.links import NO_TIME_LEFT
from phasewise.core.profile import DeviceProfile
from tests.cli.sse_server import serve_app

MIB = 1 << 20


def worker(name: str, **changes: Any) -> dict[str, Any]:
    layout = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 16, "block_size": 16, "dtype": "bfloat16"}
    return {
        "id": name, "role": name.split("-")[0], "state": "ready", "host": "h", "device": "cuda", "ranks": 1,
        "max_model_len": 4096, "kv_tokens": 8192, "kv_layout": {**layout, "content_fingerprint": "f"},
        "wire_version": 2, "layers_per_part": 1, "chunk_tokens": 1000, "checksum_failures": 0.0,
        "profile": json.loads(DeviceProfile.linear(0.005, 0.002, 0.005, 0.0).to_json()), **changes,
    }  # fmt: skip


def report() -> dict[str, Any]:
    """One pair: 10 ms latency, 1 MB/s, 1 ms for each part; a token's bytes take 1 ms, its computing 2 ms."""
    probes = [(32, 0.010), (MIB, 0.010 + (MIB - 32) / 1e6)]
    return {
        "context_length": 4096,
        "transfer": {"link": "auto", "codec": "none", "window_bytes": 256 * MIB, "layerwise_threshold_tokens": None},
        "workers": [worker("prefill-0"), worker("decode-0")],
        "pairs": [{
            "prefill": "prefill-0", "decode": "decode-0", "link": "nccl", "bytes_per_s": 1e6, "part_s": 0.001,
            "max_part_bytes": 128 * MIB, "dtype": "bfloat16", "codec": "none", "bytes_per_token": 1000.0,
            "is_lossless": True, "refusal": "",
            "probes": [{"num_bytes": n, "seconds": s, "failure": ""} for n, s in probes],
        }],
    }  # fmt: skip


def found(change: Callable[[dict[str, Any]], Any], prompt_tokens: tuple[int, ...] = (100,)) -> list[Finding]:
    changed = report()
    change(changed)
    return findings(Cluster(changed), prompt_tokens)


def test_a_healthy_cluster_has_no_findings() -> None:
    assert found(lambda r: None) == []


@pytest.mark.parametrize(
    ("change", "severity", "words"),
    [
        (lambda r: r["workers"][1].update(state="lost"), "error", "no decode worker is ready: no request can be"),
        (lambda r: r["workers"][1].update(state="lost"), "warning", "worker decode-0 is lost"),
        (lambda r: r["workers"][1].update(role="mixed"), "error", "nothing is disaggregated, mixed workers do all"),
        (lambda r: r.update(workers=[worker("mixed-0")], pairs=[]), "note", "only mixed workers"),
        (lambda r: r["workers"][1].update(checksum_failures=3.0), "warning", "3 parts came damaged to decode-0"),
        (lambda r: r["workers"][1].update(kv_tokens=8000), "warning", "holds 8,000 tokens of KV and the prefill pool"),
        (lambda r: r["pairs"][0].update(refusal="num_layers: 4 here, 5 there"), "error", "refuse each other: num_lay"),
        (lambda r: r["workers"][1].update(wire_version=3), "error", "speak wire versions 2 and 3"),
        (lambda r: r["pairs"][0]["probes"][1].update(seconds=None, failure="lost"), "error", "1,048,576 bytes failed"),
        (lambda r: r["pairs"][0]["probes"][1].update(seconds=None, failure=NO_TIME_LEFT), "warning", "raise --timeout"),
        (lambda r: r["pairs"][0].update(link="object_store"), "warning", "fell back to object_store"),
        (lambda r: r["pairs"][0].update(is_lossless=False, codec="int8"), "note", "loses precision: codec int8, lossy"),
        (lambda r: r["transfer"].update(codec="int8"), "warning", "codec int8 is allowed, and no link is slow enough"),
        (lambda r: r["transfer"].update(window_bytes=0), "warning", "is less than a part of 250,000 bytes"),
        (lambda r: r["workers"][1].update(max_model_len=2048), "warning", "decode-0 holds 2,048 tokens of a sequence"),
    ],
)  # fmt: skip
def test_each_fault_is_found(change: Callable[[dict[str, Any]], Any], severity: str, words: str) -> None:
    hits = [finding for finding in found(change) if words in finding.message]
    assert [finding.severity for finding in hits] == [severity], found(change)


def test_prompts_beyond_the_context_are_named_and_not_predicted() -> None:
    assert [f.message for f in found(lambda r: None, (100, 5000))] == [
        "a prompt of 5,000 tokens is not served: the context is 4,096"
    ]
    assert [p.prompt_tokens for p in Cluster(report()).predictions((100, 5000))] == [100]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r["pairs"][0].update(link="object_store") or r["transfer"].update(link="object_store"), []),
        (lambda r: r["pairs"][0].update(codec="int8") or r["transfer"].update(codec="int8"), []),
        (lambda r: r["pairs"][0].update(bytes_per_s=0.0) or r["transfer"].update(codec="int8"), []),
    ],
)
def test_what_was_asked_for_is_no_finding(change: Callable[[dict[str, Any]], Any], expected: list[Finding]) -> None:
    assert found(change) == expected


def test_errors_come_first() -> None:
    def change(r: dict[str, Any]) -> None:
        r["pairs"][0].update(refusal="x", is_lossless=False)
        r["workers"][1].update(kv_tokens=8000)

    assert [f.severity for f in found(change)] == [Severity.ERROR, Severity.WARNING, Severity.NOTE]


def test_predictions_follow_from_the_probes() -> None:
    cluster = Cluster(report())
    assert cluster.path(cluster.pairs[0]).bytes_per_s == pytest.approx(1e6)
    short, long = cluster.predictions((2, 100))
    assert (short.is_layerwise, long.is_layerwise) == (False, True)
    assert (short.prefill_s, long.prefill_s) == pytest.approx((0.009, 0.205))
    assert short.handoff_s == short.visible_s == pytest.approx(0.010 + 0.001 + 0.002)
    assert long.handoff_s == pytest.approx(0.010 + 4 * 0.001 + 0.100)
    assert long.visible_s == pytest.approx(0.010 + 0.001 + 0.025), "all but the last of four parts are hidden"
    assert (short.pays, long.pays) == (False, True)
    ((_, pays_from),) = cluster.pays_from()
    assert [p.pays for p in cluster.predictions((pays_from - 1, pays_from))] == [False, True]


def test_a_pair_that_was_not_measured_is_not_predicted() -> None:
    changed = report()
    changed["pairs"][0]["probes"] = [{"num_bytes": 32, "seconds": None, "failure": "lost"}]
    cluster = Cluster(changed)
    assert cluster.predictions((100,)) == []
    assert cluster.pays_from() == []
    changed["pairs"][0]["probes"] = [{"num_bytes": 32, "seconds": 0.016, "failure": ""}]
    assert Cluster(changed).predictions((100,))[0].handoff_s > 0


def test_conversions_are_told_in_words() -> None:
    changed = report()
    changed["workers"][1]["kv_layout"].update(dtype="fp8_e4m3", block_size=32)
    changed["workers"][1]["ranks"] = 2
    changed["pairs"][0]["is_lossless"] = False
    cluster = Cluster(changed)
    assert conversions(cluster, cluster.pairs[0]) == "bfloat16 → fp8_e4m3, block 16 → 32, ranks 1 → 2, lossy"
    plain = Cluster(report())
    assert conversions(plain, plain.pairs[0]) == ""


# ---- the command


def answering(answer: Response, bodies: list[Any] | None = None) -> Starlette:
    async def probe(request: Request) -> Response:
        if bodies is not None:
            bodies.append(await request.json())
        return answer

    return Starlette(routes=[Route("/links/probe", probe, methods=["POST"])])


def test_the_tables_show_pairs_and_predictions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    bodies: list[Any] = []
    with serve_app(answering(JSONResponse(report()), bodies)) as address:
        assert run(["doctor", "--http", address, "--timeout", "7", "--prompt-tokens", "100, 2"]) == 0
    assert bodies == [{"timeout_s": 7.0}]
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "prefill → decode link µs GB/s: 1 MiB converts"
    assert lines[1] == "prefill-0 → decode-0 nccl 10,000 0.00 nothing"
    assert "no findings" in lines
    assert lines[-3:-1] == [
        "2 9.00 13.00 13.00 at once no prefill-0 → decode-0",
        "100 205.00 114.00 36.00 by layers yes prefill-0 → decode-0",
    ]
    assert lines[-1].startswith("disaggregation pays from ")


def test_json_has_the_report_and_what_follows_from_it(capsys: pytest.CaptureFixture[str]) -> None:
    with serve_app(answering(JSONResponse(report()))) as address:
        assert run(["doctor", "--json", "--http", f"http://{address}/"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["report"] == report()
    assert [f["severity"] for f in answer["findings"]] == ["warning"]  # 8,192 of the default lengths
    assert [p["prompt_tokens"] for p in answer["predictions"]] == [128, 512, 2048]
    assert answer["pays_from"][0]["prompt_tokens"] > 1


def test_an_error_among_the_findings_is_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    broken = copy.deepcopy(report())
    broken["pairs"][0].update(refusal="num_layers: 4 here, 5 there", probes=[])
    with serve_app(answering(JSONResponse(broken))) as address:
        assert run(["doctor", "--http", address]) == 1
    captured = capsys.readouterr()
    assert "error: prefill-0 → decode-0 refuse each other" in " ".join(captured.out.split())
    assert captured.err == ""


@pytest.mark.parametrize(
    "arguments", ["--prompt-tokens=", "--prompt-tokens=12,x", "--prompt-tokens=0", "--prompt-tokens=-5", "--timeout=0"]
)
def test_a_wrong_option_is_one_line(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", arguments]) == 2
    error = capsys.readouterr().err
    assert arguments.partition("=")[0] in error
    assert error.count("\n") == 1


BUSY = {"error": {"message": "the links are being probed already; ask again later", "code": "overloaded"}}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (PlainTextResponse("hello"), "is not that of Phasewise"),
        (JSONResponse({"workers": [{}], "pairs": []}), "use the version of the cluster"),
        (JSONResponse({"workers": []}), "use the version of the cluster"),
        (PlainTextResponse("no", 404), "answers HTTP 404 to /links/probe; is --http the address"),
        (JSONResponse(BUSY, 429), "answers HTTP 429 to /links/probe: the links are being probed already"),
    ],
)
def test_other_answers_are_one_line(answer: Response, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serve_app(answering(answer)) as address:
        assert run(["doctor", "--http", address]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_no_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--http", "127.0.0.1:9"]) == 1
    assert "no Phasewise cluster at 127.0.0.1:9" in capsys.readouterr().err
