"""The soak finds nothing wrong in a few seconds, and would say so if it did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL = "--model tiny --minutes 0.1 --rate 60 --max-prompt 200 --max-output 200 --kv-cache-gib 6e-5 --interval-s 0.5"


def soak(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.soak", *SMALL.split(), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_nothing_is_lost(tmp_path: Path) -> None:
    done = soak("--output", str(tmp_path / "soak.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "soak.json").read_text())
    assert result["faults"] == []
    assert result["counts"]["requests"] > 100
    assert result["counts"]["aborts"] > 0
    assert result["counters"]["preemptions"] > 0


def test_growth_beyond_the_bound_is_a_failure() -> None:
    done = soak("--max-growth-mib", "-1000")
    assert done.returncode == 1
    assert "resident_mib grew" in done.stdout
