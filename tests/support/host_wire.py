"""A wire over host memory with NCCL's manners: two-sided, in the order of enqueueing, quiet after an abort.

After an abort a receive looks finished and right, as an aborted kernel's event does: the link must not believe it.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kv_transfer.wire import Check, WireError

NUM_TRIALS = 11
"""Messages that open a link; parts are counted behind them."""

Hook = Callable[[str, int, "HostWire"], None]


class _Done:
    """Mark and receipt."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._is_right = True

    def set(self, is_right: bool = True) -> None:
        self._is_right = is_right
        self._event.set()

    def wait(self) -> bool:
        assert self._event.wait(60.0), "nothing ended this operation"
        return self._is_right


@dataclass
class HostDevice:
    """`hook(stage, part, wire)` runs on the wire's thread: "sending" with half of the bytes out, "received" with all
    in and none checked. `alter` changes a part on its way. `packed`: what marks wait for."""

    hook: Hook = lambda stage, part, wire: None
    alter: Callable[[int, bytearray], None] = lambda part, data: None
    kind: str = "host"
    packed: threading.Event | None = None
    _listeners: dict[bytes, socket.socket] = field(default_factory=dict)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.full((num_bytes,), 0xA5, dtype=torch.uint8)

    def mark(self) -> _Done:
        done = _Done()
        if self.packed is None:
            done.set()
        else:
            done._event = self.packed
        return done

    def token(self) -> bytes:
        listener = socket.create_server(("127.0.0.1", 0))
        token = str(listener.getsockname()[1]).encode()
        self._listeners[token] = listener
        return token

    def make(self, token: bytes, rank: int) -> HostWire:
        return HostWire(self, token, rank, self._listeners.pop(token) if rank == 0 else None)


class HostWire:
    """One end. Its stream is a thread with a queue."""

    def __init__(self, device: HostDevice, token: bytes, rank: int, listener: socket.socket | None) -> None:
        self.aborted = threading.Event()
        self.broken = ""
        self._device = device
        self._token = token
        self._rank = rank
        self._listener = listener
        self._socket: socket.socket | None = None
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stream = threading.Thread(target=self._run, daemon=True, name="host-wire")
        self._num_messages = -NUM_TRIALS
        self._lock = threading.Lock()

    def connect(self) -> None:
        try:
            if self._listener is not None:
                self._socket, _ = self._listener.accept()
            else:
                self._socket = socket.create_connection(("127.0.0.1", int(self._token)), 30.0)
                self._socket.settimeout(None)
        except OSError as error:
            raise WireError(f"the wire does not connect: {error}") from None
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            if self.aborted.is_set():
                self._socket.close()
                raise WireError("aborted")
            self._stream.start()

    def send(self, data: torch.Tensor) -> _Done:
        return self._enqueue(self._send, data)

    def receive(self, data: torch.Tensor, after: _Done | None, check: Check) -> _Done:
        return self._enqueue(self._receive, data, after, check)

    def error(self) -> str:
        return self.broken

    def abort(self) -> None:
        with self._lock:
            self.aborted.set()
        for end in (self._listener, self._socket):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._queue.put(None)
        if self._stream.ident is not None:
            self._stream.join(30.0)
            assert not self._stream.is_alive()
        for end in (self._listener, self._socket):
            if end is not None:
                end.close()

    def _enqueue(self, operation: Any, *arguments: Any) -> _Done:
        with self._lock:  # nothing may come behind what ends the stream
            if self.aborted.is_set():
                raise WireError("aborted")
            done = _Done()
            self._queue.put((operation, self._num_messages, arguments, done))
            self._num_messages += 1
        return done

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            operation, message, arguments, done = entry
            is_right = True
            try:
                is_right = operation(message, *arguments)
            except OSError:
                self.aborted.wait(30.0)  # a kernel whose peer is gone spins until the abort
            done.set(is_right)

    def _send(self, message: int, data: torch.Tensor) -> bool:
        assert self._socket is not None
        self._read(memoryview(bytearray(1)))
        content = bytearray(data.numpy().data)
        if message >= 0:
            self._device.alter(message, content)
        half = len(content) // 2
        self._socket.sendall(content[:half])
        if message >= 0:
            self._device.hook("sending", message, self)
        if self.aborted.is_set():  # a kernel sends nothing more then
            raise ConnectionError("aborted")
        self._socket.sendall(content[half:])
        return True

    def _receive(self, message: int, data: torch.Tensor, after: _Done | None, check: Check) -> bool:
        assert self._socket is not None
        if after is not None:
            after.wait()
        self._socket.sendall(b"!")
        self._read(memoryview(data.numpy()))
        if message >= 0:
            self._device.hook("received", message, self)
        return bool(check(data))

    def _read(self, view: memoryview) -> None:
        assert self._socket is not None
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionError("the other end is gone")
            view = view[count:]
