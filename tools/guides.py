"""Lists what passes the guides of size, and whether the file says why.

    python -m tools.guides            what passes a guide without a reason; exit status 1 when there is such
    python -m tools.guides --all      what passes one with a reason, too
    python -m tools.guides --tree ../before

The guides are for our packages (not for tests, benchmarks and tools):

    class       at most 20 methods and 15 attributes. For classes that do work: dataclasses, protocols, typed
                dictionaries, enumerations, pydantic models and exceptions hold values. Properties are methods.
                Attributes are names that a class body or a method's `self` is given.
    file        at most 400 lines
    function    at most 60 lines, docstring included, decorators not. Kernels (decorated by triton) are exempt; of a
                command (a function with typer's options as parameters) the body is counted: its head is a table.
    imports     at most 15 modules of our own in one file

A passed guide is accepted where a line of the file holds the word "Guide:" and names what it is about: the class, the
function, or `lines` or `imports` of the file. For example:

    Guide: more than 15 own imports, because this file wires a whole worker.
    # Guide: KVReceiver has 23 methods: one for each message of a handoff.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tools.code_lines import PACKAGES, FunctionNode, functions, package_files

MAX_METHODS, MAX_ATTRIBUTES, MAX_FILE, MAX_FUNCTION, MAX_IMPORTS = 20, 15, 400, 60, 15

_VALUE_BASES = frozenset(
    ("Protocol", "TypedDict", "NamedTuple", "BaseModel", "Enum", "StrEnum", "IntEnum", "Exception", "BaseException")
)


@dataclass(frozen=True, slots=True)
class Passed:
    """A guide that is passed. `subject` is the word that a reason must name."""

    path: str
    subject: str
    what: str
    count: int
    limit: int
    has_reason: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.what}: {self.count} (at most {self.limit})"


def passed_guides(tree: Path) -> list[Passed]:
    """Everything in our packages that passes a guide, in the order of the files."""
    found = []
    parsed = {file: ast.parse(file.read_text(encoding="utf-8")) for file in package_files(tree)}
    value_classes = _value_classes(parsed.values())
    for file, module in parsed.items():
        text = file.read_text(encoding="utf-8")
        reasons = [line for line in text.splitlines() if "Guide:" in line]
        for passed in _of_file(file.relative_to(tree).as_posix(), text, module, value_classes):
            has_reason = any(re.search(rf"\b{passed.subject}\b", line) for line in reasons)
            found.append(replace(passed, has_reason=has_reason))
    return found


def _of_file(path: str, text: str, module: ast.Module, value_classes: set[str]) -> Iterator[Passed]:
    counts = [
        ("lines", "lines of the file", len(text.splitlines()), MAX_FILE),
        ("imports", "imports of our modules", len(_own_imports(module)), MAX_IMPORTS),
    ]
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef) and not _holds_values(node, value_classes):
            counts.append((node.name, f"methods of {node.name}", len(_methods(node)), MAX_METHODS))
            counts.append((node.name, f"attributes of {node.name}", len(_attributes(node)), MAX_ATTRIBUTES))
    for function in functions(module):
        if not _is_kernel(function):
            counts.append((function.name, f"lines of {function.name}()", _length(function), MAX_FUNCTION))
    for subject, what, count, limit in counts:
        if count > limit:
            yield Passed(path, subject, what, count, limit)


def _own_imports(module: ast.Module) -> set[str]:
    """Modules of ours that a file imports, inside functions and for types too."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name for name in names if name.split(".")[0] in PACKAGES}


def _value_classes(modules: Iterable[ast.Module]) -> set[str]:
    """Names of our classes that derive from one that holds values, over any number of steps."""
    bases: dict[str, set[str]] = {}
    for module in modules:
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                bases.setdefault(node.name, set()).update(_name(base) for base in node.bases)
    known = set(_VALUE_BASES)
    while new := {name for name, of in bases.items() if name not in known and of & known}:
        known |= new
    return known


def _holds_values(node: ast.ClassDef, value_classes: set[str]) -> bool:
    is_dataclass = any(_name(decorator) == "dataclass" for decorator in node.decorator_list)
    return is_dataclass or node.name in value_classes


def _methods(node: ast.ClassDef) -> set[str]:
    return {item.name for item in node.body if isinstance(item, FunctionNode)}


def _attributes(node: ast.ClassDef) -> set[str]:
    """Names that the class body and its methods' `self` are given."""
    names: set[str] = set()
    for item in node.body:
        for inner in ast.walk(item):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store) and not isinstance(item, FunctionNode):
                names.add(inner.id)
            elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and _name(inner.value) == "self":
                names.add(inner.attr)
    return names


def _is_kernel(function: FunctionNode) -> bool:
    return any("triton" in ast.unparse(decorator) for decorator in function.decorator_list)


def _length(function: FunctionNode) -> int:
    """Lines of a function; of a command's its body's."""
    assert function.end_lineno is not None
    arguments = function.args.args + function.args.kwonlyargs
    is_command = any("typer." in ast.unparse(a.annotation) for a in arguments if a.annotation is not None)
    first = function.body[0].lineno if is_command else function.lineno
    return function.end_lineno - first + 1


def _name(node: ast.expr) -> str:
    """The last word of a base or a decorator: `x.Protocol[T]` is a Protocol."""
    if isinstance(node, ast.Call):
        return _name(node.func)
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1], help="the checkout")
    parser.add_argument("--all", action="store_true", help="also what passes a guide and says why")
    arguments = parser.parse_args()
    found = passed_guides(arguments.tree.resolve())
    silent = [passed for passed in found if not passed.has_reason]
    for passed in found if arguments.all else silent:
        print(f"{passed}{', with a reason' if passed.has_reason else ''}")
    print(f"{len(found)} guides are passed, {len(silent)} of them without a reason")
    sys.exit(bool(silent))


if __name__ == "__main__":
    main()
