"""A gateway's way to the control plane: its actor's handle."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ray.exceptions import RayError

from control_plane.link_survey import LinkSurvey
from control_plane.remote_calls import answer, end_of
from control_plane.remote_members import LINKS_TIMEOUT_S
from phasewise.core.errors import DeadlineExceeded, ServingError, Unavailable
from phasewise.core.handles import ActorHandle
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import Placement, PlaceRequest

_WHO = "the control plane"


class RemotePlacer:
    """Placer (control_plane/gateway/placer.py) over the control plane's actor.

    First tokens and ends are told once per turn of the event loop: a step that brings many of them costs one call, not
    one for each.
    """

    def __init__(self, control_plane: ActorHandle) -> None:
        self._control_plane = control_plane
        self._news: list[tuple[str, int | None]] = []

    async def place(self, request: PlaceRequest, timeout_s: float) -> Placement:
        call = self._control_plane.place.remote(request)
        try:
            async with asyncio.timeout(timeout_s):
                placement: Placement | ServingError = await asyncio.wrap_future(call.future())
        except asyncio.CancelledError:
            self.finished(request.request_id, 0)  # the client has left; the placement, if any, is given back
            raise
        except TimeoutError:
            self.finished(request.request_id, 0)
            raise DeadlineExceeded("the request's deadline passed before it was placed") from None
        except RayError:
            raise Unavailable(f"{_WHO} does not answer", retry_after_s=2.0) from None
        if isinstance(placement, ServingError):
            raise placement
        return placement

    def first_token(self, request_id: str) -> None:
        self._tell(request_id, None)

    def finished(self, request_id: str, num_output_tokens: int) -> None:
        self._tell(request_id, num_output_tokens)

    def _tell(self, request_id: str, num_output_tokens: int | None) -> None:
        if not self._news:
            asyncio.get_running_loop().call_soon(self._send_news)
        self._news.append((request_id, num_output_tokens))

    def _send_news(self) -> None:
        news, self._news = self._news, []
        self._control_plane.progress.remote(news)

    async def snapshot(self) -> list[tuple[WorkerInfo, WorkerLoad]]:
        try:
            workers: list[tuple[WorkerInfo, WorkerLoad]] = await self._control_plane.snapshot.remote()
        except RayError:
            raise Unavailable(f"{_WHO} does not answer", retry_after_s=2.0) from None
        return workers

    async def links(self) -> LinkSurvey:
        survey: LinkSurvey = await answer(self._control_plane.links.remote(), _WHO, 2 * LINKS_TIMEOUT_S)
        return survey

    async def probe_links(self, sizes: Sequence[int], timeout_s: float) -> LinkSurvey:
        call = self._control_plane.probe_links.remote(sizes, timeout_s)
        survey: LinkSurvey = await answer(call, _WHO, timeout_s + 4 * LINKS_TIMEOUT_S)
        return survey

    async def control_plane_ended(self) -> None:
        """Returns when the control plane's process has ended, however it did."""
        await end_of(self._control_plane.wait_closed.remote())
