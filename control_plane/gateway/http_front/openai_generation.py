"""Runs the requests behind one HTTP answer: opens their streams, joins them, builds the answer, closes them.

The life of an answer:
1. made: whoever makes it calls `aclose` in the end, whatever happens.
2. `open` places every prompt. A stream belongs to the answer as soon as it is accepted, so that whoever is cancelled
   between "accepted" and "streaming" leaves none behind.
3. `whole` collects all deltas into one body, or `events` turns each into a line of an event stream.
4. However it ends (done, refused, error, client gone, server stopping), every stream is closed: workers stop at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from starlette.types import Receive

from control_plane.gateway.http_front.openai_responses import (
    DONE_EVENT,
    ChatForm,
    Choice,
    ChunkWriter,
    CompletionForm,
    Envelope,
    dumps,
    timeline_fields,
    usage_fields,
)
from control_plane.gateway.request_ids import ClaimedId
from control_plane.gateway.service import GenerateInput, GenerationStream, InferenceService, SampleDelta
from phasewise.core.errors import RequestCancelled
from phasewise.core.request import FinishReason

_QUEUED_DELTAS = 64
_T = TypeVar("_T")


class ClientLeft(Exception):
    """The client has closed its connection; there is nobody to answer."""


class Answer:
    """The open streams of one HTTP request; choice number = prompt number · n + sample number.

    Args:
        inputs: one request per prompt, all with the same number of samples.
        echo_text: the prompt of an input as text, where its choices begin with it; None: they do not.
    """

    def __init__(
        self,
        inputs: list[GenerateInput],
        form: ChatForm | CompletionForm,
        echo_text: Callable[[GenerateInput], str] | None,
    ) -> None:
        self._inputs = inputs
        self._num_samples = inputs[0].sampling.n or 1
        self._form = form
        self._echo_text = echo_text
        self._streams: list[GenerationStream] = []
        self._choices: list[Choice] = []
        self._claimed: ClaimedId | None = None
        self._unechoed = set(range(len(inputs))) if echo_text is not None else set()

    async def open(self, service: InferenceService) -> None:
        """Starts every input. Raises what the service raises; what was started before belongs to the answer.

        Several prompts share their id, which is the answer's from before the first of them until all have ended.
        """
        inputs, request_id = self._inputs, self._inputs[0].request_id
        if len(inputs) > 1 and request_id is not None:
            self._claimed = service.claim_id(request_id)
            inputs = [replace(given, claimed=self._claimed) for given in inputs]
        for given in inputs:
            self._streams.append(await service.generate(given))
        self._choices = [Choice(index) for index in range(len(inputs) * self._num_samples)]

    async def whole(self, envelope: Envelope, *, with_timeline: bool, with_token_ids: bool) -> bytes:
        """The body of an answer in one piece. Raises what the streams raise."""
        form = self._form
        try:
            async with aclosing(_joined(self._streams)) as deltas:
                async for prompt_index, delta in deltas:
                    if prompt_index in self._unechoed:
                        for choice, text in self._begin_echo(prompt_index):
                            choice.text.append(text)
                            tokens = self._streams[prompt_index].prompt_tokens
                            if tokens and (logprobs := form.logprobs(choice, tokens)) is not None:
                                choice.logprobs.append(logprobs)
                    choice = self._choice(prompt_index, delta)
                    choice.take(delta)
                    if delta.tokens and (logprobs := form.logprobs(choice, delta.tokens)) is not None:
                        choice.logprobs.append(logprobs)
            body = envelope.fields()
            body["choices"] = [
                form.choice(choice) | ({"token_ids": choice.token_ids} if with_token_ids else {})
                for choice in self._choices
            ]
            body["usage"] = self._usage()
            if with_timeline:
                body["timeline"] = self._timeline()
            return dumps(body).encode()
        finally:
            await self.aclose()

    async def events(self, writer: ChunkWriter, *, with_usage: bool, with_timeline: bool) -> AsyncGenerator[bytes]:
        """The lines of an event stream, [DONE] included. Raises what the streams raise."""
        try:
            async with aclosing(_joined(self._streams)) as deltas:
                async for prompt_index, delta in deltas:
                    if prompt_index in self._unechoed:
                        tokens = self._streams[prompt_index].prompt_tokens
                        for choice, text in self._begin_echo(prompt_index):
                            yield writer.echo(choice, text, tokens)
                    line = writer.delta(self._choice(prompt_index, delta), delta)
                    if line:
                        yield line
            await self.aclose()  # before [DONE]: a client that has read it may use the id again
            if with_usage or with_timeline:
                yield writer.closing(self._usage() if with_usage else None, self._timeline() if with_timeline else None)
            yield DONE_EVENT
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Cancels what still runs, and releases the id."""
        for stream in self._streams:
            await stream.aclose()
        if self._claimed is not None:
            self._claimed.release()

    def _choice(self, prompt_index: int, delta: SampleDelta) -> Choice:
        if delta.finish_reason is FinishReason.ABORT:
            raise RequestCancelled("the request was cancelled before it was finished")
        return self._choices[prompt_index * self._num_samples + delta.sample_index]

    def _begin_echo(self, prompt_index: int) -> list[tuple[Choice, str]]:
        """The prompt's choices with its text; once per prompt, when its logprobs are known."""
        self._unechoed.discard(prompt_index)
        first = prompt_index * self._num_samples
        text = self._echo_text(self._inputs[prompt_index]) if self._echo_text is not None else ""
        return [(choice, text) for choice in self._choices[first : first + self._num_samples]]

    def _usage(self) -> dict[str, Any]:
        return usage_fields([stream.usage for stream in self._streams])

    def _timeline(self) -> Any:
        """One object, or with several prompts a list of them."""
        timelines = [timeline_fields(stream) for stream in self._streams]
        return timelines[0] if len(timelines) == 1 else timelines


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Awaits `work`, and cancels it as soon as the client leaves, or when the caller itself is cancelled.

    `work` has ended when this returns or raises. Its result may be lost then, so that what it opens must belong to
    somebody else (`Answer`).

    Raises:
        ClientLeft: the client left first.
    """
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientLeft
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _joined(streams: list[GenerationStream]) -> AsyncGenerator[tuple[int, SampleDelta]]:
    """The deltas of all streams as they come, each with the number of its stream."""
    if len(streams) == 1:  # the usual case needs no task and no queue
        async for delta in streams[0]:
            yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, SampleDelta] | BaseException | None] = asyncio.Queue(_QUEUED_DELTAS)
    tasks = [asyncio.create_task(_pump(index, aiter(stream), queue)) for index, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    index: int,
    deltas: AsyncIterator[SampleDelta],
    queue: asyncio.Queue[tuple[int, SampleDelta] | BaseException | None],
) -> None:
    try:
        async for delta in deltas:
            await queue.put((index, delta))
        await queue.put(None)
    except Exception as error:  # raised again by the one who reads the queue
        await queue.put(error)
