"""Sums up frequent log lines, such as those of failed requests: one line per second and kind. Pure.

The first line of a kind is logged at once. Those that follow within a second are counted and logged as one line at its
end, with the newest as the example; then the next second begins. After a second without lines, the next line is a first
one again. So every line is logged or counted, at most a second late.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from phasewise.core.clock import Clock

PERIOD_S = 1.0

Kind = tuple[str, int, str]
"""Logger, level, and what tells lines of one logger and level apart: an error code, not a message. There are few."""


@dataclass(frozen=True, slots=True)
class LineSum:
    """`count` lines of one kind in `seconds`; the message and request of the newest."""

    kind: Kind
    count: int
    seconds: float
    message: str
    request_id: str


@dataclass(slots=True)
class _Second:
    start_s: float
    count: int = 0
    message: str = ""
    request_id: str = ""


class LineSums:
    """Which lines to log now, and which to count."""

    def __init__(self, clock: Clock, period_s: float = PERIOD_S) -> None:
        self._clock = clock
        self._period_s = period_s
        self._seconds: dict[Kind, _Second] = {}

    def is_first(self, kind: Kind, message: str, request_id: str) -> bool:
        """True when the line is to be logged now; else it was counted."""
        second = self._seconds.get(kind)
        if second is None:
            self._seconds[kind] = _Second(self._clock.now_s())
            return True
        second.count += 1
        second.message, second.request_id = message, request_id
        return False

    def due(self) -> list[LineSum]:
        """The sums of the seconds that are over; each kind that had one begins another second."""
        now_s = self._clock.now_s()
        over = [(kind, second) for kind, second in self._seconds.items() if second.start_s + self._period_s <= now_s]
        for kind, second in over:
            del self._seconds[kind]
            if second.count:
                self._seconds[kind] = _Second(now_s)
        return self._sums(over)

    def rest(self) -> list[LineSum]:
        """All that was counted and not logged, at the end; afterwards every line is a first one."""
        seconds, self._seconds = self._seconds, {}
        return self._sums(list(seconds.items()))

    def next_due_s(self) -> float:
        """When `due` has something to do next; infinity when never."""
        return min((second.start_s for second in self._seconds.values()), default=math.inf) + self._period_s

    def _sums(self, seconds: list[tuple[Kind, _Second]]) -> list[LineSum]:
        now_s = self._clock.now_s()
        return [
            LineSum(kind, second.count, now_s - second.start_s, second.message, second.request_id)
            for kind, second in seconds
            if second.count
        ]
