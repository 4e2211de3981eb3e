"""Collects what a worker has to say: for gateways one message per step; for workers what no step waits for."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

from phasewise.core.clock import Clock
from phasewise.core.errors import ServingError
from phasewise.core.lifecycle import Stage
from phasewise.core.messages import (
    KVDone,
    KVOffer,
    NewTokens,
    PromptLogprobs,
    RequestFailed,
    TimelineEvent,
    WorkerMessage,
    WorkerOutput,
)
from phasewise.core.placement import WorkerId
from phasewise.core.ports import GatewayPort, PeerPort


@dataclass(slots=True)
class _Pending:
    tokens: list[NewTokens] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    events: list[TimelineEvent] = field(default_factory=list)
    failures: list[RequestFailed] = field(default_factory=list)


class Outbox:
    """What a worker has for gateways since the last `flush`. Used by the step loop's thread alone."""

    def __init__(self, worker_id: WorkerId, port: GatewayPort, clock: Clock) -> None:
        self._worker_id = worker_id
        self._port = port
        self._clock = clock
        self._pending: defaultdict[str, _Pending] = defaultdict(_Pending)

    def tokens(self, gateway_id: str, tokens: NewTokens) -> None:
        self._pending[gateway_id].tokens.append(tokens)

    def prompt_logprobs(self, gateway_id: str, logprobs: PromptLogprobs) -> None:
        self._pending[gateway_id].prompt_logprobs.append(logprobs)

    def event(
        self,
        gateway_id: str,
        request_id: str,
        stage: Stage,
        *,
        num_bytes: int = 0,
        duration_s: float = 0.0,
        num_tokens: int = 0,
    ) -> None:
        """Records a moment of a request, now."""
        event = TimelineEvent(
            request_id, stage, self._clock.unix_s(), self._worker_id, num_bytes, duration_s, num_tokens
        )
        self._pending[gateway_id].events.append(event)

    def failure(self, gateway_id: str, request_id: str, error: ServingError) -> None:
        self._pending[gateway_id].failures.append(RequestFailed(request_id, error.code, error.message))

    def flush(self) -> None:
        """Sends one message per gateway that has something to hear."""
        pending, self._pending = self._pending, defaultdict(_Pending)
        for gateway_id, p in pending.items():
            output = WorkerOutput(
                self._worker_id, tuple(p.tokens), tuple(p.prompt_logprobs), tuple(p.events), tuple(p.failures)
            )
            self._port.deliver(gateway_id, output)


class PeerOutbox:
    """A PeerPort that sends at once what the receiver's next step may wait for, and defers the rest.

    Deferred are the types of `_DEFERRED`, in their order, until `flush_deferred`. A call of another actor takes its
    caller 0.3 to 0.6 ms: too long before a step for which everything is there. Used by the step loop's thread alone.
    """

    def __init__(self, port: PeerPort) -> None:
        self._port = port
        self._deferred: deque[tuple[WorkerId, WorkerMessage]] = deque()

    def send(self, worker_id: WorkerId, message: WorkerMessage) -> None:
        if isinstance(message, _DEFERRED):
            self._deferred.append((worker_id, message))
        else:
            self._port.send(worker_id, message)

    def flush_deferred(self) -> None:
        """A message that cannot be sent raises, and is the only one that is lost."""
        while self._deferred:
            self._port.send(*self._deferred.popleft())


_DEFERRED = (KVOffer, KVDone)
"""The prompt of an offer has not run, and the blocks behind a KVDone are needed by no step that is being prepared."""
