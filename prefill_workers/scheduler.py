"""Which prompts run next, and how much of each. Pure: no clock, no tensors, no I/O.

A prompt is in exactly one place:
    waiting      first come first served; holds no blocks. When it is about to run and is to be handed off, blocks are
                 asked for at its decode worker (RESERVING); until they are granted, later prompts may pass it
    running      holds blocks for its whole prompt; runs in chunks inside the token budget
    handing_off  computed; holds its blocks until the decode worker has its KV
It leaves when it is handed off, when decoding begins here, or when it ends (`remove`).
"""

from __future__ import annotations

from collections.abc import Collection

from engine.block_manager import BlockManager
from phasewise.core.lifecycle import RequestStatus
from phasewise.core.placement import WorkerId
from prefill_workers.admission import Admission
from prefill_workers.job import PrefillJob

CHUNK_STEP = 256
"""Prompts are cut at multiples of it, where the budget allows."""


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
        self.handing_off: list[PrefillJob] = []

    def add(self, job: PrefillJob) -> None:
        job.move(RequestStatus.WAITING)
        self.waiting.append(job)

    def remove(self, job: PrefillJob) -> None:
        """Takes a job out, wherever it is; the caller releases its blocks."""
        for queue in (self.waiting, self.running, self.handing_off):
            if job in queue:
                queue.remove(job)

    def hand_off(self, job: PrefillJob) -> None:
        """The prompt is computed and its KV is to leave: its blocks stay."""
        job.move(RequestStatus.HANDOFF)
        self.running.remove(job)
        self.handing_off.append(job)

    @property
    def num_staying(self) -> int:
        """Samples that running prompts will bring into this worker's own decoding batch."""
        return sum(job.num_samples for job in self.running if not job.needs_handoff)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens that are not computed."""
        return sum(job.sequence.num_unscheduled_tokens for job in self.waiting + self.running)

    def jobs_to_reserve(self) -> list[PrefillJob]:
        """Waiting prompts that are about to run and are to ask for their reservation now.

        Counted for each decode worker by itself, at least one for each, so that a full one does not starve others.
        """
        admission = Admission(self._blocks, self.handing_off)
        running = sum(job.sequence.num_unscheduled_tokens for job in self.running)
        ahead: dict[WorkerId, int] = {}
        wanted: list[PrefillJob] = []
        for job in self.waiting:
            peer = job.handoff.peer
            if peer in ahead and ahead[peer] >= self._lookahead_tokens:
                continue
            ahead[peer] = ahead.get(peer, running) + job.sequence.num_unscheduled_tokens
            if job.needs_handoff and job.status is RequestStatus.WAITING and admission.may_reserve(job):
                wanted.append(job)
        return wanted

    def jobs_to_give_back(self) -> list[PrefillJob]:
        """Waiting prompts that may not keep what they asked for: a computed one goes first."""
        admission = Admission(self._blocks, self.handing_off)
        reserving = (job for job in self.waiting if job.status is RequestStatus.RESERVING)
        return [job for job in reserving if not admission.may_reserve(job)]

    def schedule(
        self, budget: int, num_seats: int, only: Collection[str] | None = None
    ) -> list[tuple[PrefillJob, int]]:
        """(job, number of tokens) for the next step: running prompts first, then new ones while budget and blocks last.

        `num_seats`: free ones in this worker's own decoding batch, those of running prompts that stay not taken off.
        `only`: the requests that may take part; None for all.
        """
        planned: list[tuple[PrefillJob, int]] = []
        admission = Admission(self._blocks, self.handing_off)
        is_first = True  # of those that wait and are to be handed off
        for job in self.running + self.waiting:
            if budget <= 0:
                break
            if only is not None and job.request_id not in only:
                continue
            if job.status is not RequestStatus.PREFILLING:
                may_be_early = is_first and not self.running
                is_first = is_first and not job.needs_handoff
                if not admission.may_begin(job, num_seats - self.num_staying, may_be_early=may_be_early):
                    continue
                if not self._admit(job):
                    break
            if num_tokens := _chunk(job, budget):  # 0 when the last chunk is in flight
                planned.append((job, num_tokens))
                budget -= num_tokens
        return planned

    def _admit(self, job: PrefillJob) -> bool:
        """Gives the job blocks for its whole prompt, shared with known prefixes. False when too few are free."""
        # Prompt log-probabilities need every logit, so nothing of such a prompt may be skipped.
        may_skip = job.sequence.sampling.prompt_logprobs is None
        if not self._blocks.allocate_prompt(job.sequence, may_skip=may_skip):
            return False
        job.num_cached_tokens = job.sequence.num_computed_tokens
        self.waiting.remove(job)
        self.running.append(job)
        job.move(RequestStatus.PREFILLING)
        return True
