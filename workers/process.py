"""A worker's process without Ray: its links, its engine, and the step loop on a thread of its own.

1. loading   `run`: links, weights, KV cache, profile; the control plane hears how far it is
2. joined    the loop takes work. The view says who else is there: to whom messages go, which direct links are opened,
             and who is gone
3. draining  `drain`: it takes nothing new. When nothing of any request is here, it leaves the cluster and ends
4. stopped   `stop`: the loop has ended; links and further ranks are closed

More than 15 of our modules are imported, for a worker's parts and its place in the cluster meet here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

import torch

from kv_transfer.link import ArrivedPart, WriteReceived, write_nothing
from phasewise.core.clock import MonotonicClock
from phasewise.core.cluster_member import ClusterMember, End, MemberEvents
from phasewise.core.collector import freeze_collector
from phasewise.core.errors import ServingError
from phasewise.core.handles import ActorHandle, Find, WorkerHandles
from phasewise.core.heartbeat import Description
from phasewise.core.identity import MemberId
from phasewise.core.links import LinkProbe
from phasewise.core.messages import (
    ChangeRole,
    Drain,
    GatewayLost,
    KVPart,
    PeerLost,
    WorkerInfo,
    WorkerLoad,
    WorkerMessage,
)
from phasewise.core.placement import WorkerId, WorkerRole, WorkerState
from phasewise.core.view import GatewayInfo, Member, ViewChange, ViewDelta
from phasewise.delivery.sinks import TokenSinks
from workers.assemble import Ports, assemble
from workers.build import LoadedEngine, load_engine, worker_info
from workers.driver import WorkerDriver
from workers.links import Links
from workers.probing import probe_link
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)

_CLOCK = MonotonicClock()


class WorkerProcess:
    """One worker. `end` ends the process.

    Attributes:
        links: None before it is loading.
        worker: what takes messages; None while it loads.
    """

    def __init__(self, settings: WorkerSettings, control_plane: ActorHandle, find: Find, end: End) -> None:
        self.links: Links | None = None
        self.worker: WorkerDriver | None = None
        self._settings = settings
        self._end = end
        self._peers = WorkerHandles(find)
        self._gateways = TokenSinks(settings.worker_id, settings.secret)
        events = MemberEvents(self._on_change, end, self._step_began_s)
        heartbeat_s = settings.config.health.heartbeat_s
        self._member = ClusterMember(settings.worker_id, control_plane, heartbeat_s, events, _CLOCK)
        self._engine: LoadedEngine | None = None
        self._steps: asyncio.Task[None] | None = None
        self._load = WorkerLoad(settings.worker_id, settings.role, WorkerState.LOADING)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_leaving = False

    async def run(self) -> None:
        """The worker's whole life. Returns when the loop was stopped; raises what ended it, if that was a fault.

        Raises:
            ServingError: the worker cannot be had (the control plane was told), or the control plane does not take it.
        """
        self._loop = asyncio.get_running_loop()
        try:
            self.worker = await asyncio.to_thread(self._make)
        except ServingError as error:
            await self._member.failed(error)
            raise
        freeze_collector()
        self._steps = asyncio.create_task(asyncio.to_thread(self.worker.run))
        joining = asyncio.create_task(self._member.join(self.worker.info))  # who hears of it may send at once
        try:
            await asyncio.wait((self._steps, joining), return_when=asyncio.FIRST_COMPLETED)
            if joining.done():
                joining.result()
            await asyncio.shield(self._steps)
        finally:
            joining.cancel()
            self._member.close()
            self.worker.stop()

    def report(self, load: WorkerLoad) -> None:
        """LoadPort (phasewise/core/ports.py): called by the loop's thread."""
        before, self._load = self._load, load
        self._member.report(load)
        assert self._loop is not None
        if load.role is not before.role:
            self._loop.call_soon_threadsafe(self._begin, self._member.role_changed(load.role))
        if load.state is WorkerState.DRAINING and load.is_empty:
            self._loop.call_soon_threadsafe(self._leave_once)

    def describe(self) -> Description:
        return self._member.describe(None if self.worker is None else self._load)

    # ---- what it is told to do

    def view_changed(self, delta: ViewDelta) -> None:
        self._member.view_changed(delta)

    def drain(self, timeout_s: float) -> None:
        """Takes nothing new, and ends when nothing is left. What runs is given back after `timeout_s`; 0.0: never."""
        if self.worker is None:
            self._leave_once()
        else:
            self._post(Drain(timeout_s or float("inf")))

    def terminate(self) -> None:
        """Drains at the wish of its host, within the drain time of the configuration."""
        self._begin(self._member.draining())
        self.drain(self._settings.config.gateway.drain_s)

    def change_role(self, role: WorkerRole) -> None:
        """The control plane is told when it is done."""
        if role is self._load.role:
            self._begin(self._member.role_changed(role))
        else:
            self._post(ChangeRole(role))

    async def probe_link(self, peer: WorkerId, num_bytes: int, timeout_s: float) -> LinkProbe:
        """Measures the link to another worker with one part of `num_bytes`."""
        assert self.worker is not None
        return await probe_link(self.worker, peer, num_bytes, timeout_s)

    async def stop(self) -> None:
        """Ends the loop after the round that it is in, and closes the links."""
        self._member.close()
        if self.worker is not None and self._steps is not None:
            self.worker.stop()
            await asyncio.wait([self._steps])
        await asyncio.to_thread(self._gateways.close)  # when they have what this worker has said
        if self.links is not None:
            await asyncio.to_thread(self.links.close)
        if self._engine is not None and self._engine.ranks is not None:
            await asyncio.to_thread(self._engine.ranks.close)

    # ---- the view

    def _on_change(self, change: ViewChange) -> None:
        for member in (*change.joined, *change.changed):
            if member.member_id != self._settings.worker_id and member.info is not None:
                self._meet(member)
        for gone in change.gone:
            self._forget(gone.member_id)

    def _meet(self, member: Member) -> None:
        if isinstance(member.info, GatewayInfo):
            self._gateways.connect({member.member_id: member.info.tokens})
            return
        assert isinstance(member.info, WorkerInfo)
        self._peers.expect(member.member_id)
        if member.role is not None and member.role.can_decode:  # whoever has KV may hand it to this one
            assert self.links is not None
            self.links.want(member.member_id, member.info.link_address)

    def _forget(self, member_id: MemberId) -> None:
        """Nothing is sent there any more, and the loop frees what it held for it. Of which kind it was is not known."""
        assert self.links is not None
        self.links.unwant(member_id)
        self._peers.forget(member_id)
        self._gateways.forget(member_id)
        self._post(PeerLost(member_id))
        self._post(GatewayLost(member_id))

    # ---- inside

    def _make(self) -> WorkerDriver:
        self.links = Links(self._settings, self._peers, self._post, self._prepare_write)
        engine = self._engine = load_engine(self._settings, self._member.loading, _CLOCK)
        self.links.agree_on(engine.port.spec)
        return assemble(
            worker_info(self._settings, engine, self.links.address),
            engine.runner,
            engine.port,
            self._settings.config,
            Ports(self._peers, self._gateways, self, self.links.link),
            _CLOCK,
            codec_bytes_per_s=engine.codec_bytes_per_s,
        )

    def _step_began_s(self) -> float | None:
        return None if self.worker is None else self.worker.step_began_s

    def _post(self, message: WorkerMessage, arrived: ArrivedPart | None = None) -> None:
        """Called by the links' threads too. Links speak before there is a loop: it has nothing of theirs then."""
        if self.worker is not None:
            self.worker.post(message, arrived)

    def _prepare_write(self, part: KVPart, wire: torch.Tensor) -> WriteReceived:
        return write_nothing if self.worker is None else self.worker.prepare_write(part, wire)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _leave_once(self) -> None:
        if not self._is_leaving:
            self._is_leaving = True
            self._begin(self._leave())

    async def _leave(self) -> None:
        """Nothing of any request is here: the worker ends in order."""
        await self.stop()
        await self._member.leave()
        self._end("", 0)
