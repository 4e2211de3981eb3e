"""Which prompts run next, and how much of each. Pure: no clock, no tensors, no I/O.

A prompt is in exactly one place:
    waiting    first come first served; holds no blocks. When it is about to run and is to be handed off, blocks are
               asked for at its decode worker (RESERVING); until they are granted, later prompts may pass it
    running    holds blocks for its whole prompt; runs in chunks inside the token budget
It leaves when its last chunk has run (`finish_prefill`) or when it is cancelled (`remove`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from engine.block_manager import BlockManager
from engine.sequence import Sequence
from kv_transfer.outgoing import Handoff
from phasewise.core.lifecycle import RequestStatus, check_transition
from phasewise.core.messages import PrefillTask
from phasewise.core.placement import WorkerId
from phasewise.core.request import SampledToken

CHUNK_STEP = 256
"""Prompts are cut at multiples of it, where the budget allows."""


@dataclass(slots=True, eq=False)
class PrefillJob:
    """One prompt on this worker, from its arrival until its KV has left, or decoding begins here."""

    task: PrefillTask
    sequence: Sequence
    deadline_s: float
    status: RequestStatus = RequestStatus.PLACED
    handoff: Handoff = field(init=False)
    num_cached_tokens: int = 0  # of the prompt, found in this worker's prefix cache
    num_failures: int = 0  # of the handoff, as far as they are counted
    has_pushed: bool = False
    prompt_logprobs: list[SampledToken] = field(default_factory=list)
    ended_samples: set[int] = field(default_factory=set)  # cancelled one by one

    def __post_init__(self) -> None:
        task = self.task
        self.handoff = Handoff(task.placement.decode_worker, task.request, task.gateway_id, self.deadline_s)

    @property
    def request_id(self) -> str:
        return self.task.request.request_id

    @property
    def needs_handoff(self) -> bool:
        """False when decoding happens on this worker, or when the first token is the last or there is none."""
        return not self.task.placement.is_local and self.task.request.max_new_tokens > 1

    def move(self, status: RequestStatus) -> None:
        check_transition(self.status, status)
        self.status = status


def _chunk(job: PrefillJob, budget: int) -> int:
    """How much of a prompt runs next. A cut is made at a round number: attention kernels are planned per shape."""
    num_left = job.sequence.num_unscheduled_tokens
    if num_left <= budget:
        return num_left
    return budget if budget < CHUNK_STEP else budget // CHUNK_STEP * CHUNK_STEP


class PrefillScheduler:
    """The prefill queue of one worker.

    `lookahead_tokens` says how far ahead of its turn a prompt asks for its reservation.
    """

    def __init__(self, blocks: BlockManager, lookahead_tokens: int) -> None:
        self._blocks = blocks
        self._lookahead_tokens = lookahead_tokens
        self.waiting: list[PrefillJob] = []
        self.running: list[PrefillJob] = []

    def add(self, job: PrefillJob) -> None:
        job.move(RequestStatus.WAITING)
        self.waiting.append(job)

    def remove(self, job: PrefillJob) -> None:
        """Takes a job out, wherever it is; the caller releases its blocks."""
        for queue in (self.waiting, self.running):
            if job in queue:
                queue.remove(job)

    def num_staying(self) -> int:
        """Samples that running prompts will bring into this worker's own decoding batch."""
        return sum(job.task.request.sampling.n for job in self.running if not job.needs_handoff)

    def jobs_to_reserve(self) -> list[PrefillJob]:
        """Waiting prompts that are about to run and have not asked for their reservation.

        Counted for each decode worker by itself, at least one for each, so that a full one does not starve others.
        """
        running = sum(job.sequence.num_unscheduled_tokens for job in self.running)
        ahead: dict[WorkerId, int] = {}
        wanted: list[PrefillJob] = []
        for job in self.waiting:
            peer = job.task.placement.decode_worker
            if peer in ahead and ahead[peer] >= self._lookahead_tokens:
                continue
            ahead[peer] = ahead.get(peer, running) + job.sequence.num_unscheduled_tokens
            if job.needs_handoff and job.status is RequestStatus.WAITING:
                wanted.append(job)
        return wanted

    def schedule(self, budget: int, may_start: Callable[[PrefillJob], bool]) -> list[tuple[PrefillJob, int]]:
        """(job, number of tokens) for the next step: running prompts first, then new ones while budget and blocks last.

        `may_start` tells whether there is room to decode: a reservation elsewhere, or space here if the prompt stays.
        """
        planned: list[tuple[PrefillJob, int]] = []
        for job in self.running:
            if budget <= 0:
                return planned
            if not job.sequence.num_unscheduled_tokens:
                continue  # its last chunk is in flight
            num_tokens = _chunk(job, budget)
            planned.append((job, num_tokens))
            budget -= num_tokens
        for job in list(self.waiting):
            if budget <= 0:
                break
            if not may_start(job):
                continue
            if not self._admit(job):
                break
            num_tokens = _chunk(job, budget)
            planned.append((job, num_tokens))
            budget -= num_tokens
        return planned

    def finish_prefill(self, job: PrefillJob) -> None:
        """The prompt is computed: the job leaves the queue, its blocks stay with the caller."""
        self.running.remove(job)

    def _admit(self, job: PrefillJob) -> bool:
        """Gives the job blocks for its whole prompt, shared with known prefixes. False when too few are free."""
        sequence = job.sequence
        # Prompt log-probabilities need every logit, so nothing of such a prompt may be skipped.
        wants_logits = sequence.sampling.prompt_logprobs is not None
        cached = [] if wants_logits else self._blocks.match_prefix(sequence.token_ids, sequence.cache_salt)
        self._blocks.share(cached)
        missing = self._blocks.blocks_for(sequence.num_tokens) - len(cached)
        if missing > self._blocks.num_free_blocks:
            self._blocks.release(cached)
            return False
        sequence.block_table = cached + self._blocks.allocate(missing)
        sequence.num_computed_tokens = job.num_cached_tokens = len(cached) * self._blocks.block_size
        self.waiting.remove(job)
        self.running.append(job)
        job.move(RequestStatus.PREFILLING)
        return True
