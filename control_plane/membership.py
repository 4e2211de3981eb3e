"""Who is in the cluster, as the control plane decides. Pure: events in; a new view, its delta and kills out.

Event                What follows
    expect             a process was asked for: it is in the view, loading
    joined             ready; refused where it speaks another protocol, or is not in the view
    heard              a sign of life: who was suspect is ready again; who is behind gets the whole view
    drain              draining: takes nothing new, and will say `left`
    change_role        draining until it says `role_changed`: ready, in the new role
    left, ended        gone: in order, or with a reason
    tick               who was silent for `suspect_s` is suspect; who was for `overdue_s`, whose step has been running
                       for so long, or who was loading for `start_s`, is gone
    recover            a control plane that is started again learns the view from the members

Whoever is gone is killed: its process may be there still, hanging or without its loop, and would hold device and links.
Silence is counted in listened time (phasewise/core/listened.py): a pause of this process is nobody's. After a stop
nobody is lost any more.

The ledger (cluster_scheduler.py) follows the view: it is told of each worker that joins, changes or is gone.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from phasewise.core.clock import Clock
from phasewise.core.config import HealthConfig
from phasewise.core.desired import DesiredState
from phasewise.core.errors import ConfigError, Unavailable
from phasewise.core.heartbeat import PROTOCOL_VERSION, Description, Heartbeat, HeartbeatAnswer, Joining, OpenAttempt
from phasewise.core.identity import MemberId, birth_of, name_of
from phasewise.core.listened import ListenedTime
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import WorkerId, WorkerRole, WorkerState
from phasewise.core.view import Gone, Member, MemberState, View, ViewDelta, next_view

logger = logging.getLogger(__name__)


class Members(Protocol):
    """How members are reached. Every call returns at once."""

    def tell(self, member_id: MemberId, delta: ViewDelta) -> None: ...

    def drain(self, member_id: MemberId, timeout_s: float) -> None:
        """Has a member finish or move what it has, and go. `timeout_s` bounds a gateway's open requests."""

    def change_role(self, member_id: WorkerId, role: WorkerRole) -> None: ...

    def kill(self, member_id: MemberId) -> None:
        """Ends the process, whatever it does. Nothing is sent to this member afterwards."""


class Ledger(Protocol):
    """Where requests are placed."""

    def worker_joined(self, info: WorkerInfo) -> None: ...

    def worker_load(self, load: WorkerLoad) -> None: ...

    def worker_changed(self, worker_id: WorkerId, role: WorkerRole, state: WorkerState) -> None: ...

    def worker_lost(self, worker_id: WorkerId) -> bool: ...

    def gateway_lost(self, gateway_id: MemberId) -> None: ...

    def restore(self, attempt: OpenAttempt, gateway_id: MemberId) -> None: ...


@dataclass(slots=True)
class _Watch:
    """What is known of a member besides the view, in listened time.

    `joined_s` is None while it is loading. `has_to_go`: it drains in order to end. `new_role`: the one that it changes
    to.
    """

    expected_s: float
    heard_s: float
    joined_s: float | None = None
    has_to_go: bool = False
    new_role: WorkerRole | None = None


@dataclass(frozen=True, slots=True)
class End:
    """A member's end, for who decides about its successor. `served_s`: since it joined; 0.0 when it never did."""

    member_id: MemberId
    reason: str
    served_s: float


class Membership:
    """The members of one cluster.

    There are more than 20 methods: one for each event, and for each consequence that events share.

    Attributes:
        view: read-only to all others.
        is_stopping: the cluster was told to stop.
    """

    def __init__(self, health: HealthConfig, members: Members, ledger: Ledger, clock: Clock) -> None:
        self.view = View()
        self.is_stopping = False
        self.listened = ListenedTime(clock, health.heartbeat_s)
        self._health = health
        self._members = members
        self._ledger = ledger
        self._watches: dict[MemberId, _Watch] = {}
        self._ends: list[End] = []

    # ---- a member's life

    def expect(self, member_id: MemberId, role: WorkerRole | None) -> None:
        """A process was asked for under an identity that was never used."""
        now_s = self.listened.now_s()
        self._watches[member_id] = _Watch(now_s, now_s)
        births = {name_of(member_id): birth_of(member_id)}
        self._change(Member(member_id, role, MemberState.LOADING), births=births)

    def joined(self, joining: Joining) -> View:
        """The member is loaded. Gives the view, in which it is ready. Repeating it changes nothing.

        Raises:
            ConfigError: it speaks another version of the protocol.
            Unavailable: it is not in the view: somebody else has its place.
        """
        info = joining.info
        member_id = info.worker_id if isinstance(info, WorkerInfo) else info.gateway_id
        if joining.protocol_version != PROTOCOL_VERSION:
            raise ConfigError(
                f"{member_id} speaks version {joining.protocol_version} of the members' protocol and the control plane "
                f"version {PROTOCOL_VERSION}: they are of two releases; start all of one"
            )
        member = self.view.members.get(member_id)
        if member is None:
            raise Unavailable(f"{member_id} is not in the view")
        if isinstance(info, WorkerInfo) is not member.is_worker:
            raise ConfigError(f"{member_id} joins as a {type(info).__name__}, and was started as something else")
        if member.state is MemberState.LOADING:
            self._begin_to_watch(member_id)
            if isinstance(info, WorkerInfo):
                self._ledger.worker_joined(info)
            self._change(replace(member, state=MemberState.READY, info=info))
            where = f"{info.role.value} on {info.device}" if isinstance(info, WorkerInfo) else info.http
            logger.info("%s joined (%s)", member_id, where)
        return self.view

    def heard(self, beat: Heartbeat) -> HeartbeatAnswer:
        """A member's heartbeat."""
        member = self.view.members.get(beat.member_id)
        if member is None:
            return HeartbeatAnswer(is_gone=True)
        if beat.step_s >= self._health.overdue_s:
            self._lose(member.member_id, f"a step has been running for {beat.step_s:.0f} s")
            return HeartbeatAnswer(is_gone=True)
        self._sign_of_life(member)
        if beat.load is not None:
            self._ledger.worker_load(beat.load)
        return HeartbeatAnswer(self.view if beat.view_version < self.view.version else None)

    def reported(self, load: WorkerLoad) -> None:
        """A worker's load, which is a sign of life, too."""
        member = self.view.members.get(load.worker_id)
        if member is not None:
            self._sign_of_life(member)
            self._ledger.worker_load(load)

    def drain(self, member_id: MemberId, timeout_s: float) -> None:
        """Has a member take nothing new, and go. One that is loading goes at once. `timeout_s`: as Members.drain."""
        member = self.view.members[member_id]
        if member.state is MemberState.LOADING:
            self.left(member_id)
        elif not self.is_going(member):
            self.drains(member_id)
            self._members.drain(member_id, timeout_s)

    def drains(self, member_id: MemberId) -> None:
        """The member drains, because it was told to or by itself."""
        if member := self.view.members.get(member_id):
            watch = self._watches[member_id]
            watch.has_to_go, watch.new_role = True, None
            self._change(replace(member, state=MemberState.DRAINING))

    def change_role(self, worker_id: WorkerId, role: WorkerRole) -> None:
        """Has a worker give up what it does and do what the other role does."""
        member = self.view.members[worker_id]
        self._watches[worker_id].new_role = role
        self._change(replace(member, state=MemberState.DRAINING))
        self._members.change_role(worker_id, role)

    def role_changed(self, worker_id: WorkerId, role: WorkerRole) -> None:
        """The worker works in this role from now on."""
        member = self.view.members.get(worker_id)
        if member is not None and not self._watches[worker_id].has_to_go:
            self._watches[worker_id].new_role = None
            self._change(replace(member, role=role, state=MemberState.READY))
            logger.info("%s is a %s worker now", worker_id, role.value)

    def left(self, member_id: MemberId) -> None:
        """The member has ended in order."""
        self._go(member_id, "")

    def ended(self, member_id: MemberId, reason: str) -> None:
        """The member's process, or its loop, has ended. `reason` completes "decode-0#1 was lost: …"."""
        if not self.is_stopping:
            self._lose(member_id, reason)

    def tick(self) -> None:
        """Looks for silent members. To be called every `heartbeat_s`."""
        self.listened.tick()
        if self.is_stopping:
            return
        if self.listened.is_behind_pause:
            missed_s = self.listened.missed_s
            logger.warning("the control plane did not run for %.1f s; nobody's silence counts for it", missed_s)
            return  # heartbeats may wait to be read
        for member in list(self.view.members.values()):
            self._judge(member, self._watches[member.member_id])

    # ---- the whole cluster

    def want(self, desired: DesiredState) -> None:
        """The cluster should be this from now on."""
        self._publish(*next_view(self.view, desired=desired))

    def serve_admin(self, address: str) -> None:
        """The admin API is there."""
        self._publish(*next_view(self.view, admin=address))

    def stop(self) -> None:
        """From now on ends are expected, and silence is nobody's concern."""
        self.is_stopping = True

    def role_of(self, member: Member) -> WorkerRole | None:
        """A worker's role, or the one that it is about to have."""
        return self._watches[member.member_id].new_role or member.role

    def is_going(self, member: Member) -> bool:
        """Whether it drains in order to end."""
        return member.state is MemberState.DRAINING and self._watches[member.member_id].new_role is None

    def take_ends(self) -> list[End]:
        """Who went since the last call."""
        ends, self._ends = self._ends, []
        return ends

    def recover(self, processes: Collection[MemberId], described: Mapping[MemberId, Description]) -> None:
        """Takes over from a control plane that ended: who is there, and what those who answered say.

        Who has a process and does not answer is suspect, as far as the others know it, and else loading. Who has no
        process is gone; no member of another version of the protocol is kept. The view has a version above all others,
        so everybody asks for the whole.
        """
        known = max((d.view for d in described.values()), key=lambda view: view.version, default=View())
        births = dict(known.births)
        now_s = self.listened.now_s()
        for member_id in processes:
            births[name_of(member_id)] = max(births.get(name_of(member_id), 0), birth_of(member_id))
            self._watches[member_id] = _Watch(now_s, now_s)
        self.view = View(known.version, {}, births, known.desired, known.admin)
        members = [self._as_found(m, known.members.get(m), described.get(m)) for m in processes]
        self._publish(*next_view(self.view, changed=members))
        for member_id, description in described.items():
            if description.protocol_version != PROTOCOL_VERSION:
                self._lose(member_id, "it speaks another version of the members' protocol")
                continue
            if description.load is not None:
                self._ledger.worker_load(description.load)
            for attempt in description.open_attempts:
                self._ledger.restore(attempt, member_id)
        for member_id in known.members.keys() - set(processes):
            self._ends.append(End(member_id, "it ended while there was no control plane", 0.0))

    # ---- inside

    def _as_found(self, member_id: MemberId, known: Member | None, description: Description | None) -> Member:
        """A member in a new view. `known`: as the last view had it. `description`: what it answered, or None."""
        info = description.info if description is not None else known.info if known is not None else None
        member = known or Member(member_id, _first_role(member_id), MemberState.LOADING)
        if info is None:
            return replace(member, state=MemberState.LOADING)
        state = MemberState.READY if description is not None else MemberState.SUSPECT
        if member.state is MemberState.DRAINING:
            state = MemberState.DRAINING
        self._begin_to_watch(member_id)
        if isinstance(info, WorkerInfo):
            self._ledger.worker_joined(info)
            self._ledger.worker_changed(member_id, member.role or info.role, WorkerState(state.value))
        return replace(member, state=state, info=info)

    def _begin_to_watch(self, member_id: MemberId) -> None:
        watch = self._watches[member_id]
        watch.joined_s = watch.heard_s = self.listened.now_s()

    def _sign_of_life(self, member: Member) -> None:
        self._watches[member.member_id].heard_s = self.listened.now_s()
        if member.state is MemberState.SUSPECT:
            logger.info("%s is heard again", member.member_id)
            self._change(replace(member, state=MemberState.READY))

    def _judge(self, member: Member, watch: _Watch) -> None:
        now_s, health = self.listened.now_s(), self._health
        if member.state is MemberState.LOADING:
            if now_s - watch.expected_s > health.start_s:
                self._lose(member.member_id, f"not ready {health.start_s:g} s after its start")
            return
        silent_s = now_s - watch.heard_s
        if silent_s > health.overdue_s:
            self._lose(member.member_id, f"silent for {health.overdue_s:g} s")
        elif silent_s > health.suspect_s and member.state is MemberState.READY:
            logger.warning("%s is silent for %.1f s: nothing is placed there", member.member_id, silent_s)
            self._change(replace(member, state=MemberState.SUSPECT))

    def _lose(self, member_id: MemberId, reason: str) -> None:
        if member_id in self._watches:
            logger.error("%s was lost: %s", member_id, reason)
            self._go(member_id, reason)

    def _go(self, member_id: MemberId, reason: str) -> None:
        """Once for each member: out of view and ledger, and its process ends."""
        watch = self._watches.pop(member_id, None)
        if watch is None:
            return
        member = self.view.members.get(member_id)
        served_s = 0.0 if watch.joined_s is None else self.listened.now_s() - watch.joined_s
        self._ends.append(End(member_id, reason, served_s))
        if member is not None and member.is_worker:
            self._ledger.worker_lost(member_id)
        else:
            self._ledger.gateway_lost(member_id)
        self._members.kill(member_id)
        self._publish(*next_view(self.view, gone=(Gone(member_id, reason),)))

    def _change(self, member: Member, births: Mapping[str, int] | None = None) -> None:
        if member.role is not None:
            self._ledger.worker_changed(member.member_id, member.role, WorkerState(member.state.value))
        self._publish(*next_view(self.view, changed=(member,), births=births))

    def _publish(self, view: View, delta: ViewDelta) -> None:
        self.view = view
        for member in view.members.values():
            if member.state is not MemberState.LOADING:  # it gets the whole view when it joins
                self._members.tell(member.member_id, delta)


def _first_role(member_id: MemberId) -> WorkerRole | None:
    """Of a member of which only the identity is known: its name has the role at birth."""
    pool = name_of(member_id).rpartition("-")[0]
    return WorkerRole(pool) if pool in {role.value for role in WorkerRole} else None
