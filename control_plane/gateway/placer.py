"""The control plane as a gateway sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from control_plane.link_survey import LinkSurvey
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import Placement, PlaceRequest


class Placer(Protocol):
    """RemotePlacer implements it by calls (control_plane/remote_placer.py), tests in their own process."""

    async def place(self, request: PlaceRequest, timeout_s: float) -> Placement:
        """Raises Overloaded, Unavailable, or DeadlineExceeded after `timeout_s`."""

    def first_token(self, request_id: str) -> None:
        """Tells and returns at once."""

    def finished(self, request_id: str, num_output_tokens: int) -> None:
        """Tells and returns at once."""

    async def snapshot(self) -> list[tuple[WorkerInfo, WorkerLoad]]:
        """All workers and what they last said."""

    async def links(self) -> LinkSurvey:
        """The links between workers, as far as they are known. Raises Unavailable."""

    async def probe_links(self, sizes: Sequence[int], timeout_s: float) -> LinkSurvey:
        """The same, measured. Raises Unavailable, or Overloaded while somebody else measures."""
