"""The retry decisions, on a clock that the test moves."""

from __future__ import annotations

import random

import pytest

from phasewise.core.clock import ManualClock
from phasewise.core.errors import DuplicateRequest, InternalError, InvalidRequest, Overloaded, Unavailable, WorkerLost
from phasewise.retry import Attempts, RetryPolicy
from phasewise.targets import Targets


def attempts(
    clock: ManualClock, *, num_targets: int = 1, timeout_s: float | None = None, max_retries: int = 10
) -> Attempts:
    return Attempts(
        RetryPolicy(max_retries=max_retries, backoff_s=1.0, max_backoff_s=4.0),
        Targets(num_targets, clock),
        timeout_s=timeout_s,
        clock=clock,
        rng=random.Random(1),
    )


def test_backoff_doubles_between_half_and_all_of_it_up_to_its_bound() -> None:
    tried = attempts(ManualClock())
    delays = [tried.next_delay_s(Unavailable("x"), delivered=False) for _ in range(5)]
    for delay, full in zip(delays, (1.0, 2.0, 4.0, 4.0, 4.0), strict=True):
        assert delay is not None and full / 2 <= delay <= full
    assert len(set(delays)) == 5, "jitter"


def test_other_targets_come_first_and_cost_no_wait() -> None:
    tried = attempts(ManualClock(), num_targets=3)
    seen = []
    for _ in range(4):
        delay = tried.next_delay_s(Unavailable("x"), delivered=False)
        seen.append((tried.target, delay == 0.0))
    assert seen == [(1, True), (2, True), (0, False), (1, True)]


def test_a_hint_holds_for_the_target_that_gave_it() -> None:
    clock = ManualClock()
    tried = attempts(clock, num_targets=2)
    assert tried.next_delay_s(Overloaded("x", retry_after_s=9.0), delivered=False) == 0.0
    clock.advance(2.0)
    assert tried.next_delay_s(Overloaded("x"), delivered=False) == pytest.approx(7.0)


def test_the_deadline_bounds_all_attempts_together() -> None:
    clock = ManualClock()
    tried = attempts(clock, timeout_s=10.0)
    assert tried.time_left_s() == 10.0
    assert tried.next_delay_s(Overloaded("x", retry_after_s=9.0), delivered=False) == 9.0
    clock.advance(9.5)
    assert tried.time_left_s() == 0.5
    assert tried.next_delay_s(Overloaded("x", retry_after_s=0.5), delivered=False) is None
    clock.advance(9.5)
    assert tried.time_left_s() == 0.0


def test_an_answer_that_was_begun_goes_on_only_where_its_gateway_is_away() -> None:
    assert attempts(ManualClock()).next_delay_s(WorkerLost("x"), delivered=True) is None
    tried = attempts(ManualClock(), num_targets=2)
    assert tried.next_delay_s(Unavailable("x"), delivered=True) == 0.0
    assert tried.next_delay_s(Overloaded("the other is full"), delivered=True) is not None


def test_each_gateway_that_brings_something_may_be_followed_by_as_many_attempts() -> None:
    tried = attempts(ManualClock(), num_targets=2, max_retries=1)
    for _ in range(5):
        tried.answered()
        assert tried.next_delay_s(Unavailable("x"), delivered=True) == 0.0
    assert tried.next_delay_s(Unavailable("x"), delivered=True) is None, "that one brought nothing"
    tried = attempts(ManualClock(), max_retries=1)
    tried.answered()
    assert tried.next_delay_s(WorkerLost("x"), delivered=False) is not None
    tried.answered()
    assert tried.next_delay_s(WorkerLost("x"), delivered=False) is None, "it may be what kills workers"


def test_what_is_never_tried_again() -> None:
    assert attempts(ManualClock()).next_delay_s(InternalError("x"), delivered=False) is None
    assert attempts(ManualClock()).next_delay_s(DuplicateRequest("x"), delivered=False) is None
    assert attempts(ManualClock(), max_retries=0).next_delay_s(Unavailable("x"), delivered=False) is None


def test_a_duplicate_of_an_own_earlier_attempt_is_waited_for() -> None:
    tried = attempts(ManualClock())
    assert tried.next_delay_s(Unavailable("x"), delivered=False) is not None
    assert tried.next_delay_s(DuplicateRequest("x"), delivered=False) is not None


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan")])
def test_a_wrong_timeout_is_refused(timeout_s: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        attempts(ManualClock(), timeout_s=timeout_s)
    assert caught.value.field == "timeout_s"


@pytest.mark.parametrize(
    ("values", "field"), [({"max_retries": -1}, "max_retries"), ({"backoff_s": -1}, "retry_backoff_s")]
)
def test_a_wrong_policy_is_refused(values: dict[str, int], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        RetryPolicy(**values)  # type: ignore[arg-type]
    assert caught.value.field == field
