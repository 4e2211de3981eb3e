"""What an operator may ask of a cluster: other sizes, a worker's drain or role. Pure: checked here, carried out there.

An order changes the desired state, or tells one member something; the reconciler does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from control_plane.membership import Membership
from control_plane.reconciler import GATEWAY, POOLS
from phasewise.core.desired import DesiredState
from phasewise.core.errors import InvalidRequest
from phasewise.core.placement import WorkerRole
from phasewise.core.view import Member, MemberState

_LARGEST_POOL = 1024


def scaled(desired: DesiredState, sizes: Mapping[str, int]) -> DesiredState:
    """The desired state with other sizes of the named pools (`prefill`, `decode`, `mixed`) or of `gateway`.

    Raises:
        InvalidRequest: there is no such pool, the number is out of range, or no request could be served.
    """
    known = {role.value: role for role in POOLS}
    for name, size in sizes.items():
        if name not in known and name != GATEWAY:
            raise InvalidRequest(f"no pool {name!r}: there are {', '.join(known)} and {GATEWAY}", field=name)
        if not 0 <= size <= _LARGEST_POOL:
            raise InvalidRequest(f"{name} must be 0 to {_LARGEST_POOL}, not {size}", field=name)
        desired = replace(desired, gateways=size) if name == GATEWAY else desired.scaled(known[name], size)
    _check(desired)
    return desired


def member_named(membership: Membership, name: str) -> Member:
    """A member by its name (`decode-0`) or its identity (`decode-0#2`). Raises InvalidRequest."""
    for member in membership.view.members.values():
        if name in (member.name, member.member_id):
            return member
    there = ", ".join(sorted(member.name for member in membership.view.members.values()))
    raise InvalidRequest(f"no member {name!r}: there are {there or 'none'}", field="worker")


def with_role(membership: Membership, desired: DesiredState, name: str, role: str) -> tuple[Member, DesiredState]:
    """A worker that is to have another role, and the desired state in which its pools are so much smaller and larger.

    Raises:
        InvalidRequest: there is no such worker or role, the worker is not ready, has the role already, or no request
            could be served afterwards.
    """
    if role not in {known.value for known in POOLS}:
        raise InvalidRequest(f"no role {role!r}: there are {', '.join(r.value for r in POOLS)}", field="role")
    member, new = member_named(membership, name), WorkerRole(role)
    if member.role is None:
        raise InvalidRequest(f"{member.name} is a gateway and has no role", field="worker")
    if member.state is not MemberState.READY:
        raise InvalidRequest(
            f"{member.name} is {member.state.value}: its role can change when it is ready", field="worker"
        )
    if member.role is new:
        raise InvalidRequest(f"{member.name} is a {role} worker already", field="role")
    desired = desired.scaled(member.role, max(desired.size(member.role) - 1, 0)).scaled(new, desired.size(new) + 1)
    _check(desired)
    return member, desired


def _check(desired: DesiredState) -> None:
    prefill, decode, mixed = (desired.size(role) for role in POOLS)
    if not mixed and not (prefill and decode):
        raise InvalidRequest(
            "no request could be served: leave at least one prefill and one decode worker, or one mixed worker"
        )
    if not desired.gateways:
        raise InvalidRequest("no request could be taken: leave at least one gateway", field=GATEWAY)
