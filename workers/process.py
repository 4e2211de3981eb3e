"""A worker's process without Ray: its links, its engine, and the step loop on a thread of its own.

1. made
2. loaded     `load`: links, weights, KV cache, profile; `progress` meanwhile
3. connected  `connect`: the others are known; `open_links`: direct links to the workers that this one hands off to
4. running    `start`: the loop takes work
5. stopped    `stop`: the loop has ended; links and further ranks are closed
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import torch

from kv_transfer.link import ArrivedPart, WriteReceived, write_nothing
from phasewise.core.clock import MonotonicClock
from phasewise.core.collector import freeze_collector
from phasewise.core.handles import ActorHandle, WorkerHandles
from phasewise.core.links import LinkProbe
from phasewise.core.messages import GatewayLost, KVPart, PeerLost, WorkerInfo, WorkerLoad, WorkerMessage
from phasewise.core.placement import WorkerId
from phasewise.delivery.sinks import TokenSinks
from workers.assemble import Ports, assemble
from workers.build import LoadedEngine, load_engine, worker_info
from workers.driver import WorkerDriver
from workers.links import Links
from workers.probing import probe_link
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)


class WorkerProcess:
    """One worker.

    Attributes:
        progress: how far `load` is, 0 … 1.
        links: None before `load`.
        worker: what takes messages; None before `start`.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self.progress = 0.0
        self.links: Links | None = None
        self.worker: WorkerDriver | None = None
        self._settings = settings
        self._peers = WorkerHandles()
        self._gateways = TokenSinks(settings.worker_id, settings.secret)
        self._control_plane: ActorHandle = None
        self._engine: LoadedEngine | None = None
        self._loop_task: asyncio.Task[None] | None = None

    async def load(self) -> WorkerInfo:
        """Loads the model.

        Raises:
            ConfigError, ModelLoadError: something that the user can mend.
        """
        await asyncio.to_thread(self._load)
        return self._info()

    def connect(
        self,
        workers: Mapping[WorkerId, ActorHandle],
        gateways: Mapping[str, str],
        control_plane: ActorHandle,
    ) -> None:
        """Makes the others known, gateways by their addresses for tokens. May be called again when some join."""
        self._peers.connect(workers)
        self._gateways.connect(gateways)
        self._control_plane = control_plane

    async def open_links(self, addresses: Mapping[WorkerId, str]) -> None:
        """Opens and warms the direct links to these workers, each by the address at which its own link listens.

        Raises:
            ConfigError: a link could not be opened.
        """
        assert self.links is not None
        error = await asyncio.to_thread(self.links.open, addresses)
        if error is not None:
            raise error

    def start(self) -> None:
        """Begins to take work."""
        assert self._engine is not None and self.links is not None
        self.worker = assemble(
            self._info(),
            self._engine.runner,
            self._engine.port,
            self._settings.config,
            Ports(self._peers, self._gateways, self, self.links.link),
            MonotonicClock(),
            codec_bytes_per_s=self._engine.codec_bytes_per_s,
        )
        freeze_collector()
        self._loop_task = asyncio.create_task(asyncio.to_thread(self.worker.run))

    def report(self, load: WorkerLoad) -> None:
        """LoadPort (phasewise/core/ports.py): called by the loop's thread."""
        self._control_plane.report.remote(load)

    def member_lost(self, message: PeerLost | GatewayLost) -> None:
        """Somebody else was lost: nothing is sent there any more, and the loop frees what it held for them."""
        if isinstance(message, PeerLost):
            self._peers.forget(message.worker_id)
        else:
            self._gateways.forget(message.gateway_id)
        self._post(message)

    async def probe_link(self, peer: WorkerId, num_bytes: int, timeout_s: float) -> LinkProbe:
        """Measures the link to another worker with one part of `num_bytes`."""
        assert self.worker is not None
        return await probe_link(self.worker, peer, num_bytes, timeout_s)

    async def stop(self) -> None:
        """Ends the loop after the round that it is in, and closes what it spoke over."""
        if self.worker is not None and self._loop_task is not None:
            self.worker.stop()
            await asyncio.wait([self._loop_task])
        await asyncio.to_thread(self._gateways.close)
        if self.links is not None:
            await asyncio.to_thread(self.links.close)
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

    def _load(self) -> None:
        self.links = Links(self._settings, self._peers, self._post, self._prepare_write)
        self._engine = load_engine(self._settings, self._set_progress, MonotonicClock())
        self.links.agree_on(self._engine.port.spec)

    def _info(self) -> WorkerInfo:
        assert self._engine is not None and self.links is not None
        return worker_info(self._settings, self._engine, self.links.address)

    def _post(self, message: WorkerMessage, arrived: ArrivedPart | None = None) -> None:
        """Called by the links' threads too. Links speak before there is a loop: it has nothing of theirs then."""
        if self.worker is not None:
            self.worker.post(message, arrived)

    def _prepare_write(self, part: KVPart, wire: torch.Tensor) -> WriteReceived:
        return write_nothing if self.worker is None else self.worker.prepare_write(part, wire)

    def _set_progress(self, share: float) -> None:
        self.progress = share
