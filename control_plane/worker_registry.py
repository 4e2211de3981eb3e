"""The workers that requests are placed on, with what each last said. Pure.

Who is in it, in which role and state, is said by the view (membership.py); a worker that is gone is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import WorkerId, WorkerRole, WorkerState


@dataclass(slots=True)
class Member:
    """A worker as the ledger knows it. `load.role` and `load.state` are the view's, whatever the worker reports."""

    info: WorkerInfo
    load: WorkerLoad

    @property
    def is_ready(self) -> bool:
        return self.load.state is WorkerState.READY


class WorkerRegistry:
    """Workers by id."""

    def __init__(self) -> None:
        self._members: dict[WorkerId, Member] = {}

    def join(self, info: WorkerInfo) -> None:
        load = WorkerLoad(info.worker_id, info.role, WorkerState.READY, num_kv_blocks=info.num_kv_blocks)
        self._members[info.worker_id] = Member(info, load)

    def update(self, load: WorkerLoad) -> None:
        """Takes a report; one that a newer overtook, or of a worker that is unknown, is ignored."""
        member = self._members.get(load.worker_id)
        if member is not None and load.number >= member.load.number:
            member.load = replace(load, role=member.load.role, state=member.load.state)

    def change(self, worker_id: WorkerId, role: WorkerRole, state: WorkerState) -> None:
        """The view has the worker in another role or state."""
        member = self._members.get(worker_id)
        if member is not None:
            member.load = replace(member.load, role=role, state=state)

    def forget(self, worker_id: WorkerId) -> bool:
        """True when the worker was known."""
        return self._members.pop(worker_id, None) is not None

    def members(self) -> list[Member]:
        """Copies of all."""
        return [replace(m) for m in self._members.values()]

    def ready(self) -> list[Member]:
        """The workers that requests may be placed on: not copies, to be read at once."""
        return [m for m in self._members.values() if m.is_ready]

    def burden(self, worker_id: WorkerId) -> int:
        """Prompts and sequences that the worker would have to move or finish; 0 when it is unknown."""
        member = self._members.get(worker_id)
        if member is None:
            return 0
        load = member.load
        return load.num_waiting + load.num_running + load.num_preempted + load.num_reservations + load.num_handoffs_out
