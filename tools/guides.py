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

A passed guide is accepted where the text says why, in a sentence with the words "more than", the guide and what is
counted (`methods`, `attributes`, `lines`, `modules`). It stands in the class or the function that it is about, or for a
whole file in the module's docstring:

    More than 15 of our modules are imported, for this file alone knows all parts of a worker.
    There are more than 20 methods: one for each callback of the protocol.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.code_lines import PACKAGES, FunctionNode, package_files

MAX_METHODS, MAX_ATTRIBUTES, MAX_FILE, MAX_FUNCTION, MAX_IMPORTS = 20, 15, 400, 60, 15

_VALUE_BASES = frozenset(
    ("Protocol", "TypedDict", "NamedTuple", "BaseModel", "Enum", "StrEnum", "IntEnum", "Exception", "BaseException")
)


@dataclass(frozen=True, slots=True)
class Passed:
    """A guide that is passed: by `what` of `owner`, a class or a function, or the file itself where that is empty."""

    path: str
    owner: str
    what: str
    count: int
    limit: int
    has_reason: bool

    def __str__(self) -> str:
        return f"{self.path}{self.owner and ' ' + self.owner}: {self.count} {self.what} (at most {self.limit})"


def passed_guides(tree: Path) -> list[Passed]:
    """Everything in our packages that passes a guide, in the order of the files."""
    parsed = {file: ast.parse(file.read_text(encoding="utf-8")) for file in package_files(tree)}
    value_classes = _value_classes(parsed.values())
    found: list[Passed] = []
    for file, module in parsed.items():
        text = file.read_text(encoding="utf-8")
        path = file.relative_to(tree).as_posix()
        found += _of_file(path, text, module, value_classes)
    return found


def _of_file(path: str, text: str, module: ast.Module, value_classes: set[str]) -> Iterator[Passed]:
    lines = text.splitlines()
    whole = ast.get_docstring(module) or ""
    counts = [
        ("", whole, "lines", len(lines), MAX_FILE),
        ("", whole, "modules", len(_own_imports(module)), MAX_IMPORTS),
    ]
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef) and not _holds_values(node, value_classes):
            own = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            counts.append((node.name, own, "methods", len(_methods(node)), MAX_METHODS))
            counts.append((node.name, own, "attributes", len(_attributes(node)), MAX_ATTRIBUTES))
        elif isinstance(node, FunctionNode) and not _is_kernel(node):
            own = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            counts.append((node.name, own, "lines", _length(node), MAX_FUNCTION))
    for owner, said, what, count, limit in counts:
        if count > limit:
            yield Passed(path, owner, what, count, limit, _says_why(said, what, limit))


def _says_why(text: str, what: str, limit: int) -> bool:
    """Whether a docstring or comment of the text has a sentence about this guide, on one line or on several."""
    words = " ".join(text.replace("#", " ").split())
    return re.search(rf"\bmore than {limit}\b[^.]*\b{what}\b", words, re.IGNORECASE) is not None


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
