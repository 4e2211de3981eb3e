"""The gateway's loop over scripted workers: orders of messages that a cluster produces only now and then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from control_plane.gateway.attempts import MAX_ATTEMPTS
from control_plane.gateway.inference import InferenceGateway
from control_plane.gateway.open_requests import stage_durations
from control_plane.gateway.preparation import RequestLimits, RequestPreparer
from control_plane.gateway.service import GenerateInput, ModelCard, SamplingInput
from control_plane.gateway.streams import OpenStream
from control_plane.gateway.text.tokenizer import TextTokenizer
from control_plane.gateway.text.vocabulary import ByteVocabulary
from control_plane.metrics import GatewayMetrics
from control_plane.serving_pools import ServingPools
from phasewise.core.clock import MonotonicClock
from phasewise.core.errors import (
    DeadlineExceeded,
    DuplicateRequest,
    InvalidRequest,
    Overloaded,
    Unavailable,
    WorkerLost,
)
from phasewise.core.lifecycle import Stage
from phasewise.core.messages import AbortRequest, NewTokens, PrefillTask, TimelineEvent, WorkerOutput
from phasewise.core.placement import Placement, PlaceRequest, WorkerRole
from phasewise.core.request import FinishReason, SampledToken
from tests.support.generated_stream import deltas_of


class Cluster:
    """Placer and workers: places at once, records what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.before_place: Callable[[], None] = lambda: None
        self.open: set[str] = set()
        self.num_placed = 0
        tokenizer = TextTokenizer(ByteVocabulary(), vocab_size=300, eos_token_ids=(), chat_template=None)
        card = ModelCard("m", 100_000, 300, "float32", 1, (), False)
        preparer = RequestPreparer(tokenizer, card, RequestLimits(600.0))
        metrics, clock = GatewayMetrics("m"), MonotonicClock()
        pools = ServingPools({"prefill-0": WorkerRole.PREFILL, "decode-0": WorkerRole.DECODE})
        self.loop = InferenceGateway(
            "g", card, tokenizer, preparer, self, self, metrics, clock, pools=pools, max_open_requests=10, addresses={}
        )
        self.loop.start_admitting()

    async def place(self, request: PlaceRequest, timeout_s: float) -> Placement:
        self.before_place()
        self.open.add(request.request_id)
        self.num_placed += 1
        return Placement(request.request_id, "prefill-0", "decode-0")

    def first_token(self, request_id: str) -> None: ...

    def finished(self, request_id: str, num_output_tokens: int) -> None:
        self.open.remove(request_id)

    async def snapshot(self) -> list[Any]:
        return []

    def send(self, worker_id: str, message: Any) -> None:
        self.sent.append((worker_id, message))

    async def ask(self, request_id: str = "r", **sampling: Any) -> OpenStream:
        options = SamplingInput(**{"max_tokens": 4, **sampling})
        return await self.loop.generate(GenerateInput(text="hello", request_id=request_id, sampling=options))

    def say(self, stream: OpenStream, position: int, text: str, reason: FinishReason | None = None) -> None:
        tokens = tuple(SampledToken(ord(character)) for character in text)
        chunk = NewTokens(stream.record.request_id, 0, position, tokens, reason)
        self.loop.deliver(WorkerOutput("decode-0", chunks=(chunk,)))


async def collect(stream: OpenStream) -> str:
    async with asyncio.timeout(5):
        return "".join([delta.text async for delta in deltas_of(stream)])


async def test_an_id_used_again_does_not_meet_its_own_past() -> None:
    cluster = Cluster()
    old = await cluster.ask()
    old.close()
    new = await cluster.ask()
    assert old.request_id == new.request_id == "r"
    cluster.say(old, 0, "A")  # said before the worker heard the abort
    for position, character in enumerate("abc"):
        cluster.say(new, position, character)
    cluster.say(new, 3, "d", FinishReason.LENGTH)
    assert await collect(new) == "abcd"
    tasks = [m.request.request_id for _, m in cluster.sent if isinstance(m, PrefillTask)]
    assert len(set(tasks)) == 2
    assert cluster.open == set()


async def test_one_id_is_open_once() -> None:
    cluster = Cluster()
    stream = await cluster.ask()
    with pytest.raises(DuplicateRequest):
        await cluster.ask()
    stream.close()
    (await cluster.ask()).close()


async def test_tokens_that_overtake_each_other_are_put_in_order() -> None:
    cluster = Cluster()
    stream = await cluster.ask()
    cluster.say(stream, 3, "d", FinishReason.LENGTH)
    cluster.say(stream, 1, "bc")
    cluster.say(stream, 0, "a")
    assert await collect(stream) == "abcd"


async def test_a_stop_string_ends_the_workers_too() -> None:
    cluster = Cluster()
    stream = await cluster.ask(max_tokens=50, stop=("cd",))
    for position, character in enumerate("abcdef"):
        cluster.say(stream, position, character)
    assert await collect(stream) == "ab"
    aborts = [worker_id for worker_id, m in cluster.sent if isinstance(m, AbortRequest)]
    assert sorted(aborts) == ["decode-0", "prefill-0"]
    assert stream.usage.num_output_tokens == 4
    assert cluster.open == set()


async def test_a_worker_lost_while_placing() -> None:
    cluster = Cluster()
    cluster.before_place = lambda: cluster.loop.worker_lost("decode-0")
    with pytest.raises(WorkerLost):  # the placer gives the same pair again and again
        await cluster.ask()
    assert cluster.num_placed == MAX_ATTEMPTS
    assert cluster.open == set()


async def test_a_prefill_worker_lost_with_its_first_token() -> None:
    cluster = Cluster()
    stream = await cluster.ask()
    event = TimelineEvent(stream.record.request_id, Stage.HANDOFF_END, 1.0, "decode-0")
    cluster.loop.deliver(WorkerOutput("decode-0", events=(event,)))
    cluster.say(stream, 1, "b")
    cluster.loop.worker_lost("prefill-0")
    cluster.say(stream, 2, "c")
    with pytest.raises(WorkerLost):
        await collect(stream)
    assert cluster.open == set()


async def test_a_prefill_worker_lost_after_its_work_is_done_hurts_nobody() -> None:
    cluster = Cluster()
    stream = await cluster.ask()
    cluster.say(stream, 0, "a")
    event = TimelineEvent(stream.record.request_id, Stage.HANDOFF_END, 1.0, "decode-0")
    cluster.loop.deliver(WorkerOutput("decode-0", events=(event,)))
    cluster.loop.worker_lost("prefill-0")
    cluster.say(stream, 1, "bcd", FinishReason.LENGTH)
    assert await collect(stream) == "abcd"


async def test_drain_lets_no_prepared_request_in() -> None:
    cluster = Cluster()
    long = GenerateInput(text="x" * 30_000, sampling=SamplingInput(max_tokens=4))
    task = asyncio.create_task(cluster.loop.generate(long))
    await asyncio.sleep(0)
    await cluster.loop.drain(0.1)
    with pytest.raises(Unavailable):
        await task


async def test_a_deadline_while_placing() -> None:
    cluster = Cluster()
    given = GenerateInput(text="hi", sampling=SamplingInput(max_tokens=4), timeout_s=0.05)
    stream = await cluster.loop.generate(given)
    with pytest.raises(DeadlineExceeded):
        await collect(stream)
    assert any(isinstance(m, AbortRequest) for _, m in cluster.sent)
    assert cluster.open == set()


def test_stages_that_a_fault_broke_off_count_in_the_attempt_that_ended_them() -> None:
    moments = [
        (Stage.RECEIVED, 0.0),
        (Stage.RESERVE_ASKED, 1.0),
        (Stage.RESERVED, 1.5),
        (Stage.PREFILL_START, 2.0),
        (Stage.HANDOFF_START, 2.5),
        (Stage.RECOVERING, 3.0),
        (Stage.PREFILL_START, 5.0),
        (Stage.PREFILL_END, 6.0),
        (Stage.HANDOFF_START, 6.5),
        (Stage.HANDOFF_END, 7.0),
        (Stage.DECODE_START, 8.0),
        (Stage.RECOVERING, 9.0),
        (Stage.PREFILL_START, 9.5),
        (Stage.PREFILL_END, 11.0),
    ]
    events = [TimelineEvent("r", stage, at_s, "w") for stage, at_s in moments]
    expected = {"queue": 4.5, "reserve": 0.5, "prefill": 1.0, "handoff": 0.5, "first_decode": 1.0}
    assert stage_durations(events) == expected


async def test_readiness_follows_the_pools_and_draining() -> None:
    cluster = Cluster()
    loop = cluster.loop
    assert (loop.is_ready, loop.unready_reason) == (True, "")
    loop.worker_lost("decode-0")
    assert (loop.is_ready, loop.unready_reason) == (False, "no decode worker is ready")
    with pytest.raises(Unavailable, match="no decode worker is ready"):
        await cluster.ask()
    assert cluster.num_placed == 0, "health and requests agree, and nobody was asked"
    assert (await loop.status())["cluster"]["state"] == "unavailable"
    drained = Cluster()
    await drained.loop.drain(1.0)
    assert (drained.loop.is_ready, (await drained.loop.status())["cluster"]["state"]) == (False, "draining")


async def test_one_client_has_its_share_of_the_open_requests_and_gives_it_back() -> None:
    cluster = Cluster()  # 10 may be open, 8 of one client

    async def ask(number: int, client: str, **more: Any) -> OpenStream:
        given = GenerateInput(text="hello", request_id=f"{client}-{number}", client=client, **more)
        return await cluster.loop.generate(given)

    streams = [await ask(number, "a") for number in range(8)]
    with pytest.raises(Overloaded, match="this client"):
        await ask(8, "a")
    with pytest.raises(InvalidRequest):
        await ask(9, "b", sampling=SamplingInput(top_k=-5))
    others = [await ask(number, "b") for number in range(2)]
    with pytest.raises(Overloaded, match="there are 10"):
        await ask(3, "c")
    streams.pop().close()
    streams.append(await ask(10, "a"))
    for stream in (*streams, *others):
        stream.close()
        stream.close()
    again = [await ask(20 + number, "a") for number in range(8)] + [await ask(20 + number, "b") for number in range(2)]
    with pytest.raises(Overloaded, match="there are 10"):
        await ask(30, "c")
    for stream in again:
        stream.close()
    assert cluster.loop.is_idle
