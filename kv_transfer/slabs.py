"""Staging buffers of direct links: slabs cut from one allocation, each as large as its part, given out in the order of
the asking."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kv_transfer.wire import Mark

_ALIGNMENT = 256


@dataclass(slots=True, eq=False)
class Slab:
    """One staging buffer.  # uint8 [num_bytes]

    `last_use`: the device may still read it until then; its next writer waits for it there.

    Of marks in one stream the newest is behind all others: `age` tells.
    """

    buffer: torch.Tensor
    last_use: Mark | None
    age: int
    start: int
    size: int


@dataclass(slots=True)
class _Gap:
    """Free bytes."""

    start: int
    size: int
    last_use: Mark | None = None
    age: int = 0


class SlabPool:
    """Slabs of one worker and direction; any thread.

    `take(slab)` of an `ask` is called once, under the pool's lock, by the thread that frees the room; it returns False
    when it has no use for the slab any more.
    """

    def __init__(self, storage: torch.Tensor, slab_bytes: int) -> None:
        """`storage`: uint8 [num_bytes], empty or at least as large as the largest slab."""
        self._lock = threading.Lock()
        self._storage = storage
        self._gaps = [_Gap(0, storage.numel())] if storage.numel() else []
        self._waiting: deque[tuple[object, int, Callable[[Slab], bool]]] = deque()
        self._num_marks = 0
        self.slab_bytes = slab_bytes

    @property
    def num_bytes(self) -> int:
        return self._storage.numel()

    @property
    def num_free_bytes(self) -> int:
        with self._lock:
            return sum(gap.size for gap in self._gaps)

    @property
    def num_waiting(self) -> int:
        """Parts that somebody asked for and that there is no room for yet."""
        with self._lock:
            return len(self._waiting)

    def try_take(self, num_bytes: int) -> Slab | None:
        """A slab, if there is room and nobody waits."""
        with self._lock:
            return None if self._waiting else self._cut(num_bytes)

    def ask(self, owner: object, num_bytes: int, take: Callable[[Slab], bool]) -> None:
        """`take` gets a slab as soon as there is room, at once if there is, behind all who asked before."""
        with self._lock:
            self._waiting.append((owner, num_bytes, take))
            self._serve()

    def withdraw(self, owner: object) -> None:
        """Forgets what `owner` asked for."""
        with self._lock:
            self._waiting = deque(entry for entry in self._waiting if entry[0] is not owner)
            self._serve()

    def give_back(self, slab: Slab, last_use: Mark | None = None) -> None:
        """`last_use`: of this slab just now. All marks of a pool are from one stream, and given in its order."""
        with self._lock:
            if last_use is not None:
                self._num_marks += 1
                slab.last_use, slab.age = last_use, self._num_marks
            self._insert(slab)
            self._serve()

    def _serve(self) -> None:
        while self._waiting:
            _, num_bytes, take = self._waiting[0]
            slab = self._cut(num_bytes)
            if slab is None:
                return
            self._waiting.popleft()
            if not take(slab):
                self._insert(slab)

    def _cut(self, num_bytes: int) -> Slab | None:
        """The beginning of the first gap that is large enough."""
        size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        for index, gap in enumerate(self._gaps):
            if gap.size >= size:
                buffer = self._storage[gap.start : gap.start + num_bytes]
                slab = Slab(buffer, gap.last_use, gap.age, gap.start, size)
                gap.start += size
                gap.size -= size
                if not gap.size:
                    del self._gaps[index]
                return slab
        return None

    def _insert(self, slab: Slab) -> None:
        """Among the gaps by their places, as one with its neighbours."""
        new = _Gap(slab.start, slab.size, slab.last_use, slab.age)
        index = next((i for i, gap in enumerate(self._gaps) if gap.start > new.start), len(self._gaps))
        self._gaps.insert(index, new)
        for left in (index, index - 1):
            if 0 <= left < len(self._gaps) - 1:
                one, other = self._gaps[left : left + 2]
                if one.start + one.size == other.start:
                    newest = max(one, other, key=lambda gap: gap.age)
                    merged = _Gap(one.start, one.size + other.size, newest.last_use, newest.age)
                    self._gaps[left : left + 2] = [merged]
