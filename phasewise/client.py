"""The SDK for ordinary (blocking) programs. `phasewise/aio_client.py` is its twin for asyncio."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc

from phasewise.connection import CHANNEL_OPTIONS, Connections, parse_targets
from phasewise.core.clock import MonotonicClock
from phasewise.core.errors import InternalError, ServingError
from phasewise.generation import Generation, new_request
from phasewise.options import Options
from phasewise.results import Completion, Delta, Model
from phasewise.retry import Attempts, RetryPolicy
from phasewise.rpc import phasewise_pb2 as pb
from phasewise.rpc.codec import Messages, decode_model, encode_detokenize, encode_tokenize
from phasewise.rpc.status import from_status
from phasewise.targets import Targets


class Client:
    """A connection to a Phasewise cluster, for use from any number of threads.

    Args:
        target: `HOST:PORT` of a gateway, or several, as a list or with commas between them. Calls are spread over them;
            another one is used when one cannot take a call, and goes on with an answer whose gateway has died.
        timeout_s: deadline of a call that names none, over all attempts; None: no deadline.
        max_retries: attempts after the first, made only where the error says that this is safe, always with the same
            request id. Of an answer that was begun they bring what is left of it; each gateway that brings some may be
            followed by as many.
        retry_backoff_s: first wait between rounds of attempts; it doubles, with jitter.
        credentials: TLS, such as `grpc.ssl_channel_credentials()`; None: plain text.
        metadata: sent with every call, such as `[("authorization", "Bearer …")]`.

    Every failure is a `phasewise.ServingError`; misuse of the client itself is a RuntimeError or TypeError. Connections
    are opened at the first call. A program that forks must make its first call after the fork.

    >>> with phasewise.Client("127.0.0.1:50051") as client:
    ...     completion = client.generate("The capital of France is", max_tokens=8, temperature=0)
    ...     print(completion.text, completion.finish_reason, completion.usage)
    ...     for delta in client.chat([{"role": "user", "content": "Tell me a story."}], stream=True):
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
        def open_channel(target: str) -> grpc.Channel:
            if credentials is None:
                return grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
            return grpc.secure_channel(target, credentials, options=CHANNEL_OPTIONS)

        self._connections: Connections[grpc.Channel] = Connections(parse_targets(target), open_channel)
        self._timeout_s = timeout_s
        self._policy = RetryPolicy(max_retries=max_retries, backoff_s=retry_backoff_s)
        self._metadata = tuple(metadata)
        self._clock = MonotonicClock()
        self._rng = random.Random()
        num_targets = len(self._connections.targets)
        self._targets = Targets(num_targets, self._clock, first=self._rng.randrange(num_targets))
        self._closing = threading.Event()

    def generate(
        self, prompt: str | None = None, *, token_ids: Sequence[int] | None = None, **options: Unpack[Options]
    ) -> Completion:
        """Generates from a text or from token ids, and returns when all samples are whole.

        >>> client.generate("Once upon a time", n=2, max_tokens=32, stop="\\n", seed=7).texts
        """
        return self._open(new_request(options, prompt=prompt, token_ids=token_ids), options).drain()

    def stream(
        self, prompt: str | None = None, *, token_ids: Sequence[int] | None = None, **options: Unpack[Options]
    ) -> Stream:
        """The same, as it comes: an iterator of `Delta`. Leaving the loop early cancels the request.

        >>> with client.stream("Once upon a time", max_tokens=200) as stream:
        ...     for delta in stream:
        ...         print(delta.text, end="")
        ...     print(stream.completion().usage)
        """
        return self._open(new_request(options, prompt=prompt, token_ids=token_ids), options)

    @overload
    def chat(self, messages: Messages, stream: Literal[False] = False, **options: Unpack[Options]) -> Completion: ...

    @overload
    def chat(self, messages: Messages, stream: Literal[True], **options: Unpack[Options]) -> Stream: ...

    def chat(self, messages: Messages, stream: bool = False, **options: Unpack[Options]) -> Completion | Stream:
        """Generates the next message of a chat, in the model's own template.

        >>> client.chat([{"role": "user", "content": "What is the capital of France?"}], temperature=0).text
        """
        opened = self._open(new_request(options, messages=messages), options)
        return opened if stream else opened.drain()

    def tokenize(
        self, text: str | None = None, *, messages: Messages | None = None, model: str | None = None
    ) -> list[int]:
        """Token ids of a text, or of a chat in the model's template, exactly as a generation would see them."""
        request = encode_tokenize(text, messages, model)
        response = self._call(lambda stub, **how: stub.Tokenize(request, **how))
        return list(response.token_ids)

    def detokenize(self, token_ids: Sequence[int], *, model: str | None = None) -> str:
        """The text of token ids."""
        request = encode_detokenize(token_ids, model)
        response = self._call(lambda stub, **how: stub.Detokenize(request, **how))
        return str(response.text)

    def model(self) -> Model:
        """What is served: name, context length, vocabulary."""
        return decode_model(self._call(lambda stub, **how: stub.GetModel(pb.GetModelRequest(), **how)))

    def close(self) -> None:
        """Closes all connections; what is still open ends with RequestCancelled. Harmless when done twice."""
        self._closing.set()
        for channel in self._connections.take_all():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _attempts(self, timeout_s: float | None) -> Attempts:
        return Attempts(self._policy, self._targets, timeout_s=timeout_s, clock=self._clock, rng=self._rng)

    def _open(self, request: pb.GenerateRequest, options: Options) -> Stream:
        attempts = self._attempts(options.get("timeout_s", self._timeout_s))
        generation = Generation(request, attempts)

        def start() -> Any:
            stub = self._connections.stub(attempts.target)
            return stub.Generate(generation.request, timeout=attempts.time_left_s(), metadata=self._metadata)

        return Stream(generation, start(), start, self._connections, self._closing)

    def _call(self, call: Callable[..., Any]) -> Any:
        """Makes a call with one answer; all such calls may be repeated."""
        attempts = self._attempts(self._timeout_s)
        while True:
            target = attempts.target
            try:
                stub = self._connections.stub(target)
                response = call(stub, timeout=attempts.time_left_s(), metadata=self._metadata)
            except grpc.RpcError as rpc_error:
                error = _error_of(rpc_error, self._connections.targets[target])
                delay_s = attempts.next_delay_s(error, delivered=False)
                if delay_s is None or self._closing.wait(delay_s):
                    raise error from None
            else:
                attempts.answered()
                return response


class Stream:
    """An open request: an iterator of `Delta`.

    The request is sent at once, not at the first `next`. It is cancelled on the server by `close`, by leaving a `with`
    block or a `for` loop over the stream (break, return, exception), and when the stream is dropped.
    """

    def __init__(
        self,
        generation: Generation,
        call: Any,
        start: Callable[[], Any],
        connections: Connections[grpc.Channel],
        closing: threading.Event,
    ) -> None:
        self._generation = generation
        self._call = call
        self._start = start
        self._connections = connections
        self._closing = closing

    @property
    def request_id(self) -> str:
        return self._generation.request.request_id

    def completion(self) -> Completion:
        """Everything that was streamed, joined, with usage and timeline; for use after the last delta."""
        return self._generation.completion()

    def close(self) -> None:
        """Cancels the request if it still runs. May be called from another thread than the reading one."""
        if not self._generation.is_over:
            self._generation.close()
            self._call.cancel()

    def drain(self) -> Completion:
        """Reads to the end and returns the whole. Until then nothing counts as handed out."""
        try:
            while not self._generation.is_over:
                self._receive()
        finally:
            self.close()
        return self._generation.completion()

    def __iter__(self) -> Iterator[Delta]:
        return _Loop(self)

    def __next__(self) -> Delta:
        while True:
            delta = self._generation.pop()
            if delta is not None:
                return delta
            if self._generation.error is not None:
                raise self._generation.error
            if self._generation.is_over:
                raise StopIteration
            self._receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _receive(self) -> None:
        """Waits for one message. Afterwards there are deltas, or the stream is over, or a new attempt runs."""
        target = self._generation.attempts.target
        try:
            message = next(self._call, None)
        except grpc.RpcError as rpc_error:
            self._retry_or_fail(_error_of(rpc_error, self._connections.targets[target]))
        except BaseException:  # KeyboardInterrupt: the request must not live on without its reader
            self.close()
            raise
        else:
            if message is None:
                self._retry_or_fail(self._generation.cut_short())
            else:
                self._generation.feed(message)
                if self._generation.is_over:
                    with contextlib.suppress(grpc.RpcError):  # the answer is whole, whatever its status may say
                        next(self._call, None)

    def _retry_or_fail(self, error: ServingError) -> None:
        if self._generation.error is not None:  # closed from another thread
            return
        delay_s = self._generation.retry_delay_s(error)
        if delay_s is None:
            return
        if self._closing.wait(delay_s):
            self._generation.error = error
        elif self._generation.error is None:  # not closed meanwhile
            self._call = self._start()


class _Loop(Iterator[Delta]):
    """What a `for` statement holds while it runs, and drops when it is left: that is how a break is noticed."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __next__(self) -> Delta:
        return next(self._stream)

    def __del__(self) -> None:
        self._stream.close()


def _error_of(rpc_error: grpc.RpcError, target: str) -> ServingError:
    """What a failed call means. grpcio raises the call itself, so status, message and trailers can be asked of it."""
    if not isinstance(rpc_error, grpc.Call):
        return InternalError(f"{target}: {rpc_error}")
    return from_status(rpc_error.code(), rpc_error.details() or "", rpc_error.trailing_metadata() or (), target=target)
