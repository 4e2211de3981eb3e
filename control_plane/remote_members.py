"""The control plane's way to workers and gateways: their actors' handles."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from control_plane.remote_calls import answer, end_of
from phasewise.core.errors import Unavailable
from phasewise.core.handles import ActorHandle
from phasewise.core.links import LinkProbe, WorkerLinks
from phasewise.core.messages import GatewayLost, PeerLost, WorkerInfo
from phasewise.core.placement import WorkerId

LINKS_TIMEOUT_S = 5.0
"""For a worker to tell of its links."""


class RemoteMembers:
    """WatchedMembers (control_plane.py) and LinkAsker (link_survey.py) over actors. A worker is known until killed."""

    def __init__(self) -> None:
        self._workers: dict[WorkerId, ActorHandle] = {}
        self._gateways: dict[str, ActorHandle] = {}

    def connect_worker(self, worker_id: WorkerId, handle: ActorHandle) -> None:
        self._workers[worker_id] = handle

    def connect_gateway(self, gateway_id: str, handle: ActorHandle) -> None:
        self._gateways[gateway_id] = handle

    def tell_worker(self, worker_id: WorkerId, message: PeerLost | GatewayLost) -> None:
        self._workers[worker_id].member_lost.remote(message)

    def tell_gateway(self, gateway_id: str, lost: WorkerId) -> None:
        self._gateways[gateway_id].worker_lost.remote(lost)

    def kill_worker(self, worker_id: WorkerId) -> None:
        ray.kill(self._workers.pop(worker_id))

    async def worker_ended(self, worker_id: WorkerId) -> str:
        return await end_of(self._workers[worker_id].wait_closed.remote())

    async def gateway_ended(self, gateway_id: str) -> str:
        return await end_of(self._gateways[gateway_id].wait_closed.remote())

    async def links(self, worker_id: WorkerId, peers: Sequence[WorkerInfo]) -> WorkerLinks:
        call = self._handle(worker_id).links.remote(peers)
        links: WorkerLinks = await answer(call, f"worker {worker_id}", LINKS_TIMEOUT_S)
        return links

    async def probe(self, worker_id: WorkerId, peer: WorkerId, num_bytes: int, timeout_s: float) -> LinkProbe:
        call = self._handle(worker_id).probe_link.remote(peer, num_bytes, timeout_s)
        probe: LinkProbe = await answer(call, f"worker {worker_id}", timeout_s + LINKS_TIMEOUT_S)
        return probe

    def _handle(self, worker_id: WorkerId) -> ActorHandle:
        handle = self._workers.get(worker_id)
        if handle is None:
            raise Unavailable(f"worker {worker_id} was lost meanwhile", retry_after_s=1.0)
        return handle
