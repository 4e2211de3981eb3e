"""A running cluster as its command sees it, and the ways in which it comes to its end."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from phasewise.core.config import ServingConfig
from phasewise.core.handles import ActorHandle
from phasewise.core.messages import WorkerInfo


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
    """A running cluster. `addresses` has the `http` and `grpc` addresses that are really listened on."""

    config: ServingConfig
    model_name: str
    context_length: int
    workers: list[WorkerInfo]
    addresses: dict[str, str]
    ends: Ends = field(default_factory=queue.SimpleQueue)


def watch_for_ends(ends: Ends, gateway: ActorHandle, control_plane: ActorHandle) -> None:
    """Ends the cluster when the gateway, the control plane or a pool is gone: without them nothing is served."""

    def on_end(name: str) -> Callable[[Any], None]:
        return lambda future: ends.put(ClusterEnd(f"the {name} process has ended", drains=False))

    def on_unservable(future: Any) -> None:
        if future.exception() is None:  # else the control plane itself is gone
            ends.put(ClusterEnd(future.result()))

    gateway.wait_closed.remote().future().add_done_callback(on_end("gateway"))
    control_plane.wait_closed.remote().future().add_done_callback(on_end("control plane"))
    control_plane.wait_unservable.remote().future().add_done_callback(on_unservable)
