"""Who may ask for room, keep it and begin, while prompts are computed that nobody has accepted."""

from __future__ import annotations

import pytest

from kv_transfer.state import SendStatus
from prefill_workers.admission import Admission
from prefill_workers.job import PrefillJob
from prefill_workers.scheduler import PrefillScheduler
from tests.support.prefill_jobs import accepted, blocks_of, job_of, offered, unplaced, waiting


def beside_unplaced(num_blocks: int, num_tokens: int, decode_worker: str = "decode-0") -> Admission:
    """With a prompt that waits for room at `decode_worker` and holds blocks for `num_tokens` here."""
    blocks = blocks_of(num_blocks)
    scheduler = PrefillScheduler(blocks, 1000)
    unplaced(scheduler, job_of("unplaced", num_tokens, decode_worker))
    return Admission(blocks, scheduler.handing_off)


def alone(num_blocks: int = 100) -> Admission:
    return Admission(blocks_of(num_blocks), [])


def queued(job: PrefillJob) -> PrefillJob:
    waiting(PrefillScheduler(blocks_of(1), 0), job)
    return job


def test_everybody_may_ask_while_all_computed_prompts_have_their_room() -> None:
    assert alone(1).may_reserve(job_of("larger than the cache", 40))


def test_nobody_asks_for_the_room_that_a_computed_prompt_waits_for() -> None:
    admission = beside_unplaced(100, 40)
    assert not admission.may_reserve(job_of("same", 4, "decode-0"))
    assert admission.may_reserve(job_of("other", 4, "decode-1"))


def test_nobody_keeps_room_while_it_waits_for_blocks_that_a_computed_prompt_holds() -> None:
    admission = beside_unplaced(20, 40)  # 10 blocks of 4 tokens are free
    assert admission.may_reserve(job_of("fits", 40, "decode-1"))
    assert not admission.may_reserve(job_of("does not", 41, "decode-1"))
    assert not admission.may_begin(accepted(queued(job_of("accepted", 41, "decode-1"))), 0, may_be_early=True)
    assert not admission.may_begin(job_of("one token", 41, "decode-1", max_tokens=1), 0, may_be_early=True)
    assert not admission.may_begin(job_of("here", 41, "prefill-0"), 9, may_be_early=True)


def test_a_prompt_that_was_accepted_or_that_ends_with_its_first_token_begins() -> None:
    for admission in (alone(), beside_unplaced(100, 40)):
        assert admission.may_begin(accepted(queued(job_of("accepted", 40))), 0, may_be_early=False)
        assert admission.may_begin(job_of("one token", 40, max_tokens=1), 0, may_be_early=False)
        assert admission.may_begin(job_of("none", 40, max_tokens=0), 0, may_be_early=False)


def test_a_prompt_that_was_not_offered_or_was_refused_does_not_begin() -> None:
    assert not alone().may_begin(job_of("planned", 40), 9, may_be_early=True)
    failed = offered(queued(job_of("failed", 40)))
    failed.handoff.attempt.move(SendStatus.FAILED)
    assert not alone().may_begin(failed, 9, may_be_early=True)


@pytest.mark.parametrize(("num_tokens", "expected"), [(200, True), (201, False)])
def test_a_prompt_begins_before_the_answer_if_it_leaves_half_of_the_blocks(num_tokens: int, expected: bool) -> None:
    assert alone(100).may_begin(offered(queued(job_of("r", num_tokens))), 0, may_be_early=True) is expected


def test_no_prompt_begins_early_behind_others_or_beside_an_unplaced_one() -> None:
    early = offered(queued(job_of("r", 4, "decode-1")))
    assert not alone().may_begin(early, 0, may_be_early=False)
    assert not beside_unplaced(100, 40).may_begin(early, 0, may_be_early=True)


@pytest.mark.parametrize(("num_seats", "expected"), [(3, True), (2, False), (0, False), (-1, False)])
def test_a_prompt_that_stays_needs_a_seat_for_each_sample(num_seats: int, expected: bool) -> None:
    assert alone().may_begin(job_of("r", 4, "prefill-0", n=3), num_seats, may_be_early=False) is expected


def test_a_computed_prompt_that_was_accepted_is_in_nobodys_way() -> None:
    blocks = blocks_of(20)
    scheduler = PrefillScheduler(blocks, 1000)
    job = unplaced(scheduler, job_of("computed", 40))
    job.handoff.attempt.move(SendStatus.ACCEPTED)
    assert Admission(blocks, scheduler.handing_off).may_reserve(job_of("same", 60, "decode-0"))
