"""Members of a cluster that only record what they are told, and end when a test says so."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from phasewise.core.birth import MemberBirth
from phasewise.core.heartbeat import Description
from phasewise.core.identity import MemberId, name_of
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import WorkerInfo
from phasewise.core.placement import WorkerId, WorkerRole
from phasewise.core.profile import DeviceProfile
from phasewise.core.view import GatewayInfo, ViewDelta


@dataclass
class RecordingMembers:
    """Members (control_plane/membership.py). `killed`, `drained` and `changed` are in order."""

    told: list[tuple[MemberId, ViewDelta]] = field(default_factory=list)
    killed: list[MemberId] = field(default_factory=list)
    drained: list[tuple[MemberId, float]] = field(default_factory=list)
    changed: list[tuple[WorkerId, WorkerRole]] = field(default_factory=list)

    def tell(self, member_id: MemberId, delta: ViewDelta) -> None:
        assert member_id not in self.killed, "nobody is there any more"
        self.told.append((member_id, delta))

    def drain(self, member_id: MemberId, timeout_s: float) -> None:
        self.drained.append((member_id, timeout_s))

    def change_role(self, member_id: WorkerId, role: WorkerRole) -> None:
        self.changed.append((member_id, role))

    def kill(self, member_id: MemberId) -> None:
        self.killed.append(member_id)

    def take_told(self) -> list[tuple[MemberId, ViewDelta]]:
        """What was told since the last call."""
        told, self.told = self.told, []
        return told


class MemberProcessesInMemory(RecordingMembers):
    """MemberProcesses (control_plane/keeper.py): `end` makes one end. `there` has those that exist, with what they say
    of themselves; None: it does not answer. `lacking`: what there is too little of for the names in it."""

    def __init__(self) -> None:
        super().__init__()
        self.births: list[MemberBirth] = []
        self.there: dict[MemberId, Description | None] = {}
        self.lacking: dict[str, str] = {}
        self.stopped: list[MemberId] = []
        self._ends: dict[MemberId, asyncio.Future[str]] = {}

    def end(self, member_id: MemberId, reason: str = "its process has ended") -> None:
        """The process ends by itself."""
        self.there.pop(member_id, None)
        self._ends[member_id].set_result(reason)

    def watches(self, member_id: MemberId) -> bool:
        """Whether somebody waits for its end."""
        return member_id in self._ends

    def kill(self, member_id: MemberId) -> None:
        super().kill(member_id)
        self.there.pop(member_id, None)
        if (end := self._ends.get(member_id)) is not None and not end.done():
            end.set_result("its process has ended")

    @property
    def started(self) -> list[MemberId]:
        return [birth.member_id for birth in self.births]

    async def num_hosts(self) -> int:
        return 1

    async def lacks(self, birth: MemberBirth) -> str:
        return self.lacking.get(name_of(birth.member_id), "")

    async def start(self, birth: MemberBirth) -> None:
        self.births.append(birth)
        self.there[birth.member_id] = None

    async def ended(self, member_id: MemberId) -> str:
        self._ends[member_id] = asyncio.get_running_loop().create_future()
        return await self._ends[member_id]

    async def find(self) -> list[MemberId]:
        return list(self.there)

    async def describe(self, member_id: MemberId) -> Description | None:
        return self.there[member_id]

    async def stop(self, member_id: MemberId) -> None:
        self.stopped.append(member_id)


def worker_info(worker_id: WorkerId) -> WorkerInfo:
    """A small worker of the role that its name begins with."""
    role, spec = WorkerRole(worker_id.split("-")[0]), KVCacheSpec(2, 1, 4, 16, "float32")
    profile = DeviceProfile.linear(0.0, 0.001, 0.0, 0.001)
    return WorkerInfo(worker_id, role, 1, "h", "cpu", "float32", 1, spec, 8, 128, profile)


def gateway_info(gateway_id: MemberId) -> GatewayInfo:
    return GatewayInfo(gateway_id, 1, "h", "127.0.0.1:8000", "127.0.0.1:50051")


def info_of(member_id: MemberId) -> WorkerInfo | GatewayInfo:
    return gateway_info(member_id) if member_id.startswith("gateway") else worker_info(member_id)
