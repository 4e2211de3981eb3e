"""Who may join the decoding batch, and in which order offers are answered."""

from __future__ import annotations

import pytest

from decode_workers.joining import JoiningRules, Occupancy, ReservationQueue
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import KVOffer
from phasewise.core.request import Request, SamplingParams

EMPTY = Occupancy(100, 0, 0, 0)


def rules_of(num_blocks: int = 100, max_running: int = 8, headroom: float = 0.05) -> JoiningRules:
    return JoiningRules(num_blocks, 4, max_running, headroom)


def offer_of(name: str, num_tokens: int, n: int = 1) -> KVOffer:
    request = Request(name, tuple(range(num_tokens)), SamplingParams(n=n))
    return KVOffer(f"{name}#0.0", 1, "prefill-0", KVCacheSpec(1, 1, 2, 4, "float32"), request, "g", 60.0)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (Occupancy(100, 0, 0, 0), True),
        (Occupancy(14, 3, 0, 0), False),  # 10 blocks would leave less than the head-room of 5
        (Occupancy(15, 3, 0, 0), True),
        (Occupancy(14, 0, 0, 1), False),  # what is on its way here counts as what runs
        (Occupancy(50, 3, 1, 0), False),  # a preempted sequence waits to come back
        (Occupancy(50, 0, 1, 0), False),
        (Occupancy(50, 8, 0, 0), False),  # the batch is full
        (Occupancy(50, 4, 0, 4), False),  # or will be
        (Occupancy(50, 4, 0, 3), True),
        (Occupancy(10, 0, 0, 0), True),  # nothing else is here: no head-room is needed
        (Occupancy(9, 0, 0, 0), False),
    ],
)
def test_reservations_leave_room_for_what_runs(now: Occupancy, expected: bool) -> None:
    assert rules_of().may_reserve(offer_of("r", 40), now) is expected


def test_each_sample_needs_a_seat_and_all_but_one_a_block_of_its_own() -> None:
    rules = rules_of(headroom=0.0)
    assert rules.blocks_needed(offer_of("r", 40, n=3)) == 12
    assert rules.may_reserve(offer_of("r", 40, n=3), Occupancy(12, 3, 0, 2))
    assert not rules.may_reserve(offer_of("r", 40, n=3), Occupancy(11, 3, 0, 2))
    assert not rules.may_reserve(offer_of("r", 40, n=3), Occupancy(12, 4, 0, 2))


@pytest.mark.parametrize(
    ("now", "expected"),
    [(EMPTY, 8), (Occupancy(1, 3, 0, 2), 3), (Occupancy(90, 3, 1, 0), 0), (Occupancy(1, 8, 0, 0), 0)],
)
def test_free_seats_are_those_that_nobody_has_and_none_while_anybody_is_preempted(
    now: Occupancy, expected: int
) -> None:
    assert rules_of().num_free_seats(now) == expected


def test_what_an_empty_worker_could_not_take_is_impossible() -> None:
    rules = rules_of(num_blocks=30)
    assert rules.impossible(offer_of("r", 120, n=1)) == ""
    assert rules.impossible(offer_of("r", 121)) == "the prompt needs 31 KV blocks and this worker has 30"
    assert rules.impossible(offer_of("r", 117, n=2))
    assert rules.impossible(offer_of("r", 4, n=9)) == "n=9 exceeds max_running=8"


def test_offers_are_first_come_first_served_and_expire() -> None:
    queue = ReservationQueue(rules_of(num_blocks=30, headroom=0.0))
    queue.add(offer_of("big", 80), 50.0)
    queue.add(offer_of("small", 4), 60.0)
    now = Occupancy(10, 1, 0, 0)
    assert queue.next_acceptable(now) is None, "a small one must not starve the big one"
    assert queue.next_deadline_s() == 50.0
    assert queue.remove(lambda waiting: waiting.deadline_s <= 49.9) == []
    over = queue.remove(lambda waiting: waiting.deadline_s <= 50.0)
    assert [offer.request.request_id for offer in over] == ["big"]
    taken = queue.next_acceptable(now)
    assert taken is not None
    assert taken.offer.request.request_id == "small"
    assert taken.deadline_s == 60.0
    assert len(queue) == 0 and queue.next_acceptable(now) is None


def test_offers_leave_in_their_order_and_those_that_match_are_returned() -> None:
    queue = ReservationQueue(rules_of())
    for name in "abcd":
        queue.add(offer_of(name, 4), 60.0)
    first = queue.next_acceptable(EMPTY)
    assert first is not None and first.offer.request.request_id == "a"
    others = queue.remove(lambda waiting: waiting.offer.request.request_id != "c")
    assert [offer.request.request_id for offer in others] == ["b", "d"]
    assert len(queue) == 1
