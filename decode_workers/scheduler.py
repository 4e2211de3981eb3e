"""Which sequences take the next decode step, and who makes room when blocks run out. Pure: no clock, no tensors.

A sequence is in exactly one place:
    running     takes part in every step; its blocks cover all its computed tokens
    preempted   its KV is (about to be) in host memory; it holds no blocks and comes back oldest first
When blocks run out the youngest running sequence is preempted, never the oldest, so the oldest always gets on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from engine.block_manager import BlockManager
from engine.sequence import Sequence
from phasewise.core.lifecycle import RequestStatus, check_transition


@dataclass(slots=True, eq=False)
class DecodeJob:
    """One sample that this worker decodes."""

    sequence: Sequence
    gateway_id: str
    deadline_s: float
    order: int  # of arrival on this worker
    status: RequestStatus = RequestStatus.DECODING
    num_swapped_blocks: int = 0
    writable_end: int = 0  # tokens before this position have a slot that no other sequence refers to
    has_stepped: bool = False

    def move(self, status: RequestStatus) -> None:
        check_transition(self.status, status)
        self.status = status


@dataclass(slots=True)
class DecodePlan:
    """What to do for the next step, in this order: copy KV out of `swap_out`, copy blocks, copy KV back in, compute.

    `swap_out` has the blocks that each preempted job held; they are free already and must be read before anything is
    written. `copies` are (source, target) blocks: a sequence leaves a block that it shares with another sample.
    """

    jobs: list[DecodeJob] = field(default_factory=list)
    swap_out: list[tuple[DecodeJob, list[int]]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[DecodeJob] = field(default_factory=list)


class DecodeScheduler:
    """The running batch of one worker."""

    def __init__(self, blocks: BlockManager, max_running: int) -> None:
        self._blocks = blocks
        self._max_running = max_running
        self.running: list[DecodeJob] = []
        self.preempted: list[DecodeJob] = []
        self.job_of: dict[Sequence, DecodeJob] = {}  # of all sequences here
        self._num_seen = 0

    def jobs(self) -> Iterator[DecodeJob]:
        yield from self.running
        yield from self.preempted

    def add(self, sequence: Sequence, gateway_id: str, deadline_s: float) -> DecodeJob:
        """The sequence joins the running batch; it has its blocks, and one token that is not computed."""
        job = DecodeJob(sequence, gateway_id, deadline_s, self._num_seen)
        self._num_seen += 1
        self.running.append(job)
        self.job_of[sequence] = job
        return job

    def remove(self, job: DecodeJob) -> None:
        """Takes a job out and releases its blocks."""
        if job.status is RequestStatus.PREEMPTED:
            self.preempted.remove(job)
        else:
            self.running.remove(job)
        del self.job_of[job.sequence]
        self._blocks.release(job.sequence.block_table)
        job.sequence.block_table = []

    def schedule(self, only: Collection[str] | None = None) -> DecodePlan:
        """Plans a step of all running sequences, oldest first; makes room by preempting the youngest.

        `only`: the requests that may take part; None for all, and for those that can come back.
        Not of those whose token in flight is their last. One that a stop token ends is found out a step later.
        """
        plan = DecodePlan()
        for job in list(self.running):
            if job.status is RequestStatus.PREEMPTED:
                break  # only younger ones follow
            if job.sequence.awaits_last_token or (only is not None and job.sequence.request_id not in only):
                continue
            has_slot = job.sequence.num_scheduled_tokens < job.writable_end
            if has_slot or self._grow(job, plan) or self._make_room(job, plan):
                plan.jobs.append(job)
        if self.preempted and not plan.swap_out and only is None:
            self._resume(plan)
        return plan

    def _grow(self, job: DecodeJob, plan: DecodePlan) -> bool:
        """Makes sure that the next token has a slot of its own. False when no block is free."""
        table = job.sequence.block_table
        index = job.sequence.num_scheduled_tokens // self._blocks.block_size
        is_new = index == len(table)
        if is_new or self._blocks.is_shared(table[index]):
            if self._blocks.num_free_blocks == 0:
                return False
            table += self._blocks.allocate(1)
            if not is_new:
                self._leave_shared(table, index, plan)
        job.writable_end = (index + 1) * self._blocks.block_size
        return True

    def _leave_shared(self, table: list[int], index: int, plan: DecodePlan) -> None:
        """The newest block takes the place of one that another sample refers to as well, with its content."""
        shared, table[index] = table[index], table.pop()
        plan.copies.append((shared, table[index]))
        self._blocks.release([shared])

    def _make_room(self, job: DecodeJob, plan: DecodePlan) -> bool:
        """Preempts the youngest until the job's next token has a slot. False when the job waits, or was preempted."""
        while True:
            if any(other.sequence.awaits_last_token for other in self.running):
                return False  # blocks come free with the step in flight: this sequence waits for it, and nobody leaves
            youngest = self.running[-1]
            self._preempt(youngest, plan)
            if youngest is job:
                return False
            if self._grow(job, plan):
                return True

    def _preempt(self, job: DecodeJob, plan: DecodePlan) -> None:
        job.move(RequestStatus.PREEMPTED)
        self.running.remove(job)
        self.preempted.append(job)
        self.preempted.sort(key=lambda j: j.order)
        held = job.sequence.block_table
        plan.swap_out.append((job, held))
        job.num_swapped_blocks = len(held)
        job.sequence.block_table = []
        job.sequence.num_published_blocks = 0
        job.writable_end = 0
        self._blocks.release(held)

    def _resume(self, plan: DecodePlan) -> None:
        """Brings preempted sequences back, oldest first, while each leaves a block for every running one to grow."""
        while self.preempted and len(self.running) < self._max_running:
            job = self.preempted[0]
            needed = max(job.num_swapped_blocks, self._blocks.blocks_for(job.sequence.num_tokens))
            if needed + len(self.running) > self._blocks.num_free_blocks:
                return
            job.sequence.block_table = self._blocks.allocate(needed)
            self.preempted.pop(0)
            job.move(RequestStatus.DECODING)
            self.running.append(job)
            self.running.sort(key=lambda j: j.order)
            plan.swap_in.append(job)
            plan.jobs.append(job)
