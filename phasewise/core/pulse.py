"""Heartbeats of one member, from a thread of its own: they go on while a step computes, hangs, or holds the event loop.

A member gives one each `interval_s`, and at once when it has something to say: its load, or that it needs the whole
view. The control plane may be away for seconds, while it is started again: heartbeats go on, and nothing else changes.
Calls that it has not answered do not pile up.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from phasewise.core.clock import Clock
from phasewise.core.handles import ActorHandle
from phasewise.core.heartbeat import Heartbeat, HeartbeatAnswer
from phasewise.core.identity import MemberId
from phasewise.core.listened import ListenedTime
from phasewise.core.messages import WorkerLoad
from phasewise.core.view import View

logger = logging.getLogger(__name__)

MAX_UNANSWERED = 3
JOIN_S = 5.0


class StepWatch:
    """How long a step has been running, seen from outside of it, while this process ran itself. Pure."""

    def __init__(self, clock: Clock, interval_s: float) -> None:
        self._clock = clock
        self._listened = ListenedTime(clock, interval_s)
        self._looked_s = 0.0  # listened time
        self._began_s: float | None = None
        self._step_s = 0.0

    def look(self, began_s: float | None) -> float:
        """Seconds, for a step that began at `began_s` of the clock; 0.0 for None. To be called each `interval_s`."""
        self._listened.tick()
        before_s, self._looked_s = self._looked_s, self._listened.now_s()
        since_s = self._looked_s - before_s
        if began_s is None:
            self._step_s = 0.0
        elif began_s == self._began_s:
            self._step_s += since_s
        else:
            self._step_s = min(since_s, self._clock.now_s() - began_s)
        self._began_s = began_s
        return self._step_s


@dataclass(frozen=True, slots=True)
class PulseEvents:
    """What a pulse asks and tells. All are called by threads that are not the member's own.

    `view_version`: of the view that the member has; 0 when it needs the whole. `step_began_s`: when the step that runs
    began; None between steps.
    """

    view_version: Callable[[], int]
    step_began_s: Callable[[], float | None]
    on_view: Callable[[View], None]
    on_gone: Callable[[], None]


class Pulse:
    """The heartbeats of one member, between `start` and `stop`."""

    def __init__(
        self, member_id: MemberId, control_plane: ActorHandle, interval_s: float, events: PulseEvents, clock: Clock
    ) -> None:
        self._member_id = member_id
        self._control_plane = control_plane
        self._interval_s = interval_s
        self._events = events
        self._steps = StepWatch(clock, interval_s)
        self._load: WorkerLoad | None = None  # the newest that was not told yet
        self._unanswered: list[Future[Any]] = []
        self._is_answered = True
        self._wake = threading.Event()
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def report(self, load: WorkerLoad) -> None:
        """Tells the load with a heartbeat at once. Any thread; returns at once."""
        self._load = load
        self._wake.set()

    def beat(self) -> None:
        """Gives a heartbeat at once. Any thread."""
        self._wake.set()

    def stop(self) -> None:
        """Gives no heartbeat any more. A load that was not told yet is."""
        self._is_stopped.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    # ---- inside

    def _run(self) -> None:
        while not self._is_stopped.is_set():
            self._beat()
            self._wake.wait(self._interval_s)
            self._wake.clear()
        if self._load is not None:
            self._beat()

    def _beat(self) -> None:
        step_s = self._steps.look(self._events.step_began_s())
        self._unanswered = [future for future in self._unanswered if not future.done()]
        if len(self._unanswered) > MAX_UNANSWERED:
            return
        load, self._load = self._load, None
        try:
            call = self._control_plane.heartbeat.remote(
                Heartbeat(self._member_id, self._events.view_version(), step_s, load)
            )
            future = call.future()
        except Exception as error:  # Ray's own: the control plane is being started again
            self._no_answer(error)
            return
        self._unanswered.append(future)
        future.add_done_callback(self._on_answer)

    def _on_answer(self, future: Future[Any]) -> None:
        if (error := future.exception()) is not None:
            self._no_answer(error)
            return
        answer = future.result()
        assert isinstance(answer, HeartbeatAnswer)
        if not self._is_answered:
            self._is_answered = True
            logger.info("the control plane answers again")
        if answer.is_gone:
            self._events.on_gone()
        elif answer.view is not None:
            self._events.on_view(answer.view)

    def _no_answer(self, error: BaseException) -> None:
        if self._is_answered and not self._is_stopped.is_set():
            self._is_answered = False
            logger.warning("the control plane does not answer (%s); heartbeats go on", type(error).__name__)
