"""Which of several targets a call goes to: in turn, those that were away a moment ago last. Safe to use in threads."""

from __future__ import annotations

import threading
from collections.abc import Collection

from phasewise.core.clock import Clock

_AWAY_S = 1.0
_MOST_AWAY_S = 30.0


class Targets:
    """The targets of one client, by their index.

    A target that could not be reached, or did not take requests, is passed over for `_AWAY_S`, then one call tries it;
    each failure in a row doubles that time, up to `_MOST_AWAY_S`. Where all are away, the one is chosen whose time is
    up first.

    Args:
        first: where the first call goes, so that many clients do not begin at the same target.
    """

    def __init__(self, num_targets: int, clock: Clock, first: int = 0) -> None:
        self.num_targets = num_targets
        self._clock = clock
        self._next = first
        self._lock = threading.Lock()
        self._away_for_s: dict[int, float] = {}  # how long a target is passed over; only of those that are away
        self._away_until_s: dict[int, float] = {}

    def choose(self, tried: Collection[int] = ()) -> int:
        """The target of the next call: none of `tried`, if there is another."""
        with self._lock:
            in_turn = [(self._next + i) % self.num_targets for i in range(self.num_targets)]
            candidates = [index for index in in_turn if index not in tried] or in_turn
            now_s = self._clock.now_s()
            there = [index for index in candidates if self._away_until_s.get(index, now_s) <= now_s]
            chosen = there[0] if there else min(candidates, key=self._away_until_s.__getitem__)
            if chosen in self._away_for_s:  # this call tries it; others go on to pass it over
                self._away_until_s[chosen] = now_s + self._away_for_s[chosen]
            self._next = (chosen + 1) % self.num_targets
            return chosen

    def answered(self, index: int) -> None:
        """The target takes requests."""
        if index in self._away_for_s:
            with self._lock:
                self._away_for_s.pop(index, None)
                self._away_until_s.pop(index, None)

    def was_away(self, index: int) -> None:
        """The target could not be reached, or does not take requests now."""
        with self._lock:
            away_s = min(2 * self._away_for_s.get(index, _AWAY_S / 2), _MOST_AWAY_S)
            self._away_for_s[index] = away_s
            self._away_until_s[index] = self._clock.now_s() + away_s
