"""The one reader of open requests: what has come is joined by sample, in order, and bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from control_plane.gateway.service import SampleDelta
from control_plane.gateway.streams import MAX_TAKEN, StreamReader
from phasewise.core.errors import Overloaded, WorkerLost
from phasewise.core.messages import RequestFailed, WorkerOutput
from phasewise.core.request import FinishReason
from tests.control_plane.gateway.test_inference import Cluster
from tests.support.generated_stream import GeneratedStream


class Listed(GeneratedStream):
    """Deltas that are there from the beginning, and then an error."""

    def __init__(self, deltas: list[SampleDelta], error: Exception | None = None) -> None:
        super().__init__()
        self._listed = deltas
        self._last = error

    async def _deltas(self) -> AsyncIterator[SampleDelta]:
        for delta in self._listed:
            yield delta
        if self._last is not None:
            raise self._last


def reader_of(*streams: GeneratedStream) -> StreamReader:
    reader = StreamReader()
    for stream in streams:
        reader.add(stream)  # type: ignore[arg-type]
    return reader


async def test_what_has_come_is_joined_for_each_sample() -> None:
    deltas = [SampleDelta(i % 2, f"{i} ", (i,)) for i in range(6)]
    deltas.append(SampleDelta(0, "end", (9,), (), FinishReason.STOP, "x"))
    reader = reader_of(Listed(deltas), Listed([SampleDelta(0, "other", (7,))]))
    new, is_last = await reader.take()
    assert new == [
        (0, SampleDelta(0, "0 2 4 end", (0, 2, 4, 9), (), FinishReason.STOP, "x")),
        (0, SampleDelta(1, "1 3 5 ", (1, 3, 5))),
        (1, SampleDelta(0, "other", (7,))),
    ]
    assert is_last


async def test_an_error_comes_after_the_deltas_before_it() -> None:
    reader = reader_of(Listed([SampleDelta(0, "a", (1,))], WorkerLost("gone")))
    assert await reader.take() == ([(0, SampleDelta(0, "a", (1,)))], False)
    with pytest.raises(WorkerLost):
        await reader.take()


async def test_an_error_of_one_stream_comes_after_what_another_has_brought() -> None:
    cluster = Cluster()
    first, second = await cluster.ask("first"), await cluster.ask("second")
    reader = StreamReader()
    reader.add(first)
    reader.add(second)
    cluster.say(first, 0, "a")
    failure = RequestFailed(second.record.request_id, "overloaded", "full")
    cluster.loop.deliver(WorkerOutput("prefill-0", failures=(failure,)))
    new, is_last = await reader.take()
    assert [(number, delta.text) for number, delta in new] == [(0, "a")] and not is_last
    cluster.say(first, 1, "b")
    with pytest.raises(Overloaded, match="full"):
        await reader.take()
    reader.close()
    assert cluster.open == set()


async def test_a_reader_waits_for_any_of_its_streams_and_wakes_once_for_a_step() -> None:
    cluster = Cluster()
    first, second = await cluster.ask("first"), await cluster.ask("second")
    reader = StreamReader()
    reader.add(first)
    reader.add(second)
    waiting = asyncio.create_task(reader.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    cluster.say(second, 0, "x")
    cluster.say(first, 0, "a")
    cluster.say(second, 1, "y")
    async with asyncio.timeout(5):
        new, is_last = await waiting
    assert not is_last
    assert [(number, delta.text) for number, delta in new] == [(0, "a"), (1, "xy")]
    reader.close()
    assert cluster.open == set()


async def test_a_slow_client_gets_a_bounded_number_of_deltas_at_once() -> None:
    cluster = Cluster()
    stream = await cluster.ask(max_tokens=MAX_TAKEN + 2)
    for position in range(MAX_TAKEN + 1):
        cluster.say(stream, position, "a")
    cluster.say(stream, MAX_TAKEN + 1, "z", FinishReason.LENGTH)
    reader = StreamReader()
    reader.add(stream)
    ((_, delta),), is_last = await reader.take()
    assert delta.text == "a" * MAX_TAKEN and not is_last
    ((_, delta),), is_last = await reader.take()
    assert delta.text == "az" and delta.finish_reason is FinishReason.LENGTH and is_last
