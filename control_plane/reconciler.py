"""What has to be done so that a cluster becomes what it should be. Pure: desired state, view and time in, commands out.

    too few workers of a role      Start, under the lowest free names, each with its next birth
    too many                       Drain of those with the least to move; who is loading goes first
    a gateway's name is free       Start
    a gateway too many             Drain

A worker that drains in order to end does not count, so its successor starts beside it; a gateway's successor waits, for
it needs the port. A worker whose role changes counts for the new one.

A name whose process ends soon after its start waits before the next: 1, 2, 4 … 60 s, and again 1 s once one has served
for a while. No other name takes its place meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from phasewise.core.desired import DesiredState
from phasewise.core.identity import MemberId, member_id
from phasewise.core.placement import WorkerRole
from phasewise.core.view import Member, MemberState, View

GATEWAY = "gateway"
POOLS = (WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.MIXED)
SOON_S = 10.0
"""Who ends within this time of joining, or before it, has ended soon."""

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class Start:
    """Make the process of a new member. `role` is None for a gateway."""

    member_id: MemberId
    role: WorkerRole | None


@dataclass(frozen=True, slots=True)
class Drain:
    """Have a member move or finish what it has, and go."""

    member_id: MemberId


Command = Start | Drain


@dataclass(frozen=True, slots=True)
class Present:
    """A member as the reconciler counts it. `role`: that it has, or is about to have. `burden`: what it has to move."""

    member: Member
    role: WorkerRole | None
    is_going: bool
    burden: int = 0


@dataclass(slots=True)
class _Pause:
    """Of a name. `count`: ends soon after the start, one after the other; `reason`: of the last."""

    count: int
    until_s: float
    reason: str


class Reconciler:
    """Decides; carries nothing out. The time is that of one monotonic clock."""

    def __init__(self) -> None:
        self._pauses: dict[str, _Pause] = {}

    def ended(self, name: str, reason: str, served_s: float, now_s: float) -> None:
        """A member of this name is gone, or could not be made.

        `reason` is "" when it ended in order; `served_s` is 0.0 if it never joined.
        """
        if not reason or served_s > SOON_S:
            self._pauses.pop(name, None)
            return
        count = self._pauses[name].count + 1 if name in self._pauses else 1
        pause_s = min(_FIRST_PAUSE_S * 2 ** (count - 1), _LONGEST_PAUSE_S)
        self._pauses[name] = _Pause(count, now_s + pause_s, reason)

    def why_failing(self, least: int) -> str:
        """A name of which the last `least` starts came to nothing, and why the last did; "" when there is none."""
        for name, pause in self._pauses.items():
            if pause.count >= least:
                return f"{name} could not be started, {pause.count} times: {pause.reason}"
        return ""

    def decide(
        self, desired: DesiredState, view: View, present: Mapping[MemberId, Present], now_s: float
    ) -> list[Command]:
        """What is to be done now. `present` has every member of the view."""
        commands: list[Command] = []
        for role in POOLS:
            staying = [p for p in present.values() if p.role is role and not p.is_going]
            missing = desired.size(role) - len(staying)
            if missing > 0:
                commands += self._starts(role.value, role, missing, view, now_s)
            elif missing < 0:
                staying.sort(key=_cost)
                commands += [Drain(p.member.member_id) for p in staying[:-missing]]
        return commands + self._gateways(desired.gateways, view, present, now_s)

    def _gateways(self, size: int, view: View, present: Mapping[MemberId, Present], now_s: float) -> list[Command]:
        gateways = [p for p in present.values() if p.role is None]
        missing = size - len(gateways)
        if missing > 0:
            return [*self._starts(GATEWAY, None, missing, view, now_s)]
        staying = sorted((p for p in gateways if not p.is_going), key=lambda p: number_of(p.member.name), reverse=True)
        return [Drain(p.member.member_id) for p in staying[: max(len(staying) - size, 0)]]

    def _starts(self, pool: str, role: WorkerRole | None, count: int, view: View, now_s: float) -> list[Command]:
        """Of the `count` lowest free names, those that need not wait."""
        return [
            Start(member_id(name, view.births.get(name, 0) + 1), role)
            for name, _ in zip(_free_names(pool, view), range(count), strict=False)
            if name not in self._pauses or self._pauses[name].until_s <= now_s
        ]


def _free_names(pool: str, view: View) -> Iterator[str]:
    taken = {member.name for member in view.members.values()}
    number = 0
    while True:
        if (name := f"{pool}-{number}") not in taken:
            yield name
        number += 1


def number_of(name: str) -> int:
    """3 of `decode-3`."""
    return int(name.rpartition("-")[2])


def _cost(present: Present) -> tuple[bool, bool, int, int]:
    """Whom it costs least to lose: who loads, then who is silent, then who has least, then the highest number."""
    member = present.member
    is_loading, is_suspect = member.state is MemberState.LOADING, member.state is MemberState.SUSPECT
    return not is_loading, not is_suspect, present.burden, -number_of(member.name)
