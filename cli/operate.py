"""`phasewise scale`, `drain`, `role` and `stop`: orders to a cluster, over its admin API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from cli.errors import UsageProblem
from cli.gateway_http import fetch

DEFAULT_ADMIN = "127.0.0.1:8001"
AdminOption = Annotated[str, typer.Option(help="HOST:PORT of the cluster's admin API.")]


def scale_command(
    sizes: Annotated[list[str], typer.Argument(help="POOL=N: prefill, decode, mixed or gateway", show_default=False)],
    admin: AdminOption = DEFAULT_ADMIN,
) -> None:
    """Give pools another number of workers. Pools that are not named stay as they are.

    Examples:

    \b
      phasewise scale prefill=2 decode=3
    """
    wanted: dict[str, int] = {}
    for entry in sizes:
        pool, separator, number = entry.partition("=")
        if not separator or not number.isdigit():
            raise UsageProblem(f"write POOL=N, such as decode=3, not {entry!r}")
        wanted[pool] = int(number)
    _say(_order(admin, "/scale", wanted))


def drain_command(
    worker: Annotated[str, typer.Argument(help="Name of a worker or gateway, such as decode-0", show_default=False)],
    admin: AdminOption = DEFAULT_ADMIN,
) -> None:
    """Have a worker move or finish what it has, and end. Another one takes its place.

    For fewer workers use 'phasewise scale'.

    Examples:

    \b
      phasewise drain decode-0
    """
    _say(_order(admin, "/drain", {"worker": worker}))


def role_command(
    worker: Annotated[str, typer.Argument(help="Name of a worker, such as decode-0", show_default=False)],
    role: Annotated[str, typer.Argument(help="prefill, decode or mixed", show_default=False)],
    admin: AdminOption = DEFAULT_ADMIN,
) -> None:
    """Give a worker another role. Its pool becomes one smaller, and the other one larger.

    Examples:

    \b
      phasewise role decode-1 prefill
    """
    _say(_order(admin, "/role", {"worker": worker, "role": role}))


def stop_command(
    drain: Annotated[
        float | None, typer.Option(help="Seconds for open requests [default: gateway.drain_s]", show_default=False)
    ] = None,
    admin: AdminOption = DEFAULT_ADMIN,
) -> None:
    """Stop a cluster: open requests finish, then every process ends.

    Examples:

    \b
      phasewise stop
    """
    _order(admin, "/stop", {} if drain is None else {"drain_s": drain})
    typer.echo("the cluster stops")


def _order(admin: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return fetch(admin, path, body=body, flag="--admin")


def _say(status: Mapping[str, Any]) -> None:
    """What the cluster should be, and what it is now."""
    wanted = ", ".join(f"{size} {pool}" for pool, size in status["cluster"]["desired"].items() if size)
    there = ", ".join(f"{m['name']} {m['state']}" for m in (*status["workers"], *status["gateways"]))
    typer.echo(f"wanted: {wanted}\nnow: {there}")
