"""The control plane's way to workers and gateways: their processes are actors whose Ray name is their identity."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from control_plane.remote_calls import answer
from phasewise.core.birth import MemberBirth
from phasewise.core.errors import Unavailable
from phasewise.core.handles import ActorHandle
from phasewise.core.heartbeat import Description
from phasewise.core.identity import MemberId
from phasewise.core.links import LinkProbe, WorkerLinks
from phasewise.core.messages import WorkerInfo
from phasewise.core.placement import WorkerId, WorkerRole
from phasewise.core.view import ViewDelta

LINKS_TIMEOUT_S = 5.0
"""For a worker to tell of its links."""

DESCRIBE_TIMEOUT_S = 3.0
"""For a member to say who it is. A control plane that is started again waits so long for those that are silent."""

STOP_TIMEOUT_S = 15.0

_WORKER_CONCURRENCY = 1000
_GATEWAY_CONCURRENCY = 10_000
_WATCH_AGAIN_S = 1.0


class RemoteMembers:
    """MemberProcesses (keeper.py) and LinkAsker (link_survey.py) over detached actors.

    Args:
        worker_class, gateway_class: made with a MemberBirth.
    """

    def __init__(self, worker_class: type, gateway_class: type) -> None:
        self._worker_class = worker_class
        self._gateway_class = gateway_class
        self._handles: dict[MemberId, ActorHandle] = {}

    # ---- processes

    async def num_hosts(self) -> int:
        nodes: list[dict[str, Any]] = await asyncio.to_thread(ray.nodes)
        return sum(bool(node["Alive"]) for node in nodes)

    async def lacks(self, birth: MemberBirth) -> str:
        wanted = _resources(birth)
        if not wanted:
            return ""
        free: dict[str, float] = await asyncio.to_thread(ray.available_resources)
        missing = [
            f"it needs {amount:g} {name}, and {free.get(name, 0.0):g} free"
            for name, amount in wanted.items()
            if free.get(name, 0.0) < amount
        ]
        return "; ".join(missing)

    async def start(self, birth: MemberBirth) -> None:
        try:
            self._handles[birth.member_id] = await asyncio.to_thread(self._make, birth)
        except (RayError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise Unavailable(f"its process could not be made: {reason}") from None

    async def ended(self, member_id: MemberId) -> str:
        while True:
            handle = await self._find(member_id)
            if handle is None:
                return "its process has ended"
            try:
                await handle.wait_closed.remote()
            except ActorDiedError:
                return "its process has ended"
            except RayError as error:
                if member_id not in self._handles:
                    return type(error).__name__
                if isinstance(error, ray.exceptions.RayTaskError):
                    return "its loop broke; its log has the cause"
                await asyncio.sleep(_WATCH_AGAIN_S)  # not reached just now: it is asked again
            else:
                return ""

    async def find(self) -> list[MemberId]:
        names: list[str] = await asyncio.to_thread(ray.util.list_named_actors)
        return [name for name in names if "#" in name]

    async def describe(self, member_id: MemberId) -> Description | None:
        try:
            handle = await self._get(member_id)
            description: Description = await answer(handle.describe.remote(), member_id, DESCRIBE_TIMEOUT_S)
        except Unavailable:
            return None
        return description

    async def stop(self, member_id: MemberId) -> None:
        try:
            handle = await self._get(member_id)
            await answer(handle.stop.remote(), member_id, STOP_TIMEOUT_S)
        except Unavailable:
            return

    def kill(self, member_id: MemberId) -> None:
        handle = self._handles.pop(member_id, None)
        if handle is not None:
            ray.kill(handle)

    # ---- messages

    def tell(self, member_id: MemberId, delta: ViewDelta) -> None:
        if handle := self._handles.get(member_id):
            handle.view_changed.remote(delta)

    def drain(self, member_id: MemberId, timeout_s: float) -> None:
        if handle := self._handles.get(member_id):
            handle.drain.remote(timeout_s)

    def change_role(self, member_id: WorkerId, role: WorkerRole) -> None:
        if handle := self._handles.get(member_id):
            handle.change_role.remote(role)

    # ---- links

    async def links(self, worker_id: WorkerId, peers: Sequence[WorkerInfo]) -> WorkerLinks:
        call = (await self._get(worker_id)).links.remote(peers)
        links: WorkerLinks = await answer(call, f"worker {worker_id}", LINKS_TIMEOUT_S)
        return links

    async def probe(self, worker_id: WorkerId, peer: WorkerId, num_bytes: int, timeout_s: float) -> LinkProbe:
        call = (await self._get(worker_id)).probe_link.remote(peer, num_bytes, timeout_s)
        probe: LinkProbe = await answer(call, f"worker {worker_id}", timeout_s + LINKS_TIMEOUT_S)
        return probe

    # ---- inside

    def _make(self, birth: MemberBirth) -> ActorHandle:
        is_worker = birth.role is not None
        resources = _resources(birth)
        options = {
            "name": birth.member_id,
            "lifetime": "detached",
            "num_cpus": 0,
            "num_gpus": resources.pop("GPU", 0),
            "resources": resources,
            "max_concurrency": _WORKER_CONCURRENCY if is_worker else _GATEWAY_CONCURRENCY,
        }
        actor_class = self._worker_class if is_worker else self._gateway_class
        return ray.remote(actor_class).options(**options).remote(birth)

    async def _find(self, member_id: MemberId) -> ActorHandle | None:
        if member_id not in self._handles:
            try:
                self._handles[member_id] = await asyncio.to_thread(ray.get_actor, member_id)
            except ValueError:  # what Ray raises for a name that no actor has
                return None
        return self._handles[member_id]

    async def _get(self, member_id: MemberId) -> ActorHandle:
        handle = await self._find(member_id)
        if handle is None:
            raise Unavailable(f"{member_id} was lost meanwhile", retry_after_s=1.0)
        return handle


def _resources(birth: MemberBirth) -> dict[str, float]:
    """What Ray sets aside for a member, beside CPUs."""
    if birth.role is None:
        return {}
    wanted = dict(birth.config.pool_of(birth.role).resources)
    if birth.device != "cpu":
        wanted["GPU"] = birth.tensor_parallel
    return wanted


def end_own_actor() -> None:
    """Ends this process for good: Ray does not start its actor again."""
    ray.kill(ray.get_runtime_context().current_actor)
