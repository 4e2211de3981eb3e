"""An InferenceService in one process: a model whose tokens are bytes and whose output is its prompt, reversed.

A request that goes on gets what is left of its output. A test may script the next attempts (`Attempt`): refuse, fail
after some tokens, or go silent. Every stream records what
the server did with it; `closed` is a threading.Event, so that any thread can wait for it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio

from control_plane.gateway.grpc_front.server import start_grpc_server
from control_plane.gateway.request_ids import ClaimedId, RequestIds
from control_plane.gateway.service import GenerateInput, ModelCard, SampleDelta, TokenInfo, Usage
from control_plane.gateway.streams import MAX_TAKEN
from phasewise.core.errors import ERROR_BY_CODE, InvalidRequest, ModelNotFound, ServingError
from phasewise.core.lifecycle import Stage
from phasewise.core.messages import TimelineEvent
from phasewise.core.placement import Placement
from phasewise.core.request import FinishReason
from tests.support.generated_stream import GeneratedStream

CARD = ModelCard(
    name="bytes",
    context_length=4096,
    vocab_size=256,
    dtype="float32",
    created_unix_s=1_700_000_000,
    eos_token_ids=(0,),
    has_chat_template=True,
)
WAIT_S = 30.0
"""How long a test waits for an event before it fails: generous, since the machine may be busy."""


@dataclass(frozen=True)
class Attempt:
    """What becomes of one attempt: after `num_tokens` tokens comes `error`, or silence when there is none."""

    error: Exception | None = None
    num_tokens: int = 0
    refuse: bool = False


def chat_text(messages: tuple[Mapping[str, Any], ...]) -> str:
    return "".join(f"{message['role']}:{message['content']}\n" for message in messages) + "assistant:"


def token_info(token_id: int, num_top: int, logprob: float | None = -0.5) -> TokenInfo:
    top = tuple(((token_id + k) % 256, "alt", bytes([(token_id + k) % 256]), -0.5 - k) for k in range(num_top))
    return TokenInfo(token_id, chr(token_id), bytes([token_id]), logprob, top)


class ScriptedStream(GeneratedStream):
    """One accepted request."""

    def __init__(
        self, request: GenerateInput, prompt: tuple[int, ...], attempt: Attempt | None, num_at_once: int = MAX_TAKEN
    ) -> None:
        super().__init__(num_at_once)
        self.request = request
        self.prompt_token_ids = prompt
        self.request_id = request.request_id or "chosen-by-the-server"
        self.closed = threading.Event()
        self.silent = threading.Event()
        self.num_closes = 0
        self._attempt = attempt
        self._num_output = 0

    @property
    def prompt_tokens(self) -> tuple[TokenInfo, ...]:
        num_top = self.request.sampling.prompt_logprobs
        if num_top is None:
            return ()
        return tuple(token_info(t, num_top, None if i == 0 else -0.5) for i, t in enumerate(self.prompt_token_ids))

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt_token_ids), self._num_output, 1)

    @property
    def timeline(self) -> tuple[TimelineEvent, ...]:
        return (
            TimelineEvent(self.request_id, Stage.RECEIVED, 1000.5, "gateway"),
            TimelineEvent(self.request_id, Stage.HANDOFF_END, 1000.75, "decode-0", num_bytes=4096, duration_s=0.125),
        )

    @property
    def placement(self) -> Placement:
        return Placement(self.request_id, "prefill-0", "decode-0", attempt=2)

    async def _deltas(self) -> AsyncIterator[SampleDelta]:
        sampling = self.request.sampling
        num_samples = sampling.n or 1
        num_tokens = sampling.max_tokens or 8
        output = (self.prompt_token_ids[::-1] * num_tokens)[:num_tokens]
        had = {sample.sample_index: list(sample.token_ids) for sample in self.request.resume_after}
        for index, token_ids in had.items():
            assert token_ids == list(output[: len(token_ids)]), f"sample {index} goes on after what it never had"
        for position, token_id in enumerate(output):
            if self._attempt is not None and position == self._attempt.num_tokens:
                await self._misbehave(self._attempt)
            for index in range(num_samples):
                self._num_output += 1
                if position >= len(had.get(index, ())):
                    yield self._delta(index, token_id, is_last=position == num_tokens - 1)

    def _delta(self, index: int, token_id: int, *, is_last: bool) -> SampleDelta:
        num_top = self.request.sampling.logprobs
        return SampleDelta(
            sample_index=index,
            text=chr(token_id),
            token_ids=(token_id,),
            tokens=() if num_top is None else (token_info(token_id, num_top),),
            finish_reason=FinishReason.LENGTH if is_last else None,
        )

    async def _misbehave(self, attempt: Attempt) -> None:
        if attempt.error is not None:
            raise attempt.error
        self.silent.set()
        await asyncio.Event().wait()

    def close(self) -> None:
        super().close()
        self.num_closes += 1
        self.closed.set()


class ScriptedService:
    """See the module. `requests` and `streams` record every attempt, refused ones only in `requests`.

    Args:
        num_deltas_at_once: 1: each delta comes in a message of its own, as from workers that are slower than the wire.
    """

    def __init__(self, num_deltas_at_once: int = MAX_TAKEN) -> None:
        self._num_at_once = num_deltas_at_once
        self.model = CARD
        self.unready_reason = ""
        self.requests: list[GenerateInput] = []
        self.streams: list[ScriptedStream] = []
        self.accepted = threading.Semaphore(0)
        self._script: deque[Attempt | None] = deque()

    @property
    def is_ready(self) -> bool:
        return not self.unready_reason

    def script(self, *attempts: Attempt | None) -> None:
        """What the next requests meet; None is an attempt that goes well, as all do after these."""
        self._script.extend(attempts)

    def forget_script(self) -> None:
        """All goes well from now on."""
        self._script.clear()

    def claim_id(self, request_id: str) -> ClaimedId:
        return RequestIds().claim(request_id)  # gRPC has no requests that share one

    async def generate(self, request: GenerateInput) -> ScriptedStream:
        self.requests.append(request)
        attempt = self._script.popleft() if self._script else None
        if attempt is not None and attempt.refuse:
            assert attempt.error is not None
            raise attempt.error
        if request.sampling.max_tokens is not None and request.sampling.max_tokens < 1:
            raise InvalidRequest("max_tokens must be at least 1", field="max_tokens")
        prompt = request.token_ids
        if prompt is None:
            prompt = tuple(await self.tokenize(request.text, request.messages, request.model))
        stream = ScriptedStream(request, prompt, attempt, self._num_at_once)
        self.streams.append(stream)
        self.accepted.release()
        return stream

    async def tokenize(
        self, text: str | None, messages: tuple[Mapping[str, Any], ...] | None, model: str | None
    ) -> list[int]:
        if model not in (None, CARD.name):
            raise ModelNotFound(f"no model {model!r} here; there is {CARD.name!r}", field="model")
        return list((chat_text(messages) if messages is not None else text or "").encode())

    def detokenize(self, token_ids: tuple[int, ...], model: str | None) -> str:
        return bytes(list(token_ids)).decode()

    async def status(self) -> dict[str, Any]:
        return {"workers": [], "gateway": {}}

    async def links(self) -> dict[str, Any]:
        return {"workers": [], "pairs": []}

    async def probe_links(self, sizes: Sequence[int], timeout_s: float) -> dict[str, Any]:
        return {"workers": [], "pairs": []}

    async def metrics_text(self) -> tuple[bytes, str]:
        return b"", "text/plain"

    @property
    def last(self) -> ScriptedStream:
        return self.streams[-1]


@dataclass
class Serving:
    """A gRPC server on a loop of its own, in a thread, for blocking clients."""

    loop: asyncio.AbstractEventLoop
    server: grpc.aio.Server
    target: str

    def stop(self) -> None:
        """Cuts every connection, as the death of the gateway would."""
        asyncio.run_coroutine_threadsafe(self.server.stop(None), self.loop).result(WAIT_S)


@contextmanager
def serve_in_thread(service: ScriptedService, address: str = "127.0.0.1:0") -> Iterator[Serving]:
    """Serves until the block is left."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="grpc-test-server")
    thread.start()
    try:
        starting = asyncio.run_coroutine_threadsafe(
            start_grpc_server(service, address, max_message_bytes=1 << 20), loop
        )
        server, port = starting.result(WAIT_S)
        serving = Serving(loop, server, f"127.0.0.1:{port}")
        yield serving
        serving.stop()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()


def all_errors() -> list[ServingError]:
    """One of each class, told apart by everything that travels."""
    return [
        cls(f"about {code}: “quoted”, 100 %\nsecond line", field=f"field_{code}", retry_after_s=1.5)
        for code, cls in ERROR_BY_CODE.items()
    ]
