"""Which pools can serve a request, and which have no worker left. Pure; used by the control plane and every gateway.

A request needs a prefill and a decode worker, or a mixed one. A gateway follows the view, so it answers health checks
without a call.
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
    """A gateway's knowledge of the pools: the workers that take requests, by role."""

    def __init__(self, roles: Mapping[WorkerId, WorkerRole]) -> None:
        self._pools = set(roles.values())
        self._ready = dict(roles)

    def worker_ready(self, worker_id: WorkerId, role: WorkerRole) -> None:
        """The worker takes requests in this role."""
        self._pools.add(role)
        self._ready[worker_id] = role

    def worker_lost(self, worker_id: WorkerId) -> None:
        """The worker takes no requests: for now, or because it is gone."""
        self._ready.pop(worker_id, None)

    @property
    def why_unservable(self) -> str:
        """Why a request sent now would not be placed; "" when it would."""
        return why_unservable(self._pools, self._ready.values())
