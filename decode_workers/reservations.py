"""Which offers may set blocks aside now. Pure: counts in, decisions out.

Offers wait in the order in which they came. One is accepted when its prompt's blocks are free, when a share of the
cache stays free for running sequences to grow into, and when no preempted sequence is waiting to come back: what runs
already goes first. An offer whose time is over, or that can never fit, is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from phasewise.core.messages import KVOffer


@dataclass(frozen=True, slots=True)
class Room:
    """What the decode worker has, at one moment. `num_live` counts samples: running, preempted and on their way."""

    num_blocks: int
    num_free_blocks: int
    num_live: int
    num_preempted: int


@dataclass(frozen=True, slots=True)
class WaitingOffer:
    offer: KVOffer
    deadline_s: float


class ReservationQueue:
    """Offers that have not been answered yet."""

    def __init__(self, block_size: int, max_running: int, headroom: float) -> None:
        self._block_size = block_size
        self._max_running = max_running
        self._headroom = headroom
        self._waiting: deque[WaitingOffer] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def blocks_needed(self, offer: KVOffer) -> int:
        """Blocks for the prompt, and one more per further sample, which gets its own copy of the last block."""
        num_tokens = len(offer.request.prompt_token_ids)
        return -(-num_tokens // self._block_size) + offer.request.sampling.n - 1

    def impossible(self, offer: KVOffer, room: Room) -> str:
        """Why the offer could not be taken even by an empty worker, or ""."""
        needed = self.blocks_needed(offer)
        if needed > room.num_blocks:
            return f"the prompt needs {needed} KV blocks and this worker has {room.num_blocks}"
        if offer.request.sampling.n > self._max_running:
            return f"n={offer.request.sampling.n} exceeds max_running={self._max_running}"
        return ""

    def add(self, offer: KVOffer, deadline_s: float) -> None:
        self._waiting.append(WaitingOffer(offer, deadline_s))

    def next_acceptable(self, room: Room) -> WaitingOffer | None:
        """Takes the first waiting offer out of the queue when there is room for it; else None."""
        if not self._waiting or room.num_preempted:
            return None
        offer = self._waiting[0].offer
        if room.num_live:
            headroom = int(room.num_blocks * self._headroom)
            if room.num_free_blocks - self.blocks_needed(offer) < headroom:
                return None
            if room.num_live + offer.request.sampling.n > self._max_running:
                return None
        elif room.num_free_blocks < self.blocks_needed(offer):
            return None
        return self._waiting.popleft()

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
