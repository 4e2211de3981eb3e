"""The Ray shell of a worker process: builds one WorkerProcess (process.py) and delegates.

`ray.remote` is applied where the cluster is launched. `wait_closed` stays open while the step loop runs: who waits for
its answer learns of the end of the loop, and of the process, at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np

from phasewise.core.errors import ServingError
from phasewise.core.handles import ActorHandle, as_value
from phasewise.core.links import LinkProbe, WorkerLinks
from phasewise.core.logs import setup_logging
from phasewise.core.messages import GatewayLost, KVPart, PeerLost, WorkerInfo, WorkerMessage
from phasewise.core.placement import WorkerId
from workers.process import WorkerProcess
from workers.settings import WorkerSettings

SWITCH_S = 0.0005
"""How long the loop's thread keeps the interpreter while another wants it. Python's default is 5 ms. The links' threads
need it for little at a time, and the next part waits for them."""


class WorkerActor:
    """One worker of a cluster, called by gateways, other workers, the control plane and the launcher."""

    def __init__(self, settings: WorkerSettings) -> None:
        sys.setswitchinterval(SWITCH_S)
        logs = settings.config.logging
        setup_logging(settings.worker_id, log_format=logs.format, level=logs.level, collector=settings.log_collector)
        self._process = WorkerProcess(settings)

    async def load(self) -> WorkerInfo | ServingError:
        return await as_value(self._process.load())

    async def progress(self) -> float:
        return self._process.progress

    async def connect(
        self,
        workers: Mapping[WorkerId, ActorHandle],
        gateways: Mapping[str, str],
        control_plane: ActorHandle,
    ) -> None:
        self._process.connect(workers, gateways, control_plane)

    async def open_links(self, addresses: Mapping[WorkerId, str]) -> ServingError | None:
        return await as_value(self._process.open_links(addresses))

    async def start(self) -> None:
        self._process.start()

    async def post(self, message: WorkerMessage) -> None:
        """A message from a gateway or another worker."""
        assert self._process.worker is not None, "requests are placed on workers that have started"
        self._process.worker.post(message)

    async def post_part(self, sender: WorkerId, part: KVPart, array: np.ndarray) -> None:
        """A part of a handoff, with its bytes in shared memory."""
        assert self._process.links is not None
        self._process.links.receive(sender, part, array)

    async def member_lost(self, message: PeerLost | GatewayLost) -> None:
        self._process.member_lost(message)

    async def links(self, peers: Sequence[WorkerInfo]) -> WorkerLinks:
        """What this worker knows of its links to `peers`."""
        assert self._process.worker is not None
        return self._process.worker.links(peers)

    async def probe_link(self, peer: WorkerId, num_bytes: int, timeout_s: float) -> LinkProbe:
        return await self._process.probe_link(peer, num_bytes, timeout_s)

    async def stop(self) -> None:
        await self._process.stop()

    async def wait_closed(self) -> None:
        await self._process.wait_closed()
