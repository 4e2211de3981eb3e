"""The running batch: who steps, who is preempted, who comes back."""

from __future__ import annotations

import random

import pytest

from decode_workers.reservations import ReservationQueue, Room
from decode_workers.scheduler import DecodePlan, DecodeScheduler
from engine.block_manager import BlockManager
from engine.sequence import Sequence
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import KVOffer
from phasewise.core.request import Request, SamplingParams


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
            if rng.random() < 0.2 and scheduler.has_room(1) and blocks.num_free_blocks > 3:
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


def offer_of(name: str, num_tokens: int, n: int = 1) -> KVOffer:
    request = Request(name, tuple(range(num_tokens)), SamplingParams(n=n))
    return KVOffer(f"{name}#0.0", 1, "prefill-0", KVCacheSpec(1, 1, 2, 4, "float32"), request, "g", 60.0)


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (Room(100, 100, 0, 0), True),
        (Room(100, 11, 3, 0), False),  # 10 blocks would leave less than the head-room of 5
        (Room(100, 15, 3, 0), True),
        (Room(100, 50, 3, 1), False),  # somebody preempted waits to come back
        (Room(100, 50, 8, 0), False),  # the batch is full
        (Room(100, 10, 0, 0), True),  # nobody runs: no head-room needed
        (Room(100, 9, 0, 0), False),
    ],
)
def test_reservations_leave_room_for_what_runs(room: Room, expected: bool) -> None:
    queue = ReservationQueue(4, max_running=8, headroom=0.05)
    queue.add(offer_of("r", 40), 60.0)
    assert (queue.next_acceptable(room) is not None) is expected


def test_offers_are_first_come_first_served_and_expire() -> None:
    queue = ReservationQueue(4, max_running=8, headroom=0.0)
    queue.add(offer_of("big", 80), 50.0)
    queue.add(offer_of("small", 4), 60.0)
    assert queue.next_acceptable(Room(30, 10, 1, 0)) is None, "a small one must not starve the big one"
    assert queue.next_deadline_s() == 50.0
    assert [offer.request.request_id for offer in queue.expired(50.0)] == ["big"]
    taken = queue.next_acceptable(Room(30, 10, 1, 0))
    assert taken is not None
    assert taken.offer.request.request_id == "small"
    assert taken.deadline_s == 60.0
    assert queue.impossible(offer_of("r", 200), Room(30, 30, 0, 0))
    assert queue.impossible(offer_of("r", 4, n=9), Room(30, 30, 0, 0))
