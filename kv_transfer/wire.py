"""What a direct link needs of a device: memory, marks in its streams, and a wire to another process's device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Check = Callable[[torch.Tensor, torch.Tensor], None]
"""(uint8 [num_bytes], answer): puts whether what came is right into `answer`, bool [1] where the device can write.
Called once for a receive, where what it enqueues comes behind the bytes. Never waits."""


class WireError(Exception):
    """The wire is broken or was aborted."""


class Mark(Protocol):
    """A place in a stream."""

    def wait(self) -> object:
        """Blocks the calling thread, and no other of the interpreter's, until the device is past the mark."""


class Receipt(Protocol):
    """A receive under way."""

    def wait(self) -> bool:
        """Blocks until the bytes are in and the device is done with what the check enqueued: whether they are right.

        WireError after an abort, if it can.
        """


class Wire(Protocol):
    """One end of one epoch. All operations of one end are done in the order in which they were enqueued.

    Two-sided: a send may last until the other end has posted its receive. Everything but `connect` and `wait` returns
    at once. `abort` may come from any thread at any time, also during `connect`; all others end then.
    """

    def connect(self) -> None:
        """Blocks until the other end connects, too. Raises WireError."""

    def send(self, data: torch.Tensor, after: Mark | None = None) -> Mark:
        """Sends uint8 [num_bytes] once the device is past `after`. Raises WireError."""

    def receive(self, data: torch.Tensor, after: Mark | None, check: Check) -> Receipt:
        """Fills uint8 [num_bytes] once the device is past `after`. Raises WireError."""

    def error(self) -> str:
        """What broke the wire meanwhile, or ""."""

    def abort(self) -> None:
        """Ends the wire; may be called again. When it returns, the device touches no buffer of it any more.

        But for what another thread is enqueueing at this moment: for that it waits a second and no longer.
        """


class WireDevice(Protocol):
    """The device of a worker, and the kind of wires it can make. Thread-safe."""

    @property
    def kind(self) -> str:
        """Equal at both ends, or they cannot talk."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes], unset."""

    def mark(self) -> Mark:
        """Here in the calling thread's current stream."""

    def token(self) -> bytes:
        """Made by the sending end for each wire; both ends need it."""

    def make(self, token: bytes, rank: int) -> Wire:
        """An end that is not connected yet. Rank 0 sends, rank 1 receives."""
