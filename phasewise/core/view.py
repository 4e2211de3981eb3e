"""The view: who is in the cluster, as the control plane says, with a version. Pure.

The control plane alone changes it, and each change has the next version. It sends a `ViewDelta` to every member. A
member keeps a `ViewFollower`. A delta that does not follow upon the version that it has is not applied: it asks for the
whole view, which comes as the answer to its next heartbeat. Whoever is not in a view is gone, and does not come back:
the process that is started in its place has another identity (identity.py).

The version only grows, also when the control plane is started again: it begins above every version that a member has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from phasewise.core.desired import DesiredState
from phasewise.core.identity import MemberId, name_of
from phasewise.core.messages import WorkerInfo
from phasewise.core.placement import WorkerRole


class MemberState(StrEnum):
    """A member's state in the view.

    LOADING    its process was asked for; it takes nothing yet
    READY      it takes work
    SUSPECT    it was silent for `health.suspect_s`: nothing new is placed on it, its streams move; it may come back
    DRAINING   it takes nothing new, moves or finishes what it has, and goes
    """

    LOADING = "loading"
    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class GatewayInfo:
    """What does not change while a gateway lives.

    `http`, `grpc`: where clients reach it. `tokens`: where workers' connections for tokens reach it; "" for none.
    """

    gateway_id: MemberId
    pid: int
    host: str
    http: str
    grpc: str
    tokens: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """One member. `role` is a worker's role now, None for a gateway. `info` is None while it is loading."""

    member_id: MemberId
    role: WorkerRole | None
    state: MemberState
    info: WorkerInfo | GatewayInfo | None = None

    @property
    def name(self) -> str:
        return name_of(self.member_id)

    @property
    def is_worker(self) -> bool:
        return self.role is not None

    @property
    def takes_work(self) -> bool:
        """Whether something new may be placed on it."""
        return self.state is MemberState.READY


@dataclass(frozen=True, slots=True)
class Gone:
    """A member that is in the view no more. `reason` is "" when it ended in order."""

    member_id: MemberId
    reason: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """All members at one version.

    `births` has the last birth that was given to each name, also to those gone. `desired` and `admin` are here so that
    a control plane that is started again learns them from the members: what the cluster should be (None: what its
    configuration says), and HOST:PORT of the admin API ("": there was none yet).
    """

    version: int = 0
    members: Mapping[MemberId, Member] = field(default_factory=dict)
    births: Mapping[str, int] = field(default_factory=dict)
    desired: DesiredState | None = None
    admin: str = ""

    def workers(self) -> list[Member]:
        return [member for member in self.members.values() if member.is_worker]

    def gateways(self) -> list[Member]:
        return [member for member in self.members.values() if not member.is_worker]


@dataclass(frozen=True, slots=True)
class ViewDelta:
    """What makes the view of `version` of the one before. `changed` has members that joined, too.

    `desired` and `admin` are those of the new view, whether they changed or not.
    """

    version: int
    changed: tuple[Member, ...] = ()
    gone: tuple[Gone, ...] = ()
    births: Mapping[str, int] = field(default_factory=dict)
    desired: DesiredState | None = None
    admin: str = ""


@dataclass(frozen=True, slots=True)
class ViewChange:
    """What a follower's view has become: members that are new in it, that differ, and that are gone."""

    joined: tuple[Member, ...] = ()
    changed: tuple[Member, ...] = ()
    gone: tuple[Gone, ...] = ()


class ViewFollower:
    """The view as one member knows it. `is_behind`: a delta was missed, so the whole view is needed."""

    def __init__(self) -> None:
        self.view = View()
        self.is_behind = True

    def apply(self, delta: ViewDelta) -> ViewChange:
        """Takes a delta. One that is old changes nothing; one that does not follow makes this follower be behind."""
        if delta.version <= self.view.version:
            return ViewChange()
        if self.is_behind or delta.version != self.view.version + 1:
            self.is_behind = True
            return ViewChange()
        gone = {entry.member_id for entry in delta.gone}
        members = {m: member for m, member in self.view.members.items() if m not in gone}
        members |= {member.member_id: member for member in delta.changed}
        births = {**self.view.births, **delta.births}
        return self._become(View(delta.version, members, births, delta.desired, delta.admin), delta.gone)

    def replace(self, view: View) -> ViewChange:
        """Takes a whole view, if it is not older than what is known."""
        if view.version < self.view.version:
            return ViewChange()
        self.is_behind = False
        gone = tuple(Gone(m, "it is not in the view") for m in self.view.members if m not in view.members)
        return self._become(view, gone)

    def _become(self, view: View, gone: tuple[Gone, ...]) -> ViewChange:
        before, self.view = self.view.members, view
        joined = tuple(member for m, member in view.members.items() if m not in before)
        changed = tuple(member for m, member in view.members.items() if m in before and member != before[m])
        return ViewChange(joined, changed, tuple(entry for entry in gone if entry.member_id in before))


def next_view(
    view: View,
    *,
    changed: Iterable[Member] = (),
    gone: tuple[Gone, ...] = (),
    births: Mapping[str, int] | None = None,
    desired: DesiredState | None = None,
    admin: str = "",
) -> tuple[View, ViewDelta]:
    """The view after a change, and the delta that says so. `births`: new ones. `desired`, `admin`: where they change.

    Used by the control plane alone.
    """
    delta = ViewDelta(
        view.version + 1, tuple(changed), gone, births or {}, desired or view.desired, admin or view.admin
    )
    left = {entry.member_id for entry in gone}
    members = {m: member for m, member in view.members.items() if m not in left}
    members |= {member.member_id: member for member in delta.changed}
    return View(delta.version, members, {**view.births, **delta.births}, delta.desired, delta.admin), delta
