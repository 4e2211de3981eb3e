"""Which pools can serve a request, and which have no worker left. Pure; used by the control plane and every gateway.

A request needs a prefill and a decode worker, or a mixed one. A gateway is told of each lost worker and of the control
plane's end, so it answers health checks without a call.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from phasewise.core.placement import WorkerId, WorkerRole

_POOLS = (WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.MIXED)


def why_unservable(pools: Collection[WorkerRole], ready: Collection[WorkerRole]) -> str:
    """Why no request can be placed on `ready` workers; "" when one can. Names those of `pools` that are empty."""
    if WorkerRole.MIXED in ready or (WorkerRole.PREFILL in ready and WorkerRole.DECODE in ready):
        return ""
    empty = [role.value for role in _POOLS if role in pools and role not in ready]
    return f"no {' and no '.join(empty) or 'prefill and no decode'} worker is ready"


class ServingPools:
    """A gateway's knowledge of the pools: the workers that it was told of at the start, less those that were lost."""

    def __init__(self, roles: Mapping[WorkerId, WorkerRole]) -> None:
        self._pools = frozenset(roles.values())
        self._ready = dict(roles)
        self._has_control_plane = True

    def worker_lost(self, worker_id: WorkerId) -> None:
        self._ready.pop(worker_id, None)

    def control_plane_lost(self) -> None:
        """From now on no request can be placed."""
        self._has_control_plane = False

    @property
    def why_unservable(self) -> str:
        """Why a request sent now would not be placed; "" when it would."""
        if not self._has_control_plane:
            return "the control plane has ended: no request can be placed"
        return why_unservable(self._pools, self._ready.values())
