"""The Ray shell of a gateway: builds one GatewayProcess and delegates.

What is done here and not there is what Ray makes necessary: a process of its own is set up, errors become values, and
handles become ports. Ray itself is in `remote_calls.py` and `remote_placer.py`; `ray.remote` is applied where the actor
is made.
"""

from __future__ import annotations

import asyncio
import sys

from control_plane.gateway.process import GatewayProcess
from control_plane.gateway.service import ModelCard
from control_plane.remote_calls import find_actor
from control_plane.remote_placer import RemotePlacer
from phasewise.core.birth import CONTROL_PLANE_NAME, MemberBirth
from phasewise.core.errors import ServingError
from phasewise.core.handles import as_value
from phasewise.core.heartbeat import Description
from phasewise.core.logs import setup_logging
from phasewise.core.termination import Termination, end_process
from phasewise.core.view import ViewDelta

SWITCH_INTERVAL_S = 0.0005
"""How long a gateway's event loop waits for a thread that tokenises to give up the interpreter, at each of its steps.
Python's default is 5 ms."""


class GatewayActor:
    """One gateway of a cluster, called by the control plane and the launcher. Workers' tokens come another way."""

    _termination: Termination

    def __new__(cls, *_: object) -> GatewayActor:
        """Ray makes the object on the main thread, which alone may take signals, and initialises it on another."""
        actor = super().__new__(cls)
        actor._termination = Termination()
        actor._termination.catch()
        return actor

    def __init__(self, birth: MemberBirth) -> None:
        logs = birth.config.logging
        setup_logging(birth.member_id, log_format=logs.format, level=logs.level, collector=birth.log_collector)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        control_plane = find_actor(CONTROL_PLANE_NAME)
        placer = RemotePlacer(control_plane, birth.member_id)
        self._process = GatewayProcess(birth, control_plane, placer, find_actor, end_process)
        self._life = asyncio.get_running_loop().create_task(self._process.run())
        self._life.add_done_callback(_end_after_fault)
        self._termination.listen(asyncio.get_running_loop(), self._process.terminate)

    async def wait_serving(self) -> ModelCard | ServingError:
        return await as_value(self._process.wait_serving())

    async def view_changed(self, delta: ViewDelta) -> None:
        self._process.view_changed(delta)

    async def describe(self) -> Description:
        return self._process.describe()

    async def drain(self, timeout_s: float) -> None:
        self._process.drain(timeout_s)

    async def stop(self) -> None:
        await self._process.stop()

    async def wait_closed(self) -> None:
        await asyncio.shield(self._life)


def _end_after_fault(life: asyncio.Task[None]) -> None:
    """A gateway that broke does not stay: the control plane may not be there to end it."""
    if not life.cancelled() and (error := life.exception()) is not None:
        end_process(f"{type(error).__name__}: {error}", 1)
