"""`phasewise doctor`: measures the links of a running cluster, checks that its pools fit, predicts its handoffs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.diagnosis import Cluster, Finding, Prediction, Severity, conversions, findings
from cli.errors import FAILURE_EXIT_CODE, CommandError, UsageProblem
from cli.gateway_http import fetch
from phasewise.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

_SEVERITY_STYLES = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: ""}
_ANSWER_S = 30.0  # beside the probes themselves
_MEBIBYTE = 1 << 20


def doctor_command(
    http: Annotated[str, typer.Option(help="HOST:PORT of the gateway's HTTP server.")] = "127.0.0.1:8000",
    prompt_tokens: Annotated[
        str, typer.Option(help="Prompt lengths to predict handoffs for, such as 512,2048.")
    ] = "128,512,2048,8192",
    timeout: Annotated[float, typer.Option(min=1.0, max=600.0, help="Seconds for all probes together.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure every pair of prefill and decode workers, check the pools, predict handoffs.

    The probes go over the links of the running cluster beside its load; exit code 1 when an error was found.

    Examples:

    \b
      phasewise doctor

    \b
      phasewise doctor --prompt-tokens 512,2048 --json --http 10.0.0.5:8000
    """
    lengths = _lengths(prompt_tokens)
    report = fetch(http, "/links/probe", body={"timeout_s": timeout}, timeout_s=timeout + _ANSWER_S)
    try:
        cluster = Cluster(report)
        found = findings(cluster, lengths)
        predicted = cluster.predictions(lengths)
        pays_from = cluster.pays_from()
    except (KeyError, TypeError, ConfigError):
        raise CommandError(
            f"{http}/links/probe is not that of this version of Phasewise; use the version of the cluster"
        ) from None
    if as_json:
        answer = {
            "report": report,
            "findings": [asdict(finding) for finding in found],
            "predictions": [asdict(prediction) for prediction in predicted],
            "pays_from": [{"prefill": p["prefill"], "decode": p["decode"], "prompt_tokens": n} for p, n in pays_from],
        }
        typer.echo(json.dumps(answer, indent=2))
    else:
        from rich.console import Console

        least = [n for _, n in pays_from]
        Console().print(diagnosis_view(cluster, found, predicted, least), soft_wrap=False)
    if any(finding.severity is Severity.ERROR for finding in found):
        raise typer.Exit(FAILURE_EXIT_CODE)


def _lengths(text: str) -> list[int]:
    """`512,2048` → sorted numbers. Raises UsageProblem."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and 0 < int(word) < 2**31 for word in words):
        raise UsageProblem(f"--prompt-tokens must be whole numbers above 0, such as 512,2048, not {text!r}")
    return sorted({int(word) for word in words})


def diagnosis_view(
    cluster: Cluster, found: Sequence[Finding], predicted: Sequence[Prediction], pays_from: Sequence[int | None]
) -> RenderableType:
    """The pairs, the findings, the predictions; each as far as there is something to say."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = []
    if cluster.pairs:
        parts += [_pair_table(cluster), Text()]
    parts += [Text(f"{f.severity}: {f.message}", style=_SEVERITY_STYLES[f.severity]) for f in found]
    if not found:
        parts.append(Text("no findings"))
    if predicted:
        parts += [Text(), _prediction_table(predicted), Text(_pays_line(pays_from))]
    return Group(*parts)


def _pair_table(cluster: Cluster) -> RenderableType:
    table = _table()
    for name in ("prefill → decode", "link"):
        table.add_column(name, no_wrap=True)
    sizes = sorted({p["num_bytes"] for pair in cluster.pairs for p in pair["probes"] if p["num_bytes"] >= _MEBIBYTE})
    rates = [f"{size / _MEBIBYTE:g} MiB" for size in sizes]
    for name in ("µs", *(f"GB/s: {name}" if name == rates[0] else name for name in rates)):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("converts")
    for pair in cluster.pairs:
        seconds = {probe["num_bytes"]: probe["seconds"] for probe in pair["probes"] if probe["seconds"]}
        least = min(seconds, default=None)
        latency = "-" if least is None else f"{seconds[least] * 1e6:,.0f}"
        measured = [f"{size / seconds[size] / 1e9:.2f}" if size in seconds else "-" for size in sizes]
        converts = conversions(cluster, pair) or "nothing"
        table.add_row(f"{pair['prefill']} → {pair['decode']}", pair["link"], latency, *measured, converts)
    return table


def _prediction_table(predicted: Sequence[Prediction]) -> RenderableType:
    """For each length the pair at which most of the handoff is seen."""
    table = _table()
    for name in ("prompt", "prefill ms", "handoff ms", "visible ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("pushed", "pays"):
        table.add_column(name, no_wrap=True)
    table.add_column("slowest pair")
    for num_tokens in sorted({p.prompt_tokens for p in predicted}):
        p = max((p for p in predicted if p.prompt_tokens == num_tokens), key=lambda p: p.visible_s)
        table.add_row(
            f"{num_tokens:,}",
            *(f"{seconds * 1e3:,.2f}" for seconds in (p.prefill_s, p.handoff_s, p.visible_s)),
            "by layers" if p.is_layerwise else "at once",
            "yes" if p.pays else "no",
            f"{p.prefill} → {p.decode}",
        )
    return table


def _pays_line(pays_from: Sequence[int | None]) -> str:
    known = [n for n in pays_from if n is not None]
    if not known:
        return "disaggregation pays at no prompt length"
    at = "" if len(known) == len(pays_from) else f", at {len(known)} of {len(pays_from)} pairs; at the others never"
    return f"disaggregation pays from {max(known):,} prompt tokens on{at}"


def _table() -> Any:
    from rich.table import Table

    return Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
