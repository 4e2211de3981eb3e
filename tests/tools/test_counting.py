"""The counting scripts against small trees whose counts are known, and against this one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.code_lines import code_lines
from tools.guides import passed_guides
from tools.private_reaches import reaches
from tools.request_lines import FileCount, Recorder, count_files

ROOT = Path(__file__).resolve().parents[2]

CODE = '''"""A docstring

of three lines.
"""

import functools  # 6


def outer(values):  # 9
    """Says what it does."""
    # A comment.

    def inner(value):  # 13
        return value  # 14

    text = """two
    lines"""  # 16 and 17
    return [inner(v) for v in values]  # 18


@functools.cache  # 21
def untouched():  # 22
    return 1  # 23


class Pair:
    @property
    def first(self):
        return (lambda: 1)()
'''


def write(tree: Path, name: str, text: str) -> None:
    file = tree / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_docstrings_comments_and_blank_lines_are_no_code() -> None:
    assert code_lines(CODE) == {6, 9, 13, 14, 16, 17, 18, 21, 22, 23, 26, 27, 28, 29}


def test_a_function_that_is_entered_counts_as_a_whole_and_once(tmp_path: Path) -> None:
    write(tmp_path, "workers/sample.py", CODE)
    write(tmp_path, "elsewhere/sample.py", CODE)
    scopes: list[dict[str, object]] = []
    for folder in ("workers", "elsewhere"):
        file = tmp_path / folder / "sample.py"
        scopes.append({})
        exec(compile(file.read_text(), str(file), "exec"), scopes[-1])
    recorder = Recorder(tmp_path)
    sys.setprofile(recorder)
    try:
        scopes[0]["untouched"]()  # type: ignore[operator]
        with recorder.on():
            for scope in scopes:
                assert scope["outer"]([1, 2]) == [1, 2]  # type: ignore[operator]
                assert scope["Pair"]().first == 1  # type: ignore[operator]
    finally:
        sys.setprofile(None)
    # `outer` and `inner` (6 lines together), `first` with its decorator (3); the lambda is part of `first`.
    assert count_files(tmp_path, recorder.entered) == [
        FileCount("workers/sample.py", {"outer:9": 6, "inner:13": 2, "first:27": 3}, 9, True)
    ]


def test_the_way_from_placement_to_tokens_leaves_out_protocols_text_and_engine(tmp_path: Path) -> None:
    names = {
        "control_plane/gateway/http_front/server.py": False,
        "control_plane/gateway/text/tokenizer.py": False,
        "control_plane/gateway/attempts.py": True,
        "engine/sampler.py": False,
        "kv_transfer/sender.py": True,
    }
    for name in names:
        write(tmp_path, name, "def f():\n    return 1\n")
    entered = {(str(tmp_path / name), 1) for name in names}
    assert {c.path: c.is_on_way for c in count_files(tmp_path, entered)} == names


@pytest.mark.slow
def test_a_request_of_this_tree_is_counted(tmp_path: Path) -> None:
    table = tmp_path / "lines.json"
    command = [sys.executable, "-m", "tools.request_lines", "--json", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    files = {file["path"]: file for file in json.loads(table.read_text())["files"]}
    for path in ("control_plane/cluster_scheduler.py", "prefill_workers/phase.py", "decode_workers/phase.py"):
        assert files[path]["is_on_way"] and files[path]["num_lines"] > 20
    assert not files["engine/model_runner.py"]["is_on_way"]
    assert sum(file["num_lines"] for file in files.values()) > 2000


def test_what_passes_a_guide_is_found_unless_the_file_says_why(tmp_path: Path) -> None:
    methods = "".join(f"    def m{i}(self): self.a{i} = {i}\n" for i in range(21))
    long_body = "".join(f"    x = {i}\n" for i in range(60))
    imports = "".join(f"import engine.m{i}\n" for i in range(16))
    write(tmp_path, "workers/large.py", f"class Large:\n{methods}\ndef long():\n{long_body}\n{imports}" + "\n" * 400)
    write(tmp_path, "workers/small.py", "class Small:\n    def m(self): ...\n\ndef short():\n    return 1\n")
    found = passed_guides(tmp_path)
    assert {(p.owner, p.what, p.count) for p in found} == {
        ("Large", "methods", 21),
        ("Large", "attributes", 21),
        ("", "lines", 501),
        ("", "modules", 16),
        ("long", "lines", 61),
    }
    assert not any(p.has_reason for p in found)

    text = (tmp_path / "workers/large.py").read_text()
    text = text.replace(
        "class Large:\n", "class Large:\n    # There are more\n    # than 20 methods, because it is large.\n"
    )
    write(tmp_path, "workers/large.py", '"""More than 15 of our modules are imported: all."""\n' + text)
    assert {(p.owner, p.what) for p in passed_guides(tmp_path) if not p.has_reason} == {
        ("Large", "attributes"),
        ("", "lines"),
        ("long", "lines"),
    }


def test_values_kernels_and_heads_of_commands_pass_no_guide(tmp_path: Path) -> None:
    fields = "".join(f"    f{i}: int\n" for i in range(16))
    body = "".join(f"    x = {i}\n" for i in range(60))
    head = "".join(f"    o{i}: Annotated[int, typer.Option()] = {i},\n" for i in range(60))
    text = (
        f"@dataclass(frozen=True)\nclass A:\n{fields}\nclass B(Section):\n{fields}\nclass Section(BaseModel):\n{fields}"
        f"\nclass C(Protocol):\n{fields}\n@triton.jit\ndef kernel():\n{body}\ndef command(\n{head}):\n    return 1\n"
    )
    write(tmp_path, "cli/table.py", text)
    assert passed_guides(tmp_path) == []
    write(tmp_path, "cli/table.py", text.replace("(BaseModel)", "").replace("    return 1\n", body + "    return 1\n"))
    assert {p.owner for p in passed_guides(tmp_path)} == {"B", "Section", "command"}


def test_reaches_into_privates_are_found_by_line(tmp_path: Path) -> None:
    lines = {
        "from workers.round import _private": ("_private",),
        "from os.path import _unicode": None,
        "self._own = super()._own = cls._own": None,
        "x._a._b = y.__dict__": ("_a", "_b"),
        "monkeypatch.setattr(x, '_c', 1)": ("_c",),
        "monkeypatch.setattr('workers.round._d', 1)": ("_d",),
        "setattr(x, 'public', x.public)": None,
        "row._asdict()": None,
    }
    write(tmp_path, "tests/test_x.py", "\n".join(lines) + "\n")
    found = {reach.line: reach.names for reach in reaches(tmp_path)}
    assert found == {i: names for i, names in enumerate(lines.values(), 1) if names}
