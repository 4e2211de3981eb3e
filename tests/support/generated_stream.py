"""Streams of tests: one over a generator of deltas, for services that are made up; and what reads any stream."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator

from control_plane.gateway.service import GenerationStream, News, SampleDelta
from control_plane.gateway.streams import MAX_TAKEN, StreamReader


class GeneratedStream(ABC):
    """The part of a GenerationStream that is read. A task runs `_deltas` from the first `listen` to `close`.

    Args:
        num_at_once: the most deltas that are given at once; what is given at once is joined.
    """

    def __init__(self, num_at_once: int = MAX_TAKEN) -> None:
        self._num_at_once = num_at_once
        self._ready: list[SampleDelta] = []
        self._error: Exception | None = None
        self._has_ended = False
        self._news: News = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @abstractmethod
    def _deltas(self) -> AsyncIterator[SampleDelta]: ...

    @property
    def is_over(self) -> bool:
        return self._has_ended and not self._ready

    def listen(self, news: News) -> None:
        self._news = news
        news.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def take(self) -> list[SampleDelta]:
        ready = self._ready[: self._num_at_once]
        del self._ready[: self._num_at_once]
        if not ready and self._error is not None:
            raise self._error
        if self._ready or self._error is not None:
            self._news.set()
        return ready

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            async for delta in self._deltas():
                self._ready.append(delta)
                self._news.set()
            self._has_ended = True
        except Exception as error:
            self._error = error
        finally:
            self._news.set()


async def deltas_of(stream: GenerationStream) -> AsyncIterator[SampleDelta]:
    """All deltas as they come. Raises the stream's error after them."""
    reader = StreamReader()
    reader.add(stream)
    is_last = False
    while not is_last:
        new, is_last = await reader.take()
        for _, delta in new:
            yield delta
