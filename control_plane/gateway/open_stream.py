"""A client's end of an open request: what is new, in order, until the end or an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from control_plane.gateway.open_requests import OpenRequest, merge_deltas
from control_plane.gateway.service import SampleDelta, TokenInfo, Usage
from phasewise.core.messages import TimelineEvent
from phasewise.core.placement import Placement


class OpenStream:
    """A client's end of an open request. Implements GenerationStream (control_plane/gateway/service.py)."""

    def __init__(self, record: OpenRequest, cancel: Any) -> None:
        self.record = record
        self.timer: asyncio.TimerHandle | None = None
        self._cancel = cancel
        self._news = asyncio.Event()

    @property
    def request_id(self) -> str:
        """The client's own."""
        return self.record.client_id

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.record.request.prompt_token_ids

    @property
    def prompt_tokens(self) -> tuple[TokenInfo, ...]:
        return self.record.prompt_tokens

    @property
    def usage(self) -> Usage:
        return self.record.usage

    @property
    def timeline(self) -> tuple[TimelineEvent, ...]:
        return tuple(sorted(self.record.events, key=lambda event: event.at_unix_s))

    @property
    def placement(self) -> Placement:
        assert self.record.placement is not None
        return self.record.placement

    def wake(self) -> None:
        """There is news in the record."""
        self._news.set()

    def __aiter__(self) -> AsyncIterator[SampleDelta]:
        return self._deltas()

    async def _deltas(self) -> AsyncIterator[SampleDelta]:
        record = self.record
        while True:
            pending, record.pending = record.pending, []
            for delta in merge_deltas(pending):
                yield delta
            if record.pending:
                continue
            if record.error is not None:
                raise record.error
            if record.is_over:
                return
            await self._news.wait()
            self._news.clear()

    async def aclose(self) -> None:
        """Cancels what is still running; harmless after the end."""
        self._cancel(self)
