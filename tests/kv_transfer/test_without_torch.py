"""Both halves of a handoff decide and carry messages where torch cannot be imported."""

from __future__ import annotations

import subprocess
import sys

_IMPORT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "numpy", "ray", "grpc", "cupy", "triton"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import kv_transfer.sender, kv_transfer.receiver, kv_transfer.prober, kv_transfer.link
try:
    import torch
except ImportError:
    print("blocked")
"""


def test_the_halves_import_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "blocked"), done.stderr
