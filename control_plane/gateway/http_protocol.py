"""HTTP/1.1 as uvicorn speaks it, with a bound on everything that a client can make the gateway keep or wait for.

The life of a connection, and who ends it:

1. header   nothing has come, or a part of a header: at most `max_header_bytes` (431) and `header_timeout_s` (408)
2. body     its bytes come: `body_grace_s`, and then at least `min_body_bytes_per_s` (408)
3. answer   the client reads it: `write_stall_s` without taking anything closes the connection
4. idle     between two requests: uvicorn's keep-alive time-out

A client that closes its sending side after a request (a *half-close*) looks like one that has left: both send a FIN.
The two are told apart by a few harmless bytes (an interim response `100 Continue`, or a comment in an event stream):
the host of a client that has left answers with a reset, which the socket reports at once. HTTP/1.0 has no such bytes:
there a FIN counts as leaving.
"""

from __future__ import annotations

import asyncio
import logging
import select
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from control_plane.gateway.openai_responses import dumps

_PIECE_BYTES = 4096
"""Most bytes of a header that the parser gets at once. It joins the header anew for each piece; this bounds that
work."""
_LONG_PIECE_BYTES = 65536

_MAX_QUEUED = 8
"""Requests queued behind a running one on a connection; further ones are read when there is room."""

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
    """One connection. The module's docstring tells its life."""

    limits = HttpLimits()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
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
        self._wait(self.limits.header_timeout_s)

    def data_received(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest and not self.transport.is_closing():
            size = _LONG_PIECE_BYTES if self._is_in_body else _PIECE_BYTES
            piece, rest = rest[:size], rest[size:]
            self._num_unused_bytes += len(piece)
            super().data_received(bytes(piece))
            if self._num_unused_bytes > self.limits.max_header_bytes and not self.transport.is_closing():
                self._refuse(431, "header_too_large", f"headers may have {self.limits.max_header_bytes} bytes in all")
        if self._timer is None and not self._unfinished:  # these bytes were no part of a request
            self._wait(self.limits.header_timeout_s)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keeps the connection for a client that may still read."""
        cycle = self._unfinished[0] if self._unfinished else None
        if cycle is None or self._is_in_message or self.scope["http_version"] != "1.1" or self._resets is not None:
            return False
        self.cycle.keep_alive = False
        self._watch_for_reset()
        if cycle is self._event_stream:
            self.transport.write(b"3\r\n:\n\n\r\n")
        elif not cycle.response_started:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._end_write_stall()
        if self._resets is not None:
            self.loop.remove_reader(self._resets.fileno())
            self._resets.close()
            self._resets = None
        super().connection_lost(exc)
        for cycle in self._unfinished:  # uvicorn notifies only the newest
            cycle.disconnected = True
            cycle.message_event.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write_stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_write_stall()

    # ---- what the parser says

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_message = True
        self._wait(self.limits.header_timeout_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_in_body:  # trailers of a chunked body are not used
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
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
        self._is_in_message = self._is_in_body = False
        self._num_unused_bytes = 0
        self._stop_waiting()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "invalid_http", "this is no valid HTTP request")

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
                    names = dict(message.get("headers", []))
                    if b"content-length" not in names and scope["http_version"] == "1.0":
                        has_no_length, cycle.chunked_encoding = True, False  # the answer ends with the connection
                    if names.get(b"content-type", b"").startswith(b"text/event-stream") and not has_no_length:
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
        """Ends the connection, with an answer unless one is under way; a connection without a byte gets none."""
        is_idle = not self._is_in_message
        if not is_idle and not any(cycle.response_started for cycle in self._unfinished):
            fields = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
            body = dumps({"error": fields}).encode()
            self.transport.write(
                STATUS_LINE[status]
                + b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
                + body
            )
        self.transport.close()


def make_http_server(app: ASGIApp, limits: HttpLimits = HttpLimits()) -> uvicorn.Server:
    """A server that speaks `GatewayProtocol`; it is given its socket when it serves."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a client's fault is no warning of ours

    class Protocol(GatewayProtocol):
        pass

    Protocol.limits = limits
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
