"""A probe of a link as something to await: from an event loop to the step loop and back."""

from __future__ import annotations

import asyncio
import contextlib

from kv_transfer.prober import ProbeLink
from phasewise.core.links import LinkProbe
from phasewise.core.placement import WorkerId
from workers.driver import WorkerDriver

_GRACE_S = 1.0


async def probe_link(worker: WorkerDriver, peer: WorkerId, num_bytes: int, timeout_s: float) -> LinkProbe:
    """Sends a probe and returns what came of it, a little later than `timeout_s` at the latest."""
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[LinkProbe] = loop.create_future()

    def settle(probe: LinkProbe) -> None:
        if not answered.done():
            answered.set_result(probe)

    def answer(probe: LinkProbe) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(settle, probe)

    worker.post(ProbeLink(peer, num_bytes, timeout_s, answer))
    try:
        async with asyncio.timeout(timeout_s + _GRACE_S):
            return await answered
    except TimeoutError:  # a step takes longer, or the loop has stopped
        return LinkProbe(num_bytes, None, f"worker {worker.info.worker_id} did not answer within {timeout_s:g} s")
