"""A gateway's way to the control plane: its actor's handle, which stays good when that is started again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from ray.exceptions import ActorDiedError, RayError

from control_plane.link_survey import LinkSurvey
from control_plane.remote_calls import answer
from control_plane.remote_members import LINKS_TIMEOUT_S
from phasewise.core.errors import DeadlineExceeded, ServingError, Unavailable
from phasewise.core.handles import ActorHandle
from phasewise.core.identity import MemberId
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import Placement, PlaceRequest

_WHO = "the control plane"
_ASK_AGAIN_S = 0.2
"""While the control plane is being started again, each call of it fails at once."""


class RemotePlacer:
    """Placer (control_plane/gateway/placer.py) over the control plane's actor.

    First tokens and ends are told once per turn of the event loop: a step that brings many of them costs one call, not
    one for each.
    """

    def __init__(self, control_plane: ActorHandle, gateway_id: MemberId) -> None:
        self._control_plane = control_plane
        self._gateway_id = gateway_id
        self._news: list[tuple[str, int | None]] = []

    async def place(self, request: PlaceRequest, timeout_s: float) -> Placement:
        """Asks again within `timeout_s` while the control plane is being started again."""
        request = replace(request, gateway_id=self._gateway_id)
        try:
            async with asyncio.timeout(timeout_s):
                placement = await self._placed(request)
        except asyncio.CancelledError:
            self.finished(request.request_id, 0)  # the client has left; the placement, if any, is given back
            raise
        except TimeoutError:
            self.finished(request.request_id, 0)
            raise DeadlineExceeded("the request's deadline passed before it was placed") from None
        if isinstance(placement, ServingError):
            raise placement
        return placement

    async def _placed(self, request: PlaceRequest) -> Placement | ServingError:
        while True:
            call = self._control_plane.place.remote(request)
            try:
                placement: Placement | ServingError = await asyncio.wrap_future(call.future())
            except ActorDiedError:
                raise Unavailable(f"{_WHO} has ended", retry_after_s=2.0) from None
            except RayError:
                await asyncio.sleep(_ASK_AGAIN_S)
            else:
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
        workers: list[tuple[WorkerInfo, WorkerLoad]] = await answer(
            self._control_plane.snapshot.remote(), _WHO, LINKS_TIMEOUT_S
        )
        return workers

    async def links(self) -> LinkSurvey:
        survey: LinkSurvey = await answer(self._control_plane.links.remote(), _WHO, 2 * LINKS_TIMEOUT_S)
        return survey

    async def probe_links(self, sizes: Sequence[int], timeout_s: float) -> LinkSurvey:
        call = self._control_plane.probe_links.remote(sizes, timeout_s)
        survey: LinkSurvey = await answer(call, _WHO, timeout_s + 4 * LINKS_TIMEOUT_S)
        return survey
