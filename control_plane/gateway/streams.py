"""A client's end of an open request: what is new, in order, until the end or an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from control_plane.gateway.attempts import Attempts
from control_plane.gateway.open_requests import OpenRequest
from control_plane.gateway.request_ids import ClaimedId
from control_plane.gateway.service import SampleDelta, TokenInfo, Usage
from phasewise.core.messages import TimelineEvent
from phasewise.core.placement import Placement


class OpenStream:
    """A client's end of an open request. Implements GenerationStream (control_plane/gateway/service.py)."""

    def __init__(self, record: OpenRequest, attempts: Attempts, client: str | None, own_id: ClaimedId | None) -> None:
        self.record = record
        self.client = client
        self.timer: asyncio.TimerHandle | None = None
        self._attempts = attempts
        self._own_id = own_id
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

    def ended(self) -> None:
        """Nothing of the request is left but what the client has not read."""
        if self.timer is not None:
            self.timer.cancel()
        if self._own_id is not None:
            self._own_id.release()
        self.wake()

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
        self._attempts.cancel(self.record)


def merge_deltas(deltas: list[SampleDelta]) -> list[SampleDelta]:
    """Joins what is new of each sample: a slow reader gets fewer and larger deltas. Linear in what is joined."""
    if len(deltas) < 2:
        return deltas
    by_sample: dict[int, list[SampleDelta]] = {}
    for delta in deltas:
        by_sample.setdefault(delta.sample_index, []).append(delta)
    return [_join(parts) for parts in by_sample.values()]


def _join(parts: list[SampleDelta]) -> SampleDelta:
    last = parts[-1]
    return SampleDelta(
        last.sample_index,
        "".join(part.text for part in parts),
        tuple(token_id for part in parts for token_id in part.token_ids),
        tuple(token for part in parts for token in part.tokens),
        last.finish_reason,
        last.stop_reason,
    )
