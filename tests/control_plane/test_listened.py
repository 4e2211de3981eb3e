"""Silence is counted in the time in which it could have been broken."""

from __future__ import annotations

import pytest

from control_plane.cluster_scheduler import ClusterScheduler
from phasewise.core.clock import ManualClock
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.listened import ListenedTime
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import WorkerId, WorkerRole, WorkerState
from phasewise.core.profile import DeviceProfile

OVERDUE_S = 5.0
HEARTBEAT_S = 1.0


class Watched:
    """A scheduler whose workers report once in each heartbeat, those that are `dead` do not."""

    def __init__(self, *worker_ids: WorkerId) -> None:
        self.clock = ManualClock()
        self.scheduler = ClusterScheduler(self.clock, max_waiting=9, overdue_s=OVERDUE_S, heartbeat_s=HEARTBEAT_S)
        self.dead: set[WorkerId] = set()
        self.worker_ids = worker_ids
        spec, profile = KVCacheSpec(2, 1, 4, 16, "float32"), DeviceProfile.linear(0.0, 0.001, 0.0, 0.001)
        for worker_id in worker_ids:
            self.scheduler.worker_joined(
                WorkerInfo(worker_id, WorkerRole.MIXED, 1, "h", "cpu", "float32", 1, spec, 9, 99, profile)
            )

    def reports(self) -> None:
        for worker_id in self.worker_ids:
            if worker_id not in self.dead:
                self.scheduler.worker_load(WorkerLoad(worker_id, WorkerRole.MIXED, WorkerState.READY))

    def beat(self, count: int = 1) -> list[WorkerId]:
        """So many heartbeats with their reports and ticks; who was found lost."""
        lost: list[WorkerId] = []
        for _ in range(count):
            self.clock.advance(HEARTBEAT_S)
            self.reports()
            lost += self.scheduler.tick()
        return lost

    def pause(self, seconds: float) -> list[WorkerId]:
        """This process is stopped for so long; the tick behind it comes before the reports that queued up."""
        self.clock.advance(seconds)
        lost = self.scheduler.tick()
        self.reports()
        return lost


@pytest.mark.parametrize("pause_s", [OVERDUE_S + 0.1, 3600.0, 1e6])
def test_a_pause_of_the_listener_is_nobodys_silence(pause_s: float) -> None:
    watched = Watched("a", "b")
    assert watched.beat(3) == []
    assert watched.pause(pause_s) == []
    assert watched.scheduler.listened.missed_s == pytest.approx(pause_s - HEARTBEAT_S)
    assert watched.beat(20) == []


def test_who_is_dead_behind_a_pause_is_found_in_its_time() -> None:
    watched = Watched("a", "b")
    watched.beat(3)
    watched.dead.add("b")
    assert watched.pause(3600.0) == []
    beats = 0
    while not (lost := watched.beat()):
        beats += 1
    assert lost == ["b"]
    assert beats <= OVERDUE_S / HEARTBEAT_S, "the pause itself made it no later"
    assert watched.beat(20) == []


def test_who_died_before_the_pause_is_found_as_if_there_had_been_none() -> None:
    watched, undisturbed = Watched("a", "b"), Watched("a", "b")
    for each in (watched, undisturbed):
        each.dead.add("b")
        assert each.beat(3) == []
    assert watched.pause(60.0) == []
    undisturbed.beat(1)
    assert watched.beat(2) == undisturbed.beat(2) == ["b"]


def test_a_report_of_before_the_pause_that_is_read_behind_it_counts_as_heard_then() -> None:
    """Its worker was silent for nearly too long when the listener was stopped."""
    watched = Watched("a")
    watched.dead.add("a")
    assert watched.beat(5) == []
    watched.dead.clear()
    assert watched.pause(3600.0) == [], "its report waits behind the tick"
    assert watched.beat(4) == []


def test_pauses_again_and_again() -> None:
    watched = Watched("a", "b")
    for _ in range(100):
        assert watched.pause(OVERDUE_S * 2) == []
        assert watched.beat() == []
    watched.dead.add("b")
    lost: list[WorkerId] = []
    for _ in range(6):
        lost += watched.pause(1.5 * HEARTBEAT_S)  # too late for a tick, too short for a pause
    assert lost == ["b"]


def test_the_time_in_which_a_cluster_starts_is_no_pause() -> None:
    """The control plane is made first; its ticks begin when all workers have loaded."""
    watched = Watched("a", "b")
    listened = watched.scheduler.listened
    watched.clock.advance(60.0)
    before_s = listened.now_s()
    listened.begin()
    assert listened.now_s() == before_s, "it never goes back"
    assert (listened.missed_s, listened.is_behind_pause) == (0.0, False)
    assert watched.beat() == []
    assert (listened.missed_s, listened.is_behind_pause) == (0.0, False)
    watched.pause(60.0)
    assert listened.is_behind_pause


def test_who_is_always_late_finds_a_dead_worker() -> None:
    """Each tick comes so late that one is missing before it, and the reports wait behind it each time."""
    watched = Watched("a", "b")
    watched.dead.add("b")
    lost: list[WorkerId] = []
    for _ in range(20):
        lost += watched.pause(2.2 * HEARTBEAT_S)
    assert lost == ["b"]
    watched.beat()
    assert watched.pause(3600.0) == []
    assert watched.scheduler.listened.is_behind_pause, "a tick in time ends the lateness"


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
