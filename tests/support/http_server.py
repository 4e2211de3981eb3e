"""The gateway's HTTP server as it is in a cluster, on a free port, with a thread and a loop of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from starlette.types import ASGIApp

from control_plane.gateway.bodies import Bodies
from control_plane.gateway.http_front.openai_server import build_app
from control_plane.gateway.http_front.protocol import HttpLimits, make_http_server
from control_plane.gateway.service import InferenceService


@contextlib.contextmanager
def http_server(
    app: ASGIApp,
    limits: HttpLimits = HttpLimits(),  # noqa: B008 (frozen)
    max_connections: int | None = None,
) -> Iterator[str]:
    """HOST:PORT of a running server over `app`."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # as `bind_http` does
    listener.bind(("127.0.0.1", 0))
    listener.listen(2048)
    server = make_http_server(app, limits, max_connections)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()  # what connects before it is up waits in the socket's queue
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextlib.contextmanager
def api_server(
    service: InferenceService,
    limits: HttpLimits = HttpLimits(),  # noqa: B008 (frozen)
    *,
    max_body_bytes: int = 1 << 20,
    max_requests: int = 1000,
    cors_origins: tuple[str, ...] = (),
) -> Iterator[str]:
    """HOST:PORT of the OpenAI-compatible server over `service`."""
    bodies = Bodies(max_body_bytes, max_requests)
    app = build_app(service, bodies, cors_origins=cors_origins)
    with contextlib.closing(bodies), http_server(app, limits) as address:
        yield address
