"""Who is in the cluster, and who has to hear of whom. Pure: events in, messages to the members out.

Event              What follows
    worker_joined    requests may be placed on it; it is told which workers are lost already
    gateway_joined   it is told which workers are lost already
    worker_ended     the worker is lost
    tick             a worker that was silent for too long is lost
    gateway_ended    every worker is told, and drops the gateway's requests
    stop             from now on ends are expected: no worker is lost any more

A worker is lost once. Its process may be there still, hanging or without its loop: it is killed, so that it holds
neither device nor links. The other workers free what they held for it, and the gateways move its requests.
"""

from __future__ import annotations

import logging
from typing import Protocol

from control_plane.cluster_scheduler import ClusterScheduler
from phasewise.core.messages import GatewayLost, PeerLost, WorkerInfo
from phasewise.core.placement import WorkerId

logger = logging.getLogger(__name__)


class Members(Protocol):
    """How workers and gateways that have joined are reached. Every call returns at once."""

    def tell_worker(self, worker_id: WorkerId, message: PeerLost | GatewayLost) -> None:
        """Tells a worker that somebody else was lost."""

    def tell_gateway(self, gateway_id: str, lost: WorkerId) -> None:
        """Tells a gateway that a worker was lost."""

    def kill_worker(self, worker_id: WorkerId) -> None:
        """Ends the worker's process, whatever it does. Nothing is sent to this worker afterwards."""


class Membership:
    """The members of one cluster. `is_stopping`: the cluster was told to stop."""

    def __init__(self, scheduler: ClusterScheduler, members: Members) -> None:
        self.is_stopping = False
        self._scheduler = scheduler
        self._members = members
        self._gateways: set[str] = set()
        self._last_loss = ""

    def worker_joined(self, info: WorkerInfo) -> None:
        for worker_id in self._scheduler.registry.lost():
            self._members.tell_worker(info.worker_id, PeerLost(worker_id))
        self._scheduler.worker_joined(info)
        logger.info("worker joined (%s on %s)", info.role.value, info.device, extra={"worker_id": info.worker_id})

    def gateway_joined(self, gateway_id: str) -> None:
        self._gateways.add(gateway_id)
        for worker_id in self._scheduler.registry.lost():
            self._members.tell_gateway(gateway_id, worker_id)

    def worker_ended(self, worker_id: WorkerId, reason: str) -> None:
        """The worker's process, or its loop, has ended. `reason` completes "worker was lost: …"."""
        if not self.is_stopping and self._scheduler.worker_lost(worker_id):
            self._tell_lost(worker_id, reason)

    def gateway_ended(self, gateway_id: str, fault: str) -> None:
        """The gateway's process has ended; in order when `fault` is empty."""
        if fault:
            logger.error("gateway %s was lost: %s", gateway_id, fault)
        self._gateways.discard(gateway_id)
        for worker_id in self._scheduler.registry.present():
            self._members.tell_worker(worker_id, GatewayLost(gateway_id))

    def tick(self) -> None:
        """Looks for silent workers. To be called every `heartbeat_s`."""
        if self.is_stopping:
            return
        for worker_id in self._scheduler.tick():
            self._tell_lost(worker_id, f"silent for {self._scheduler.registry.overdue_s:g} s")
        listened = self._scheduler.listened
        if listened.is_behind_pause:
            logger.warning(
                "the control plane did not run for %.1f s; no worker's silence counts for it", listened.missed_s
            )

    def stop(self) -> None:
        self.is_stopping = True

    def why_unservable(self) -> str:
        """Why no request can be served any more, with the loss that led to it; "" while nothing was lost for good."""
        reason = self._scheduler.why_unservable() if self._last_loss else ""
        return f"{reason}: {self._last_loss}, and lost workers do not come back" if reason else ""

    def _tell_lost(self, worker_id: WorkerId, reason: str) -> None:
        logger.error("worker was lost: %s", reason, extra={"worker_id": worker_id})
        self._last_loss = f"{worker_id} was lost ({reason})"
        self._members.kill_worker(worker_id)
        for other in self._scheduler.registry.present():
            self._members.tell_worker(other, PeerLost(worker_id))
        for gateway_id in self._gateways:
            self._members.tell_gateway(gateway_id, worker_id)
