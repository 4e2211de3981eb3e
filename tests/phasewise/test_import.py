"""What `import phasewise` brings along, and what it must not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "ray", "starlette", "uvicorn", "transformers", "tokenizers", "numpy", "yaml", "typer", "jinja2"}
OURS = {"core", "engine", "workers", "control_plane", "prefill_workers", "decode_workers", "kv_transfer", "cli"}
ALLOWED = {"phasewise", "grpc", "google", "pydantic", "typing_extensions", "cython_runtime"}
# grpcio imports these by itself where they are installed.
ALLOWED |= {"grpc_tools", "grpc_health", "grpc_reflection"}


def run(code: str, cwd: Path) -> list[str]:
    """Runs `code` in a new interpreter and returns the names in sys.modules that it prints as JSON."""
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{cwd}{os.pathsep}{repository}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.fixture
def folder_of_a_user(tmp_path: Path) -> Path:
    for name in OURS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('the user\\'s own {name}')")
    return tmp_path


def test_the_sdk_is_light_and_collides_with_nothing(folder_of_a_user: Path) -> None:
    code = (
        "import json, sys; before = set(sys.modules); import phasewise;"
        "phasewise.Client('127.0.0.1:1').close(); phasewise.AsyncClient;"
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    loaded = set(run(code, folder_of_a_user))
    assert not loaded & (HEAVY | OURS)
    third_party = {name for name in loaded if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert third_party <= ALLOWED


def test_the_nouns_need_no_grpc(tmp_path: Path) -> None:
    code = (
        "import json, sys; import phasewise.core.messages, phasewise.core.errors; import phasewise;"
        "phasewise.InvalidRequest, phasewise.Completion;"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    assert not set(run(code, tmp_path)) & {"grpc", "google", *HEAVY}


def test_a_client_made_but_not_used_before_a_fork_works_in_the_child(tmp_path: Path) -> None:
    code = """
import json, os, sys, phasewise
unused, used = phasewise.Client("127.0.0.1:1", max_retries=0), phasewise.Client("127.0.0.1:1", max_retries=0)
pid = os.fork()
if pid == 0:
    try:
        unused.model()
    except phasewise.Unavailable:
        os._exit(7)
    os._exit(1)
first = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
try:
    used.model()
except phasewise.Unavailable:
    pass
pid = os.fork()
if pid == 0:
    try:
        used.model()
    except RuntimeError as error:
        os._exit(8 if "fork" in str(error) else 2)
    os._exit(1)
second = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps([str(first), str(second)]))
"""
    assert run(code, tmp_path) == ["7", "8"]
