"""Who is in the cluster, what each last said, and who has been silent for too long. Pure.

Silence is counted in listened time (listened.py): a pause of this process is not the workers'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from phasewise.core.listened import ListenedTime
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import WorkerId, WorkerState


@dataclass(slots=True)
class Member:
    """A worker as the control plane knows it. `heard_s` is listened time."""

    info: WorkerInfo
    load: WorkerLoad
    heard_s: float

    @property
    def is_ready(self) -> bool:
        return self.load.state is WorkerState.READY


class WorkerRegistry:
    """Members by id. Lost workers stay in the list, marked, so that status can show them.

    A worker is overdue when it has not reported for `overdue_s` of listened time.
    """

    def __init__(self, listened: ListenedTime, overdue_s: float) -> None:
        self.overdue_s = overdue_s
        self._listened = listened
        self._members: dict[WorkerId, Member] = {}

    def join(self, info: WorkerInfo) -> None:
        load = WorkerLoad(info.worker_id, info.role, WorkerState.READY, num_kv_blocks=info.num_kv_blocks)
        self._members[info.worker_id] = Member(info, load, self._listened.now_s())

    def update(self, load: WorkerLoad) -> None:
        """Takes a report; one that a newer overtook, or of a worker that is unknown or lost, is ignored."""
        member = self._members.get(load.worker_id)
        if member is None or member.load.state is WorkerState.LOST:
            return
        if load.number >= member.load.number:
            member.load = load
        member.heard_s = self._listened.now_s()

    def mark_lost(self, worker_id: WorkerId) -> bool:
        """True when this is news."""
        member = self._members.get(worker_id)
        if member is None or member.load.state is WorkerState.LOST:
            return False
        member.load = WorkerLoad(worker_id, member.load.role, WorkerState.LOST)
        return True

    def overdue(self) -> list[WorkerId]:
        """Ready workers that have been silent for too long."""
        limit_s = self._listened.now_s() - self.overdue_s
        return [m.info.worker_id for m in self._members.values() if m.is_ready and m.heard_s < limit_s]

    def members(self) -> list[Member]:
        """Copies of all, lost ones included."""
        return [replace(m) for m in self._members.values()]

    def present(self) -> list[WorkerId]:
        """The workers that are not lost."""
        return [m.info.worker_id for m in self._members.values() if m.load.state is not WorkerState.LOST]

    def lost(self) -> list[WorkerId]:
        return [m.info.worker_id for m in self._members.values() if m.load.state is WorkerState.LOST]

    def ready(self) -> list[Member]:
        """The workers that requests may be placed on: not copies, to be read at once."""
        return [m for m in self._members.values() if m.is_ready]
