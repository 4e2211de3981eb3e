"""A worker's connections for tokens to gateways, one each.

The life of a connection:

1. idle       nothing was said since the gateway became known
2. opening    there is something to say: connect, Hello, Welcome
3. open       frames go out, acknowledgements come in
4. broken     what was not acknowledged is kept. After a pause, up to `_LONGEST_PAUSE_S`, it is opened again (2), and
              goes on with the first frame that the gateway has not taken
5. closed     the gateway is gone, or the worker stops

`deliver` sends a frame itself, by one call of the system that does not wait: a step pays some microseconds for a
gateway. What the system does not take at once is the work of the connection's own thread, and so is all else. The
thread sleeps while everything goes out at once.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
from collections.abc import Mapping
from dataclasses import replace

from phasewise.core.clock import Clock, MonotonicClock
from phasewise.core.config import split_address
from phasewise.core.identity import MemberId
from phasewise.core.messages import WorkerOutput
from phasewise.delivery.frame_queue import MAX_QUEUED_BYTES, FrameQueue
from phasewise.delivery.frames import (
    COUNT,
    LENGTH,
    MAX_GREETING_BYTES,
    Hello,
    Refused,
    decode_answer,
    encode_greeting,
    encode_output,
)

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_CONNECT_S = 5.0
_DEAD_MS = 10_000
"""A host that confirms nothing for so long is cut off: the connection breaks."""
_RECEIVE_BYTES = 4096
_CLOSE_S = 2.0


class TokenSinks:
    """The gateways that a worker knows. Implements GatewayPort (phasewise/core/ports.py).

    Args:
        secret: the cluster's, which gateways ask for.
        max_queued_bytes: for one gateway; frame_queue.py says what happens beyond.
    """

    def __init__(
        self,
        worker_id: MemberId,
        secret: str,
        clock: Clock | None = None,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
    ) -> None:
        self._worker_id = worker_id
        self._secret = secret
        self._clock = clock or MonotonicClock()
        self._max_queued_bytes = max_queued_bytes
        self._sinks: dict[MemberId, TokenSink] = {}

    def connect(self, addresses: Mapping[MemberId, str]) -> None:
        """Adds these gateways, by HOST:PORT, to those that are known."""
        for gateway_id, address in addresses.items():
            if gateway_id not in self._sinks:
                hello = Hello(self._worker_id, gateway_id, 0, self._secret)
                self._sinks[gateway_id] = TokenSink(hello, address, FrameQueue(self._max_queued_bytes), self._clock)

    def forget(self, gateway_id: MemberId) -> None:
        """The gateway is gone: drops what is queued for it, and what is meant for it from now on."""
        sink = self._sinks.pop(gateway_id, None)
        if sink is not None:
            sink.close(0.0)

    def deliver(self, gateway_id: MemberId, output: WorkerOutput) -> None:
        """Output for an unknown gateway is dropped: it is gone."""
        sink = self._sinks.get(gateway_id)
        if sink is not None:
            sink.push(encode_output(output))

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Returns when gateways have what is queued, after `timeout_s` for each at the latest."""
        sinks, self._sinks = list(self._sinks.values()), {}
        for sink in sinks:
            sink.close(timeout_s)
        for sink in sinks:
            sink.wait_closed()


class TokenSink:
    """One gateway's connection. `push` belongs to the step loop's thread; `close` may be called from any."""

    def __init__(self, hello: Hello, address: str, queue: FrameQueue, clock: Clock) -> None:
        self._hello = hello
        self._address = split_address(address, field="the gateway's address for tokens")
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows; nobody waits while holding it
        self._queue = queue
        self._connection: socket.socket | None = None  # while it is open
        self._closes_at_s: float | None = None
        self._alarm, self._waker = socket.socketpair()
        self._alarm.setblocking(False)
        self._waker.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=f"tokens-{hello.gateway_id}", daemon=True)
        self._thread.start()

    def push(self, frame: bytes) -> None:
        """Sends a frame, or leaves it to the thread."""
        with self._lock:
            is_first = self._queue.is_all_sent
            if not self._queue.push(frame):
                self._connection = None  # the numbers go on behind a gap, which only a Hello can tell
                logger.error(
                    "gateway %s takes no tokens: what was queued for it is dropped; it will give up the requests "
                    "concerned and try them again",
                    self._hello.gateway_id,
                )
            elif not is_first:
                return  # the thread is at it
            elif self._connection is not None:
                try:
                    _send(self._connection, self._queue)
                except OSError:
                    self._connection = None  # the thread learns why
                else:
                    if self._queue.is_all_sent:
                        return
        self._wake()

    def close(self, timeout_s: float) -> None:
        """Ends the connection when the gateway has all that is queued, after `timeout_s` at the latest. Returns at
        once."""
        with self._lock:
            self._closes_at_s = self._clock.now_s() + timeout_s
        self._wake()

    def wait_closed(self) -> None:
        """After `close`."""
        self._thread.join()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it has been woken and has not looked yet, or it has ended
            self._waker.send(b"\0")

    # ---- the thread

    def _run(self) -> None:
        pause_s, is_known_as_down = 0.0, False
        while self._wait_for_work(pause_s):
            try:
                with self._connect() as connection:
                    self._begin(connection, self._greet(connection))
                    pause_s, is_known_as_down = 0.0, False
                    self._serve(connection)
            except (OSError, ValueError) as error:
                pause_s = min(max(2 * pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
                log = logger.debug if is_known_as_down else logger.warning
                log("the connection for tokens to %s is broken: %s", self._hello.gateway_id, error)
                is_known_as_down = True
        self._alarm.close()
        self._waker.close()

    def _wait_for_work(self, pause_s: float) -> bool:
        """Waits for the end of a pause, and for something to say. False when this end is to be closed."""
        not_before_s = self._clock.now_s() + pause_s
        while True:
            with self._lock:
                now_s, closes_at_s, is_empty = self._clock.now_s(), self._closes_at_s, self._queue.is_empty
            if closes_at_s is not None and (is_empty or now_s >= closes_at_s):
                return False
            if not is_empty and now_s >= not_before_s:
                return True
            self._sleep(None if is_empty else not_before_s - now_s)

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(self._address, _CONNECT_S)
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_MS)
        return connection

    def _greet(self, connection: socket.socket) -> int:
        """Says Hello; gives the number of the frame that the gateway expects. Raises OSError and ValueError."""
        with self._lock:
            hello = replace(self._hello, first=self._queue.first)
        connection.send(encode_greeting(hello))  # smaller than any buffer of a new connection
        (length,) = LENGTH.unpack(self._read(connection, LENGTH.size))
        if length > MAX_GREETING_BYTES:
            raise ValueError(f"an answer of {length} bytes is no greeting")
        answer = decode_answer(self._read(connection, length))
        if isinstance(answer, Refused):
            raise ConnectionError(f"the gateway refuses it: {answer.reason}")
        return answer.next

    def _begin(self, connection: socket.socket, next_number: int) -> None:
        with self._lock:
            if self._queue.first > next_number:
                raise ConnectionError("the queue was dropped meanwhile")
            self._queue.begin(next_number)
            self._connection = connection

    def _serve(self, connection: socket.socket) -> None:
        """Until the connection breaks, which raises OSError, or is closed."""
        received, is_ending = b"", False
        try:
            while True:
                with self._lock:
                    if self._connection is not connection:
                        raise ConnectionError("sending failed, or the queue was dropped")
                    _send(connection, self._queue)
                    is_all_sent, closes_at_s = self._queue.is_all_sent, self._closes_at_s
                if closes_at_s is not None:
                    if self._clock.now_s() >= closes_at_s:
                        return
                    if is_all_sent and not is_ending:
                        is_ending = True
                        connection.shutdown(socket.SHUT_WR)  # the gateway takes all that is on its way, and closes
                events = select.POLLIN if is_all_sent else select.POLLIN | select.POLLOUT
                self._sleep(None, connection, events)
                with contextlib.suppress(BlockingIOError):
                    data = connection.recv(_RECEIVE_BYTES)
                    if not data:
                        if is_ending:
                            return
                        raise ConnectionError("the gateway closed it")
                    received += data
                    whole = len(received) - len(received) % COUNT.size
                    if whole:
                        with self._lock:
                            self._queue.acknowledged(COUNT.unpack_from(received, whole - COUNT.size)[0])
                    received = received[whole:]
        finally:
            with self._lock:
                self._connection = None

    def _read(self, connection: socket.socket, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            self._sleep(None, connection, select.POLLIN)
            with self._lock:
                closes_at_s = self._closes_at_s
            if closes_at_s is not None and self._clock.now_s() >= closes_at_s:
                raise ConnectionError("the gateway has not answered")
            with contextlib.suppress(BlockingIOError):
                more = connection.recv(num_bytes - len(data))
                if not more:
                    raise ConnectionError("the gateway closed it")
                data += more
        return data

    def _sleep(self, timeout_s: float | None, connection: socket.socket | None = None, events: int = 0) -> None:
        """Until the connection has one of these events, somebody wakes this thread, or it is time."""
        with self._lock:
            closes_at_s = self._closes_at_s
        if closes_at_s is not None:
            left_s = max(closes_at_s - self._clock.now_s(), 0.0)
            timeout_s = left_s if timeout_s is None else min(timeout_s, left_s)
        poll = select.poll()
        poll.register(self._alarm, select.POLLIN)
        if connection is not None:
            poll.register(connection, events)
        poll.poll(None if timeout_s is None else timeout_s * 1000 + 1)
        with contextlib.suppress(BlockingIOError):
            self._alarm.recv(_RECEIVE_BYTES)


def _send(connection: socket.socket, queue: FrameQueue) -> None:
    """Sends what the system takes now. Raises OSError: the connection is broken."""
    with contextlib.suppress(BlockingIOError):
        while (data := queue.to_send()) is not None:
            queue.went(connection.send(data))
