"""Wires over TCP, between workers whose KV cache is in host memory, on one host or several.

Bytes go from the sender's slab into the kernel and from there into the receiver's slab, with one call each.
"""

from __future__ import annotations

import contextlib
import hmac
import queue
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kv_transfer.wire import Check, Mark, WireError

_SECRET_BYTES = 32
_SECRET_S = 2.0  # within it whoever connects must say the secret
_RETRY_S = 0.05


class TcpDevice:
    """This host's memory as the end of links (`WireDevice`). `host` is where others reach it, and where wires listen.

    A token is a random secret and the address at which the sending end listens until the other has come.
    """

    kind = "tcp"

    def __init__(self, host: str) -> None:
        self._host = host
        self._listeners: dict[bytes, socket.socket] = {}  # until the wire is made

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def mark(self) -> Mark:
        return _PAST

    def token(self) -> bytes:
        listener = socket.create_server((self._host, 0))
        token = secrets.token_bytes(_SECRET_BYTES) + f"{self._host}:{listener.getsockname()[1]}".encode()
        self._listeners[token] = listener
        return token

    def make(self, token: bytes, rank: int) -> TcpWire:
        return TcpWire(token, self._listeners.pop(token) if rank == 0 else None)


class _Past:
    """Work on host memory is done when the call that asked for it returns."""

    def wait(self) -> None:
        pass


_PAST = _Past()


@dataclass(slots=True, eq=False)
class _Operation:
    """One message in a wire's queue: the mark of what is sent, the receipt of what is received."""

    work: Callable[[], bool]
    after: Mark | None
    is_over: threading.Event = field(default_factory=threading.Event)
    is_right: bool = False
    error: str = ""

    def run(self) -> None:
        try:
            if self.after is not None:
                self.after.wait()
            self.is_right = self.work()
        except Exception as error:
            self.error = str(error) or type(error).__name__
        self.is_over.set()

    def wait(self) -> bool:
        """Until the kernel has what is sent, or what is received is in: whether that is right. Raises WireError."""
        self.is_over.wait()
        if self.error:
            raise WireError(self.error)
        return self.is_right


class TcpWire:
    """One end (`Wire`). Its stream is a thread that does one message after the other."""

    def __init__(self, token: bytes, listener: socket.socket | None) -> None:
        """The end with the listener waits for the other."""
        self._token = token
        self._listener = listener
        self._socket: socket.socket | None = None
        self._queue: queue.SimpleQueue[_Operation | None] = queue.SimpleQueue()
        self._stream = threading.Thread(target=self._run, daemon=True, name="kv-link-wire")
        self._lock = threading.Lock()
        self._is_aborted = False
        self._is_idle = threading.Event()  # not in `connect`
        self._is_idle.set()
        self._broken = ""

    @property
    def address(self) -> tuple[str, int]:
        """Where the sending end waits for the other: host and port."""
        host, _, port = self._token[_SECRET_BYTES:].decode().rpartition(":")
        return host, int(port)

    def connect(self) -> None:
        with self._lock:
            if self._is_aborted:
                raise WireError("aborted")
            self._is_idle.clear()
        try:
            if self._listener is not None:
                self._admit(self._listener)
            else:
                self._reach()
            self._stream.start()
        except OSError as error:
            raise WireError(f"the wire does not connect: {error}") from None
        finally:
            self._is_idle.set()

    def send(self, data: torch.Tensor, after: Mark | None = None) -> _Operation:
        return self._enqueue(_Operation(lambda: self._write(data), after))

    def receive(self, data: torch.Tensor, after: Mark | None, check: Check) -> _Operation:
        return self._enqueue(_Operation(lambda: self._receive(data, check), after))

    def error(self) -> str:
        return self._broken

    def abort(self) -> None:
        with self._lock:
            self._is_aborted = True
            self._queue.put(None)
        self._shut_down()
        while not self._is_idle.wait(_RETRY_S):
            self._shut_down()  # again: `connect` may have opened a socket since
        if self._stream.ident is not None:
            self._stream.join()
        for end in (self._listener, self._socket):
            if end is not None:
                end.close()

    # ---- inside

    def _admit(self, listener: socket.socket) -> None:
        """Waits for the end that knows the secret; others are turned away."""
        while True:
            connection, _ = listener.accept()
            self._use(connection)
            connection.settimeout(_SECRET_S)
            said = bytearray(_SECRET_BYTES)
            with contextlib.suppress(OSError):
                self._fill(memoryview(said))
            if hmac.compare_digest(said, self._token[:_SECRET_BYTES]):
                break
            with self._lock:
                connection.close()
        connection.settimeout(None)
        listener.close()

    def _reach(self) -> None:
        connection = socket.socket()
        self._use(connection)
        connection.connect(self.address)
        connection.sendall(self._token[:_SECRET_BYTES])

    def _use(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._socket = connection
            if self._is_aborted:
                raise ConnectionAbortedError("aborted")

    def _shut_down(self) -> None:
        """Threads that are in a call of a socket return from it."""
        with self._lock:
            for end in (self._listener, self._socket):
                if end is not None:
                    with contextlib.suppress(OSError):  # it is not connected, or closed already
                        end.shutdown(socket.SHUT_RDWR)

    def _enqueue(self, operation: _Operation) -> _Operation:
        with self._lock:  # nothing may come behind what ends the stream
            if self._is_aborted:
                raise WireError("aborted")
            self._queue.put(operation)
        return operation

    def _run(self) -> None:
        while (operation := self._queue.get()) is not None:
            operation.run()
            if operation.error and not self._broken:
                self._broken = operation.error
                self._shut_down()  # a message is torn: nothing that follows can be right

    def _write(self, data: torch.Tensor) -> bool:
        assert self._socket is not None
        self._socket.sendall(data.numpy().data)
        return True

    def _receive(self, data: torch.Tensor, check: Check) -> bool:
        self._fill(data.numpy().data)
        answer = torch.empty(1, dtype=torch.bool)
        check(data, answer)
        return bool(answer)

    def _fill(self, view: memoryview) -> None:
        assert self._socket is not None
        while view:
            count = self._socket.recv_into(view, 0, socket.MSG_WAITALL)
            if not count:
                raise ConnectionError("the other end is gone")
            view = view[count:]
