"""Counts the places where tests reach into what is private: names that begin with one underscore.

    python -m tools.private_reaches                     by file, and in all
    python -m tools.private_reaches --places            each place, too
    python -m tools.private_reaches --tree ../before

Counted in tests/:

    x._name             read, set or deleted, where x is not `self`, `cls` or `super()`
    "…_name"            given to `setattr`, `getattr`, `delattr` and `hasattr`, monkeypatch's included
    from ours import _name

A line is one place, whatever it reaches. Names with two underscores are not counted, nor those that are public in
spite of the underscore (`_asdict` of a named tuple, `os._exit`).
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from tools.code_lines import PACKAGES

_PUBLIC = frozenset(("_asdict", "_replace", "_fields", "_make", "_exit"))
_BY_NAME = frozenset(("setattr", "getattr", "delattr", "hasattr"))


@dataclass(frozen=True, slots=True)
class Reach:
    """A line of a test that reaches private names. `path` is relative to the tree."""

    path: str
    line: int
    names: tuple[str, ...]


def reaches(tree: Path) -> list[Reach]:
    """All of them in tests/, by file and line."""
    found = []
    for file in sorted((tree / "tests").rglob("*.py")):
        by_line: defaultdict[int, set[str]] = defaultdict(set)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.expr | ast.stmt):
                by_line[node.lineno].update(_reached(node))
        path = file.relative_to(tree).as_posix()
        found += [Reach(path, line, tuple(sorted(names))) for line, names in sorted(by_line.items()) if names]
    return found


def _reached(node: ast.expr | ast.stmt) -> list[str]:
    """The private names that a node reaches."""
    names: list[str] = []
    if isinstance(node, ast.Attribute) and not _is_own(node.value):
        names = [node.attr]
    elif isinstance(node, ast.Call) and _function_name(node.func) in _BY_NAME:
        words = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        names = [word.rsplit(".", 1)[-1] for word in words]
    elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
        names = [alias.name for alias in node.names]
    return [name for name in names if name.startswith("_") and not name.startswith("__") and name not in _PUBLIC]


def _is_own(value: ast.expr) -> bool:
    """Whether what is before the dot is the object, or the class, that the code belongs to."""
    if isinstance(value, ast.Call):
        return _function_name(value.func) == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def _function_name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1], help="the checkout")
    parser.add_argument("--places", action="store_true", help="show each place")
    arguments = parser.parse_args()
    found = reaches(arguments.tree.resolve())
    for path, count in Counter(reach.path for reach in found).most_common():
        print(f"{count:5}  {path}")
        if arguments.places:
            for reach in (r for r in found if r.path == path):
                print(f"         {reach.line}: {', '.join(reach.names)}")
    print(f"{len(found):5}  in all")


if __name__ == "__main__":
    main()
