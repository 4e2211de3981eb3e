"""The way of a request through the gateway: check, place, send, collect, end. The I/O shell around the open requests.

    generate()   check and tokenise (preparation.py) → placement from the control plane → PrefillTask to its worker
    deliver()    what workers say: tokens into the record, text to the client's stream, an abort where a stop
                 string hit
    an end       exactly one: finished, failed, or cancelled; then nothing of the request is left in the gateway,
                 and whatever workers may still hold is told to go

Everything runs on one asyncio loop; nothing here blocks. Every wait has the request's deadline.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from control_plane.gateway.detokenizer import SampleText, token_info
from control_plane.gateway.link_report import link_report
from control_plane.gateway.open_requests import OpenRequest, OpenSample, merge_deltas
from control_plane.gateway.preparation import PreparedRequest, RequestPreparer
from control_plane.gateway.service import GenerateInput, ModelCard, SampleDelta, TokenInfo, Usage
from control_plane.gateway.text import TextTokenizer
from control_plane.link_survey import LinkSurvey, check_probes
from control_plane.metrics import GatewayMetrics
from phasewise.core.clock import Clock
from phasewise.core.errors import (
    ERROR_BY_CODE,
    DeadlineExceeded,
    DuplicateRequest,
    InternalError,
    InvalidRequest,
    Overloaded,
    RequestCancelled,
    ServingError,
    Unavailable,
    WorkerLost,
)
from phasewise.core.lifecycle import RequestStatus, Stage, check_transition
from phasewise.core.messages import (
    AbortRequest,
    PrefillTask,
    TimelineEvent,
    TokenChunk,
    WorkerInfo,
    WorkerLoad,
    WorkerOutput,
)
from phasewise.core.placement import Placement, WorkerId
from phasewise.core.ports import PeerPort

logger = logging.getLogger(__name__)

_LONG_TEXT = 20_000  # characters; some 10 ms of tokenising


class Placer(Protocol):
    """The control plane as a gateway sees it."""

    async def place(
        self, request_id: str, num_prompt_tokens: int, num_samples: int, max_tokens: int, timeout_s: float
    ) -> Placement:
        """Raises Overloaded, Unavailable, or DeadlineExceeded after `timeout_s`."""

    def first_token(self, request_id: str) -> None:
        """Tells and returns at once."""

    def finished(self, request_id: str, num_output_tokens: int) -> None:
        """Tells and returns at once."""

    async def snapshot(self) -> list[tuple[WorkerInfo, WorkerLoad]]:
        """All workers and what they last said."""

    async def links(self) -> LinkSurvey:
        """The links between workers, as far as they are known. Raises Unavailable."""

    async def probe_links(self, sizes: Sequence[int], timeout_s: float) -> LinkSurvey:
        """The same, measured. Raises Unavailable, or Overloaded while somebody else measures."""


class RequestLoop:
    """Implements InferenceService (control_plane/gateway/service.py)."""

    def __init__(
        self,
        gateway_id: str,
        card: ModelCard,
        tokenizer: TextTokenizer,
        preparer: RequestPreparer,
        placer: Placer,
        workers: PeerPort,
        metrics: GatewayMetrics,
        clock: Clock,
        *,
        max_open_requests: int,
        addresses: Mapping[str, str],
    ) -> None:
        self.gateway_id = gateway_id
        self.model = card
        self._tokenizer = tokenizer
        self._preparer = preparer
        self._placer = placer
        self._workers = workers
        self._metrics = metrics
        self._clock = clock
        self._max_open_requests = max_open_requests
        self._addresses = addresses
        self._started_s = clock.now_s()
        self._open: dict[str, OpenStream] = {}  # by the id that workers know
        self._open_client_ids: set[str] = set()
        self._nonce = secrets.token_hex(4)
        self._num_accepted = 0
        self._lost_workers: set[WorkerId] = set()
        self._is_admitting = False
        self._all_closed = asyncio.Event()
        self._all_closed.set()

    # ---- InferenceService

    @property
    def is_ready(self) -> bool:
        return self._is_admitting

    async def generate(self, request: GenerateInput) -> OpenStream:
        """Accepts a request and starts it. An error that is raised was counted, and nothing is left of the request."""
        try:
            self._check_admission()
            prepared = await self._prepare(request)
            self._check_admission()  # much may have happened while a long prompt was tokenised
            stream, timeout_s = self._accept(prepared)
        except ServingError as error:
            self._metrics.request_refused(error.code)
            raise
        try:
            await self._start(stream, timeout_s)
        except ServingError as error:
            self._fail(stream, error)
            raise
        except asyncio.CancelledError:
            self._cancel(stream)
            raise
        return stream

    def tokenize(
        self, text: str | None, messages: tuple[Mapping[str, Any], ...] | None, model: str | None
    ) -> list[int]:
        self._preparer.check_model(model)
        if (text is None) == (messages is None):
            raise InvalidRequest("give exactly one of text and messages", field="text")
        return self._tokenizer.encode(text) if text is not None else self._tokenizer.encode_chat(messages or ())

    def detokenize(self, token_ids: tuple[int, ...], model: str | None) -> str:
        self._preparer.check_model(model)
        self._preparer.check_token_ids(token_ids, "token_ids")
        return self._tokenizer.decode(token_ids)

    async def status(self) -> dict[str, Any]:
        state = "ready" if self._is_admitting else "draining"
        workers = await self._placer.snapshot()
        return {
            "cluster": {
                "model": self.model.name,
                "state": state,
                "uptime_s": round(self._clock.now_s() - self._started_s, 3),
                **self._addresses,
            },
            "workers": [_worker_status(info, load) for info, load in workers],
            "gateway": {
                "id": self.gateway_id,
                "open_requests": len(self._open),
                "waiting": sum(s.record.first_token_s is None for s in self._open.values()),
            },
        }

    async def links(self) -> dict[str, Any]:
        return link_report(await self._placer.links(), self.model.context_length)

    async def probe_links(self, sizes: Sequence[int], timeout_s: float) -> dict[str, Any]:
        check_probes(sizes, timeout_s)
        return link_report(await self._placer.probe_links(sizes, timeout_s), self.model.context_length)

    async def metrics_text(self) -> tuple[bytes, str]:
        return self._metrics.render(await self._placer.snapshot())

    # ---- life of the gateway

    def start_admitting(self) -> None:
        self._is_admitting = True

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests and waits for the open ones; what is left after `timeout_s` is ended."""
        self._is_admitting = False
        try:
            await asyncio.wait_for(self._all_closed.wait(), timeout_s)
        except TimeoutError:
            for stream in list(self._open.values()):
                self._fail(stream, Unavailable("the server is shutting down"))

    # ---- from workers and the control plane

    def deliver(self, output: WorkerOutput) -> None:
        """Takes what one step of one worker has for this gateway."""
        for event in output.events:
            self._on_event(event)
        for logprobs in output.prompt_logprobs:
            stream = self._open.get(logprobs.request_id)
            if stream is not None:
                infos = tuple(token_info(self._tokenizer, token) for token in logprobs.tokens)
                stream.record.prompt_tokens = infos
        for chunk in output.chunks:
            stream = self._open.get(chunk.request_id)
            if stream is not None:
                self._on_chunk(stream, chunk)
        for failure in output.failures:
            stream = self._open.get(failure.request_id)
            if stream is not None:
                self._fail(stream, ERROR_BY_CODE.get(failure.code, InternalError)(failure.message))

    def worker_lost(self, worker_id: WorkerId) -> None:
        """Ends the requests that the worker still held. (Moving them elsewhere will begin here: RECOVERING.)"""
        self._lost_workers.add(worker_id)
        for stream in list(self._open.values()):
            placement, record = stream.record.placement, stream.record
            if placement is None:
                continue
            # A first token that is not here yet may have died with the prefill worker, even when decoding has begun.
            has_all_first = all(sample.token_ids for sample in record.samples)
            in_prefill = placement.prefill_worker == worker_id and not (record.is_decoding and has_all_first)
            if in_prefill or placement.decode_worker == worker_id:
                self._fail(stream, _worker_lost(worker_id))

    # ---- inside: start

    def _check_admission(self) -> None:
        if not self._is_admitting:
            raise Unavailable("the server is not taking requests: it is starting or shutting down", retry_after_s=2.0)
        if len(self._open) >= self._max_open_requests:
            raise Overloaded(f"{self._max_open_requests} requests are open already", retry_after_s=1.0)

    async def _prepare(self, given: GenerateInput) -> PreparedRequest:
        """Checks and tokenises; a long text on a thread of its own, so that streams go on meanwhile."""
        num_characters = len(given.text or "") + sum(len(str(m.get("content", ""))) for m in given.messages or ())
        if num_characters > _LONG_TEXT:
            return await asyncio.to_thread(self._preparer.prepare, given)
        return self._preparer.prepare(given)

    def _accept(self, prepared: PreparedRequest) -> tuple[OpenStream, float]:
        """Opens the record of a request; (stream, seconds it may take)."""
        client_id = prepared.request.request_id
        if client_id in self._open_client_ids:
            raise DuplicateRequest(
                f"a request with the id {client_id!r} is open already; use another id", field="request_id"
            )
        # A client may use its id again at once; what workers still send for the earlier request must not reach it.
        self._num_accepted += 1
        request = replace(prepared.request, request_id=f"{client_id}~{self._nonce}{self._num_accepted}")
        samples = [
            OpenSample(SampleText(self._tokenizer, prepared.stop, continues_text=prepared.continues_text))
            for _ in range(request.sampling.n)
        ]
        record = OpenRequest(client_id, request, self.gateway_id, self._clock.now_s(), samples)
        stream = OpenStream(record, self._cancel)
        self._open[request.request_id] = stream
        self._open_client_ids.add(client_id)
        self._all_closed.clear()
        self._metrics.request_started()
        self._record_event(record, Stage.RECEIVED)
        return stream, prepared.timeout_s

    async def _start(self, stream: OpenStream, timeout_s: float) -> None:
        """Places the request and sends it off."""
        record = stream.record
        request, sampling = record.request, record.request.sampling
        stream.timer = asyncio.get_running_loop().call_later(timeout_s, self._expire, stream)
        num_prompt_tokens = len(request.prompt_token_ids)
        placement = await self._placer.place(
            request.request_id, num_prompt_tokens, sampling.n, sampling.max_tokens, timeout_s
        )
        if record.error is not None:  # its deadline passed, or the server began to shut down, meanwhile
            self._placer.finished(request.request_id, 0)
            raise record.error
        record.placement = placement
        self._move(record, RequestStatus.PLACED)
        for worker_id in (placement.prefill_worker, placement.decode_worker):
            if worker_id in self._lost_workers:  # lost while the answer was on its way
                raise _worker_lost(worker_id)
        self._record_event(record, Stage.PLACED)
        self._metrics.placed(is_local=placement.is_local)
        time_left_s = record.received_s + timeout_s - self._clock.now_s()
        task = PrefillTask(request, placement, self.gateway_id, time_left_s)
        self._workers.send(placement.prefill_worker, task)

    # ---- inside: progress

    def _on_event(self, event: TimelineEvent) -> None:
        stream = self._open.get(event.request_id)
        if stream is None:
            return
        record = stream.record
        record.events.append(event)
        if event.stage is Stage.PREFILL_START:
            record.num_cached_tokens = event.num_tokens
        elif event.stage is Stage.HANDOFF_END:
            self._metrics.handoff(event.num_bytes, event.duration_s)
        elif event.stage is Stage.PREEMPTED:
            self._metrics.preempted()

    def _on_chunk(self, stream: OpenStream, chunk: TokenChunk) -> None:
        record = stream.record
        deltas = record.take(chunk, self._tokenizer)
        if not deltas:
            return
        now_s = self._clock.now_s()
        if record.first_token_s is None:
            record.first_token_s = now_s
            self._placer.first_token(record.request_id)
        sample = record.samples[chunk.sample_index]
        if sample.last_token_s is not None:
            self._metrics.inter_token(now_s - sample.last_token_s, sum(len(d.token_ids) for d in deltas))
        sample.last_token_s = now_s
        record.pending.extend(deltas)
        if deltas[-1].finish_reason is not None:
            self._on_sample_end(stream, chunk.sample_index, by_worker=not isinstance(deltas[-1].stop_reason, str))
        stream.wake()

    def _on_sample_end(self, stream: OpenStream, sample_index: int, *, by_worker: bool) -> None:
        """A sample ended. When a stop string ended it, the workers do not know yet."""
        record = stream.record
        if all(sample.finish_reason is not None for sample in record.samples):
            if not by_worker:
                self._abort(record, None)
            self._finish(stream)
        elif not by_worker:
            self._abort(record, sample_index)

    # ---- inside: the three ends

    def _finish(self, stream: OpenStream) -> None:
        record = stream.record
        self._move(record, RequestStatus.FINISHED)
        self._record_event(record, Stage.FINISHED)
        self._observe_finished(record)
        self._close(stream)

    def _fail(self, stream: OpenStream, error: ServingError) -> None:
        record = stream.record
        if record.is_over:
            return
        level = logging.WARNING if error.code != "internal" else logging.ERROR
        logger.log(level, "request failed: %s", error.message, extra={"request_id": record.request_id})
        record.error = error
        self._move(record, RequestStatus.FAILED)
        self._metrics.request_failed(error.code, **self._token_counts(record))
        self._abort(record, None)
        self._close(stream)
        stream.wake()

    def _cancel(self, stream: OpenStream) -> None:
        """The client has left."""
        record = stream.record
        if record.is_over:
            return
        record.error = RequestCancelled("the client cancelled the request")
        self._move(record, RequestStatus.CANCELLED)
        self._metrics.cancelled(**self._token_counts(record))
        self._abort(record, None)
        self._close(stream)
        stream.wake()

    def _expire(self, stream: OpenStream) -> None:
        self._fail(stream, DeadlineExceeded("the request's deadline passed; allow more time or ask for fewer tokens"))

    def _close(self, stream: OpenStream) -> None:
        """Nothing of the request is left in the gateway; its stream keeps what the client has not read."""
        record = stream.record
        if stream.timer is not None:
            stream.timer.cancel()
        if self._open.pop(record.request_id, None) is not None:
            self._open_client_ids.discard(record.client_id)
            if record.placement is not None:
                self._placer.finished(record.request_id, record.num_output_tokens)
        if not self._open:
            self._all_closed.set()

    def _abort(self, record: OpenRequest, sample_index: int | None) -> None:
        """Tells both workers; the one that knows nothing of the request ignores it."""
        if record.placement is None:
            return
        message = AbortRequest(record.request_id, sample_index)
        for worker_id in {record.placement.prefill_worker, record.placement.decode_worker}:
            self._workers.send(worker_id, message)

    # ---- inside: records

    def _move(self, record: OpenRequest, status: RequestStatus) -> None:
        check_transition(record.status, status)
        record.status = status

    def _record_event(self, record: OpenRequest, stage: Stage) -> None:
        event = TimelineEvent(record.request_id, stage, self._clock.unix_s(), self.gateway_id)
        record.events.append(event)

    def _observe_finished(self, record: OpenRequest) -> None:
        now_s = self._clock.now_s()
        reasons = [s.finish_reason.value for s in record.samples if s.finish_reason is not None]
        ttft_s = (record.first_token_s or now_s) - record.received_s
        self._metrics.request_finished(
            reasons[0] if reasons else "stop",
            num_prompt_tokens=len(record.request.prompt_token_ids),
            num_output_tokens=record.num_output_tokens,
            num_cached_tokens=record.num_cached_tokens,
            e2e_s=now_s - record.received_s,
            ttft_s=ttft_s,
            stages=stage_durations(record.events),
            num_samples=record.request.sampling.n,
        )

    @staticmethod
    def _token_counts(record: OpenRequest) -> dict[str, int]:
        return {
            "num_prompt_tokens": len(record.request.prompt_token_ids) if record.first_token_s is not None else 0,
            "num_output_tokens": record.num_output_tokens,
        }


class OpenStream:
    """A client's end of an open request. Implements GenerationStream (control_plane/gateway/service.py)."""

    def __init__(self, record: OpenRequest, cancel: Any) -> None:
        self.record = record
        self.timer: asyncio.TimerHandle | None = None
        self._cancel = cancel
        self._news = asyncio.Event()

    @property
    def request_id(self) -> str:
        """The client's own."""
        return self.record.client_id

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.record.request.prompt_token_ids

    @property
    def prompt_tokens(self) -> tuple[TokenInfo, ...]:
        return self.record.prompt_tokens

    @property
    def usage(self) -> Usage:
        return self.record.usage

    @property
    def timeline(self) -> tuple[TimelineEvent, ...]:
        return tuple(sorted(self.record.events, key=lambda event: event.at_unix_s))

    @property
    def placement(self) -> Placement:
        assert self.record.placement is not None
        return self.record.placement

    def wake(self) -> None:
        """There is news in the record."""
        self._news.set()

    def __aiter__(self) -> AsyncIterator[SampleDelta]:
        return self._deltas()

    async def _deltas(self) -> AsyncIterator[SampleDelta]:
        record = self.record
        while True:
            pending, record.pending = record.pending, []
            for delta in merge_deltas(pending):
                yield delta
            if record.pending:
                continue
            if record.error is not None:
                raise record.error
            if record.is_over:
                return
            await self._news.wait()
            self._news.clear()

    async def aclose(self) -> None:
        """Cancels what is still running; harmless after the end."""
        self._cancel(self)


def _worker_lost(worker_id: WorkerId) -> WorkerLost:
    return WorkerLost(f"worker {worker_id} was lost; sending the request again is safe")


def stage_durations(events: Iterable[TimelineEvent]) -> dict[str, float]:
    """Seconds that a request spent in each stage before its second token, as far as its timeline tells.

    queue: received → prefill start, without the wait for the reservation; reserve: asked → granted;
    prefill: start → end; handoff: first bytes sent → whole on the other side; first_decode: there → first decode
    step over.
    """
    at: dict[Stage, float] = {}
    for event in events:
        at.setdefault(event.stage, event.at_unix_s)

    def between(start: Stage, end: Stage) -> float | None:
        return max(at[end] - at[start], 0.0) if start in at and end in at else None

    reserve = between(Stage.RESERVE_ASKED, Stage.RESERVED)
    queue = between(Stage.RECEIVED, Stage.PREFILL_START)
    decode_from = Stage.HANDOFF_END if Stage.HANDOFF_END in at else Stage.PREFILL_END
    durations = {
        "queue": None if queue is None else max(queue - (reserve or 0.0), 0.0),
        "reserve": reserve,
        "prefill": between(Stage.PREFILL_START, Stage.PREFILL_END),
        "handoff": between(Stage.HANDOFF_START, Stage.HANDOFF_END),
        "first_decode": between(decode_from, Stage.DECODE_START),
    }
    return {stage: seconds for stage, seconds in durations.items() if seconds is not None}


def _worker_status(info: WorkerInfo, load: WorkerLoad) -> dict[str, Any]:
    return {
        "id": info.worker_id,
        "pid": info.pid,
        "role": load.role.value,
        "state": load.state.value,
        "host": info.host,
        "device": info.device,
        "dtype": info.dtype,
        "threads": info.num_threads,
        "waiting": load.num_waiting,
        "running": load.num_running,
        "preempted": load.num_preempted,
        "reservations": load.num_reservations,
        "handoffs": load.num_handoffs_out,
        "kv_blocks": load.num_kv_blocks,
        "kv_used_blocks": load.num_used_blocks,
        "kv_cached_blocks": load.num_cached_blocks,
        "waiting_prompt_tokens": load.waiting_prompt_tokens,
        "counters": load.counters,
    }
