"""Pictures of a load test: curves over the load for a sweep, distributions for a single run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from cli.bench.summary import RequestRow
from cli.errors import CommandError

LATENCIES = (("ttft_s", "TTFT"), ("tbt_s", "TBT"), ("e2e_s", "E2E"))
AXIS = {"closed": "concurrency", "open": "rate in requests/s", "replay": "time scale"}


def plot_sweep(points: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """TTFT, TBT, E2E (p50, p90, p99) and throughput over concurrency or rate."""
    figure, axes = _canvas(title)
    ordered = sorted(points, key=lambda point: float(point["value"]))
    label = AXIS[ordered[0]["mode"]]
    for axis, (name, text) in zip(axes, LATENCIES, strict=False):
        for percent in ("p50", "p90", "p99"):
            seen = [(point["value"], point[name][percent] * 1e3) for point in ordered if point[name]["count"]]
            axis.plot([x for x, _ in seen], [y for _, y in seen], marker="o", label=percent)
        _finish_axis(axis, label, f"{text} in ms")
    values = [point["value"] for point in ordered]
    axes[3].plot(values, [point["requests_per_s"] for point in ordered], marker="o", label="completed")
    if all(point["slo"] for point in ordered):
        axes[3].plot(values, [point["goodput_requests_per_s"] for point in ordered], marker="o", label="within SLO")
    _finish_axis(axes[3], label, "requests/s")
    return figure


def plot_run(rows: Sequence[RequestRow], title: str) -> Figure:
    """Cumulative distributions of TTFT, TBT, E2E, and output tokens over time, of one run's successful requests."""
    figure, axes = _canvas(title)
    good = [row for row in rows if not row.error]
    values: dict[str, list[float]] = {
        "TTFT": [row.ttft_s for row in good if row.ttft_s is not None],
        "TBT": [gap for row in good for gap in row.gaps_s],
        "E2E": [row.e2e_s for row in good if row.e2e_s is not None],
    }
    for axis, (name, seconds) in zip(axes, values.items(), strict=False):
        ordered = sorted(seconds)
        shares = [(rank + 1) / len(ordered) for rank in range(len(ordered))]
        axis.step([value * 1e3 for value in ordered], shares, where="post", label=f"{len(ordered)} values")
        _finish_axis(axis, f"{name} in ms", "share at or below")
    arrivals = sorted((at_s, count) for row in good for at_s, count in row.token_times_s)
    total, totals = 0, []
    for _, count in arrivals:
        total += count
        totals.append(total)
    axes[3].plot([at_s for at_s, _ in arrivals], totals, label="output tokens")
    _finish_axis(axes[3], "seconds since the beginning", "tokens so far")
    return figure


def save_plot(figure: Figure, path: str) -> None:
    """Raises CommandError when the file cannot be written or its ending names no picture format."""
    try:
        figure.savefig(path)
    except OSError as error:
        raise CommandError(f"cannot write --plot {path}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"cannot write --plot {path}: {str(error).splitlines()[0]}") from None


def _canvas(title: str) -> tuple[Figure, list[Any]]:
    matplotlib.use("Agg")  # no window system on servers
    figure = Figure(figsize=(11, 8), dpi=110, layout="constrained")
    figure.suptitle(title)
    return figure, list(figure.subplots(2, 2).flat)


def _finish_axis(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
