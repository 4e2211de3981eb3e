"""The sockets that a gateway listens on: whether an address can be had, and the socket of HTTP."""

from __future__ import annotations

import socket

from phasewise.core.config import split_address
from phasewise.core.errors import ConfigError

_BACKLOG = 2048
"""Connections that the kernel keeps until the server accepts them."""


_KEYS = {"http": "gateway.http", "grpc": "gateway.grpc", "admin": "admin.http"}
"""The configuration key behind each flag."""


def check_port(address: str, name: str) -> None:
    """Raises ConfigError when `address` cannot be listened on. `name`: of the flag that chooses another."""
    _listen(address, name, f"--{name}").close()


def bind_http(address: str, name: str = "http") -> socket.socket:
    """A listening socket that does not block. `name`: of the flag that chooses the address.

    Raises:
        ConfigError: the port is taken, or the host is not ours.
    """
    listener = _listen(address, name, _KEYS[name])
    listener.setblocking(False)
    return listener


def format_address(listener: socket.socket) -> str:
    """HOST:PORT of a socket as it is really bound; an IPv6 host is in brackets."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen(address: str, name: str, shown_as: str) -> socket.socket:
    host, port = split_address(address, field=_KEYS[name])
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off on every connection.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{shown_as}: cannot listen on {address} ({error.strerror}); stop what uses the port, or choose another "
            f"with --{name} HOST:PORT (port 0 takes any that is free)",
            field=_KEYS[name],
        ) from None
    return listener
