"""Where a server is, as users write it."""

from __future__ import annotations

from urllib.parse import urlsplit

from cli.errors import UsageProblem
from phasewise.core.config import split_address


def http_url(address: str, *, flag: str) -> str:
    """`HOST:PORT` or an http(s) URL → the URL without a slash at its end. Raises UsageProblem naming `flag`."""
    try:
        if "://" not in address:
            split_address(address, field=flag)
            return f"http://{address}"
        parts = urlsplit(address)
        if parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0:
            return address.rstrip("/")
    except ValueError:
        pass  # told below, in the same words for both forms
    raise UsageProblem(f"{flag} must be HOST:PORT, such as 127.0.0.1:8000, or an http URL, not {address!r}")
