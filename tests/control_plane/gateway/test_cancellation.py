"""A client that leaves, or a server that stops, at every turn of the loop: nothing of the request may be left.

The real servers' code, request loop and placer run over a control plane and workers that are scripted; turns of the
event loop are counted, no time passes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from control_plane.gateway.bodies import Bodies
from control_plane.gateway.grpc_front.server import InferenceServicer
from control_plane.gateway.http_front.openai_server import build_app
from control_plane.gateway.inference import InferenceGateway
from control_plane.gateway.preparation import RequestLimits, RequestPreparer
from control_plane.gateway.service import ModelCard
from control_plane.gateway.text.tokenizer import TextTokenizer
from control_plane.gateway.text.vocabulary import ByteVocabulary
from control_plane.metrics import GatewayMetrics
from control_plane.remote_placer import RemotePlacer
from control_plane.serving_pools import ServingPools
from phasewise.core.clock import MonotonicClock
from phasewise.core.messages import AbortRequest, NewTokens, PrefillTask, WorkerOutput
from phasewise.core.placement import Placement, PlaceRequest, WorkerRole
from phasewise.core.request import SampledToken
from phasewise.rpc import phasewise_pb2 as pb

NUM_TURNS = 40
"""More than any of the ways below needs until its first tokens are out."""


class ScriptedCluster:
    """A control plane that answers a turn after it was asked, and workers that give a token each turn, without end."""

    def __init__(self) -> None:
        self.placed: set[str] = set()
        self.running: dict[str, int] = {}
        self.num_tokens = 0
        tokenizer = TextTokenizer(ByteVocabulary(), vocab_size=300, eos_token_ids=(), chat_template=None)
        card = ModelCard("m", 100_000, 300, "float32", 1, (), False)
        self.placer = RemotePlacer(self, "gateway-0#1")
        self.service = InferenceGateway(
            "gateway-0",
            card,
            tokenizer,
            RequestPreparer(tokenizer, card, RequestLimits()),
            self.placer,
            self,
            GatewayMetrics("m"),
            MonotonicClock(),
            pools=ServingPools({"prefill-0": WorkerRole.PREFILL, "decode-0": WorkerRole.DECODE}),
            max_open_requests=100,
            addresses={},
        )
        self.service.start_admitting()

    # ---- the control plane's actor

    @property
    def place(self) -> _Method:
        return _Method(self._place)

    @property
    def progress(self) -> _Method:
        return _Method(self._progress)

    def _place(self, request: PlaceRequest) -> Placement:
        self.placed.add(request.request_id)
        return Placement(request.request_id, "prefill-0", "decode-0")

    def _progress(self, news: list[tuple[str, int | None]]) -> None:
        for request_id, num_output_tokens in news:
            if num_output_tokens is not None:
                self.placed.discard(request_id)

    # ---- workers

    def send(self, worker_id: str, message: Any) -> None:
        if isinstance(message, PrefillTask):
            self.running[message.request.request_id] = 0
        elif isinstance(message, AbortRequest):
            self.running.pop(message.request_id, None)

    def step(self) -> None:
        for request_id, position in list(self.running.items()):
            chunk = NewTokens(request_id, 0, position, (SampledToken(97),), None)
            self.running[request_id] += 1
            self.num_tokens += 1
            self.service.deliver(WorkerOutput("decode-0", chunks=(chunk,)))

    async def turns(self, num_turns: int) -> None:
        for _ in range(num_turns):
            self.step()
            await asyncio.sleep(0)

    def assert_nothing_left(self) -> None:
        assert not self.running, "the workers were not told"
        assert not self.placed, "the placement was not given back"
        assert self.service.is_idle, "something is left in the gateway"


class _Method:
    """`method.remote(…)` of an actor's handle: the answer comes two turns later."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def remote(self, *arguments: Any) -> _Method:
        loop = asyncio.get_running_loop()
        self._answer: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def answer() -> None:
            value = self._method(*arguments)
            if self._answer.set_running_or_notify_cancel():
                self._answer.set_result(value)

        loop.call_soon(lambda: loop.call_soon(answer))
        return self

    def future(self) -> concurrent.futures.Future[Any]:
        return self._answer


class Client:
    """One HTTP request to the application, without a socket. `gone` is when it has left."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = json.dumps(body).encode()
        self.gone = asyncio.Event()
        self.sent: list[Any] = []

    async def receive(self) -> dict[str, Any]:
        if self._body:
            body, self._body = self._body, b""
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await asyncio.sleep(0)  # as a socket that takes the bytes a turn later
        self.sent.append(message)

    def call(self, cluster: ScriptedCluster) -> Awaitable[None]:
        path = "/v1/completions"
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [], "http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1), "server": None,
            "root_path": "",
        }  # fmt: skip
        return build_app(cluster.service, Bodies(1 << 20, 10))(scope, self.receive, self.send)


BODIES = [
    {"prompt": "hello", "max_tokens": 1000, "stream": True},
    {"prompt": "hello", "max_tokens": 1000},
    {"prompt": ["hello", "there"], "max_tokens": 1000, "stream": True},
]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("ends_by", ["client", "server", "both"])
async def test_http_requests_end_at_every_turn(body: dict[str, Any], ends_by: str) -> None:
    num_tokens = []
    for num_turns in range(NUM_TURNS):
        cluster, client = ScriptedCluster(), Client(body)
        task = asyncio.ensure_future(client.call(cluster))
        await cluster.turns(num_turns)
        assert not task.done(), "the requests have no end of their own"
        if ends_by != "server":
            client.gone.set()
        if ends_by != "client":
            task.cancel()
        async with asyncio.timeout(10):
            await asyncio.wait({task})
        await asyncio.sleep(0)  # what has been given back is told once a turn
        await asyncio.sleep(0)
        cluster.assert_nothing_left()
        num_tokens.append(cluster.num_tokens)
    assert num_tokens[0] == 0 and num_tokens[-1] > 2, "from before the first to after some tokens"


class Context:
    """What grpc.aio gives a handler. A message is taken a turn later."""

    def __init__(self) -> None:
        self.num_messages = 0

    def time_remaining(self) -> float | None:
        return None

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    async def write(self, message: Any) -> None:
        await asyncio.sleep(0)
        self.num_messages += 1

    async def abort(self, *_: Any) -> None:
        raise AssertionError("nothing is wrong with the request")


async def test_grpc_requests_end_at_every_turn() -> None:
    num_messages = []
    for num_turns in range(NUM_TURNS):
        cluster, context = ScriptedCluster(), Context()
        request = pb.GenerateRequest(text="hello", sampling=pb.Sampling(max_tokens=1000))
        task = asyncio.ensure_future(InferenceServicer(cluster.service).Generate(request, context))
        await cluster.turns(num_turns)
        task.cancel()
        async with asyncio.timeout(10):
            await asyncio.wait({task})
        assert task.cancelled()
        await cluster.turns(6)  # the stream is closed by a task of its own
        cluster.assert_nothing_left()
        num_messages.append(context.num_messages)
    assert num_messages[0] == 0 and num_messages[-1] > 2


async def test_a_cancel_that_comes_with_the_answer_is_not_swallowed() -> None:
    cluster = ScriptedCluster()
    placing = asyncio.create_task(cluster.placer.place(PlaceRequest("r", 1, 1, 1), 10.0))
    while not cluster.placed:  # noqa: ASYNC110 (turns are counted here)
        await asyncio.sleep(0)
    await asyncio.sleep(0)  # the answer is in the loop, the task does not know yet
    assert not placing.done() and placing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await placing
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    cluster.assert_nothing_left()
