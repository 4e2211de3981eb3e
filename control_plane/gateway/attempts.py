"""Attempts at open requests: what is tried, again where needed, and how a request ends. Pure: events in, commands out.

    open         a request is accepted; its first attempt is to be placed
    resume       one whose answer broke off elsewhere is accepted; each sample that has not ended has an attempt
    placed       the control plane has answered: the prefill worker is sent its task, or, where one of the two workers
                 was lost meanwhile, another attempt is to be placed
    refused      it has answered with an error: the request ends
    deliver      tokens go into the record (open_requests.py). A sample that a stop string ends is aborted at its
                 workers. A failure gives its attempt up
    worker_lost  every attempt that loses something with the worker is given up
    tokens_lost  the same, where messages of a worker that lives were lost
    the end      exactly one: finished, failed, or cancelled. Nothing of the request is left here, and the workers that
                 may still hold something of it are told to drop it

An attempt that is given up is followed by others under new ids, one for each sample that has tokens, up to
`MAX_ATTEMPTS`. What its workers still send finds nothing under the old id.

Commands are values where an answer is expected: an `Attempt` that is returned is to be placed, `placed` or `refused`
takes the answer. All others go to the ports given in. The caller asks for placements, and calls `expire` when a
record's deadline has passed.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import replace
from typing import Protocol

from control_plane.gateway.open_requests import Attempt, OpenRequest, OpenSample, PreparedRequest
from control_plane.gateway.service import SampleDelta
from control_plane.gateway.text.detokenizer import SampleText, TokenTexts, token_info
from phasewise.core.clock import Clock
from phasewise.core.errors import (
    ERROR_BY_CODE,
    DeadlineExceeded,
    InternalError,
    RequestCancelled,
    ServingError,
    TransferFailed,
    Unavailable,
    WorkerLost,
)
from phasewise.core.lifecycle import RequestStatus, Stage, check_transition
from phasewise.core.messages import (
    AbortRequest,
    NewTokens,
    PrefillTask,
    RequestFailed,
    TimelineEvent,
    WorkerOutput,
)
from phasewise.core.placement import Placement, WorkerId
from phasewise.core.ports import PeerPort

MAX_ATTEMPTS = 3
"""At a request, or at a sample of it that goes on alone: the first and what may follow a fault."""

_RECOVERABLE = (WorkerLost, TransferFailed, Unavailable)  # another attempt may find other workers


class PlacementLedger(Protocol):
    """Where the control plane is told how far a placed attempt is. Both return at once."""

    def first_token(self, attempt_id: str) -> None: ...

    def finished(self, attempt_id: str, num_output_tokens: int) -> None:
        """The placement is given back."""


class ProgressMetrics(Protocol):
    """What is counted before a request's end."""

    def placed(self, *, is_local: bool) -> None: ...

    def handoff(self, num_bytes: int, seconds: float) -> None: ...

    def preempted(self) -> None: ...

    def inter_token(self, gap_s: float, num_tokens: int = 1) -> None:
        """`num_tokens` of one sample came together, `gap_s` after the one before them."""


class RequestOwner(Protocol):
    """Opened the requests, and hears what becomes of them."""

    def has_news(self, record: OpenRequest) -> None:
        """There are more deltas in `record.pending`."""

    def given_up(self, attempt: Attempt, error: ServingError) -> None:
        """The attempt ended with `error`; others follow."""

    def ended(self, record: OpenRequest) -> None:
        """Called once for each request. `record.status` and `record.error` say how it ended."""


class Attempts:
    """All open requests of one gateway.

    Args:
        nonce: makes the ids of attempts differ from those of other gateways, and of an earlier process of this one.
        texts: the texts of the model's tokens.
        ledger, workers, metrics: told of each attempt.
        owner: told of each request.

    There are more than 20 methods: one for each event, and for each way in which an attempt or a request ends.
    """

    def __init__(
        self,
        gateway_id: str,
        nonce: str,
        texts: TokenTexts,
        ledger: PlacementLedger,
        workers: PeerPort,
        owner: RequestOwner,
        metrics: ProgressMetrics,
        clock: Clock,
    ) -> None:
        self._gateway_id = gateway_id
        self._texts = texts
        self._ledger = ledger
        self._workers = workers
        self._owner = owner
        self._metrics = metrics
        self._clock = clock
        self._open: dict[str, OpenRequest] = {}  # by the id of the first attempt
        self._attempts: dict[str, Attempt] = {}  # by the ids that workers know
        self._lost_workers: set[WorkerId] = set()
        # Behind the client's id they make one for workers. A client may use its own again at once, and what workers
        # still send for an earlier request or attempt must not reach a later one.
        self._suffixes = (f"~{nonce}{number}" for number in itertools.count(1))

    @property
    def open_requests(self) -> Collection[OpenRequest]:
        """In the order in which they were opened."""
        return self._open.values()

    @property
    def num_attempts(self) -> int:
        """Attempts that have not ended, placed or not."""
        return len(self._attempts)

    # ---- a request, from its beginning to an attempt that runs

    def open(self, prepared: PreparedRequest) -> Attempt:
        """Opens the record of a request; returns its first attempt, to be placed."""
        sampling = prepared.request.sampling
        least = sampling.min_tokens
        texts = [
            SampleText(self._texts, prepared.stop, continues_text=prepared.continues_text, min_tokens=least)
            for _ in range(sampling.n)
        ]
        record = self._open_record(prepared, [OpenSample(text) for text in texts])
        return self._begin(Attempt(record, record.request))

    def resume(self, prepared: PreparedRequest) -> OpenRequest:
        """Opens the record of a request with `prepared.samples`; all its attempts are to be placed.

        Where every sample has ended there are none, and `end_resumed` is to be called.
        """
        record = self._open_record(prepared, list(prepared.samples))
        record.num_resumed = record.num_output_tokens
        for request in Attempt(record, record.request).rest():
            own_id = record.client_id + next(self._suffixes)
            self._begin(Attempt(record, replace(request, request_id=own_id)))
        return record

    def end_resumed(self, record: OpenRequest) -> None:
        """Ends a resumed request of which nothing was left to be run."""
        record.first_token_s = self._clock.now_s()
        record.note(Stage.FINISHED, self._clock.unix_s(), self._gateway_id)
        self._end(record, RequestStatus.FINISHED)

    def _open_record(self, prepared: PreparedRequest, samples: list[OpenSample]) -> OpenRequest:
        client_id = prepared.request.request_id
        request = replace(prepared.request, request_id=client_id + next(self._suffixes))
        now_s = self._clock.now_s()
        record = OpenRequest(client_id, request, now_s, now_s + prepared.timeout_s, samples)
        self._open[record.request_id] = record
        record.note(Stage.RECEIVED, self._clock.unix_s(), self._gateway_id)
        return record

    def placed(self, attempt: Attempt, placement: Placement) -> Attempt | None:
        """Sends the attempt to its workers; returns another one to be placed instead, where one of them is lost.

        The placement is given back where the request has ended meanwhile.
        """
        record = attempt.record
        if attempt.attempt_id not in self._attempts:
            self._ledger.finished(attempt.attempt_id, 0)
            return None
        attempt.placement = record.placement = placement
        pair = (placement.prefill_worker, placement.decode_worker)
        lost = next((worker_id for worker_id in pair if worker_id in self._lost_workers), None)
        if lost is not None:
            again = self._give_up(attempt, _worker_lost(lost))
            for successor in again:  # one at most: no token has come
                successor.cause = attempt.cause
            return again[0] if again else None
        if all(other.placement is not None for other in record.attempts.values()):
            _move(record, RequestStatus.PLACED)
        record.note(Stage.PLACED, self._clock.unix_s(), self._gateway_id)
        self._metrics.placed(is_local=placement.is_local)
        time_left_s = record.deadline_s - self._clock.now_s()
        task = PrefillTask(attempt.request, placement, self._gateway_id, time_left_s)
        self._workers.send(placement.prefill_worker, task)
        return None

    def refused(self, attempt: Attempt, error: ServingError) -> None:
        """Ends the request: where no worker is left for a further attempt, with the fault that led to it."""
        if attempt.cause is not None and isinstance(error, Unavailable):
            error = attempt.cause
        self.fail(attempt.record, error)

    # ---- from workers and the control plane

    def deliver(self, output: WorkerOutput) -> list[Attempt]:
        """Takes what one step of one worker has for this gateway; returns the attempts that are to be placed."""
        for event in output.events:
            self._on_event(event)
        for logprobs in output.prompt_logprobs:
            if attempt := self._attempts.get(logprobs.request_id):
                attempt.record.prompt_tokens = tuple(token_info(self._texts, token) for token in logprobs.tokens)
        for new in output.chunks:
            self._on_tokens(new)
        return [again for failure in output.failures for again in self._on_failure(failure, output.worker_id)]

    def worker_lost(self, worker_id: WorkerId) -> list[Attempt]:
        """Gives up what is lost with a worker; returns the attempts that are to be placed."""
        self._lost_workers.add(worker_id)
        return self._give_up_with(worker_id, _worker_lost(worker_id))

    def tokens_lost(self, worker_id: WorkerId) -> list[Attempt]:
        """As `worker_lost`, for a worker that lives and some of whose messages will never come."""
        message = f"messages of worker {worker_id} were lost; sending the request again is safe"
        return self._give_up_with(worker_id, WorkerLost(message))

    # ---- the ends

    def expire(self, record: OpenRequest) -> None:
        """The request's deadline has passed."""
        if record.placement is None:
            self.fail(record, DeadlineExceeded("the request's deadline passed before it was placed"))
        else:
            message = "the request's deadline passed; allow more time or ask for fewer tokens"
            self.fail(record, DeadlineExceeded(message))

    def cancel(self, record: OpenRequest) -> None:
        """The client has left. Harmless after the end."""
        if not record.is_over:
            self._break_off(record, RequestStatus.CANCELLED, RequestCancelled("the client cancelled the request"))

    def fail(self, record: OpenRequest, error: ServingError) -> None:
        """Harmless after the end."""
        if not record.is_over:
            self._break_off(record, RequestStatus.FAILED, error)

    def _break_off(self, record: OpenRequest, status: RequestStatus, error: ServingError) -> None:
        """Ends a request whose samples have not all ended."""
        record.error = error
        for attempt in list(record.attempts.values()):
            _abort(self._workers, attempt)
            self._end_attempt(attempt, attempt.num_output_tokens)
        self._end(record, status)

    def _end(self, record: OpenRequest, status: RequestStatus) -> None:
        """The one end of a request, when it has no attempt any more."""
        _move(record, status)
        del self._open[record.request_id]
        self._owner.ended(record)

    # ---- inside: attempts

    def _begin(self, attempt: Attempt) -> Attempt:
        self._attempts[attempt.attempt_id] = attempt.record.attempts[attempt.attempt_id] = attempt
        return attempt

    def _give_up(self, attempt: Attempt, error: ServingError) -> list[Attempt]:
        """Ends an attempt; returns those that go on in its place. The request ends with `error` after the last.

        One that a worker gave back, because it drains or has another role now, counts as the first and no further: a
        request outlives any number of drains. Its deadline bounds them.
        """
        record = attempt.record
        number = max(attempt.number, 1) if isinstance(error, Unavailable) else attempt.number + 1
        if number >= MAX_ATTEMPTS:
            self.fail(record, error)
            return []
        _abort(self._workers, attempt)
        self._end_attempt(attempt, num_output_tokens=0)
        if record.status is RequestStatus.PLACED:
            _move(record, RequestStatus.RECOVERING)
        record.note(Stage.RECOVERING, self._clock.unix_s(), self._gateway_id)
        self._owner.given_up(attempt, error)
        rest = [replace(request, request_id=record.client_id + next(self._suffixes)) for request in attempt.rest()]
        return [self._begin(Attempt(record, request, number, error)) for request in rest]

    def _give_up_with(self, worker_id: WorkerId, error: ServingError) -> list[Attempt]:
        """Gives up the attempts for which something may be lost that the worker had."""
        again: list[Attempt] = []
        for record in list(self._open.values()):
            for attempt in [a for a in record.attempts.values() if a.ends_with(worker_id)]:
                if not record.is_over:
                    again += self._give_up(attempt, error)
        return again

    def _end_attempt(self, attempt: Attempt, num_output_tokens: int) -> None:
        """Forgets the attempt and gives its placement back."""
        del attempt.record.attempts[attempt.attempt_id], self._attempts[attempt.attempt_id]
        if attempt.placement is not None:  # else `placed` gives it back
            self._ledger.finished(attempt.attempt_id, num_output_tokens)

    # ---- inside: what workers say

    def _on_event(self, event: TimelineEvent) -> None:
        attempt = self._attempts.get(event.request_id)
        if attempt is None:
            return
        record = attempt.record
        record.events.append(event)
        if event.stage is Stage.PREFILL_START and record.first_token_s is None:
            # Of the prompt: what goes on after an output finds that there, too.
            record.num_cached_tokens = min(event.num_tokens, len(record.request.prompt_token_ids))
        elif event.stage is Stage.HANDOFF_END:
            self._metrics.handoff(event.num_bytes, event.duration_s)
        elif event.stage is Stage.PREEMPTED:
            self._metrics.preempted()

    def _on_tokens(self, new: NewTokens) -> None:
        attempt = self._attempts.get(new.request_id)
        if attempt is None:
            return
        record = attempt.record
        deltas = record.take(new, self._texts)
        if not deltas:
            return
        now_s = self._clock.now_s()
        if record.first_token_s is None:
            record.first_token_s = now_s
        if not attempt.has_first_token:
            attempt.has_first_token = True
            self._ledger.first_token(attempt.attempt_id)
        sample = record.samples[new.sample_index]
        if sample.last_token_s is not None:
            self._metrics.inter_token(now_s - sample.last_token_s, sum([len(delta.token_ids) for delta in deltas]))
        sample.last_token_s = now_s
        record.pending += deltas
        self._owner.has_news(record)
        if sample.finish_reason is not None:
            self._on_last_delta(attempt, deltas[-1])

    def _on_last_delta(self, attempt: Attempt, delta: SampleDelta) -> None:
        """A sample has ended, and with it perhaps its attempt and the request."""
        record = attempt.record
        is_over = all(sample.finish_reason is not None for sample in attempt.samples)
        if isinstance(delta.stop_reason, str):  # a stop string: the workers know no text
            _abort(self._workers, attempt, None if is_over else delta.sample_index)
        if is_over:
            self._end_attempt(attempt, attempt.num_output_tokens)
        if not record.attempts:  # each sample that has not ended is part of one
            record.note(Stage.FINISHED, self._clock.unix_s(), self._gateway_id)
            self._end(record, RequestStatus.FINISHED)

    def _on_failure(self, failure: RequestFailed, worker_id: WorkerId) -> list[Attempt]:
        attempt = self._attempts.get(failure.request_id)
        if attempt is None:
            return []
        record, placement = attempt.record, attempt.placement
        error = ERROR_BY_CODE.get(failure.code, InternalError)(failure.message)
        if not isinstance(error, _RECOVERABLE):
            self.fail(record, error)
            return []
        assert placement is not None, "a worker has it"
        if isinstance(error, TransferFailed):  # either may be at fault
            record.avoided.update((placement.prefill_worker, placement.decode_worker))
        elif isinstance(error, Unavailable):
            record.avoided.add(worker_id)
        return self._give_up(attempt, error)


def _move(record: OpenRequest, status: RequestStatus) -> None:
    check_transition(record.status, status)
    record.status = status


def _abort(workers: PeerPort, attempt: Attempt, sample_index: int | None = None) -> None:
    """Tells both workers of a placed attempt; the one that knows nothing of it ignores it."""
    if (placement := attempt.placement) is not None:
        message = AbortRequest(attempt.attempt_id, sample_index)
        for worker_id in dict.fromkeys((placement.prefill_worker, placement.decode_worker)):
            workers.send(worker_id, message)


def _worker_lost(worker_id: WorkerId) -> WorkerLost:
    return WorkerLost(f"worker {worker_id} was lost; sending the request again is safe")
