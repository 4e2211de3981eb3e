"""Wire buffers: a few slabs cut from one allocation, handed out in the order in which they were asked for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kv_transfer.wire import Mark


@dataclass(slots=True, eq=False)
class Slab:
    """uint8 [slab_bytes]. `last_use`: the device may still read it until then; its next writer waits for it there."""

    buffer: torch.Tensor
    last_use: Mark | None = None


class SlabPool:
    """Slabs of one worker and direction; any thread.

    `take(slab)` of an `ask` is called once, under the pool's lock, by the thread that frees the slab; it returns False
    when it has no use for the slab any more.
    """

    def __init__(self, storage: torch.Tensor, num_slabs: int, slab_bytes: int) -> None:
        """`storage`: uint8 [num_slabs * slab_bytes]."""
        self._lock = threading.Lock()
        self._free = [Slab(buffer) for buffer in storage.view(num_slabs, slab_bytes)]
        self._waiting: deque[tuple[object, Callable[[Slab], bool]]] = deque()
        self.num_slabs = num_slabs
        self.slab_bytes = slab_bytes

    @property
    def num_free(self) -> int:
        with self._lock:
            return len(self._free)

    def try_take(self) -> Slab | None:
        """A free slab, if there is one and nobody waits."""
        with self._lock:
            return self._free.pop() if self._free and not self._waiting else None

    def ask(self, owner: object, take: Callable[[Slab], bool]) -> None:
        """`take` gets the next free slab, at once if there is one, behind all who asked before."""
        with self._lock:
            self._waiting.append((owner, take))
            self._serve()

    def withdraw(self, owner: object) -> None:
        """Forgets what `owner` asked for."""
        with self._lock:
            self._waiting = deque(entry for entry in self._waiting if entry[0] is not owner)

    def give_back(self, slab: Slab) -> None:
        with self._lock:
            self._free.append(slab)
            self._serve()

    def _serve(self) -> None:
        while self._free and self._waiting:
            _, take = self._waiting.popleft()
            if take(self._free[-1]):
                self._free.pop()
