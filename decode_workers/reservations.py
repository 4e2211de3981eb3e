"""Offers that wait for an answer, in the order in which they came. Pure.

Only the first may be accepted, when decode_workers/joining.py has room for it: a small one must not keep a large one
out for ever. An offer whose time is over is taken out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from decode_workers.joining import JoiningRules, Occupancy
from phasewise.core.messages import KVOffer


@dataclass(frozen=True, slots=True)
class WaitingOffer:
    offer: KVOffer
    deadline_s: float


class ReservationQueue:
    """Offers that have not been answered yet."""

    def __init__(self, rules: JoiningRules) -> None:
        self._rules = rules
        self._waiting: deque[WaitingOffer] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, offer: KVOffer, deadline_s: float) -> None:
        self._waiting.append(WaitingOffer(offer, deadline_s))

    def next_acceptable(self, now: Occupancy) -> WaitingOffer | None:
        """Takes the first offer out of the queue when there is room for it; else None."""
        if self._waiting and self._rules.may_reserve(self._waiting[0].offer, now):
            return self._waiting.popleft()
        return None

    def expired(self, now_s: float) -> list[KVOffer]:
        """Takes out the offers whose time is over."""
        over = [w.offer for w in self._waiting if w.deadline_s <= now_s]
        self._waiting = deque(w for w in self._waiting if w.deadline_s > now_s)
        return over

    def remove(self, matches: Callable[[KVOffer], bool]) -> list[KVOffer]:
        """Takes out the offers that match: aborted by their sender, cancelled, or their sender lost."""
        removed = [w.offer for w in self._waiting if matches(w.offer)]
        self._waiting = deque(w for w in self._waiting if not matches(w.offer))
        return removed

    def next_deadline_s(self) -> float:
        return min((w.deadline_s for w in self._waiting), default=float("inf"))
