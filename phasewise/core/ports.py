"""The protocols that cross package boundaries. Shells implement them over Ray; tests implement them with lists."""

from __future__ import annotations

from typing import Protocol

from phasewise.core.messages import WorkerLoad, WorkerMessage, WorkerOutput
from phasewise.core.placement import WorkerId


class GatewayPort(Protocol):
    """How a worker answers: one call per step and gateway."""

    def deliver(self, gateway_id: str, output: WorkerOutput) -> None:
        """Sends and returns at once; an unknown or dead gateway is not an error here."""


class PeerPort(Protocol):
    """How a worker talks to another worker, and a gateway to any worker."""

    def send(self, worker_id: WorkerId, message: WorkerMessage) -> None:
        """Sends and returns at once; loss of the peer is reported by the control plane, not here."""


class LoadPort(Protocol):
    """How a worker reports its load."""

    def report(self, load: WorkerLoad) -> None: ...
