"""`phasewise doctor` against a real cluster: every pair measured, beside nothing and beside a stream."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import phasewise
from cli.main import run
from tests.support.served import Served, served, until

pytestmark = pytest.mark.cluster


def diagnose(cluster: Served, capsys: pytest.CaptureFixture[str], exit_code: int = 0) -> dict[str, Any]:
    assert run(["doctor", "--json", "--http", cluster.http, "--prompt-tokens", "8,32"]) == exit_code
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def check(answer: dict[str, Any], num_pairs: int) -> None:
    pairs = answer["report"]["pairs"]
    assert len({(pair["prefill"], pair["decode"]) for pair in pairs}) == len(pairs) == num_pairs
    for pair in pairs:
        assert pair["link"] == "object_store"
        assert [probe["num_bytes"] for probe in pair["probes"]] == [32, 1 << 20, 16 << 20, 64 << 20]
        assert all(0 < probe["seconds"] < 30 and not probe["failure"] for probe in pair["probes"])
        assert pair["bytes_per_s"] > 0, "the link has learnt its rate"
    predicted = {(p["prefill"], p["decode"], p["prompt_tokens"]) for p in answer["predictions"]}
    assert len(predicted) == 2 * num_pairs
    for p in answer["predictions"]:
        assert 0 < p["visible_s"] <= p["handoff_s"]
    assert len(answer["pays_from"]) == num_pairs


def test_every_pair_is_measured(cluster: Served, capsys: pytest.CaptureFixture[str]) -> None:
    before = {w["id"]: w["counters"] for w in cluster.status()["workers"]}
    answer = diagnose(cluster, capsys)
    check(answer, num_pairs=2)
    assert not [f for f in answer["findings"] if f["severity"] == "error"]
    for worker in cluster.status()["workers"]:
        for name in ("late_parts", "checksum_failures", "handoff_bytes_in", "handoff_bytes_out"):
            assert worker["counters"].get(name, 0) == before[worker["id"]].get(name, 0), "a probe is no handoff"
    assert cluster.get("/links")["pairs"][0]["bytes_per_s"] > 0


def test_streams_go_on_beside_it(cluster: Served, capsys: pytest.CaptureFixture[str]) -> None:
    lengths: list[int] = []

    def stream() -> None:
        with phasewise.Client(cluster.grpc, max_retries=0) as client:
            done = client.generate(token_ids=[5, 6, 7] * 30, max_tokens=60, temperature=0.0, ignore_eos=True)
            lengths.append(len(done.token_ids))

    threads = [threading.Thread(target=stream) for _ in range(4)]
    for thread in threads:
        thread.start()
    check(diagnose(cluster, capsys), num_pairs=2)
    for thread in threads:
        thread.join(60)
    assert lengths == [60] * 4


def test_a_pool_that_is_away_is_an_error(tiny_model: tuple[Path, Any], tmp_path: Path, capsys: Any) -> None:
    with served(str(tiny_model[0])) as cluster:
        # A worker that is stopped stays away for as long as it takes to be called lost.
        os.kill(cluster.worker("prefill-0")["pid"], signal.SIGSTOP)
        until(lambda: cluster.worker("prefill-0")["state"] == "suspect", 20.0)
        answer = diagnose(cluster, capsys, exit_code=1)
        assert answer["report"]["pairs"] == answer["predictions"] == []
        assert answer["findings"][0]["message"].startswith("no prefill worker is ready")
