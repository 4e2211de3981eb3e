"""The running batch: who steps, who is preempted, who comes back."""

from __future__ import annotations

import random

from decode_workers.scheduler import DecodePlan, DecodeScheduler
from engine.block_manager import BlockManager
from engine.sequence import Sequence
from phasewise.core.request import SamplingParams


def sequence_of(name: str, num_tokens: int, blocks: BlockManager) -> Sequence:
    """A sequence with `num_tokens` computed and one more to compute."""
    return Sequence(
        request_id=name,
        sampling=SamplingParams(max_tokens=1000),
        token_ids=list(range(num_tokens + 1)),
        num_prompt_tokens=num_tokens,
        num_computed_tokens=num_tokens,
        block_table=blocks.allocate(blocks.blocks_for(num_tokens)),
    )


def step(plan: DecodePlan) -> None:
    for job in plan.jobs:
        job.sequence.num_computed_tokens += 1
        job.sequence.token_ids.append(0)


def test_the_youngest_is_preempted_and_the_oldest_gets_on() -> None:
    blocks = BlockManager(7, 4, prefix_caching=False)
    scheduler = DecodeScheduler(blocks, max_running=8)
    jobs = [scheduler.add(sequence_of(name, 8, blocks), "g", 1e9) for name in "abc"]
    plan = scheduler.schedule()
    assert [job.sequence.request_id for job, _ in plan.swap_out] == ["c"]
    assert [job.sequence.request_id for job in plan.jobs] == ["a", "b"]
    assert plan.swap_in == []
    assert jobs[2].sequence.block_table == []
    step(plan)
    blocks.check()
    scheduler.remove(jobs[0])
    plan = scheduler.schedule()
    assert plan.swap_in == [jobs[2]]
    assert jobs[2] in plan.jobs
    assert len(jobs[2].sequence.block_table) == 3
    blocks.check()


def test_a_shared_block_is_copied_before_the_first_write_and_the_last_owner_keeps_it() -> None:
    blocks = BlockManager(8, 4, prefix_caching=False)
    scheduler = DecodeScheduler(blocks, max_running=8)
    parent = sequence_of("a", 6, blocks)
    twin = sequence_of("b", 0, blocks)
    twin.token_ids, twin.num_prompt_tokens, twin.num_computed_tokens = list(parent.token_ids), 6, 6
    twin.block_table = list(parent.block_table)
    blocks.share(twin.block_table)
    scheduler.add(parent, "g", 1e9)
    scheduler.add(twin, "g", 1e9)
    plan = scheduler.schedule()
    assert len(plan.copies) == 1
    ((source, target),) = plan.copies
    assert source == twin.block_table[1]
    assert target == parent.block_table[1]
    assert parent.block_table[0] == twin.block_table[0]
    step(plan)
    assert scheduler.schedule().copies == []


def test_random_histories_lose_no_block_and_always_get_on() -> None:
    rng = random.Random(5)
    for _ in range(30):
        blocks = BlockManager(rng.randrange(8, 24), 4, prefix_caching=False)
        scheduler = DecodeScheduler(blocks, max_running=6)
        left: dict[str, int] = {}
        names = iter(range(1000))
        for _ in range(400):
            if (
                rng.random() < 0.2
                and not scheduler.preempted
                and len(scheduler.running) < 6
                and blocks.num_free_blocks > 3
            ):
                name = str(next(names))
                scheduler.add(sequence_of(name, rng.randrange(1, 9), blocks), "g", 1e9)
                left[name] = rng.randrange(1, 20)
            plan = scheduler.schedule()
            assert plan.jobs or not left or plan.swap_out, "nobody gets on"
            assert not (plan.swap_in and plan.swap_out)
            orders = [job.order for job in scheduler.running]
            assert orders == sorted(orders)
            held = [b for job in scheduler.running for b in job.sequence.block_table]
            assert len(held) == len(set(held)) == blocks.num_used_blocks
            step(plan)
            for job in list(plan.jobs):
                left[job.sequence.request_id] -= 1
                if left[job.sequence.request_id] == 0:
                    scheduler.remove(job)
                    del left[job.sequence.request_id]
            blocks.check()


def test_a_sequence_is_asked_for_a_block_only_where_the_next_one_begins() -> None:
    blocks = BlockManager(8, 4, prefix_caching=False)
    scheduler = DecodeScheduler(blocks, max_running=8)
    job = scheduler.add(sequence_of("a", 7, blocks), "g", 1e9)
    num_blocks = []
    for _ in range(7):
        step(scheduler.schedule())
        num_blocks.append(len(job.sequence.block_table))
    assert num_blocks == [2, 3, 3, 3, 3, 4, 4]


def test_what_comes_back_from_host_memory_leaves_blocks_that_it_shares() -> None:
    """Its blocks are others than those that it could write to before."""
    blocks = BlockManager(6, 4, prefix_caching=False)
    scheduler = DecodeScheduler(blocks, max_running=8)
    old = scheduler.add(sequence_of("old", 10, blocks), "g", 1e9)
    young = scheduler.add(sequence_of("young", 8, blocks), "g", 1e9)
    for _ in range(3):
        step(scheduler.schedule())
    assert scheduler.preempted == [young] and young.sequence.num_computed_tokens == 10
    scheduler.remove(old)
    step(plan := scheduler.schedule())
    assert plan.swap_in == [young]
    shared = list(young.sequence.block_table)
    blocks.share(shared)
    assert [source for source, _ in scheduler.schedule().copies] == [shared[2]]
    blocks.release(shared)
    blocks.check()


def test_a_job_is_found_by_its_sequence_as_long_as_it_is_here() -> None:
    blocks = BlockManager(8, 4, prefix_caching=False)
    scheduler = DecodeScheduler(blocks, max_running=8)
    job = scheduler.add(sequence_of("a", 7, blocks), "g", 1e9)
    assert scheduler.job_of == {job.sequence: job}
    scheduler.remove(job)
    assert scheduler.job_of == {}
