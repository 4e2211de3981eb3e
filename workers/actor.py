"""The Ray shell of a worker process: builds one plain Worker, runs its loop on a thread, passes messages in.

Life: made → `load` (links, weights, cache, profile; `progress` meanwhile) → `connect` → `open_links` → `start` → … →
`stop`.
`wait_closed` stays open while the loop runs; whoever awaits it learns at once when the process dies.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kv_transfer.link import ArrivedPart, WriteReceived, write_nothing
from phasewise.core.clock import MonotonicClock
from phasewise.core.collector import freeze_collector
from phasewise.core.errors import ServingError
from phasewise.core.handles import ActorHandle, GatewayHandles, WorkerHandles
from phasewise.core.links import LinkProbe, WorkerLinks
from phasewise.core.logs import setup_logging
from phasewise.core.messages import GatewayLost, KVPart, PeerLost, WorkerInfo, WorkerLoad, WorkerMessage
from phasewise.core.placement import WorkerId
from workers.assemble import Ports, assemble
from workers.build import LoadedEngine, load_engine, worker_info
from workers.links import Links
from workers.probing import probe_link
from workers.settings import WorkerSettings
from workers.worker import Worker

logger = logging.getLogger(__name__)

SWITCH_S = 0.0005
"""How long the loop's thread keeps the interpreter while another wants it (5 ms by default): those of links do little,
and the next part waits for them."""


class WorkerActor:
    """One worker of a cluster. `ray.remote` is applied where the cluster is launched."""

    def __init__(self, settings: WorkerSettings) -> None:
        sys.setswitchinterval(SWITCH_S)
        logs = settings.config.logging
        setup_logging(settings.worker_id, log_format=logs.format, level=logs.level, collector=settings.log_collector)
        self._settings = settings
        self._progress = 0.0
        self._peers = WorkerHandles()
        self._gateways = GatewayHandles()
        self._control_plane: ActorHandle = None
        self._engine: LoadedEngine | None = None
        self._links: Links | None = None
        self._worker: Worker | None = None
        self._loop_task: asyncio.Task[None] | None = None

    async def load(self) -> WorkerInfo | ServingError:
        """Loads the model. An error that a user can mend comes back as a value: Ray would wrap it."""
        try:
            await asyncio.to_thread(self._load)
        except ServingError as error:
            return error
        return self._info()

    def _load(self) -> None:
        self._links = Links(self._settings, self._peers, self._post_from_link, self._prepare_write)
        self._engine = load_engine(self._settings, self._set_progress, MonotonicClock())
        self._links.agree_on(self._engine.port.spec)

    async def progress(self) -> float:
        """How far `load` is, 0 … 1."""
        return self._progress

    async def connect(
        self,
        workers: Mapping[WorkerId, ActorHandle],
        gateways: Mapping[str, ActorHandle],
        control_plane: ActorHandle,
    ) -> None:
        """Makes the others known. May be called again when some join."""
        self._peers.connect(workers)
        self._gateways.connect(gateways)
        self._control_plane = control_plane

    async def open_links(self, addresses: Mapping[WorkerId, str]) -> ServingError | None:
        """Opens and warms the direct links to the workers that this one hands over to. An error comes as a value."""
        assert self._links is not None
        return await asyncio.to_thread(self._links.open, addresses)

    async def start(self) -> None:
        """Begins to take work."""
        assert self._engine is not None and self._links is not None
        ports = Ports(self._peers, self._gateways, self, self._links.link)
        self._worker = assemble(
            self._info(),
            self._engine.runner,
            self._engine.port,
            self._settings.config,
            ports,
            MonotonicClock(),
            codec_bytes_per_s=self._engine.codec_bytes_per_s,
        )
        freeze_collector()
        self._loop_task = asyncio.create_task(asyncio.to_thread(self._worker.run))

    def report(self, load: WorkerLoad) -> None:
        """LoadPort: called by the loop's thread."""
        self._control_plane.report.remote(load)

    async def post(self, message: WorkerMessage) -> None:
        """A message from a gateway, a worker or the control plane."""
        if isinstance(message, PeerLost):
            self._peers.forget(message.worker_id)
        elif isinstance(message, GatewayLost):
            self._gateways.forget(message.gateway_id)
        if self._worker is not None:
            self._worker.post(message)

    async def post_part(self, sender: WorkerId, part: KVPart, array: np.ndarray) -> None:
        """A part of a handoff, with its bytes in shared memory."""
        if self._links is not None:
            self._links.receive(sender, part, array)

    async def links(self, peers: Sequence[WorkerInfo]) -> WorkerLinks:
        """What this worker knows of its ways to others."""
        assert self._worker is not None
        return self._worker.links(peers)

    async def probe_link(self, peer: WorkerId, num_bytes: int, timeout_s: float) -> LinkProbe:
        """Measures the way to another worker with one part."""
        assert self._worker is not None
        return await probe_link(self._worker, peer, num_bytes, timeout_s)

    async def stop(self) -> None:
        """Ends the loop after the round that it is in."""
        if self._worker is not None and self._loop_task is not None:
            self._worker.stop()
            await asyncio.wait([self._loop_task])
        if self._links is not None:
            await asyncio.to_thread(self._links.close)
        if self._engine is not None and self._engine.ranks is not None:
            await asyncio.to_thread(self._engine.ranks.close)

    async def wait_closed(self) -> None:
        """Returns when the loop has ended; raises what ended it, if that was a fault."""
        assert self._loop_task is not None
        try:
            await asyncio.shield(self._loop_task)
        except Exception:
            logger.exception("the step loop broke", extra={"worker_id": self._settings.worker_id})
            raise

    def _info(self) -> WorkerInfo:
        assert self._engine is not None and self._links is not None
        return worker_info(self._settings, self._engine, self._links.address)

    def _post_from_link(self, message: WorkerMessage, arrived: ArrivedPart | None = None) -> None:
        if self._worker is not None:
            self._worker.post(message, arrived)

    def _prepare_write(self, part: KVPart, wire: torch.Tensor) -> WriteReceived:
        return write_nothing if self._worker is None else self._worker.prepare_write(part, wire)

    def _set_progress(self, share: float) -> None:
        self._progress = share
