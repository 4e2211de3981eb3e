"""The wire over host memory with NCCL's manners, and with hooks.

After an abort a receive looks finished and right, as an aborted kernel's event does: the link must not believe it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from kv_transfer.tcp_wire import TcpDevice, TcpWire
from kv_transfer.wire import Check, Mark

NUM_TRIALS = 11
"""Messages that open a link; parts are counted behind them."""

Hook = Callable[[str, int, "HostWire"], None]


class _Packed:
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def wait(self) -> None:
        assert self._event.wait(60.0), "nothing ended this operation"


class HostDevice(TcpDevice):
    """`hook(stage, part, wire)` runs on the wire's thread: "sending" with half of the bytes out, "received" with all
    in and none checked. `alter` changes a part on its way. `packed`: what marks wait for."""

    def __init__(
        self,
        hook: Hook = lambda stage, part, wire: None,
        alter: Callable[[int, bytearray], None] = lambda part, data: None,
        kind: str = "tcp",
    ) -> None:
        super().__init__("127.0.0.1")
        self.hook = hook
        self.alter = alter
        self.kind = kind
        self.packed: threading.Event | None = None

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return super().allocate(num_bytes).fill_(0xA5)

    def mark(self) -> Mark:
        return super().mark() if self.packed is None else _Packed(self.packed)

    def make(self, token: bytes, rank: int) -> HostWire:
        return HostWire(self, token, self._listeners.pop(token) if rank == 0 else None)


class HostWire(TcpWire):
    def __init__(self, device: HostDevice, token: bytes, listener: Any) -> None:
        super().__init__(token, listener)
        self.aborted = threading.Event()
        self.device = device
        self._num_messages = -NUM_TRIALS

    def abort(self) -> None:
        self.aborted.set()
        super().abort()

    def _write(self, data: torch.Tensor) -> bool:
        content = bytearray(data.numpy().data)
        half = len(content) // 2
        with self._Message(self) as message:
            if message >= 0:
                self.device.alter(message, content)
            super()._write(torch.frombuffer(content[:half], dtype=torch.uint8))
            if message >= 0:
                self.device.hook("sending", message, self)
            if self.aborted.is_set():  # a kernel sends nothing more then
                raise ConnectionError("aborted")
            super()._write(torch.frombuffer(content[half:], dtype=torch.uint8))
        return True

    def _receive(self, data: torch.Tensor, check: Check) -> bool:
        def hooked(received: torch.Tensor, answer: torch.Tensor) -> None:
            if message >= 0:
                self.device.hook("received", message, self)
            check(received, answer)

        with self._Message(self) as message:
            return super()._receive(data, hooked)
        return True

    class _Message:
        """Its number. A kernel whose peer is gone spins until the abort."""

        def __init__(self, wire: HostWire) -> None:
            self._wire = wire

        def __enter__(self) -> int:
            self._wire._num_messages += 1
            return self._wire._num_messages - 1

        def __exit__(self, kind: Any, error: Any, traceback: Any) -> bool:
            if isinstance(error, OSError):
                self._wire.aborted.wait(30.0)
            return isinstance(error, OSError)
