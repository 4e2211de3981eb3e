"""The control plane's process without Ray: waits for what happens to members, and lets `Membership` decide.

1. made       workers and gateways join, each is watched from then on; nobody is silent yet
2. watching   `start_health_checks`: a tick each heartbeat
3. stopped    `stop`: members may end
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

from control_plane.cluster_scheduler import ClusterScheduler
from control_plane.link_survey import LinkAsker, LinkSurvey, look, measure
from control_plane.membership import Members, Membership
from phasewise.core.clock import Clock
from phasewise.core.config import ServingConfig
from phasewise.core.errors import Overloaded
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import WorkerId


class WatchedMembers(Members, Protocol):
    """Members whose ends can be waited for."""

    async def worker_ended(self, worker_id: WorkerId) -> str:
        """Returns when the worker has: "" when its loop ended in order, else the fault."""

    async def gateway_ended(self, gateway_id: str) -> str:
        """Returns when the gateway has: "" when it was stopped, else the fault."""


class ControlPlane:
    """Membership, placement and the links of one cluster. Requests are placed by `scheduler`, without a hop here."""

    def __init__(self, config: ServingConfig, members: WatchedMembers, link_asker: LinkAsker, clock: Clock) -> None:
        self.scheduler = ClusterScheduler(
            clock,
            max_waiting=config.scheduler.max_waiting,
            overdue_s=config.health.overdue_s,
            heartbeat_s=config.health.heartbeat_s,
        )
        self._membership = Membership(self.scheduler, members)
        self._members = members
        self._heartbeat_s = config.health.heartbeat_s
        self._transfer = config.transfer
        self._link_asker = link_asker
        self._clock = clock
        self._is_probing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_changed = asyncio.Event()  # a worker may be lost, or all stop
        self._closed = asyncio.Event()

    # ---- members

    def join(self, info: WorkerInfo) -> None:
        """A worker has started."""
        self._membership.worker_joined(info)
        self._run(self._watch_worker(info.worker_id))

    def join_gateway(self, gateway_id: str) -> None:
        self._membership.gateway_joined(gateway_id)
        self._run(self._watch_gateway(gateway_id))

    def start_health_checks(self) -> None:
        """From now on workers are expected to report."""
        self.scheduler.listened.begin()
        self._run(self._beat())

    def snapshot(self) -> list[tuple[WorkerInfo, WorkerLoad]]:
        """All workers, lost ones too, and what each last said."""
        return [(member.info, member.load) for member in self.scheduler.registry.members()]

    # ---- links

    async def links(self) -> LinkSurvey:
        """What workers know of the links between them. Raises Unavailable when one does not answer."""
        return await look(self._transfer, self.snapshot(), self._link_asker)

    async def probe_links(self, sizes: Sequence[int], timeout_s: float) -> LinkSurvey:
        """The same, measured. One at a time: two would measure each other.

        Raises:
            Overloaded: the links are being measured already.
            Unavailable: a worker does not answer.
        """
        if self._is_probing:
            raise Overloaded("the links are being probed already; ask again later", retry_after_s=timeout_s)
        self._is_probing = True
        try:
            before = await self.links()
            probes = await measure(before.pairs, self._link_asker, sizes, timeout_s, self._clock)
            return (await self.links()).with_probes(probes)  # with what the links have learnt
        finally:
            self._is_probing = False

    # ---- end

    def stop(self) -> None:
        """From now on workers that end are not lost but stopped."""
        self._membership.stop()
        self._has_changed.set()
        self._closed.set()

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def wait_unservable(self) -> str:
        """Returns when no request can be served any more, with the reason; "" when the cluster was stopped."""
        while not self._membership.is_stopping:
            if reason := self._membership.why_unservable():
                return reason
            self._has_changed.clear()
            await self._has_changed.wait()
        return ""

    # ---- inside

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch_worker(self, worker_id: WorkerId) -> None:
        fault = await self._members.worker_ended(worker_id)
        self._membership.worker_ended(worker_id, fault or "its loop ended")
        self._has_changed.set()

    async def _watch_gateway(self, gateway_id: str) -> None:
        self._membership.gateway_ended(gateway_id, await self._members.gateway_ended(gateway_id))

    async def _beat(self) -> None:
        while not self._membership.is_stopping:
            await asyncio.sleep(self._heartbeat_s)
            self._membership.tick()
            self._has_changed.set()
