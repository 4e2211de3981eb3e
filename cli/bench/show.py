"""A load test's result for people (tables) and for programs (JSON)."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cli.errors import CommandError

LATE_S = 0.01
"""From this 99th percentile of lateness on, the load generator and not the server set the pace; the report says so."""


def versions() -> dict[str, str]:
    """Versions of what took part in the measurement on this side."""
    found = {"python": platform.python_version()}
    for package in ("phasewise", "httpx"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            found[package] = "not installed"
    return found


def command_line(arguments: Sequence[str]) -> str:
    """The command as typed, without what --header values hold: those may be keys."""
    shown, hide_next = [], False
    for argument in arguments:
        if hide_next or argument.startswith("--header="):
            argument = argument.partition(":")[0] + ": ***"
        hide_next = argument == "--header"
        shown.append(f"'{argument}'" if " " in argument else argument)
    return " ".join(["phasewise", *shown])


def result_document(
    *, target: Mapping[str, Any], workload: Mapping[str, Any], points: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Everything needed to read the numbers later: versions, command, date, target, workload, one entry per point."""
    return {
        "benchmark": "serving",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv[1:]),
        "versions": versions(),
        "client": {"platform": platform.platform(), "machine": platform.machine()},
        "target": dict(target),
        "workload": dict(workload),
        "points": [dict(point) for point in points],
    }


def write_json(document: Mapping[str, Any], path: str) -> None:
    """Raises CommandError when the file cannot be written."""
    try:
        Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write --output {path}: {error.strerror}") from None


def print_report(document: Mapping[str, Any], console: Console) -> None:
    """Rates and latencies of every point, and what must be known to trust the numbers."""
    points = document["points"]
    console.print(_rates(points), _latencies(points), sep="")
    for point in points:
        for note in notes(point, document["target"]["tbt_basis"]):
            console.print(f"{point['label']}: {note}", style="yellow", highlight=False, markup=False)


def notes(point: Mapping[str, Any], tbt_basis: str) -> list[str]:
    """What a reader of the table would otherwise miss."""
    found = [
        f"{count} failed: {reason}" + (f" ({point['error_details'][reason]})" if point["error_details"][reason] else "")
        for reason, count in point["errors"].items()
    ]
    if point["wrong_length"]:
        found.append(
            f"{point['wrong_length']} answers have another length than asked for: does the server know ignore_eos?"
        )
    if tbt_basis == "events" and point["tokens_per_event"] > 1.001:
        found.append(
            f"{point['tokens_per_event']:.2f} tokens per event, and the server does not say which: "
            "TBT is between events, each counted as one token"
        )
    late = point["lateness_s"]
    if late.get("p99", 0.0) > LATE_S:
        found.append(
            f"requests left late (p99 {late['p99'] * 1e3:.0f} ms, max {late['max'] * 1e3:.0f} ms): "
            "this load generator is too slow for the load; latencies count from the real sending"
        )
    return found


def _rates(points: Sequence[Mapping[str, Any]]) -> Table:
    table = _plain_table("run", "ok", "failed", "req/s", "in tok/s", "out tok/s", "goodput req/s")
    for point in points:
        goodput = "-"
        if point["slo"]:
            goodput = f"{point['goodput_requests_per_s']:.2f} ({point['slo_attainment']:.0%})"
        table.add_row(
            point["label"],
            str(point["completed"]),
            str(point["failed"]),
            f"{point['requests_per_s']:.2f}",
            f"{point['prompt_tokens_per_s']:.0f}",
            f"{point['output_tokens_per_s']:.0f}",
            goodput,
        )
    return table


def _latencies(points: Sequence[Mapping[str, Any]]) -> Table:
    table = _plain_table("run", "ms", "p50", "p90", "p99", "mean", "max", "values")
    for point in points:
        for name, label in (("ttft_s", "TTFT"), ("tbt_s", "TBT"), ("tpot_s", "TPOT"), ("e2e_s", "E2E")):
            values = point[name]
            cells = ["-"] * 5
            if values["count"]:
                cells = [_milliseconds(values[part]) for part in ("p50", "p90", "p99", "mean", "max")]
            table.add_row(point["label"] if label == "TTFT" else "", label, *cells, str(values["count"]))
    return table


def _plain_table(first: str, *others: str) -> Table:
    """Without lines between columns, so that it fits into 80 characters."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
