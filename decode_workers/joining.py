"""Who may join the decoding batch: handoffs that are offered, and prompts that stay on this worker. Pure.

A sample that may join has a seat from then on. Of `max_running` seats these are taken: those of the running batch, of
reservations, and of prompts that run on this worker and stay here. While a preempted sequence waits to come back nobody
else may join: what runs already goes first.

A reservation needs blocks besides: those of its prompt, and a share of the cache stays free for running sequences to
grow into. Offers are answered in the order in which they came, and only the first may be accepted: a small one must not
keep a large one out for ever. An offer whose time is over is taken out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from phasewise.core.messages import KVOffer


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What a decode worker has at one moment. `num_coming` counts the samples that have a seat and do not run yet."""

    num_free_blocks: int
    num_running: int
    num_preempted: int
    num_coming: int


@dataclass(frozen=True, slots=True)
class JoiningRules:
    """`headroom`: the share of all blocks that a reservation leaves free while anything else is here."""

    num_blocks: int
    block_size: int
    max_running: int
    headroom: float

    def blocks_needed(self, offer: KVOffer) -> int:
        """Blocks for the prompt, and one more per further sample, which gets its own copy of the last block."""
        return -(-offer.request.num_prompt_tokens // self.block_size) + offer.request.sampling.n - 1

    def impossible(self, offer: KVOffer) -> str:
        """Why the offer could not be taken even by an empty worker, or ""."""
        needed, num_samples = self.blocks_needed(offer), offer.request.sampling.n
        if needed > self.num_blocks:
            return f"the prompt needs {needed} KV blocks and this worker has {self.num_blocks}"
        if num_samples > self.max_running:
            return f"n={num_samples} exceeds max_running={self.max_running}"
        return ""

    def num_free_seats(self, now: Occupancy) -> int:
        """How many more samples may join."""
        return 0 if now.num_preempted else self.max_running - now.num_running - now.num_coming

    def may_reserve(self, offer: KVOffer, now: Occupancy) -> bool:
        """Whether the offer's blocks may be set aside now."""
        is_empty = not (now.num_running or now.num_coming)
        kept_free = 0 if is_empty else int(self.num_blocks * self.headroom)
        has_blocks = now.num_free_blocks - self.blocks_needed(offer) >= kept_free
        return has_blocks and offer.request.sampling.n <= self.num_free_seats(now)


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

    def remove(self, matches: Callable[[WaitingOffer], bool]) -> list[KVOffer]:
        """Takes out those that match: their time is over, they were cancelled, or their sender was lost."""
        removed = [waiting.offer for waiting in self._waiting if matches(waiting)]
        self._waiting = deque(waiting for waiting in self._waiting if not matches(waiting))
        return removed

    def next_deadline_s(self) -> float:
        return min((waiting.deadline_s for waiting in self._waiting), default=float("inf"))
