"""How long others were silent, or a step has run, counted only while this process itself ran. Pure.

The control plane itself can be stopped: a virtual machine that is paused, a frozen container, a debugger. Meanwhile it
hears no worker, and afterwards its clock may be hours ahead of every report. Its own pause must not count as silence of
the workers. So silence is counted in listened time, which advances with the clock, but by at most one period between
two ticks:

    clock      0   1   2                               3602  3603
    ticks      |   |   |        (stopped)                |    |
    listened   0   1   2                                 3    4

A dead worker is still found, `overdue_s` of listened time after its last report. Reports that queued up during a pause
may be read after the first tick that follows it, so no worker is lost at that tick (`is_behind_pause`). At the next
tick workers are judged again, even if that tick is overdue as well: a process whose ticks are always overdue must still
find a dead worker.

No tick comes while the cluster starts. `begin` marks that ticks come from now on, so that the start is no pause.

A clock that stands still while the machine sleeps (CLOCK_MONOTONIC on Linux) shows no gap, and adds nothing either.
"""

from __future__ import annotations

from phasewise.core.clock import Clock


class ListenedTime:
    """Seconds in which this process listened, since it was made. `tick` is to be called every `period_s`.

    Attributes:
        missed_s: what the last tick did not count, because the process was stopped, or too busy to tick.
        is_behind_pause: whether at least one tick is missing before the last one, and none was missing before that.
    """

    def __init__(self, clock: Clock, period_s: float) -> None:
        self._clock = clock
        self._period_s = period_s
        self._ticked_s = clock.now_s()
        self._counted_s = 0.0
        self._is_overdue = False
        self.missed_s = 0.0
        self.is_behind_pause = False

    def begin(self) -> None:
        """Ticks come from now on. The time before counts for at most a period, and is no pause."""
        self.tick()
        self.missed_s, self._is_overdue, self.is_behind_pause = 0.0, False, False

    def tick(self) -> None:
        """Counts the time since the tick before, up to a period of it."""
        since_s = self._clock.now_s() - self._ticked_s
        counted_s = min(since_s, self._period_s)
        self.missed_s = since_s - counted_s
        self._counted_s += counted_s
        self._ticked_s += since_s
        was_overdue, self._is_overdue = self._is_overdue, self.missed_s >= self._period_s
        self.is_behind_pause = self._is_overdue and not was_overdue

    def now_s(self) -> float:
        """Listened time, at most a period past the last tick."""
        return self._counted_s + min(self._clock.now_s() - self._ticked_s, self._period_s)
