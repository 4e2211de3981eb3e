"""Heartbeats: how long a step runs, loads at once, and a control plane that is away."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from phasewise.core.clock import ManualClock, MonotonicClock
from phasewise.core.heartbeat import Heartbeat, HeartbeatAnswer
from phasewise.core.messages import WorkerLoad
from phasewise.core.placement import WorkerRole, WorkerState
from phasewise.core.pulse import MAX_UNANSWERED, Pulse, PulseEvents, StepWatch
from phasewise.core.view import View

WAIT_S = 10.0


def test_a_step_is_counted_from_its_beginning_and_a_pause_of_the_process_is_not() -> None:
    clock = ManualClock(100.0)
    watch = StepWatch(clock, 1.0)
    assert watch.look(None) == 0.0
    began_s = clock.now_s()
    clock.advance(1.0)
    assert watch.look(began_s) == 1.0
    clock.advance(1.0)
    assert watch.look(began_s) == 2.0
    clock.advance(40.0)  # the whole process was stopped
    assert watch.look(began_s) == 3.0
    clock.advance(1.0)
    assert watch.look(clock.now_s() - 0.25) == 0.25, "another step"
    assert watch.look(None) == 0.0


class ControlPlane:
    """An actor's handle that keeps heartbeats, with a future for the answer to each."""

    def __init__(self) -> None:
        self.calls: queue.Queue[tuple[Heartbeat, Future[Any]]] = queue.Queue()
        self.is_away = False
        self.heartbeat = self

    def remote(self, beat: Heartbeat) -> Any:
        if self.is_away:
            raise ConnectionError("it is being started again")
        future: Future[Any] = Future()
        self.calls.put((beat, future))

        class Call:
            def future(self) -> Future[Any]:
                return future

        return Call()

    def next(self) -> tuple[Heartbeat, Future[Any]]:
        return self.calls.get(timeout=WAIT_S)


class Member:
    def __init__(self, interval_s: float = 1e6) -> None:
        self.control_plane = ControlPlane()
        self.views: queue.Queue[View] = queue.Queue()
        self.ends: queue.Queue[bool] = queue.Queue()
        events = PulseEvents(lambda: 7, lambda: None, self.views.put, lambda: self.ends.put(True))
        self.pulse = Pulse("decode-0#1", self.control_plane, interval_s, events, MonotonicClock())
        self.pulse.start()


@pytest.fixture
def member() -> Iterator[Member]:
    made = Member()
    yield made
    made.pulse.stop()


def test_a_load_goes_out_at_once_and_only_once(member: Member) -> None:
    first, _ = member.control_plane.next()
    assert first == Heartbeat("decode-0#1", 7)
    load = WorkerLoad("decode-0#1", WorkerRole.DECODE, WorkerState.READY, num_running=3)
    member.pulse.report(load)
    assert member.control_plane.next()[0].load == load
    member.pulse.beat()
    assert member.control_plane.next()[0].load is None


def test_the_last_load_is_told_before_the_pulse_stops(member: Member) -> None:
    member.control_plane.next()
    load = WorkerLoad("decode-0#1", WorkerRole.DECODE, WorkerState.STOPPED)
    member.pulse.report(load)
    member.pulse.stop()
    assert member.control_plane.next()[0].load == load


def test_the_answer_brings_the_view_or_the_end(member: Member) -> None:
    _, answer = member.control_plane.next()
    answer.set_result(HeartbeatAnswer(View(9)))
    assert member.views.get(timeout=WAIT_S) == View(9)
    member.pulse.beat()
    _, answer = member.control_plane.next()
    answer.set_result(HeartbeatAnswer(is_gone=True))
    assert member.ends.get(timeout=WAIT_S)


def test_heartbeats_go_on_while_the_control_plane_is_away_and_do_not_pile_up() -> None:
    member = Member(interval_s=0.001)
    try:
        unanswered = [member.control_plane.next()[1] for _ in range(MAX_UNANSWERED + 1)]
        assert member.control_plane.calls.empty(), "no more than these wait for an answer"
        unanswered[0].set_exception(ConnectionError("it has ended"))
        _, again = member.control_plane.next()
        member.control_plane.is_away = True
        for answer in (*unanswered[1:], again):
            answer.set_exception(ConnectionError("it has ended"))
        member.control_plane.is_away = False
        member.control_plane.next()[1].set_result(HeartbeatAnswer())
        member.control_plane.next()
        assert member.ends.empty() and member.views.empty()
    finally:
        member.pulse.stop()
