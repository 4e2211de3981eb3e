"""Both halves of a handoff decide and carry messages where torch cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SCRIPT = """
import runpy, sys

class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "numpy", "ray", "grpc", "cupy", "triton"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import kv_transfer.prober
runpy.run_module("tests.support.virtual_handoff", run_name="__main__")
"""


def test_a_handoff_needs_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, "[0, 1] False"), done.stderr
