"""Which lines of a Python file are code: no docstring, no comment, not blank. For the counting scripts beside it."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

PACKAGES = (
    "phasewise",
    "engine",
    "kv_transfer",
    "prefill_workers",
    "decode_workers",
    "workers",
    "control_plane",
    "cli",
)
"""Our packages, from the lowest floor up."""

_NO_CODE = frozenset(
    (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
)


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold code. A statement or string of several lines counts with each of them."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, _end(node) + 1))
    return lines


def functions(tree: ast.AST) -> Iterator[FunctionNode]:
    """All functions and methods, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, FunctionNode))


def span(node: FunctionNode) -> range:
    """The lines of a function, its decorators included: their first is a code object's `co_firstlineno`."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return range(first, _end(node) + 1)


def package_files(tree: Path) -> Iterator[Path]:
    """The Python files of our packages, without generated ones."""
    for package in PACKAGES:
        yield from sorted(file for file in (tree / package).rglob("*.py") if "_pb2" not in file.name)


def _end(node: ast.stmt) -> int:
    assert node.end_lineno is not None, "parsed from text"
    return node.end_lineno
