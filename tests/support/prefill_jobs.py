"""Prompts in a prefill worker's queue, in any state, without a worker."""

from __future__ import annotations

from engine.block_manager import BlockManager
from engine.sequence import Sequence
from kv_transfer.outgoing import Attempt
from kv_transfer.state import SendStatus
from phasewise.core.lifecycle import RequestStatus
from phasewise.core.messages import PrefillTask
from phasewise.core.placement import Placement
from phasewise.core.request import Request, SamplingParams
from prefill_workers.job import PrefillJob
from prefill_workers.scheduler import PrefillScheduler

BLOCK_SIZE = 4


def blocks_of(num_blocks: int) -> BlockManager:
    return BlockManager(num_blocks, BLOCK_SIZE, prefix_caching=False)


def job_of(name: str, num_tokens: int, decode_worker: str = "decode-0", **sampling: int) -> PrefillJob:
    """A prompt of `prefill-0`; one that stays there when that is its decode worker, too."""
    request = Request(name, tuple(range(num_tokens)), SamplingParams(**{"max_tokens": 8, **sampling}))
    task = PrefillTask(request, Placement(name, "prefill-0", decode_worker), "gateway-0", 60.0)
    sequence = Sequence(name, request.sampling, list(request.prompt_token_ids), num_tokens)
    return PrefillJob(task, sequence, 60.0)


def waiting(scheduler: PrefillScheduler, *jobs: PrefillJob) -> None:
    for job in jobs:
        scheduler.add(job)


def offered(job: PrefillJob) -> PrefillJob:
    """Its decode worker is asked for room, and has not answered."""
    if job.status is RequestStatus.WAITING:
        job.move(RequestStatus.RESERVING)
    job.handoff.attempt = Attempt(f"{job.request_id}#1")
    job.handoff.attempt.move(SendStatus.OFFERED)
    return job


def accepted(job: PrefillJob) -> PrefillJob:
    offered(job).handoff.attempt.move(SendStatus.ACCEPTED)
    return job


def unplaced(scheduler: PrefillScheduler, job: PrefillJob) -> PrefillJob:
    """It began early and is computed, and its decode worker has not answered yet."""
    waiting(scheduler, job)
    offered(job)
    plan = scheduler.schedule(job.sequence.num_tokens, 0)
    assert [planned for planned, _ in plan] == [job], "the first may begin early"
    scheduler.hand_off(job)
    return job
