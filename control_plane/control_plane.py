"""The control plane's process without Ray: what members, gateways and operators ask, and the parts that answer.

    membership.py          who is in the cluster            cluster_scheduler.py   where a request runs
    keeper.py              starts, watches, reconciles      link_survey.py         the links between workers

A control plane that was started again first learns who is there (keeper.py). Until then every question waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from control_plane.births import Births, ClusterFacts
from control_plane.cluster_scheduler import ClusterScheduler
from control_plane.keeper import ClusterKeeper, MemberProcesses
from control_plane.link_survey import LinkAsker, LinkSurveyor
from control_plane.membership import Membership
from phasewise.core.clock import Clock
from phasewise.core.desired import desired_of
from phasewise.core.errors import ConfigError, InternalError, ServingError
from phasewise.core.heartbeat import Heartbeat, HeartbeatAnswer, Joining
from phasewise.core.identity import MemberId, name_of
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import Placement, PlaceRequest, WorkerId, WorkerRole
from phasewise.core.view import GatewayInfo, MemberState, View

logger = logging.getLogger(__name__)

_LONGEST_WAIT_S = 120.0
"""Of a request that lost its worker, for another one."""

_HOPELESS = 3
"""So many processes of one name have ended soon after their start, before the cluster ever was up."""


@dataclass(frozen=True, slots=True)
class StartReport:
    """How far a cluster's start is.

    Attributes:
        is_up: every member that there should be is ready.
        share: of its loading that the slowest has done.
        failure: why it will not be up, where somebody has to mend something.
    """

    is_up: bool
    share: float
    failure: ServingError | None = None


class ControlPlane:
    """One cluster. Every method may be called as soon as `begin` is running, and waits until the members are known."""

    def __init__(self, facts: ClusterFacts, processes: MemberProcesses, link_asker: LinkAsker, clock: Clock) -> None:
        config = facts.config
        self.scheduler = ClusterScheduler(clock, max_waiting=config.scheduler.max_waiting)
        self.membership = Membership(config.health, processes, self.scheduler, clock)
        self._births = Births(facts)
        self.keeper = ClusterKeeper(
            desired_of(config),
            self.membership,
            self.scheduler,
            processes,
            self._births,
            clock,
            heartbeat_s=config.health.heartbeat_s,
            drain_s=config.gateway.drain_s,
        )
        self.links = LinkSurveyor(config.transfer, self.workers, link_asker, clock)
        self._failures: dict[str, ServingError] = {}
        self._has_been_up = False
        self._closed = asyncio.Event()

    async def begin(self) -> None:
        await self.keeper.begin()

    # ---- members

    async def loading(self, member_id: MemberId, share: float) -> None:
        """How far a member's start is, 0 … 1."""
        self.keeper.loading[member_id] = share

    async def failed(self, member_id: MemberId, error: ServingError) -> None:
        """A member could not load, and ends."""
        await self.keeper.recovered()
        self._failures[name_of(member_id)] = error
        self.membership.ended(member_id, error.message)
        self.keeper.changed()

    async def join(self, joining: Joining) -> View:
        """A member has loaded. Raises as Membership.joined."""
        await self.keeper.recovered()
        view = self.membership.joined(joining)
        info = joining.info
        if isinstance(info, GatewayInfo):
            self._births.gateway_joined(info)
        member_id = info.worker_id if isinstance(info, WorkerInfo) else info.gateway_id
        self.keeper.loading.pop(member_id, None)
        self._failures.pop(name_of(member_id), None)
        self.keeper.changed()
        return view

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatAnswer:
        await self.keeper.recovered()
        return self.membership.heard(beat)

    async def report(self, load: WorkerLoad) -> None:
        await self.keeper.recovered()
        self.membership.reported(load)

    async def draining(self, member_id: MemberId) -> None:
        await self.keeper.recovered()
        self.membership.drains(member_id)
        self.keeper.changed()

    async def role_changed(self, worker_id: WorkerId, role: WorkerRole) -> None:
        await self.keeper.recovered()
        self.membership.role_changed(worker_id, role)
        self.keeper.changed()

    async def left(self, member_id: MemberId) -> None:
        await self.keeper.recovered()
        self.membership.left(member_id)
        self.keeper.changed()

    async def view(self) -> View:
        await self.keeper.recovered()
        return self.membership.view

    def workers(self) -> list[tuple[WorkerInfo, WorkerLoad]]:
        """All workers that have joined and what each last said."""
        return [(member.info, member.load) for member in self.scheduler.registry.members()]

    # ---- requests

    async def place(self, request: PlaceRequest) -> Placement:
        """A request that lost its worker waits for a successor; the gateway bounds that by the request's deadline.

        Raises as ClusterScheduler.place.
        """
        await self.keeper.recovered()
        if request.attempt:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LONGEST_WAIT_S):
                    while self.scheduler.why_unservable():
                        await self.keeper.next_change()
        return self.scheduler.place(request)

    async def progress(self, news: Sequence[tuple[str, int | None]]) -> None:
        """What became of attempts: (id, None) for a first token, (id, number of output tokens) for an end."""
        await self.keeper.recovered()
        for request_id, num_output_tokens in news:
            if num_output_tokens is None:
                self.scheduler.first_token(request_id)
            else:
                self.scheduler.finished(request_id, num_output_tokens)

    # ---- start and end

    async def start_report(self) -> StartReport:
        await self.keeper.recovered()
        view, desired = self.membership.view, self.keeper.desired
        num_wanted = sum(desired.pools.values()) + desired.gateways
        num_ready = sum(member.state is MemberState.READY for member in view.members.values())
        self._has_been_up = self._has_been_up or num_ready >= num_wanted
        shares = [self.keeper.loading.get(m, 0.0) for m, member in view.members.items() if member.info is None]
        share = 0.0 if len(view.members) < num_wanted else min(shares, default=1.0)
        return StartReport(num_ready >= num_wanted, share, None if self._has_been_up else self._why_hopeless())

    async def stop(self, drain_s: float) -> None:
        """Ends every member; requests that are open get `drain_s` to finish. Returns when none is left."""
        await self.keeper.recovered()
        await self.keeper.stop(drain_s)
        self._closed.set()

    async def wait_closed(self) -> None:
        """Returns when the cluster was stopped."""
        await self._closed.wait()

    def _why_hopeless(self) -> ServingError | None:
        for error in self._failures.values():
            if isinstance(error, ConfigError):
                return error
        if reason := self.keeper.reconciler.why_failing(_HOPELESS):
            return InternalError(reason)
        return None
