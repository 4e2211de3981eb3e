"""The Ray shell of a worker process: builds one WorkerProcess (process.py) and delegates.

`ray.remote` is applied where the actor is made. That is in the control plane's process, which has no torch: so the
process is imported when the actor is initialised. `wait_closed` stays open as long as the worker lives.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import numpy as np

from phasewise.core.birth import CONTROL_PLANE_NAME, MemberBirth
from phasewise.core.heartbeat import Description
from phasewise.core.links import LinkProbe, WorkerLinks
from phasewise.core.logs import setup_logging
from phasewise.core.messages import KVPart, WorkerInfo, WorkerMessage
from phasewise.core.placement import WorkerId, WorkerRole
from phasewise.core.termination import Termination, end_process
from phasewise.core.view import ViewDelta
from workers.settings import settings_of

SWITCH_S = 0.0005
"""How long the loop's thread keeps the interpreter while another wants it. Python's default is 5 ms. The links' threads
need it for little at a time, and the next part waits for them."""


class WorkerActor:
    """One worker of a cluster, called by gateways, other workers, the control plane and the launcher."""

    _termination: Termination

    def __new__(cls, *_: object) -> WorkerActor:
        """Ray makes the object on the main thread, which alone may take signals, and initialises it on another."""
        actor = super().__new__(cls)
        actor._termination = Termination()
        actor._termination.catch()
        return actor

    def __init__(self, birth: MemberBirth) -> None:
        from workers.process import WorkerProcess  # torch
        from workers.remote_cluster import find_actor  # Ray: once it is set up

        sys.setswitchinterval(SWITCH_S)
        settings, logs = settings_of(birth), birth.config.logging
        setup_logging(settings.worker_id, log_format=logs.format, level=logs.level, collector=birth.log_collector)
        self._process = WorkerProcess(settings, find_actor(CONTROL_PLANE_NAME), find_actor, end_process)
        self._life = asyncio.get_running_loop().create_task(self._process.run())
        self._life.add_done_callback(_end_after_fault)
        self._termination.listen(asyncio.get_running_loop(), self._process.terminate)

    async def post(self, message: WorkerMessage) -> None:
        """A message from a gateway or another worker."""
        assert self._process.worker is not None, "requests are placed on workers that have joined"
        self._process.worker.post(message)

    async def post_part(self, sender: WorkerId, part: KVPart, array: np.ndarray) -> None:
        """A part of a handoff, with its bytes in shared memory."""
        assert self._process.links is not None
        self._process.links.receive(sender, part, array)

    async def view_changed(self, delta: ViewDelta) -> None:
        self._process.view_changed(delta)

    async def describe(self) -> Description:
        return self._process.describe()

    async def drain(self, timeout_s: float) -> None:
        self._process.drain(timeout_s)

    async def change_role(self, role: WorkerRole) -> None:
        self._process.change_role(role)

    async def links(self, peers: Sequence[WorkerInfo]) -> WorkerLinks:
        """What this worker knows of its links to `peers`."""
        assert self._process.worker is not None
        return self._process.worker.links(peers)

    async def probe_link(self, peer: WorkerId, num_bytes: int, timeout_s: float) -> LinkProbe:
        return await self._process.probe_link(peer, num_bytes, timeout_s)

    async def stop(self) -> None:
        await self._process.stop()

    async def wait_closed(self) -> None:
        await asyncio.shield(self._life)


def _end_after_fault(life: asyncio.Task[None]) -> None:
    """A worker that broke does not stay: the control plane may not be there to end it."""
    if not life.cancelled() and (error := life.exception()) is not None:
        end_process(f"{type(error).__name__}: {error}", 1)
