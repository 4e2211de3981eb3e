"""Runs one measurement in turns on two checkouts, each turn in a process of its own: for comparisons on a CPU.

What a machine does meanwhile then meets both alike, and a turn inherits nothing from the one before.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

OWN_TREE = Path(__file__).resolve().parents[1]


def environment_of(tree: Path) -> dict[str, str]:
    """For a process that runs the code of `tree`: its packages come first, and what only this checkout has is found."""
    return {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{OWN_TREE}", "OMP_NUM_THREADS": "1"}


def check_tree(tree: Path, module: Any) -> None:
    """In a turn's process: exits when `module` was not imported from `tree`."""
    if not Path(module.__file__).is_relative_to(tree):
        sys.exit(f"{module.__name__} comes from {module.__file__}, not from {tree}")


def run_turn(module: str, tree: Path, *arguments: str) -> dict[str, float]:
    """One turn: `python -m MODULE --turn TREE` prints its measurements, case → value, as its last line."""
    command = [sys.executable, "-m", module, "--turn", str(tree), *arguments]
    done = subprocess.run(command, cwd=tree, env=environment_of(tree), stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def alternate(
    trees: dict[str, Path], num_turns: int, measure: Callable[[Path], dict[str, float]]
) -> dict[str, dict[str, list[float]]]:
    """Values by case and tree. The tree that goes first changes with each turn."""
    values: dict[str, dict[str, list[float]]] = {}
    for turn in range(num_turns):
        names = list(trees) if turn % 2 == 0 else list(trees)[::-1]
        for name in names:
            for case, value in measure(trees[name]).items():
                values.setdefault(case, {}).setdefault(name, []).append(value)
        print(f"turn {turn + 1} of {num_turns} is over", file=sys.stderr, flush=True)
    return values


def rows_of(values: dict[str, dict[str, list[float]]], unit: str, tolerance: float) -> list[dict[str, Any]]:
    """Rows of a result: medians of the trees `now` and `before`; must: no more than before, with a tolerance.

    `spread` is half of what lies between the quartiles, as a share of the median: of the tree with the wider one. A
    must is widened to it.
    """
    rows = []
    for case, by_tree in values.items():
        now = statistics.median(by_tree["now"])
        row: dict[str, Any] = {"case": case, "unit": unit, "ours": now, "floor": None, "peer": None, "better": "low"}
        row["spread"] = spread = max(_spread(found) for found in by_tree.values())
        before = statistics.median(by_tree["before"]) if "before" in by_tree else None
        row["must"] = None if before is None else before * (1 + max(tolerance, spread))
        row["goal"] = row["before"] = before
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        before = row["before"]
        change = "" if before is None else f"  before {before:9.2f}  {100 * (row['ours'] / before - 1):+6.1f} %"
        print(f"{row['case']:52} {row['ours']:9.2f} {row['unit']}{change}  (spread {100 * row['spread']:.1f} %)")


def _spread(found: Sequence[float]) -> float:
    if len(found) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(found, n=4)
    return (high - low) / 2 / middle
