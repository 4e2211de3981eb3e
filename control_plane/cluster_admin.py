"""What the admin API does: tells of the cluster, and passes an operator's orders on. Implements AdminService."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from control_plane.cluster_operator import member_named, scaled, with_role
from control_plane.control_plane import ControlPlane
from control_plane.gateway.cluster_report import worker_report
from phasewise.core.errors import InvalidRequest
from phasewise.core.placement import WorkerRole
from phasewise.core.view import GatewayInfo, Member

logger = logging.getLogger(__name__)

Fields = Mapping[str, Any]


class ClusterAdmin:
    """`drain_s`: how long open requests get at a stop that says nothing else."""

    def __init__(self, control_plane: ControlPlane, drain_s: float) -> None:
        self._control_plane = control_plane
        self._drain_s = drain_s
        self._stop: asyncio.Task[None] | None = None

    async def status(self) -> Fields:
        plane = self._control_plane
        view, desired = await plane.view(), plane.keeper.desired
        reports = [worker_report(info, load) for info, load in plane.workers()]
        reports += [_loading(m, plane.keeper.loading.get(m.member_id, 0.0)) for m in view.workers() if m.info is None]
        return {
            "cluster": {
                "view_version": view.version,
                "is_servable": not plane.scheduler.why_unservable(),
                "is_stopping": plane.membership.is_stopping,
                "desired": {role.value: size for role, size in desired.pools.items()} | {"gateway": desired.gateways},
            },
            "workers": reports,
            "gateways": [_gateway(member) for member in view.gateways()],
        }

    async def order(self, name: str, fields: Fields) -> Fields:
        """Raises InvalidRequest."""
        await self._control_plane.keeper.recovered()
        match name:
            case "scale":
                self._scale(fields)
            case "drain":
                self._drain(_text(fields, "worker"))
            case "role":
                self._change_role(_text(fields, "worker"), _text(fields, "role"))
            case "stop":
                self._begin_stop(_seconds(fields, "drain_s", self._drain_s))
        return await self.status()

    def _scale(self, fields: Fields) -> None:
        for pool, size in fields.items():
            if not isinstance(size, int) or isinstance(size, bool):
                raise InvalidRequest(f"{pool} must be a whole number", field=pool)
        keeper = self._control_plane.keeper
        keeper.want(scaled(keeper.desired, fields))
        logger.info("an operator wants %s", ", ".join(f"{pool} {size}" for pool, size in fields.items()))

    def _drain(self, worker: str) -> None:
        member = member_named(self._control_plane.membership, worker)
        logger.info("an operator has %s drained", member.member_id)
        self._control_plane.keeper.drain(member.member_id)

    def _change_role(self, worker: str, role: str) -> None:
        keeper, membership = self._control_plane.keeper, self._control_plane.membership
        member, desired = with_role(membership, keeper.desired, worker, role)
        logger.info("an operator makes %s a %s worker", member.member_id, role)
        keeper.change_role(member.member_id, WorkerRole(role), desired)

    def _begin_stop(self, drain_s: float) -> None:
        if self._stop is None:
            logger.info("an operator stops the cluster; open requests have %g s", drain_s)
            self._stop = asyncio.create_task(self._control_plane.stop(drain_s))


def _gateway(member: Member) -> dict[str, Any]:
    report: dict[str, Any] = {"id": member.member_id, "name": member.name, "state": member.state.value}
    if isinstance(member.info, GatewayInfo):
        info = member.info
        report |= {"pid": info.pid, "host": info.host, "http": info.http, "grpc": info.grpc}
    return report


def _loading(member: Member, share: float) -> dict[str, Any]:
    role = member.role.value if member.role is not None else ""
    return {"id": member.member_id, "name": member.name, "role": role, "state": member.state.value, "loaded": share}


def _text(fields: Fields, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is missing: send a string", field=name)
    return value


def _seconds(fields: Fields, name: str, default: float) -> float:
    value = fields.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 86_400:
        raise InvalidRequest(f"{name} must be 0 to 86400 seconds", field=name)
    return float(value)
