"""HTTP/1.1 as uvicorn speaks it, with a bound on everything that a client can make the gateway keep or wait for.

The life of a connection, and who ends it:

1. header   nothing has come, or a part of a header: at most `max_header_bytes` (431) and `header_timeout_s` (408)
2. body     its bytes come: `body_grace_s`, and then at least `min_body_bytes_per_s` (408)
3. answer   the client reads it: `write_stall_s` without taking anything closes the connection
4. idle     between two requests: uvicorn's keep-alive time-out

A client that closes its sending side after a request (a *half-close*) looks like one that has left: both send a FIN.
The two are told apart by a few bytes: the beginning of the status line, which is that of every answer, or a comment in
an event stream. The host of a client that has left answers them with a reset, which the socket reports at once.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import select
import sys
from dataclasses import dataclass
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from control_plane.gateway.http_front.openai_responses import dumps
from control_plane.gateway.quota import Quota, client_of, share_of
from phasewise.core.errors import Overloaded

_PIECE_BYTES = 1024
"""Most bytes of a header that the parser gets at once. It joins the header anew for each piece; this bounds that
work."""
_LONG_PIECE_BYTES = 65536

_MAX_QUEUED = 8
"""Requests queued behind a running one on a connection; further ones are read when there is room."""

_STATUS_PREFIX = b"HTTP/1.1 "
"""Of every answer."""

_MOST_CONNECTIONS = 16_384
_OTHER_FILES = 1024

_KEEP_ALIVE_S = 75
"""Longer than clients and load balancers keep an idle connection (60 s). The side that closes first may close while a
request is on its way, and the other side cannot tell whether the request was read."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What a connection may take and how long. Times in seconds."""

    max_header_bytes: int = 65536
    header_timeout_s: float = 20.0
    body_grace_s: float = 20.0
    min_body_bytes_per_s: int = 4096
    write_stall_s: float = 60.0


class GatewayProtocol(HttpToolsProtocol):
    """One connection. The module's docstring tells its life.

    There are more than 20 methods: those of the parser and of the transport, which call them, and one for each bound.
    """

    limits = HttpLimits()

    connections_quota = Quota("connections", sys.maxsize, sys.maxsize)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._counted: str | None = None  # whose share this connection is part of
        self._held = b""  # what came behind more requests than are taken at once
        self._is_upgrade = False  # the parser is in a request that offers another protocol
        self._is_in_message = False  # between a message's first byte and its end
        self._is_in_body = False
        self._num_unused_bytes = 0  # fed to the parser since it last gave body bytes or a whole header
        self._num_body_bytes = 0
        self._since_s = self.loop.time()  # when the wait began that `_timer` bounds
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._unfinished: list[RequestResponseCycle] = []  # begun or queued, the oldest first
        self._event_stream: RequestResponseCycle | None = None  # the one whose answer is a stream of events
        self._resets: select.epoll | None = None

    # ---- what the transport says

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        client = client_of(self.client[0]) if self.client is not None else ""
        try:
            self.connections_quota.take(client)
        except Overloaded as error:
            self.transport.write(_answer(429, error.code, error.message))
            self.transport.close()
            return
        self._counted = client
        self._wait(self.limits.header_timeout_s)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._held:
            self._held += data
            return
        rest = memoryview(data)
        while rest and not self.transport.is_closing() and len(self.pipeline) <= _MAX_QUEUED:
            size = _LONG_PIECE_BYTES if self._is_in_body else _PIECE_BYTES
            piece, rest = rest[:size], rest[size:]
            self._feed(bytes(piece))
        if rest and not self.transport.is_closing():
            self._held = bytes(rest)
            self.flow.pause_reading()
        if self._timer is None and not self._unfinished:  # what came was no part of a request
            self._wait(self.limits.header_timeout_s)

    def _feed(self, piece: bytes) -> None:
        self._num_unused_bytes += len(piece)
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            self._feed_without_upgrade(piece[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(400, "invalid_http", "this is no valid HTTP request")
        if self._num_unused_bytes > self.limits.max_header_bytes and not self.transport.is_closing():
            self._refuse(431, "header_too_large", f"headers may have {self.limits.max_header_bytes} bytes in all")

    def _feed_without_upgrade(self, rest: bytes) -> None:
        """Feeds a request again without its offer of another protocol, which made the parser stop behind its headers.

        A client that offers one (HTTP/2, usually) goes on in HTTP/1.1 when it is not taken up.
        """
        self._is_upgrade = False
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(400, "invalid_http", "this server is no proxy")
            return
        kept = [(name, value) for name, value in self.headers if name not in (b"upgrade", b"connection")]
        if any(name == b"connection" and b"close" in value.lower() for name, value in self.headers):
            kept.append((b"connection", b"close"))
        head = b"".join(b"%s: %s\r\n" % header for header in kept)
        version = self.parser.get_http_version().encode()
        self._num_unused_bytes = 0
        self._feed(b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, head) + rest)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keeps the connection for a client that may still read."""
        cycle = self._unfinished[0] if self._unfinished else None
        if cycle is None or self._is_in_message or self._resets is not None:
            return False
        self.cycle.keep_alive = False
        self._watch_for_reset()
        if cycle is self._event_stream:
            self.transport.write(b"3\r\n:\n\n\r\n" if cycle.chunked_encoding else b":\n\n")
        elif not cycle.response_started:
            self.transport.write(_STATUS_PREFIX)
            cycle.transport = _WithoutPrefix(self.transport)  # type: ignore[assignment]
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._end_write_stall()
        if self._resets is not None:
            self.loop.remove_reader(self._resets.fileno())
            self._resets.close()
            self._resets = None
        super().connection_lost(exc)
        if self._counted is not None:
            self.connections_quota.give_back(self._counted)
            self._counted = None
        for cycle in self._unfinished:  # uvicorn notifies only the newest
            cycle.disconnected = True
            cycle.message_event.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._watch_reader(sys.maxsize)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_write_stall()

    def _watch_reader(self, num_bytes_before: int) -> None:
        """Ends the connection when the client has taken nothing since this was called last."""
        num_bytes = self.transport.get_write_buffer_size()
        if num_bytes >= num_bytes_before:
            self.transport.abort()
        else:
            self._write_timer = self.loop.call_later(self.limits.write_stall_s, self._watch_reader, num_bytes)

    # ---- what the parser says

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_message = True
        self._wait(self.limits.header_timeout_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_in_body:  # trailers of a chunked body are not used
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            self._is_upgrade = True
            return
        self._num_unused_bytes = self._num_body_bytes = 0
        self._is_in_body = True
        super().on_headers_complete()
        self._unfinished.append(self.cycle)
        if len(self.pipeline) <= _MAX_QUEUED:  # uvicorn stops reading here, and would not see that a client leaves
            self.flow.resume_reading()
        self._wait(self.limits.body_grace_s)

    def on_body(self, body: bytes) -> None:
        self._num_unused_bytes = 0
        self._num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_upgrade:
            return
        self._is_in_message = self._is_in_body = False
        self._num_unused_bytes = 0
        self._stop_waiting()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._held and not self.transport.is_closing():
            held, self._held = self._held, b""
            self.data_received(held)

    # ---- requests

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, self._wrapped(cycle, app))

    def _wrapped(self, cycle: RequestResponseCycle, app: ASGIApp) -> Any:
        """`app`, with its answer observed: whether it is a stream of events, and when it ends. Sets the framing for
        HTTP/1.0."""

        async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
            has_no_length = False

            async def send_framed(message: Message) -> None:
                nonlocal has_no_length
                if message["type"] == "http.response.start":
                    if cycle.waiting_for_100_continue:  # its body was not asked for, and may not come
                        cycle.keep_alive = False
                    names = dict(message.get("headers", []))
                    if b"content-length" not in names and scope["http_version"] == "1.0":
                        has_no_length, cycle.chunked_encoding = True, False  # the answer ends with the connection
                    if names.get(b"content-type", b"").startswith(b"text/event-stream"):
                        self._event_stream = cycle
                elif has_no_length:
                    cycle.expected_content_length = len(message.get("body", b""))
                if message["type"] == "http.response.body" and not message.get("more_body", False):
                    self._end(cycle)
                await send(message)

            try:
                await app(scope, receive, send_framed)
            finally:
                self._end(cycle)

        return wrapped

    def _end(self, cycle: RequestResponseCycle) -> None:
        if cycle in self._unfinished:
            self._unfinished.remove(cycle)
        if self._event_stream is cycle:
            self._event_stream = None

    # ---- waits

    def _wait(self, timeout_s: float) -> None:
        """Bounds the next wait, which begins now."""
        self._stop_waiting()
        self._since_s = self.loop.time()
        self._timer = self.loop.call_later(timeout_s, self._expire)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        if not self._is_in_body:
            self._refuse(408, "request_timeout", f"no whole header has come in {self.limits.header_timeout_s:g} s")
            return
        now_s = self.loop.time()
        if self.flow.read_paused:  # the gateway itself does not read
            self._since_s = now_s
        allowed_s = self.limits.body_grace_s + self._num_body_bytes / self.limits.min_body_bytes_per_s
        left_s = self._since_s + allowed_s - now_s
        if left_s > 0:
            self._timer = self.loop.call_later(left_s, self._expire)
        else:
            self._refuse(408, "request_timeout", "the body comes too slowly")

    def _end_write_stall(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _watch_for_reset(self) -> None:
        """The transport reads no more: only the socket can report that the peer is gone."""
        resets = select.epoll()
        resets.register(self.transport.get_extra_info("socket").fileno(), 0)  # errors are always reported
        self._resets = resets
        self.loop.add_reader(resets.fileno(), self.transport.abort)

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Ends the connection, with an answer where none was begun. A connection without a byte gets none."""
        is_answered = self._is_in_body and self.cycle.response_started
        if self._is_in_message and not is_answered and not any(c.response_started for c in self._unfinished):
            self.transport.write(_answer(status, code, message))
        self.transport.close()


class _WithoutPrefix:
    """A transport on which the beginning of a status line has been sent already."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._is_first = True

    def write(self, data: bytes) -> None:
        if self._is_first:
            self._is_first = False
            data = data.removeprefix(_STATUS_PREFIX)
        self._transport.write(data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._transport.close()


def _answer(status: int, code: str, message: str) -> bytes:
    """A whole answer, after which the connection is closed."""
    fields = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = dumps({"error": fields}).encode()
    head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    return STATUS_LINE[status] + head + body


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
) -> uvicorn.Server:
    """A server that speaks `GatewayProtocol`; it is given its socket when it serves."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a client's fault is no warning of ours

    most = max_connections or most_connections()

    class Protocol(GatewayProtocol):
        pass

    Protocol.limits = limits
    Protocol.connections_quota = Quota("connections", most, share_of(most))
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=5,
            timeout_keep_alive=_KEEP_ALIVE_S,
        )
    )
