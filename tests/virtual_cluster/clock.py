"""Virtual time: a clock that jumps from one event to the next. Everything in a virtual cluster is such an event."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable


class VirtualTime:
    """A Clock (phasewise/core/clock.py), and the events that are still to come.

    Events of one moment happen in the order in which they were planned. `digest` is over the time and the name of all
    that have happened: two runs with equal digests took the same course.
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        self._coming: list[tuple[float, int, str, Callable[[], None]]] = []
        self._num_planned = 0
        self._hash = hashlib.blake2b(digest_size=16)
        self.num_events = 0

    def now_s(self) -> float:
        return self._now_s

    def unix_s(self) -> float:
        return self._now_s

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def at(self, time_s: float, name: str, happen: Callable[[], None]) -> None:
        """Plans an event. A time in the past counts as now; events of one time happen in the order of planning."""
        self._num_planned += 1
        heapq.heappush(self._coming, (max(time_s, self._now_s), self._num_planned, name, happen))

    def after(self, delay_s: float, name: str, happen: Callable[[], None]) -> None:
        self.at(self._now_s + delay_s, name, happen)

    def run(self, is_over: Callable[[], bool]) -> None:
        """Event by event, until `is_over`. Raises RuntimeError when nothing more will happen before that."""
        while not is_over():
            if not self._coming:
                raise RuntimeError(f"nothing happens any more at {self._now_s:.3f} s, and the run is not over")
            self._now_s, _, name, happen = heapq.heappop(self._coming)
            self._hash.update(f"{self._now_s!r} {name}\n".encode())
            self.num_events += 1
            happen()
