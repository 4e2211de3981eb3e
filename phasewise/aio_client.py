"""The SDK for asyncio programs: the twin of `phasewise/client.py`."""

from __future__ import annotations

import asyncio
import contextlib
import random
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc
import grpc.aio

from phasewise.connection import CHANNEL_OPTIONS, Connections, parse_targets
from phasewise.core.clock import MonotonicClock
from phasewise.core.errors import RequestCancelled, ServingError
from phasewise.generation import Generation, new_request
from phasewise.options import Options
from phasewise.results import Completion, Delta, Model
from phasewise.retry import Attempts, RetryPolicy
from phasewise.rpc import phasewise_pb2 as pb
from phasewise.rpc.codec import Messages, decode_model, encode_detokenize, encode_tokenize
from phasewise.rpc.status import from_status
from phasewise.targets import Targets


class AsyncClient:
    """A connection to a Phasewise cluster, for use from one event loop. Arguments and errors are those of `Client`.

    >>> async with phasewise.AsyncClient("127.0.0.1:50051") as client:
    ...     completion = await client.generate("The capital of France is", max_tokens=8, temperature=0)
    ...     async for delta in client.chat([{"role": "user", "content": "Tell me a story."}], stream=True):
    ...         print(delta.text, end="", flush=True)
    """

    def __init__(
        self,
        target: str | Sequence[str] = "127.0.0.1:50051",
        *,
        timeout_s: float | None = 600.0,
        max_retries: int = 3,
        retry_backoff_s: float = 0.1,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        def open_channel(target: str) -> grpc.aio.Channel:
            if credentials is None:
                return grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
            return grpc.aio.secure_channel(target, credentials, options=CHANNEL_OPTIONS)

        self._connections: Connections[grpc.aio.Channel] = Connections(parse_targets(target), open_channel)
        self._timeout_s = timeout_s
        self._policy = RetryPolicy(max_retries=max_retries, backoff_s=retry_backoff_s)
        self._metadata = tuple(metadata)
        self._clock = MonotonicClock()
        self._rng = random.Random()
        num_targets = len(self._connections.targets)
        self._targets = Targets(num_targets, self._clock, first=self._rng.randrange(num_targets))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: weakref.WeakSet[AsyncStream] = weakref.WeakSet()

    async def generate(
        self, prompt: str | None = None, *, token_ids: Sequence[int] | None = None, **options: Unpack[Options]
    ) -> Completion:
        """Generates from a text or from token ids, and returns when all samples are whole.

        Cancelling the task cancels the request on the server.
        """
        return await self._open(new_request(options, prompt=prompt, token_ids=token_ids), options).drain()

    def stream(
        self, prompt: str | None = None, *, token_ids: Sequence[int] | None = None, **options: Unpack[Options]
    ) -> AsyncStream:
        """The same, as it comes: an asynchronous iterator of `Delta`. Leaving the loop early cancels the request.

        >>> async with client.stream("Once upon a time", max_tokens=200) as stream:
        ...     async for delta in stream:
        ...         print(delta.text, end="")
        ...     print(stream.completion().usage)
        """
        return self._open(new_request(options, prompt=prompt, token_ids=token_ids), options)

    @overload
    def chat(
        self, messages: Messages, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Coroutine[Any, Any, Completion]: ...

    @overload
    def chat(self, messages: Messages, stream: Literal[True], **options: Unpack[Options]) -> AsyncStream: ...

    def chat(
        self, messages: Messages, stream: bool = False, **options: Unpack[Options]
    ) -> Coroutine[Any, Any, Completion] | AsyncStream:
        """Generates the next message of a chat, in the model's own template: awaitable, or a stream if so asked.

        >>> (await client.chat([{"role": "user", "content": "What is the capital of France?"}])).text
        """
        opened = self._open(new_request(options, messages=messages), options)
        return opened if stream else opened.drain()

    async def tokenize(
        self, text: str | None = None, *, messages: Messages | None = None, model: str | None = None
    ) -> list[int]:
        """Token ids of a text, or of a chat in the model's template, exactly as a generation would see them."""
        request = encode_tokenize(text, messages, model)
        response = await self._call(lambda stub, **how: stub.Tokenize(request, **how))
        return list(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str | None = None) -> str:
        """The text of token ids."""
        request = encode_detokenize(token_ids, model)
        response = await self._call(lambda stub, **how: stub.Detokenize(request, **how))
        return str(response.text)

    async def model(self) -> Model:
        """What is served: name, context length, vocabulary."""
        return decode_model(await self._call(lambda stub, **how: stub.GetModel(pb.GetModelRequest(), **how)))

    async def close(self) -> None:
        """Closes all connections; what is still open ends with RequestCancelled. Harmless when done twice."""
        for stream in list(self._streams):  # before version 1.85, grpc.aio forgets calls that are not being read
            stream.cancel()
        for channel in self._connections.take_all():
            await channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    def _attempts(self, timeout_s: float | None) -> Attempts:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError("this AsyncClient belongs to another event loop: make one per loop")
        return Attempts(self._policy, self._targets, timeout_s=timeout_s, clock=self._clock, rng=self._rng)

    def _open(self, request: pb.GenerateRequest, options: Options) -> AsyncStream:
        attempts = self._attempts(options.get("timeout_s", self._timeout_s))
        generation = Generation(request, attempts)

        def start() -> Any:
            stub = self._connections.stub(attempts.target)
            return stub.Generate(generation.request, timeout=attempts.time_left_s(), metadata=self._metadata)

        stream = AsyncStream(generation, start(), start, self._connections)
        self._streams.add(stream)
        return stream

    async def _call(self, call: Callable[..., Any]) -> Any:
        """Makes a call with one answer; all such calls may be repeated."""
        attempts = self._attempts(self._timeout_s)
        while True:
            target = attempts.target
            stub = self._connections.stub(target)
            rpc = call(stub, timeout=attempts.time_left_s(), metadata=self._metadata)
            try:
                response = await rpc
            except (grpc.aio.AioRpcError, asyncio.CancelledError) as failure:
                error = _error_of(failure, self._connections.targets[target])
                delay_s = attempts.next_delay_s(error, delivered=False)
                if delay_s is None:
                    raise error from None
                await asyncio.sleep(delay_s)
            else:
                attempts.answered()
                return response


class AsyncStream:
    """An open request: an asynchronous iterator of `Delta`.

    The request is sent at once, not at the first `anext`. It is cancelled on the server by `aclose`, by leaving an
    `async with` block or an `async for` loop over the stream (break, return, exception), when the reading task is
    cancelled, and when the stream is dropped.
    """

    def __init__(
        self,
        generation: Generation,
        call: Any,
        start: Callable[[], Any],
        connections: Connections[grpc.aio.Channel],
    ) -> None:
        self._generation = generation
        self._call = call
        self._start = start
        self._connections = connections
        self._loop = asyncio.get_running_loop()

    @property
    def request_id(self) -> str:
        return self._generation.request.request_id

    def completion(self) -> Completion:
        """Everything that was streamed, joined, with usage and timeline; for use after the last delta."""
        return self._generation.completion()

    def cancel(self) -> None:
        """Cancels the request if it still runs."""
        if not self._generation.is_over:
            self._generation.close()
            self._call.cancel()

    async def aclose(self) -> None:
        """The same, for use with `contextlib.aclosing`."""
        self.cancel()

    async def drain(self) -> Completion:
        """Reads to the end and returns the whole. Until then nothing counts as handed out."""
        try:
            while not self._generation.is_over:
                await self._receive()
        finally:
            self.cancel()
        return self._generation.completion()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return _Loop(self)

    async def __anext__(self) -> Delta:
        while True:
            delta = self._generation.pop()
            if delta is not None:
                return delta
            if self._generation.error is not None:
                raise self._generation.error
            if self._generation.is_over:
                raise StopAsyncIteration
            await self._receive()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Cancels from a finaliser, which may run on any thread, even after the loop's end."""
        if not self._generation.is_over:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the connection
                self._loop.call_soon_threadsafe(self._call.cancel)
            self._generation.close()

    async def _receive(self) -> None:
        """Waits for one message. Afterwards there are deltas, or the stream is over, or a new attempt runs."""
        target = self._generation.attempts.target
        try:
            message = await self._call.read()
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as failure:
            try:
                error = _error_of(failure, self._connections.targets[target])
            except asyncio.CancelledError:
                self.cancel()
                raise
            await self._retry_or_fail(error)
        else:
            if message is grpc.aio.EOF:  # type: ignore[attr-defined]
                await self._retry_or_fail(self._generation.cut_short())
            else:
                self._generation.feed(message)
                if self._generation.is_over:
                    with contextlib.suppress(grpc.aio.AioRpcError):  # the answer is whole, whatever its status may say
                        await self._call.read()

    async def _retry_or_fail(self, error: ServingError) -> None:
        if self._generation.error is not None:  # closed by another task
            return
        delay_s = self._generation.retry_delay_s(error)
        if delay_s is None:
            return
        await asyncio.sleep(delay_s)
        if self._generation.error is None:
            self._call = self._start()


class _Loop(AsyncIterator[Delta]):
    """What an `async for` statement holds while it runs, and drops when it is left: that is how a break is noticed."""

    def __init__(self, stream: AsyncStream) -> None:
        self._stream = stream

    async def __anext__(self) -> Delta:
        return await anext(self._stream)

    def __del__(self) -> None:
        self._stream.drop()


def _error_of(failure: grpc.aio.AioRpcError | asyncio.CancelledError, target: str) -> ServingError:
    """What a failed call means. Raises CancelledError again when it is the calling task that is being cancelled.

    grpc.aio raises CancelledError also when the call was cancelled from elsewhere, by `aclose` or `close`.
    """
    if isinstance(failure, grpc.aio.AioRpcError):
        trailers: Any = failure.trailing_metadata() or ()
        return from_status(failure.code(), failure.details() or "", trailers, target=target)
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise failure
    return RequestCancelled(f"the call to {target} was cancelled by its own program")
