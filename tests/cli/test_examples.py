"""The examples run as they are, against a real gRPC server; the configuration builds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from phasewise.core.config import load_config
from tests.phasewise.scripted_service import ScriptedService, serve_in_thread

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def address() -> Iterator[str]:
    with serve_in_thread(ScriptedService()) as serving:
        yield serving.target


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("complete.py", "the same from the same seed: True"),
        ("stream_many.py", "Name three rivers."),
        ("timeline.py", "   250.00 ms  handoff_end    decode-0, 4,096 bytes"),
    ],
)
def test_an_example_runs(name: str, expected: str, address: str) -> None:
    command = [sys.executable, str(EXAMPLES / name), address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert done.stderr == ""


def test_the_example_configuration_is_valid() -> None:
    config = load_config(EXAMPLES / "cluster.yaml")
    assert (config.pools.num_workers, config.logging.format) == (2, "json")
