"""`phasewise status`: the cluster as its gateway sees it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.gateway_http import fetch

if TYPE_CHECKING:
    from rich.console import RenderableType

HANDOFF_COUNTERS = (("handoffs_out", "out"), ("handoffs_in", "in"))
STATE_STYLES = {"ready": "green", "loading": "yellow", "draining": "yellow", "lost": "red", "stopped": "red"}


def status_command(
    http: Annotated[str, typer.Option(help="HOST:PORT of the gateway's HTTP server.")] = "127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON of GET /status.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks with --watch.")] = 1.0,
) -> None:
    """Show the workers of a cluster: role, state, load, KV use, handoffs.

    Examples:

    \b
      phasewise status

    \b
      phasewise status --json --http 10.0.0.5:8000

    \b
      phasewise status --watch
    """
    status = fetch_status(http)
    if not watch:
        _print_once(status, as_json)
        return
    if as_json:
        while True:  # one line each, for programs that read as they come; Ctrl-C ends it
            typer.echo(json.dumps(status, separators=(",", ":")))
            time.sleep(interval)
            status = fetch_status(http)
    from rich.live import Live

    with Live(status_view(status), auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(status_view(fetch_status(http)), refresh=True)


def _print_once(status: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(status, indent=2))
        return
    from rich.console import Console

    Console().print(status_view(status))


def fetch_status(address: str) -> dict[str, Any]:
    """GET /status. Raises CommandError when it cannot be had."""
    return fetch(address, "/status")


def status_view(status: Mapping[str, Any]) -> RenderableType:
    """A line for the cluster, a table of its workers, a line for the gateway."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    # No lines, short names: a row fits into 80 characters. `pre` are the preempted, `resv` the open reservations.
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("worker", "pid", "role", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("wait", "run", "pre", "KV used", "resv"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("handoffs")
    for worker in status["workers"]:
        state = str(worker["state"])
        table.add_row(
            str(worker["id"]),
            str(worker["pid"]),
            str(worker["role"]),
            Text(state, style=STATE_STYLES.get(state, "")),
            *(_number(worker, name) for name in ("waiting", "running", "preempted")),
            _kv_used(worker),
            _number(worker, "reservations"),
            _handoffs(worker),
        )
    return Group(Text(_cluster_line(status)), table, Text(_gateway_line(status)))


def _number(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _kv_used(worker: Mapping[str, Any]) -> str:
    """Used share of the KV blocks, and how many blocks there are."""
    total = worker.get("kv_blocks")
    return f"{worker.get('kv_used_blocks', 0) / total:.0%} of {total}" if total else "-"


def _handoffs(worker: Mapping[str, Any]) -> str:
    """Handoffs being sent now, and those sent (out) and received (in) since the worker started."""
    counters = worker.get("counters") or {}
    done = [f"{counters[key]:g} {text}" for key, text in HANDOFF_COUNTERS if counters.get(key)]
    return ", ".join([f"{_number(worker, 'handoffs')} open", *done])


def _cluster_line(status: Mapping[str, Any]) -> str:
    cluster = status.get("cluster") or {}
    uptime_s = int(cluster.get("uptime_s") or 0)
    hours, rest = divmod(uptime_s, 3600)
    return (
        f"{cluster.get('model', '?')}: {cluster.get('state', '?')}, up {hours}:{rest // 60:02}:{rest % 60:02}, "
        f"http {cluster.get('http', '?')}, grpc {cluster.get('grpc', '?')}"
    )


def _gateway_line(status: Mapping[str, Any]) -> str:
    gateway = status.get("gateway") or {}
    return f"{gateway.get('id', 'gateway')}: {_number(gateway, 'open_requests')} open requests"
