"""A worker of two ranks in a real cluster: its tokens, a rank that dies, and what an orderly end leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import phasewise
from tests.support.served import served, until
from tests.support.tiny_model import greedy

pytestmark = pytest.mark.cluster


CONFIG = """
pools:
  prefill: {workers: 0}
  decode: {workers: 0}
  mixed: {workers: 2, threads: 1, tensor_parallel: 2}
model: {device: cpu}
cache: {kv_cache_gib: 0.05}
"""


def children(pid: int) -> list[int]:
    rows = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(row.split()[0]) for row in rows.splitlines() if "workers.rank_process" in row]


def test_tokens_a_lost_rank_and_an_orderly_end(tiny_model: tuple[Path, Any], tmp_path: Path) -> None:
    folder, oracle = tiny_model
    (tmp_path / "cluster.yaml").write_text(CONFIG)
    prompt = [7, 8, 9, 10] * 20
    expected = greedy(oracle, prompt, 24)
    with (
        served(str(folder), "--config", str(tmp_path / "cluster.yaml")) as cluster,
        phasewise.Client(cluster.grpc, max_retries=0) as client,
    ):
        pids = [cluster.worker(f"mixed-{i}")["pid"] for i in range(2)]
        ranks = [children(pid) for pid in pids]
        assert [len(found) for found in ranks] == [1, 1]
        for _ in range(2):
            result = client.generate(token_ids=prompt, max_tokens=24, temperature=0.0, ignore_eos=True)
            assert list(result.token_ids) == expected
        os.kill(ranks[0][0], signal.SIGKILL)
        killed_s = time.monotonic()
        until(lambda: cluster.members().get("mixed-0", {}).get("id") != "mixed-0#1", 5.0)
        assert time.monotonic() - killed_s < 3.0, "not by a heartbeat that fails to come"
        assert any("CRITICAL mixed-0#1: rank 1 of mixed-0#1 ended (exit code -9)" in line for line in cluster.lines)
        result = client.generate(token_ids=prompt, max_tokens=24, temperature=0.0, ignore_eos=True)
        assert list(result.token_ids) == expected, "the other worker serves on"
    assert not any("of mixed-1#1 ended" in line for line in cluster.lines)
    all_pids = (*pids, *ranks[0], *ranks[1])
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in all_pids), 5.0)  # reaped, too
