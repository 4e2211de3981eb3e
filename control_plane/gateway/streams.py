"""A client's end of an open request, and the one reader of such ends, for both servers.

Deltas wait in the request's record while a client is slow. A reader takes all that has come at once and joins it, so a
slow client gets fewer and larger deltas.
"""

from __future__ import annotations

import asyncio

from control_plane.gateway.attempts import Attempts
from control_plane.gateway.open_requests import OpenRequest
from control_plane.gateway.request_ids import ClaimedId
from control_plane.gateway.service import GenerationStream, News, NotRead, SampleDelta, TokenInfo, Usage
from phasewise.core.messages import TimelineEvent
from phasewise.core.placement import Placement

MAX_TAKEN = 256
"""Deltas of one request that are joined and sent at once. Keeps a gRPC message below the 4 MiB that clients accept by
default, log-probabilities included."""


class OpenStream:
    """A client's end of an open request. Implements GenerationStream (service.py).

    Attributes:
        client: whose share of the open requests it is part of.
        timer: of the request's deadline; the request's driver sets it.
        news: is set when there is something to take.
    """

    timer: asyncio.TimerHandle

    def __init__(self, record: OpenRequest, attempts: Attempts, client: str | None, own_id: ClaimedId | None) -> None:
        self.record = record
        self.client = client
        self._attempts = attempts
        self._own_id = own_id
        self.news: News = NotRead()

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
    def placement(self) -> Placement | None:
        return self.record.placement

    @property
    def is_over(self) -> bool:
        record = self.record
        return record.is_over and record.error is None and not record.pending

    def listen(self, news: News) -> None:
        self.news = news
        news.set()

    def take(self) -> list[SampleDelta]:
        record = self.record
        deltas = record.pending[:MAX_TAKEN]
        if not deltas and record.error is not None:
            raise record.error
        del record.pending[:MAX_TAKEN]
        if record.pending or record.error is not None:
            self.news.set()  # there is more to take
        return deltas

    def close(self) -> None:
        self._attempts.cancel(self.record)

    def ended(self) -> None:
        """Called by the request's driver. Deltas that were not taken stay in the record."""
        self.timer.cancel()
        if self._own_id is not None:
            self._own_id.release()
        self.news.set()


class ReaderNews:
    """An `asyncio.Event` that clears itself, for one task that waits. It is set and waited for at every token."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_set = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        self._is_set = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait(self) -> None:
        """Returns when `set` was called since this last returned."""
        if not self._is_set:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._is_set = False


class StreamReader:
    """Reads the streams of one answer, one or several. `close` must be called in the end."""

    def __init__(self) -> None:
        self.streams: list[GenerationStream] = []
        self._news = ReaderNews()
        self._error: Exception | None = None  # of one stream, while what others have brought goes first

    def add(self, stream: GenerationStream) -> None:
        self.streams.append(stream)
        stream.listen(self._news)

    async def take(self) -> tuple[list[tuple[int, SampleDelta]], bool]:
        """Waits for something new; returns (number of the stream, delta) for each sample, and whether that was all.

        Raises the error of a stream when all its deltas were taken, and those that others had brought before.
        """
        while self._error is None:
            await self._news.wait()
            new, is_last = [], True
            for number, stream in enumerate(self.streams):
                try:
                    deltas = stream.take()
                except Exception as error:
                    self._error, is_last = error, False
                    break
                new += [(number, delta) for delta in _joined(deltas)]
                is_last = is_last and stream.is_over
            if new or is_last:
                return new, is_last
        raise self._error

    def close(self) -> None:
        """Cancels what still runs. Harmless when repeated."""
        for stream in self.streams:
            stream.close()


def _joined(deltas: list[SampleDelta]) -> list[SampleDelta]:
    """One delta for each sample. Linear in what is joined."""
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
