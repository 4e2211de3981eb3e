"""The Ray shells of the control plane and of the gateways. Each builds one plain object and delegates.

What is done here and not there is what Ray makes necessary: a process of its own is set up, errors become values, and
handles become ports. Ray itself is in `remote_calls.py`, `remote_members.py` and `remote_placer.py`; `ray.remote` is
applied where the cluster is launched.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from control_plane.gateway.process import GatewayProcess
from control_plane.gateway.service import ModelCard
from control_plane.remote_placer import RemotePlacer
from phasewise.core.config import ServingConfig
from phasewise.core.errors import ServingError
from phasewise.core.handles import ActorHandle, as_value
from phasewise.core.logs import setup_logging
from phasewise.core.messages import WorkerInfo, WorkerOutput
from phasewise.core.placement import WorkerId

SWITCH_INTERVAL_S = 0.0005
"""How long a gateway's event loop waits for a thread that tokenises to give up the interpreter, at each of its steps.
Python's default is 5 ms."""


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """What a gateway process is told when it is made. `log_collector`: the path of a socket that takes its log."""

    gateway_id: str
    config: ServingConfig
    log_collector: str | None = None


class GatewayActor:
    """One GatewayProcess, called by workers, the control plane and the launcher."""

    def __init__(self, settings: GatewaySettings) -> None:
        logs = settings.config.logging
        setup_logging(settings.gateway_id, log_format=logs.format, level=logs.level, collector=settings.log_collector)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._process = GatewayProcess(settings.gateway_id, settings.config)

    async def bind(self) -> str | ServingError:
        return await as_value(self._process.bind())

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

    async def deliver(self, output: WorkerOutput) -> None:
        """What one step of one worker has for this gateway."""
        assert self._process.service is not None, "workers have its requests only"
        self._process.service.deliver(output)

    async def worker_lost(self, worker_id: WorkerId) -> None:
        self._process.worker_lost(worker_id)

    async def drain(self, timeout_s: float) -> None:
        await self._process.drain(timeout_s)

    async def stop(self) -> None:
        await self._process.stop()

    async def wait_closed(self) -> None:
        await self._process.wait_closed()
