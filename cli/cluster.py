"""A running cluster as its command sees it, and the ways in which it comes to its end."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field

from cli.ray_runtime import Outcome, RayRuntime
from phasewise.core.config import ServingConfig
from phasewise.core.handles import ActorHandle
from phasewise.core.messages import WorkerInfo

RAY_HAS_ENDED = "Ray's control process (gcs_server) has ended"

_WATCH_S = 1.0
_RAY_FAILURES = 3


@dataclass(frozen=True, slots=True)
class ClusterEnd:
    """Why a cluster is to end: a fault, or "" when somebody asked for it. `drains`: open requests may finish first."""

    fault: str = ""
    drains: bool = True


Ends = queue.SimpleQueue[ClusterEnd]
"""Who wants a cluster to end puts the reason here; the first counts. (A SimpleQueue, because a signal handler puts it
there: an Event's lock could be held by the very thread that the handler interrupts.)"""


@dataclass(slots=True)
class Cluster:
    """A running cluster. `addresses` has the `http`, `grpc` and `admin` addresses that are really listened on."""

    config: ServingConfig
    model_name: str
    context_length: int
    workers: list[WorkerInfo]
    addresses: dict[str, str]
    ends: Ends = field(default_factory=queue.SimpleQueue)


class ClusterWatch:
    """A thread that puts a cluster's end into `ends`: it was stopped, its control plane has ended for good, or its Ray
    has. A control plane that is started again is no end."""

    def __init__(self, ends: Ends, runtime: RayRuntime, control_plane: ActorHandle) -> None:
        self._ends = ends
        self._runtime = runtime
        self._control_plane = control_plane
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cluster-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Nothing is put from now on. Returns when the thread asks Ray nothing any more."""
        self._is_stopping.set()
        self._thread.join(_WATCH_S + 5.0)

    def _run(self) -> None:
        try:
            self._look()
        except Exception:
            if not self._is_stopping.is_set():  # else Ray was closed under a question: the user did not wait
                raise

    def _look(self) -> None:
        num_failures = 0
        call = self._control_plane.wait_closed.remote()
        while not self._is_stopping.is_set():
            outcome = self._runtime.outcome(call, _WATCH_S)
            num_failures = 0 if self._runtime.is_alive() else num_failures + 1
            if num_failures >= _RAY_FAILURES:
                self._ends.put(ClusterEnd(RAY_HAS_ENDED, drains=False))
                return
            if outcome is Outcome.ANSWERED or (outcome is Outcome.ENDED and not self._runtime.is_private):
                self._ends.put(ClusterEnd(drains=False))
                return
            if outcome is Outcome.ENDED:
                self._ends.put(ClusterEnd("the control plane has ended for good", drains=False))
                return
            if outcome is Outcome.UNREACHED:
                self._is_stopping.wait(_WATCH_S)
                call = self._control_plane.wait_closed.remote()
