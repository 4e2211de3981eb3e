"""Members of a cluster that only record what they are told, and end when a test says so."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import GatewayLost, PeerLost, WorkerInfo
from phasewise.core.placement import WorkerId, WorkerRole
from phasewise.core.profile import DeviceProfile


@dataclass
class RecordingMembers:
    """Members (control_plane/membership.py). `told`: (who, of what), in order; `killed`: in order."""

    told: list[tuple[str, object]] = field(default_factory=list)
    killed: list[WorkerId] = field(default_factory=list)

    def tell_worker(self, worker_id: WorkerId, message: PeerLost | GatewayLost) -> None:
        assert worker_id not in self.killed, "nobody is there any more"
        self.told.append((worker_id, message))

    def tell_gateway(self, gateway_id: str, lost: WorkerId) -> None:
        self.told.append((gateway_id, lost))

    def kill_worker(self, worker_id: WorkerId) -> None:
        self.killed.append(worker_id)

    def take_told(self) -> list[tuple[str, object]]:
        """What was told since the last call."""
        told, self.told = self.told, []
        return told


class EndingMembers(RecordingMembers):
    """WatchedMembers (control_plane/control_plane.py): `end` makes one end; `watched` are those that are waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._ends: dict[str, asyncio.Future[str]] = {}

    def end(self, member: str, fault: str = "") -> None:
        self._ends[member].set_result(fault)

    @property
    def watched(self) -> set[str]:
        return {member for member, end in self._ends.items() if not end.done()}

    async def worker_ended(self, worker_id: WorkerId) -> str:
        return await self._end_of(worker_id)

    async def gateway_ended(self, gateway_id: str) -> str:
        return await self._end_of(gateway_id)

    async def _end_of(self, member: str) -> str:
        self._ends[member] = asyncio.get_running_loop().create_future()
        return await self._ends[member]


def worker_info(worker_id: WorkerId) -> WorkerInfo:
    """A small worker of the role that its name begins with."""
    role, spec = WorkerRole(worker_id.split("-")[0]), KVCacheSpec(2, 1, 4, 16, "float32")
    profile = DeviceProfile.linear(0.0, 0.001, 0.0, 0.001)
    return WorkerInfo(worker_id, role, 1, "h", "cpu", "float32", 1, spec, 8, 128, profile)
