"""JSON from a cluster's HTTP servers; every way in which that fails is one line with a remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cli.addresses import http_url
from cli.errors import CommandError, no_cluster_at, one_line

REQUEST_TIMEOUT_S = 10.0

_SERVERS = {
    "--http": ("the gateway's HTTP address", "a Phasewise gateway"),
    "--admin": ("the admin API's address", "a Phasewise cluster's admin API"),
}
"""What each option should name."""


def fetch(
    address: str,
    path: str,
    *,
    body: Mapping[str, Any] | None = None,
    timeout_s: float = REQUEST_TIMEOUT_S,
    flag: str = "--http",
) -> dict[str, Any]:
    """GET, or with a body POST, of the server at HOST:PORT (or a URL): a JSON object with a list of workers.

    `flag`: the option that names the server, `--http` of a gateway or `--admin`.

    Raises CommandError when it cannot be had.
    """
    import httpx

    url = http_url(address, flag=flag)
    what, whose = _SERVERS[flag]
    method = "GET" if body is None else "POST"
    try:
        response = httpx.request(method, f"{url}{path}", json=body, timeout=timeout_s, trust_env=False)
    except httpx.ConnectError:
        raise no_cluster_at(address, flag=flag) from None
    except httpx.TimeoutException:
        raise CommandError(
            f"{address} did not answer within {timeout_s:g} s; it may be overloaded: try again"
        ) from None
    except httpx.TransportError as error:
        raise CommandError(f"{address} does not speak HTTP ({one_line(str(error))}); is {flag} {what}?") from None
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if response.status_code != 200:
        if reason := _reason(answer):
            raise CommandError(f"{address} answers HTTP {response.status_code} to {path}: {reason}")
        raise CommandError(
            f"{address} answers HTTP {response.status_code} to {path}; is {flag} the address of {whose}?"
        )
    if not isinstance(answer, dict) or not isinstance(answer.get("workers"), list):
        raise CommandError(f"{address}{path} is not that of Phasewise; is {flag} the address of {whose}?")
    return answer


def _reason(answer: Any) -> str:
    """What an error in the gateway's own form says."""
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return one_line(message) if isinstance(message, str) else ""
