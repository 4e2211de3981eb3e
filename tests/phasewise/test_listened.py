"""Time is counted in which this process ran. What follows for the silent: tests/control_plane/test_membership.py."""

from __future__ import annotations

import pytest

from phasewise.core.clock import ManualClock
from phasewise.core.listened import ListenedTime

PERIOD_S = 1.0


def ticked(clock: ManualClock, listened: ListenedTime, count: int, every_s: float = PERIOD_S) -> None:
    for _ in range(count):
        clock.advance(every_s)
        listened.tick()


@pytest.mark.parametrize("pause_s", [2.5, 45.0, 3600.0, 1e6])
def test_a_pause_counts_for_a_period_and_is_seen_once(pause_s: float) -> None:
    clock = ManualClock()
    listened = ListenedTime(clock, PERIOD_S)
    ticked(clock, listened, 3)
    ticked(clock, listened, 1, every_s=pause_s)
    assert (listened.now_s(), listened.is_behind_pause) == (4.0, True)
    assert listened.missed_s == pytest.approx(pause_s - PERIOD_S)
    ticked(clock, listened, 1)
    assert (listened.now_s(), listened.is_behind_pause) == (5.0, False)


def test_who_is_always_late_is_behind_no_pause_but_at_first() -> None:
    clock = ManualClock()
    listened = ListenedTime(clock, PERIOD_S)
    seen = []
    for _ in range(4):
        ticked(clock, listened, 1, every_s=2.2 * PERIOD_S)
        seen.append(listened.is_behind_pause)
    assert seen == [True, False, False, False]
    ticked(clock, listened, 1)
    ticked(clock, listened, 1, every_s=3600.0)
    assert listened.is_behind_pause, "a tick in time ends the lateness"


def test_the_time_before_the_first_tick_is_no_pause() -> None:
    clock = ManualClock()
    listened = ListenedTime(clock, PERIOD_S)
    clock.advance(60.0)
    before_s = listened.now_s()
    listened.begin()
    assert listened.now_s() == before_s, "it never goes back"
    assert (listened.missed_s, listened.is_behind_pause) == (0.0, False)
    ticked(clock, listened, 1)
    assert not listened.is_behind_pause
    ticked(clock, listened, 1, every_s=60.0)
    assert listened.is_behind_pause


def test_listened_time_goes_on_between_ticks_and_never_faster_than_the_clock() -> None:
    clock = ManualClock(100.0)
    listened = ListenedTime(clock, 1.0)
    seen = [listened.now_s()]
    for step_s, ticks in ((0.0, False), (0.25, False), (0.25, True), (0.75, False), (9.0, False), (0.0, True)):
        clock.advance(step_s)
        if ticks:
            listened.tick()
        seen.append(listened.now_s())
    assert seen == [0.0, 0.0, 0.25, 0.5, 1.25, 1.5, 1.5]
    listened.tick()  # a clock that has not moved since
    assert (listened.now_s(), listened.missed_s, listened.is_behind_pause) == (1.5, 0.0, False)
    clock.advance(1.0)  # exactly in time
    listened.tick()
    assert (listened.now_s(), listened.missed_s) == (2.5, 0.0)
