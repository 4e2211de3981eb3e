"""Which prompts may ask for room at their decode worker, keep it, and begin. Pure.

As a rule a prompt is offered to its decode worker, accepted, and computed, in this order. One that stays here needs
free seats in this worker's own decoding batch; one without further tokens needs neither.

A prompt may begin early, before its offer is answered, when nothing else would run: the answer takes milliseconds,
there is room almost always, and nobody else could use the time. It must be the first in the queue that is handed off,
since one that passes others would take their offers' places again and again; and it leaves half of the free blocks, so
that others can pass it when the answer takes long.

So a prompt may be computed and *unplaced*: nobody has accepted it, and it holds blocks here until somebody does. One
whose handoff failed and is offered again is unplaced, too. Unplaced prompts go first. While there are any,

    no prompt begins early;
    prompts for their decode workers ask for no room there, and give back what they have: it is what those wait for;
    others ask, keep and begin only if the blocks that are free here suffice. They must not wait for blocks that
        unplaced prompts hold, with room that an unplaced prompt of another prefill worker may wait for.

Without the last two, prompts and workers would wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.block_manager import BlockManager
from kv_transfer.state import SendStatus
from prefill_workers.job import PrefillJob


class Admission:
    """The rules at one moment, while `computed` prompts are being handed off."""

    def __init__(self, blocks: BlockManager, computed: Iterable[PrefillJob]) -> None:
        self._blocks = blocks
        self._unplaced_at = {job.handoff.peer for job in computed if job.is_unanswered}

    def may_reserve(self, job: PrefillJob) -> bool:
        """May the prompt, which does not run yet, ask for its reservation or keep it?"""
        return not self._unplaced_at or (job.handoff.peer not in self._unplaced_at and self._fits(job))

    def may_begin(self, job: PrefillJob, num_seats: int, *, may_be_early: bool) -> bool:
        """May a waiting prompt be computed?

        Args:
            num_seats: free ones in this worker's own decoding batch.
            may_be_early: nothing runs, and no prompt before this one is to be handed off.
        """
        if self._unplaced_at and not self._fits(job):
            return False
        if job.task.request.max_new_tokens <= 1:
            return True
        if not job.needs_handoff:
            return job.num_samples <= num_seats
        if job.is_unanswered:
            return may_be_early and not self._unplaced_at and self._fits(job, share=2)
        return job.handoff.status is SendStatus.ACCEPTED

    def _fits(self, job: PrefillJob, share: int = 1) -> bool:
        """Whether one `share`-th of the free blocks suffices for the prompt."""
        return share * self._blocks.blocks_for(job.sequence.num_tokens) <= self._blocks.num_free_blocks
