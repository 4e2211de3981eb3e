"""The only place that reads time."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where every component takes its time from, so that tests and the simulator can set it."""

    def now_s(self) -> float:
        """Monotonic seconds: for durations, deadlines and leases inside one process."""

    def unix_s(self) -> float:
        """Seconds since the epoch: for timestamps that other processes read (timelines, logs)."""


class MonotonicClock:
    """The real clock."""

    def now_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time()


class ManualClock:
    """A clock that moves only when told to: for tests and virtual time."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def advance(self, seconds: float) -> None:
        self._now_s += seconds

    def now_s(self) -> float:
        return self._now_s

    def unix_s(self) -> float:
        return self._now_s
