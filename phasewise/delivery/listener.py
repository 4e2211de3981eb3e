"""Where workers' tokens reach a gateway: a port, and a connection for each worker.

A connection's first word is a Hello. From then on each frame is the output of one step. Frames are counted for each
worker, not for each connection: one that is opened again goes on behind the last frame that was taken. Where the worker
no longer has the next one, the requests concerned are told.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Protocol

from phasewise.core.identity import MemberId
from phasewise.core.messages import WorkerOutput
from phasewise.delivery.frames import (
    COUNT,
    LENGTH,
    MAX_GREETING_BYTES,
    Hello,
    Refused,
    Welcome,
    decode_hello,
    decode_output,
    encode_greeting,
    why_refused,
)

logger = logging.getLogger(__name__)

_GREETING_S = 10.0
"""For the Hello of whoever connects."""
_ACK_FRAMES, _ACK_BYTES = 64, 256 * 1024
"""An acknowledgement goes out after so many: until then the worker keeps them."""


class OutputTaker(Protocol):
    """What workers' outputs are for. Both are called on the listener's loop."""

    def deliver(self, output: WorkerOutput) -> None: ...

    def tokens_lost(self, worker_id: MemberId) -> None:
        """Some of the worker's outputs will never come."""


class TokenListener:
    """A gateway's port for tokens. Outputs go to `taker`.

    Args:
        secret: the cluster's; whoever does not know it is refused.
    """

    def __init__(self, gateway_id: MemberId, secret: str, taker: OutputTaker) -> None:
        self.gateway_id = gateway_id
        self.taker = taker
        self._secret = secret
        self._server: asyncio.Server | None = None
        self._next: dict[MemberId, int] = {}  # the number of each worker's next frame
        self._connections: dict[MemberId, TokenConnection] = {}

    async def open(self, host: str) -> str:
        """Listens on any free port of `host`; gives HOST:PORT, which workers need. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: TokenConnection(self), host, 0)
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    def forget(self, worker_id: MemberId) -> None:
        """The worker is gone and will not come back."""
        self._next.pop(worker_id, None)
        if (connection := self._connections.pop(worker_id, None)) is not None:
            connection.transport.abort()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections.values()):
            connection.transport.abort()
        if self._server is not None:
            await self._server.wait_closed()

    # ---- for connections

    def greet(self, hello: Hello, connection: TokenConnection) -> Welcome | Refused:
        """Makes a connection its worker's only one, or refuses it."""
        if reason := why_refused(hello, self.gateway_id, self._secret):
            return Refused(reason)
        worker_id = hello.worker_id
        if (older := self._connections.get(worker_id)) is not None:
            older.transport.abort()
        self._connections[worker_id] = connection
        connection.worker_id = worker_id
        expected = self._next.get(worker_id, 0)
        self._next[worker_id] = max(expected, hello.first)
        if hello.first > expected:
            logger.error("%d messages of worker %s were lost", hello.first - expected, worker_id)
            self.taker.tokens_lost(worker_id)
        return Welcome(self._next[worker_id])

    def is_current(self, connection: TokenConnection) -> bool:
        return self._connections.get(connection.worker_id) is connection

    def take(self, worker_id: MemberId, body: bytes) -> int:
        """Takes a frame; gives the number of the next one."""
        self._next[worker_id] = number = self._next[worker_id] + 1
        try:
            self.taker.deliver(decode_output(body, worker_id))
        except Exception:  # a fault of ours: said, and whom it may concern is told
            logger.exception("a message of worker %s could not be taken", worker_id)
            self.taker.tokens_lost(worker_id)
        return number

    def ended(self, connection: TokenConnection) -> None:
        if self.is_current(connection):
            del self._connections[connection.worker_id]


class TokenConnection(asyncio.Protocol):
    """One worker's connection. `worker_id` is "" before its Hello."""

    transport: asyncio.Transport

    def __init__(self, listener: TokenListener) -> None:
        self.worker_id: MemberId = ""
        self._listener = listener
        self._buffer = bytearray()
        self._unacked_frames = self._unacked_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._timer = asyncio.get_running_loop().call_later(_GREETING_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= LENGTH.size and not self.transport.is_closing():
            (length,) = LENGTH.unpack_from(buffer, start)
            if not self.worker_id and length > MAX_GREETING_BYTES:
                self.transport.abort()  # whoever this is does not speak our protocol
                return
            end = start + LENGTH.size + length
            if len(buffer) < end:
                break
            self._on_frame(bytes(memoryview(buffer)[start + LENGTH.size : end]))
            start = end
        del buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._listener.ended(self)

    def _on_frame(self, body: bytes) -> None:
        if not self.worker_id:
            self._on_hello(body)
            return
        if not self._listener.is_current(self):
            return  # a newer one has taken its place, or the worker is gone
        number = self._listener.take(self.worker_id, body)
        self._unacked_frames += 1
        self._unacked_bytes += len(body)
        if self._unacked_frames >= _ACK_FRAMES or self._unacked_bytes >= _ACK_BYTES:
            self._unacked_frames = self._unacked_bytes = 0
            self.transport.write(COUNT.pack(number))

    def _on_hello(self, body: bytes) -> None:
        assert self._timer is not None
        self._timer.cancel()
        try:
            hello = decode_hello(body)
        except ValueError as error:
            answer: Welcome | Refused = Refused(str(error))
        else:
            answer = self._listener.greet(hello, self)
        self.transport.write(encode_greeting(answer))
        if isinstance(answer, Refused):
            logger.warning("a connection for tokens is refused: %s", answer.reason)
            self.transport.close()
