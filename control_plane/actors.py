"""The Ray shells of the control plane and of the gateways. Each builds one plain object and delegates.

What is done here and not there is what Ray makes necessary: a process of its own is set up, errors become values, and
handles become ports. Ray itself is in `remote_calls.py`, `remote_members.py` and `remote_placer.py`; `ray.remote` is
applied where the cluster is launched.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from control_plane.control_plane import ControlPlane
from control_plane.gateway.process import GatewayProcess
from control_plane.gateway.service import ModelCard
from control_plane.link_survey import LinkSurvey
from control_plane.remote_members import RemoteMembers
from control_plane.remote_placer import RemotePlacer
from phasewise.core.clock import MonotonicClock
from phasewise.core.collector import freeze_collector
from phasewise.core.config import ServingConfig
from phasewise.core.errors import ServingError
from phasewise.core.handles import ActorHandle, as_value
from phasewise.core.logs import setup_logging
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import Placement, PlaceRequest, WorkerId

SWITCH_INTERVAL_S = 0.0005
"""How long a gateway's event loop waits for a thread that tokenises to give up the interpreter, at each of its steps.
Python's default is 5 ms."""


class ControlPlaneActor:
    """One ControlPlane, called by gateways, workers and the launcher."""

    def __init__(self, config: ServingConfig, log_collector: str | None) -> None:
        logs = config.logging
        setup_logging("control-plane", log_format=logs.format, level=logs.level, collector=log_collector)
        self._members = RemoteMembers()
        self._control_plane = ControlPlane(config, self._members, self._members, MonotonicClock())
        self._scheduler = self._control_plane.scheduler

    async def join(self, info: WorkerInfo, handle: ActorHandle) -> None:
        self._members.connect_worker(info.worker_id, handle)
        self._control_plane.join(info)

    async def join_gateway(self, gateway_id: str, handle: ActorHandle) -> None:
        self._members.connect_gateway(gateway_id, handle)
        self._control_plane.join_gateway(gateway_id)

    async def start_health_checks(self) -> None:
        freeze_collector()
        self._control_plane.start_health_checks()

    async def report(self, load: WorkerLoad) -> None:
        self._scheduler.worker_load(load)

    async def place(self, request: PlaceRequest) -> Placement | ServingError:
        """A refusal comes back as a value: Ray would wrap an exception."""
        try:
            return self._scheduler.place(request)
        except ServingError as error:
            return error

    async def progress(self, news: Sequence[tuple[str, int | None]]) -> None:
        """What became of attempts: (id, None) for a first token, (id, number of output tokens) for an end."""
        for request_id, num_output_tokens in news:
            if num_output_tokens is None:
                self._scheduler.first_token(request_id)
            else:
                self._scheduler.finished(request_id, num_output_tokens)

    async def snapshot(self) -> list[tuple[WorkerInfo, WorkerLoad]]:
        return self._control_plane.snapshot()

    async def links(self) -> LinkSurvey | ServingError:
        return await as_value(self._control_plane.links())

    async def probe_links(self, sizes: Sequence[int], timeout_s: float) -> LinkSurvey | ServingError:
        return await as_value(self._control_plane.probe_links(sizes, timeout_s))

    async def stop(self) -> None:
        self._control_plane.stop()

    async def wait_closed(self) -> None:
        await self._control_plane.wait_closed()

    async def wait_unservable(self) -> str:
        return await self._control_plane.wait_unservable()


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """What a gateway process is told when it is made. `log_collector`: the path of a socket that takes its log.
    `secret` and `head`: as a worker's (workers/settings.py)."""

    gateway_id: str
    config: ServingConfig
    log_collector: str | None = None
    secret: str = field(default="", repr=False)
    head: str = ""


class GatewayActor:
    """One GatewayProcess, called by the control plane and the launcher. Workers' tokens come another way."""

    def __init__(self, settings: GatewaySettings) -> None:
        logs = settings.config.logging
        setup_logging(settings.gateway_id, log_format=logs.format, level=logs.level, collector=settings.log_collector)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._process = GatewayProcess(settings.gateway_id, settings.config, settings.secret, settings.head)

    async def bind(self) -> str | ServingError:
        return await as_value(self._process.bind())

    async def listen_for_tokens(self) -> str:
        return await self._process.listen_for_tokens()

    async def load(self) -> ServingError | None:
        return await as_value(self._process.load())

    async def has_chat_template(self) -> bool:
        return self._process.has_chat_template

    async def serve(
        self,
        card: ModelCard,
        infos: Sequence[WorkerInfo],
        workers: Mapping[WorkerId, ActorHandle],
        control_plane: ActorHandle,
    ) -> str | ServingError:
        return await as_value(self._process.serve(card, infos, workers, RemotePlacer(control_plane)))

    async def worker_lost(self, worker_id: WorkerId) -> None:
        self._process.worker_lost(worker_id)

    async def drain(self, timeout_s: float) -> None:
        await self._process.drain(timeout_s)

    async def stop(self) -> None:
        await self._process.stop()

    async def wait_closed(self) -> None:
        await self._process.wait_closed()
