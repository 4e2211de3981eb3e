"""What a role allows: which messages start new work on a worker. Pure.

Both phases always exist; a role only gates what may begin, so a change of role is a change of intake, and what runs
already runs to its end. (Changing a role at run time belongs to the cluster scheduler's later work; the gate is here.)
"""

from __future__ import annotations

from phasewise.core.placement import WorkerRole, WorkerState


def may_prefill(role: WorkerRole, state: WorkerState) -> bool:
    """May a PrefillTask begin here?"""
    return role.can_prefill and state is WorkerState.READY


def may_reserve(role: WorkerRole, state: WorkerState) -> bool:
    """May a KVOffer be taken here?"""
    return role.can_decode and state is WorkerState.READY
