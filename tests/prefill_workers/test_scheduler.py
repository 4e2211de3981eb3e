"""The prefill queue: whose turn it is, how much of a prompt runs, who asks for room and who gives it back."""

from __future__ import annotations

import random

from engine.block_manager import BlockManager
from kv_transfer.state import SendStatus
from phasewise.core.lifecycle import RequestStatus
from prefill_workers.job import PrefillJob
from prefill_workers.scheduler import CHUNK_STEP, PrefillScheduler
from tests.support.prefill_jobs import BLOCK_SIZE, accepted, blocks_of, job_of, offered, unplaced, waiting

HERE = "prefill-0"


def names(jobs: list[PrefillJob]) -> list[str]:
    return [job.request_id for job in jobs]


def planned(scheduler: PrefillScheduler, budget: int, num_seats: int = 100) -> list[tuple[str, int]]:
    plan = scheduler.schedule(budget, num_seats)
    for job, num_tokens in plan:
        job.sequence.begin_step(num_tokens)
    return [(job.request_id, num_tokens) for job, num_tokens in plan]


def test_running_prompts_go_first_and_new_ones_take_what_is_left() -> None:
    scheduler = PrefillScheduler(blocks_of(1000), 1000)
    waiting(scheduler, *(job_of(name, 100, HERE) for name in "abc"))
    assert planned(scheduler, 150) == [("a", 100), ("b", 50)]
    assert planned(scheduler, 150) == [("b", 50), ("c", 100)]
    assert planned(scheduler, 150) == [], "all of their tokens are in flight"


def test_a_prompt_is_cut_at_a_round_number_where_the_budget_has_one() -> None:
    scheduler = PrefillScheduler(blocks_of(1000), 1000)
    waiting(scheduler, job_of("r", 2000, HERE))
    assert planned(scheduler, CHUNK_STEP + 100) == [("r", CHUNK_STEP)]
    assert planned(scheduler, CHUNK_STEP - 1) == [("r", CHUNK_STEP - 1)]
    assert planned(scheduler, 5000) == [("r", 2000 - 2 * CHUNK_STEP + 1)]


def test_prompts_that_stay_take_seats_from_each_other() -> None:
    scheduler = PrefillScheduler(blocks_of(1000), 1000)
    waiting(scheduler, job_of("a", 8, HERE, n=2), job_of("b", 8, HERE, n=2), job_of("c", 8, HERE))
    assert planned(scheduler, 100, num_seats=3) == [("a", 8), ("c", 8)]
    assert scheduler.num_staying == 3
    assert planned(scheduler, 100, num_seats=4) == []
    assert planned(scheduler, 100, num_seats=5) == [("b", 8)]


def test_prompts_that_are_handed_off_take_no_seats() -> None:
    scheduler = PrefillScheduler(blocks_of(100), 1000)
    waiting(scheduler, away := job_of("away", 8, n=2), job_of("here", 8, HERE))
    accepted(away)
    assert planned(scheduler, 100, num_seats=1) == [("away", 8), ("here", 8)]
    assert scheduler.num_staying == 1


def test_known_prefixes_are_shared_and_given_back_by_a_prompt_that_does_not_fit() -> None:
    blocks = BlockManager(10, BLOCK_SIZE)
    scheduler = PrefillScheduler(blocks, 1000)
    first, small, large = (job_of(name, n, HERE) for name, n in (("first", 20), ("small", 12), ("large", 40)))
    waiting(scheduler, first, small)
    assert planned(scheduler, 20) == [("first", 20)]
    first.sequence.end_step(20)
    blocks.publish(first.sequence)
    assert planned(scheduler, 20) == [("small", 4)], "8 of 12 tokens are known"
    assert small.num_cached_tokens == 8 and small.sequence.block_table[:2] == first.sequence.block_table[:2]
    waiting(scheduler, large)
    assert planned(scheduler, 20) == [], "4 blocks are free, and 6 are missing"
    scheduler.remove(large)
    for job in (first, small):
        leave(scheduler, job, blocks)
    blocks.check()
    assert blocks.num_used_blocks == 0


def test_a_prompt_whose_log_probabilities_are_wanted_is_computed_as_a_whole() -> None:
    blocks = BlockManager(20, BLOCK_SIZE)
    scheduler = PrefillScheduler(blocks, 1000)
    waiting(scheduler, first := job_of("first", 20, HERE))
    assert planned(scheduler, 20) == [("first", 20)]
    first.sequence.end_step(20)
    blocks.publish(first.sequence)
    waiting(scheduler, job_of("same", 20, HERE, prompt_logprobs=0))
    assert planned(scheduler, 100) == [("same", 20)]


def test_one_that_has_no_blocks_holds_those_behind_it_back() -> None:
    scheduler = PrefillScheduler(blocks_of(10), 1000)
    waiting(scheduler, job_of("a", 20, HERE), job_of("large", 24, HERE), job_of("small", 4, HERE))
    assert planned(scheduler, 100) == [("a", 20)]
    assert names(scheduler.waiting) == ["large", "small"]


def test_later_prompts_pass_one_that_waits_for_its_answer() -> None:
    scheduler = PrefillScheduler(blocks_of(100), 1000)
    waiting(scheduler, job_of("a", 8), job_of("b", 8, HERE))
    assert planned(scheduler, 100) == [("b", 8)]


def test_only_the_first_that_is_handed_off_begins_before_the_answer_and_only_if_nothing_runs() -> None:
    scheduler = PrefillScheduler(blocks_of(100), 1000)
    waiting(scheduler, job_of("too large", 300), job_of("b", 8))
    for job in scheduler.waiting:
        offered(job)
    assert planned(scheduler, 1000) == [], "the first must leave half of the blocks, and the second is not the first"
    scheduler.remove(scheduler.waiting[0])
    waiting(scheduler, offered_later := job_of("c", 8))
    offered(offered_later)
    assert planned(scheduler, 1000) == [("b", 8)]
    assert planned(scheduler, 1000) == [], "something runs"
    runs = PrefillScheduler(blocks_of(100), 1000)
    waiting(runs, job_of("here", 8, HERE), job_of("r", 8))
    offered(runs.waiting[1])
    assert planned(runs, 1000) == [("here", 8)]
    waiting(stays := PrefillScheduler(blocks_of(100), 1000), job_of("here", 8, HERE), job_of("r", 8))
    offered(stays.waiting[1])
    assert planned(stays, 1000, num_seats=0) == [("r", 8)], "one that stays here is no handoff"


def test_each_decode_worker_is_asked_ahead_by_itself_and_at_least_once() -> None:
    scheduler = PrefillScheduler(blocks_of(1000), lookahead_tokens=100)
    waiting(scheduler, *(job_of(f"a{i}", 60, "decode-0") for i in range(3)), job_of("b", 500, "decode-1"))
    waiting(scheduler, job_of("here", 10, HERE), job_of("one token", 10, "decode-2", max_tokens=1))
    assert names(scheduler.jobs_to_reserve()) == ["a0", "a1", "b"]
    offered(scheduler.waiting[0])
    assert names(scheduler.jobs_to_reserve()) == ["a1", "b"]
    accepted(scheduler.waiting[0])
    assert planned(scheduler, 10, num_seats=0) == [("a0", 10)]
    assert names(scheduler.jobs_to_reserve()) == ["a1", "b"], "50 tokens that run are ahead, too"
    assert planned(scheduler, 50, num_seats=0) == [("a0", 50)]
    assert names(scheduler.jobs_to_reserve()) == ["a1", "a2", "b"]


def test_what_a_computed_prompt_waits_for_is_neither_asked_for_nor_kept() -> None:
    scheduler = PrefillScheduler(blocks_of(100), 1000)
    job = unplaced(scheduler, job_of("computed", 80))  # 80 blocks stay free
    waiting(scheduler, job_of("same", 8), job_of("other", 8, "decode-1"), job_of("too large", 324, "decode-1"))
    assert names(scheduler.jobs_to_reserve()) == ["other"]
    for other in scheduler.waiting:
        accepted(other)
    assert names(scheduler.jobs_to_give_back()) == ["same", "too large"]
    job.handoff.attempt.move(SendStatus.ACCEPTED)
    assert scheduler.jobs_to_give_back() == []


def test_what_was_not_asked_for_cannot_be_given_back() -> None:
    scheduler = PrefillScheduler(blocks_of(100), 1000)
    unplaced(scheduler, job_of("computed", 80))
    waiting(scheduler, job_of("same", 8))
    assert scheduler.jobs_to_give_back() == []


def test_a_prompt_is_in_one_place_until_it_is_removed() -> None:
    scheduler = PrefillScheduler(blocks_of(100), 1000)
    job = job_of("r", 80)
    waiting(scheduler, job)
    places = [scheduler.waiting, scheduler.running, scheduler.handing_off]
    accepted(job)
    for index, status in enumerate((RequestStatus.RESERVING, RequestStatus.PREFILLING, RequestStatus.HANDOFF)):
        assert [job in place for place in places] == [i == index for i in range(3)]
        assert job.status is status
        (lambda: scheduler.schedule(100, 0), lambda: scheduler.hand_off(job), lambda: scheduler.remove(job))[index]()
    assert not any(places)


def test_waiting_tokens_are_those_that_are_not_computed() -> None:
    scheduler = PrefillScheduler(blocks_of(100), 1000)
    waiting(scheduler, job_of("a", 80, HERE), job_of("b", 50, HERE))
    assert planned(scheduler, 30) == [("a", 30)]
    assert scheduler.num_waiting_tokens == 100


def test_random_histories_lose_no_block_and_every_prompt_gets_its_turn() -> None:
    rng = random.Random(3)
    for _ in range(20):
        blocks = blocks_of(rng.randrange(20, 60))
        scheduler = PrefillScheduler(blocks, 100)
        left = 60
        for _ in range(3000):
            if left and rng.random() < 0.4:
                place = rng.choice([HERE, "decode-0", "decode-1"])
                waiting(scheduler, job_of(str(left), rng.randrange(1, 76), place, n=rng.randrange(1, 3)))
                left -= 1
            for job in scheduler.jobs_to_reserve():
                offered(job)
            for job in (*scheduler.waiting, *scheduler.running, *scheduler.handing_off):
                if job.is_unanswered and rng.random() < 0.2:
                    job.handoff.attempt.move(SendStatus.ACCEPTED)
            plan = scheduler.schedule(rng.randrange(1, 64), num_seats=4)
            for job, num_tokens in plan:
                job.sequence.begin_step(num_tokens)
                job.sequence.end_step(num_tokens)
                if job.sequence.is_prefilling:
                    continue
                if job.needs_handoff:
                    scheduler.hand_off(job)
                    for other in scheduler.jobs_to_give_back():
                        other.handoff.attempt = type(other.handoff.attempt)()
                        other.move(RequestStatus.WAITING)
                else:
                    leave(scheduler, job, blocks)
            for job in list(scheduler.handing_off):
                if not job.is_unanswered and rng.random() < 0.5:
                    leave(scheduler, job, blocks)
            blocks.check()
            if not left and not scheduler.waiting and not scheduler.running and not scheduler.handing_off:
                break
        else:
            raise AssertionError(f"{names(scheduler.waiting)} wait for ever")
        assert blocks.num_used_blocks == 0


def leave(scheduler: PrefillScheduler, job: PrefillJob, blocks: BlockManager) -> None:
    scheduler.remove(job)
    blocks.release(job.sequence.block_table)
