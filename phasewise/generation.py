"""What a Generate call has brought so far: the part of a stream that both clients share. No I/O.

A call whose gateway dies goes on at another one, behind the tokens that have come: the request is sent again with all
of them, and with the seed that it had from the beginning.
"""

from __future__ import annotations

import secrets
import uuid
from collections import deque
from collections.abc import Sequence

from phasewise.core.errors import InternalError, RequestCancelled, ServingError
from phasewise.core.request import FinishReason
from phasewise.options import Options, check_names
from phasewise.results import Completion, Delta, Sample, Token
from phasewise.retry import Attempts
from phasewise.rpc import phasewise_pb2 as pb
from phasewise.rpc.codec import (
    FINISH_REASON_TO_PB,
    Messages,
    decode_delta,
    decode_placement,
    decode_timeline,
    decode_tokens,
    decode_usage,
    encode_generate,
)


def new_request(
    options: Options,
    *,
    prompt: str | None = None,
    token_ids: Sequence[int] | None = None,
    messages: Messages | None = None,
) -> pb.GenerateRequest:
    """The request of one call, with an id of its own, to recognise a retry, and a seed, so that its answer can go on.

    Raises TypeError for an unknown keyword and InvalidRequest for a value that cannot be sent.
    """
    check_names(options)
    request_id = options.get("request_id") or f"req-{uuid.uuid4().hex}"
    request = encode_generate(options, request_id=request_id, prompt=prompt, token_ids=token_ids, messages=messages)
    if not request.sampling.HasField("seed"):
        request.sampling.seed = secrets.randbits(63)
    return request


class Generation:
    """Takes messages in, gives deltas out, and joins them to a Completion at the end.

    1. open: messages come; `pop` hands deltas to the caller. A retry brings what has not come yet
    2. ended: `finished` has come and every delta is handed out
    3. failed: `error` is what the caller was told, and will be told again; a closed stream is one of these
    """

    def __init__(self, request: pb.GenerateRequest, attempts: Attempts) -> None:
        self.request = request
        self.attempts = attempts
        self.error: ServingError | None = None
        self.delivered = False
        self._ready: deque[Delta] = deque()
        self._samples: dict[int, _SampleSoFar] = {}
        self._prompt_tokens: tuple[Token, ...] = ()
        self._finished: pb.Finished | None = None

    @property
    def is_over(self) -> bool:
        """True when nothing more is expected from the server."""
        return self._finished is not None or self.error is not None

    def feed(self, message: pb.GenerateResponse) -> None:
        """Takes the next message of the current attempt."""
        self.attempts.answered()
        if message.started.prompt_tokens:  # of the first attempt that brings something
            self._prompt_tokens = decode_tokens(message.started.prompt_tokens)
        for wire in message.deltas:
            delta = decode_delta(wire)
            self._samples.setdefault(delta.sample_index, _SampleSoFar()).add(delta)
            self._ready.append(delta)
        if message.HasField("finished"):
            self._finished = message.finished

    def cut_short(self) -> ServingError:
        """The error of a call that ended well without a last message: a fault of the server, never a success."""
        return InternalError(f"request {self.request.request_id}: the stream ended without its last message")

    def pop(self) -> Delta | None:
        """The next delta for the caller, or None when none has come yet."""
        if not self._ready:
            return None
        self.delivered = True
        return self._ready.popleft()

    def retry_delay_s(self, error: ServingError) -> float | None:
        """Seconds to wait before the next attempt, which sends `request` as it is then; None: `error` is final."""
        delay_s = self.attempts.next_delay_s(error, delivered=self.delivered)
        if delay_s is None:
            self.error = error
        else:
            del self.request.resume_after[:]
            self.request.resume_after.extend(self._samples[index].so_far() for index in sorted(self._samples))
        return delay_s

    def close(self) -> None:
        """The caller has left: what was not handed out is dropped."""
        if self._finished is None and self.error is None:
            self.error = RequestCancelled(f"request {self.request.request_id} was closed by its caller")
            self._ready.clear()

    def completion(self) -> Completion:
        """All samples, whole. Raises the stream's error, or RequestCancelled when it is not at its end."""
        if self.error is not None:
            raise self.error
        if self._finished is None:
            raise RequestCancelled(f"request {self.request.request_id} is not at its end: read the whole stream first")
        if not self._samples:
            raise InternalError(f"request {self.request.request_id} ended without a sample")
        return Completion(
            request_id=self.request.request_id,
            samples=tuple(self._samples[index].whole() for index in sorted(self._samples)),
            usage=decode_usage(self._finished.usage),
            prompt_tokens=self._prompt_tokens,
            timeline=decode_timeline(self._finished.timeline),
            placement=decode_placement(self._finished),
        )


class _SampleSoFar:
    """One sample's deltas."""

    def __init__(self) -> None:
        self._deltas: list[Delta] = []

    def add(self, delta: Delta) -> None:
        self._deltas.append(delta)

    def so_far(self) -> pb.SampleSoFar:
        last = self._deltas[-1]
        return pb.SampleSoFar(
            sample_index=last.sample_index,
            token_ids=[token_id for delta in self._deltas for token_id in delta.token_ids],
            finish_reason=FINISH_REASON_TO_PB[last.finish_reason],
        )

    def whole(self) -> Sample:
        last = self._deltas[-1]
        if last.finish_reason is None:
            raise InternalError(f"sample {last.sample_index} has no finish reason although its request has ended")
        if last.finish_reason is FinishReason.ABORT:
            raise RequestCancelled(f"sample {last.sample_index} was aborted by the server")
        return Sample(
            text="".join(delta.text for delta in self._deltas),
            token_ids=tuple(token_id for delta in self._deltas for token_id in delta.token_ids),
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            tokens=tuple(token for delta in self._deltas for token in delta.tokens),
        )
