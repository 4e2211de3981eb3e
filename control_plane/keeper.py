"""Keeps a cluster as it should be: starts and watches processes, ticks, and carries out what the reconciler says.

1. made
2. recovered   `begin`: members of a control plane that ended are taken over; there are none at a cluster's start
3. keeping     a tick each heartbeat; whatever changes is settled at once
4. stopped     `stop`: gateways drain, workers end, then gateways
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from control_plane.births import Births
from control_plane.cluster_scheduler import ClusterScheduler
from control_plane.membership import Members, Membership
from control_plane.reconciler import Drain, Present, Reconciler, Start
from phasewise.core.birth import MemberBirth
from phasewise.core.clock import Clock
from phasewise.core.desired import DesiredState
from phasewise.core.errors import Unavailable
from phasewise.core.heartbeat import Description
from phasewise.core.identity import MemberId, name_of
from phasewise.core.placement import WorkerId, WorkerRole
from phasewise.core.view import GatewayInfo, Member

logger = logging.getLogger(__name__)

STOP_S = 15.0
"""For a member to end in order, behind its drain."""


class MemberProcesses(Members, Protocol):
    """WorkerFactory and way to the members at once: RemoteMembers over Ray (control_plane/remote_members.py)."""

    async def num_hosts(self) -> int:
        """Hosts that processes can be made on."""

    async def lacks(self, birth: MemberBirth) -> str:
        """What there is too little of for this process now; "" when it can be made."""

    async def start(self, birth: MemberBirth) -> None:
        """Asks for the process, and returns before it has loaded. Raises Unavailable when it cannot be made."""

    async def ended(self, member_id: MemberId) -> str:
        """Returns when the process, or its loop, has ended: "" when that was in order, else how."""

    async def find(self) -> list[MemberId]:
        """The processes of members that there are."""

    async def describe(self, member_id: MemberId) -> Description | None:
        """None when the member does not answer in time."""

    async def stop(self, member_id: MemberId) -> None:
        """Returns when the member has ended in order, or does not answer."""


class ClusterKeeper:
    """`loading` has the share of its start that each loading member has done, 0 … 1."""

    def __init__(
        self,
        desired: DesiredState,
        membership: Membership,
        scheduler: ClusterScheduler,
        processes: MemberProcesses,
        births: Births,
        clock: Clock,
        *,
        heartbeat_s: float,
        drain_s: float,
    ) -> None:
        self.loading: dict[MemberId, float] = {}
        self.reconciler = Reconciler()
        self._first_desired = desired
        self._membership = membership
        self._scheduler = scheduler
        self._processes = processes
        self._births = births
        self._clock = clock
        self._heartbeat_s = heartbeat_s
        self._drain_s = drain_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_changed = asyncio.Event()
        self._waiting: list[asyncio.Future[None]] = []
        self._is_recovered = asyncio.Event()

    @property
    def desired(self) -> DesiredState:
        return self._membership.view.desired or self._first_desired

    async def begin(self) -> None:
        """Takes over what is there, and keeps the cluster from then on."""
        found = await self._processes.find()
        answers = await asyncio.gather(*(self._processes.describe(member_id) for member_id in found))
        described = {member_id: answer for member_id, answer in zip(found, answers, strict=True) if answer is not None}
        if found:
            logger.warning("the control plane takes over %d members, %d answer", len(found), len(described))
        self._membership.listened.begin()
        self._membership.recover(found, described)
        for member in self._membership.view.members.values():
            if isinstance(member.info, GatewayInfo):
                self._births.gateway_joined(member.info)
            self._run(self._watch(member.member_id))
        self._membership.want(self.desired)
        self._is_recovered.set()
        self._run(self._beat())
        self._run(self._keep())

    async def recovered(self) -> None:
        """Returns when the members are known. Nobody is judged, and nothing is placed, before."""
        await self._is_recovered.wait()

    def changed(self) -> None:
        """Something happened that may call for a command."""
        self._has_changed.set()
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def next_change(self) -> None:
        """Returns when something happened; at the next heartbeat at the latest."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    def want(self, desired: DesiredState) -> None:
        self._membership.want(desired)
        self.changed()

    def drain(self, member_id: MemberId) -> None:
        """Has a member move or finish what it has, and go. Raises KeyError when there is no such member."""
        self._membership.drain(member_id, self._drain_s)
        self.changed()

    def change_role(self, worker_id: WorkerId, role: WorkerRole, desired: DesiredState) -> None:
        """Gives a worker another role. `desired` has it counted there."""
        self._membership.change_role(worker_id, role)
        self.want(desired)

    async def stop(self, drain_s: float) -> None:
        """Ends all members: gateways get `drain_s` for what is open, then the workers stop."""
        membership = self._membership
        membership.stop()
        self.changed()
        for gateway in membership.view.gateways():
            membership.drain(gateway.member_id, drain_s)
        await self._until_gone(lambda: membership.view.gateways(), drain_s + STOP_S)
        stops = [asyncio.create_task(self._processes.stop(m.member_id)) for m in membership.view.workers()]
        if stops:  # some may not answer: that must not keep the others from ending
            await asyncio.wait(stops, timeout=STOP_S)
        for member in list(membership.view.members.values()):
            membership.left(member.member_id)
        for task in (*stops, *self._tasks):
            task.cancel()

    # ---- inside

    async def _until_gone(self, members: Callable[[], Sequence[Member]], timeout_s: float) -> None:
        """Members say that they have left; a process that ends by itself is not waited for either."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while members():
                    self._has_changed.clear()
                    await self._has_changed.wait()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self, member_id: MemberId) -> None:
        reason = await self._processes.ended(member_id)
        if self._membership.is_stopping:
            self._membership.left(member_id)
        else:
            self._membership.ended(member_id, reason or "its loop ended")
        self.changed()

    async def _beat(self) -> None:
        while not self._membership.is_stopping:
            await asyncio.sleep(self._heartbeat_s)
            self._membership.tick()
            self.changed()

    async def _keep(self) -> None:
        while not self._membership.is_stopping:
            self._has_changed.clear()
            await self._settle()
            await self._has_changed.wait()

    async def _settle(self) -> None:
        now_s = self._clock.now_s()
        for end in self._membership.take_ends():
            self.loading.pop(end.member_id, None)
            self.reconciler.ended(name_of(end.member_id), end.reason, end.served_s, now_s)
        present = {m.member_id: self._present(m) for m in self._membership.view.members.values()}
        for command in self.reconciler.decide(self.desired, self._membership.view, present, now_s):
            match command:
                case Start():
                    await self._start(command)
                case Drain(member_id):
                    logger.info("%s is one too many: it drains", member_id)
                    self.drain(member_id)

    def _present(self, member: Member) -> Present:
        return Present(
            member,
            self._membership.role_of(member),
            self._membership.is_going(member),
            self._scheduler.registry.burden(member.member_id),
        )

    async def _start(self, command: Start) -> None:
        member_id, now_s = command.member_id, self._clock.now_s()
        birth = self._births.birth(member_id, command.role, self.desired, await self._processes.num_hosts())
        if lacking := await self._processes.lacks(birth):
            logger.warning("%s waits: %s", member_id, lacking)
            self.reconciler.ended(name_of(member_id), lacking, 0.0, now_s)
            return
        if self._membership.is_stopping:
            return
        logger.info("%s starts", member_id)
        self._membership.expect(member_id, command.role)
        try:
            await self._processes.start(birth)
        except Unavailable as error:
            self._membership.ended(member_id, error.message)
            return
        self._run(self._watch(member_id))
