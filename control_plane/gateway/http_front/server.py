"""The gateway's HTTP server: uvicorn on a listening socket that several gateways of a host may share.

1. serving   a connection is accepted in each turn of the loop: who shares the socket and is less busy takes more
2. leaving   `leave`: no connection is accepted here; what the open ones ask is answered, and each answer closes its one
3. closed    `should_exit` is set, as uvicorn has it

A client may send a request on a connection that is just being closed because it was idle, and cannot tell whether the
request was read. So idle connections are kept for a while when the server leaves: a client in regular use asks once
more, and is told that its connection ends.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from control_plane.gateway.http_front.protocol import GatewayProtocol, HttpLimits, Leaving
from control_plane.gateway.quota import Quota, share_of

logger = logging.getLogger(__name__)

_MOST_CONNECTIONS = 16_384
_OTHER_FILES = 1024

_KEEP_ALIVE_S = 75
"""Longer than clients and load balancers keep an idle connection (60 s). The side that closes first may close while a
request is on its way, and the other side cannot tell whether the request was read."""

_LOOK_S = 0.05
_FULL_PAUSE_S = 1.0
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor:
    """Accepts the connections of one listening socket, which it closes in the end. Stands for an `asyncio.Server`."""

    def __init__(self, listener: socket.socket, make_protocol: Callable[[], asyncio.Protocol]) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[object]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._start()

    def close(self) -> None:
        """No connection is accepted afterwards. Those that wait are accepted by the others that share the socket."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()

    async def wait_closed(self) -> None:
        """Returns when all connections that were accepted have a protocol."""
        await asyncio.gather(*self._connecting, return_exceptions=True)

    def _start(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # another gateway was faster, or it is gone
            return
        except OSError as error:
            if error.errno not in _OUT_OF_FILES:
                raise
            logger.error("no connection can be accepted: %s", error.strerror)
            self._loop.remove_reader(self._listener.fileno())
            self._pause = self._loop.call_later(_FULL_PAUSE_S, self._start)
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._loop.connect_accepted_socket(self._make_protocol, connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)


class HttpServer(uvicorn.Server):
    """Made by `make_http_server`. It is given its socket, which must not block, when it serves."""

    def __init__(self, config: uvicorn.Config, leaving: Leaving) -> None:
        super().__init__(config)
        self.servers = []
        self._leaving = leaving

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        config = self.config

        def make_protocol() -> asyncio.Protocol:
            return config.http_protocol_class(  # type: ignore[call-arg]
                config=config, server_state=self.server_state, app_state=self.lifespan.state
            )

        for listener in sockets or []:
            listener.setblocking(False)
            self.servers.append(Acceptor(listener, make_protocol))  # type: ignore[arg-type]
        self.started = True

    async def leave(self, idle_s: float) -> None:
        """Accepts no more connections; returns when none is open. Those that are idle are closed after `idle_s`.

        The caller bounds the wait: a connection is open as long as an answer takes.
        """
        for server in self.servers:
            server.close()
            await server.wait_closed()
        self._leaving.is_on = True
        loop = asyncio.get_running_loop()
        closes_at_s = loop.time() + idle_s
        while self.server_state.connections:
            await asyncio.sleep(_LOOK_S)
            if loop.time() >= closes_at_s:
                self._close_idle()

    def _close_idle(self) -> None:
        for connection in list(self.server_state.connections):
            assert isinstance(connection, GatewayProtocol)
            if connection.is_idle:
                connection.transport.close()


def most_connections() -> int:
    """How many connections may be open: what the system allows the process, less what else it opens.

    The soft limit of open files is raised to the hard one first, where that is higher.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_CONNECTIONS + _OTHER_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(_MOST_CONNECTIONS, soft - min(_OTHER_FILES, soft // 2)))


def make_http_server(
    app: ASGIApp,
    limits: HttpLimits = HttpLimits(),
    max_connections: int | None = None,
) -> HttpServer:
    """A server that speaks `GatewayProtocol`; it is given its socket when it serves."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a client's fault is no warning of ours

    most = max_connections or most_connections()

    class Protocol(GatewayProtocol):
        pass

    leaving = Leaving()
    Protocol.leaving = leaving
    Protocol.limits = limits
    Protocol.connections_quota = Quota("connections", most, share_of(most))
    return HttpServer(
        uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=5,
            timeout_keep_alive=_KEEP_ALIVE_S,
        ),
        leaving,
    )
