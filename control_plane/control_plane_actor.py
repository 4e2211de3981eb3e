"""The Ray shell of the control plane: builds one ControlPlane and its admin API, and delegates.

It is a named, detached actor that Ray starts again when its process ends. It then learns the cluster's state from the
members (keeper.py). What is done here and not there is what Ray makes necessary: a process of its own is set up, and
errors become values. Ray itself is in `remote_members.py`; `ray.remote` is applied where the cluster is launched. More
than 15 of our modules are imported, for every message of members and gateways passes here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from control_plane.admin_server import AdminServer
from control_plane.births import ClusterFacts
from control_plane.cluster_admin import ClusterAdmin
from control_plane.control_plane import ControlPlane, StartReport
from control_plane.link_survey import LinkSurvey
from control_plane.remote_members import RemoteMembers, end_own_actor
from phasewise.core.birth import CONTROL_PLANE_NAME
from phasewise.core.clock import MonotonicClock
from phasewise.core.collector import freeze_collector
from phasewise.core.errors import ServingError
from phasewise.core.handles import as_value
from phasewise.core.heartbeat import Heartbeat, HeartbeatAnswer, Joining
from phasewise.core.identity import MemberId
from phasewise.core.logs import setup_logging
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import Placement, PlaceRequest, WorkerId, WorkerRole
from phasewise.core.view import View


@dataclass(frozen=True, slots=True)
class ControlPlaneSettings:
    """What the control plane is told when it is made, also each time that it is made again.

    Attributes:
        worker_class, gateway_class: actors that are made with a MemberBirth. They are importable without torch.
        outlives_launcher: on a Ray that others started, a cluster that was stopped ends its control plane, too.
    """

    facts: ClusterFacts
    worker_class: type
    gateway_class: type
    outlives_launcher: bool = False


class ControlPlaneActor:
    """One ControlPlane, called by members, the admin API and the launcher.

    There are more than 20 methods: one for each question.
    """

    def __init__(self, settings: ControlPlaneSettings) -> None:
        config = settings.facts.config
        logs = config.logging
        setup_logging(
            CONTROL_PLANE_NAME, log_format=logs.format, level=logs.level, collector=settings.facts.log_collector
        )
        self._settings = settings
        members = RemoteMembers(settings.worker_class, settings.gateway_class)
        self._plane = ControlPlane(settings.facts, members, members, MonotonicClock())
        self._admin = AdminServer(ClusterAdmin(self._plane, config.gateway.drain_s))
        self._life = asyncio.get_running_loop().create_task(self._live())

    async def _live(self) -> None:
        await self._plane.begin()
        self._plane.membership.serve_admin(
            await self._admin.open(self._plane.membership.view.admin or self._settings.facts.config.admin.http)
        )
        freeze_collector()
        await self._plane.wait_closed()
        await self._admin.close()
        if self._settings.outlives_launcher:
            end_own_actor()

    async def join(self, joining: Joining) -> View | ServingError:
        return await as_value(self._plane.join(joining))

    async def loading(self, member_id: MemberId, share: float) -> None:
        await self._plane.loading(member_id, share)

    async def failed(self, member_id: MemberId, error: ServingError) -> None:
        await self._plane.failed(member_id, error)

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatAnswer:
        return await self._plane.heartbeat(beat)

    async def report(self, load: WorkerLoad) -> None:
        await self._plane.report(load)

    async def draining(self, member_id: MemberId) -> None:
        await self._plane.draining(member_id)

    async def role_changed(self, worker_id: WorkerId, role: WorkerRole) -> None:
        await self._plane.role_changed(worker_id, role)

    async def left(self, member_id: MemberId) -> None:
        await self._plane.left(member_id)

    async def view(self) -> View:
        return await self._plane.view()

    async def place(self, request: PlaceRequest) -> Placement | ServingError:
        """A refusal comes back as a value: Ray would wrap an exception."""
        return await as_value(self._plane.place(request))

    async def progress(self, news: Sequence[tuple[str, int | None]]) -> None:
        await self._plane.progress(news)

    async def snapshot(self) -> list[tuple[WorkerInfo, WorkerLoad]]:
        return self._plane.workers()

    async def links(self) -> LinkSurvey | ServingError:
        return await as_value(self._plane.links.look())

    async def probe_links(self, sizes: Sequence[int], timeout_s: float) -> LinkSurvey | ServingError:
        return await as_value(self._plane.links.probe(sizes, timeout_s))

    async def start_report(self) -> StartReport:
        return await self._plane.start_report()

    async def stop(self, drain_s: float) -> None:
        await self._plane.stop(drain_s)

    async def wait_closed(self) -> None:
        """Returns when the cluster was stopped, and raises what broke this process."""
        closed = asyncio.ensure_future(self._plane.wait_closed())
        await asyncio.wait((closed, self._life), return_when=asyncio.FIRST_COMPLETED)
        closed.cancel()
        if self._life.done():
            self._life.result()
