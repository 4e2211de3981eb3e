"""Where calls go, on a clock that the test moves."""

from __future__ import annotations

from phasewise.core.clock import ManualClock
from phasewise.targets import Targets


def test_calls_go_to_all_in_turn() -> None:
    targets = Targets(3, ManualClock(), first=1)
    assert [targets.choose() for _ in range(6)] == [1, 2, 0, 1, 2, 0]
    assert targets.choose(tried={1, 2}) == 0


def test_a_target_that_was_away_is_passed_over_and_then_tried_by_one_call() -> None:
    clock = ManualClock()
    targets = Targets(2, clock)
    targets.was_away(0)
    assert [targets.choose() for _ in range(3)] == [1, 1, 1]
    clock.advance(1.0)
    assert sorted(targets.choose() for _ in range(3)) == [0, 1, 1], "the others do not wait for the one that tries"
    targets.was_away(0)
    clock.advance(1.5)
    assert {targets.choose() for _ in range(3)} == {1}, "twice as long"
    clock.advance(0.5)
    assert 0 in {targets.choose() for _ in range(2)}
    targets.answered(0)
    assert sorted(targets.choose() for _ in range(4)) == [0, 0, 1, 1]


def test_where_all_are_away_the_one_that_was_away_longest_is_tried() -> None:
    clock = ManualClock()
    targets = Targets(3, clock)
    for index in (2, 0, 1):
        targets.was_away(index)
        clock.advance(0.1)
    assert targets.choose() == 2
    assert targets.choose(tried={0, 2}) == 1
