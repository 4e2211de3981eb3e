"""The way of a request through the gateway: check, place, send, collect, end. The I/O shell around the open requests.

    generate()   check and tokenise (preparation.py) → placement from the control plane → PrefillTask to its worker
    deliver()    what workers say: tokens into the record, text to the client's stream, an abort where a stop
                 string hit
    a fault      a worker was lost, or could not go on: the attempt is given up, and its rest (open_requests.py) is
                 placed again under a new id, so that the old attempt's late words find nothing
    an end       exactly one: finished, failed, or cancelled; then nothing of the request is left in the gateway,
                 and whatever workers may still hold is told to go

Everything runs on one asyncio loop; nothing here blocks. Every wait has the request's deadline.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from control_plane.gateway.cluster_report import worker_report
from control_plane.gateway.link_report import link_report
from control_plane.gateway.open_requests import Attempt, OpenRequest, OpenSample, stage_durations
from control_plane.gateway.open_stream import OpenStream
from control_plane.gateway.placer import Placer
from control_plane.gateway.preparation import PreparedRequest, RequestPreparer
from control_plane.gateway.quota import Quota, share_of
from control_plane.gateway.request_ids import ClaimedId, RequestIds
from control_plane.gateway.service import GenerateInput, ModelCard
from control_plane.gateway.summed_log import SummedLog
from control_plane.gateway.text.detokenizer import SampleText, token_info
from control_plane.gateway.text.threads import TextThreads, num_text_characters
from control_plane.gateway.text.tokenizer import TextTokenizer
from control_plane.link_survey import check_probes
from control_plane.metrics import GatewayMetrics
from control_plane.serving_pools import ServingPools
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
from phasewise.core.placement import PlaceRequest, WorkerId
from phasewise.core.ports import PeerPort
from phasewise.core.request import Request

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""At a request, or at a sample of it that goes on alone: the first and what may follow a fault."""

_RECOVERABLE = (WorkerLost, TransferFailed, Unavailable)  # another attempt may find other workers


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
        pools: ServingPools,
        max_open_requests: int,
        addresses: Mapping[str, str],
        max_open_per_client: int | None = None,
    ) -> None:
        self.gateway_id = gateway_id
        self.model = card
        self._tokenizer = tokenizer
        self._preparer = preparer
        self._placer = placer
        self._workers = workers
        self._metrics = metrics
        self._clock = clock
        self._quota = Quota("requests open", max_open_requests, max_open_per_client or share_of(max_open_requests))
        self._pools = pools
        self._lines = SummedLog(clock)
        self._threads = TextThreads()
        self._addresses = addresses
        self._started_s = clock.now_s()
        self._open: dict[str, OpenStream] = {}  # by the id of the first attempt
        self._ids = RequestIds()
        self._streams: dict[str, OpenStream] = {}  # by the ids that workers know: one for each attempt
        self._tasks: set[asyncio.Task[None]] = set()
        self._nonce = secrets.token_hex(4)
        self._num_attempts = 0
        self._lost_workers: set[WorkerId] = set()
        self._is_admitting = False
        self._all_closed = asyncio.Event()
        self._all_closed.set()

    # ---- InferenceService

    @property
    def is_ready(self) -> bool:
        return not self.unready_reason

    @property
    def unready_reason(self) -> str:
        if reason := self._pools.why_unservable:
            return reason
        return "" if self._is_admitting else "the server is not taking requests: it is starting or shutting down"

    def claim_id(self, request_id: str) -> ClaimedId:
        try:
            return self._ids.claim(request_id)
        except ServingError as error:
            self._metrics.request_refused(error.code)
            raise

    async def generate(self, request: GenerateInput) -> OpenStream:
        """Accepts a request and starts it. An error that is raised was counted, and nothing is left of the request."""
        try:
            self._check_admission()
            self._quota.take(request.client)
        except ServingError as error:
            self._metrics.request_refused(error.code)
            raise
        try:
            prepared = await self._prepare(request)
            self._check_admission()  # much may have happened while a long prompt was tokenised
            stream = self._accept(prepared, request.client, request.claimed)
        except BaseException as error:  # a cancellation, too, gives the place back; all are raised again
            self._quota.give_back(request.client)
            if isinstance(error, ServingError):
                self._metrics.request_refused(error.code)
            raise
        try:
            await self._start(stream, self._begin(stream, stream.record.request, 0))
        except ServingError as error:
            self._fail(stream, error)
            raise
        except BaseException:  # a cancellation or a fault of ours: nothing may stay open; raised again
            self._cancel(stream)
            raise
        return stream

    async def tokenize(
        self, text: str | None, messages: tuple[Mapping[str, Any], ...] | None, model: str | None
    ) -> list[int]:
        work = partial(self._preparer.tokenize, text, messages, model)
        return await self._threads.run(num_text_characters(text, messages), work)

    def detokenize(self, token_ids: Sequence[int], model: str | None) -> str:
        self._preparer.check_model(model)
        self._preparer.check_detokenize(token_ids)
        return self._tokenizer.decode(token_ids)

    async def status(self) -> dict[str, Any]:
        state = "ready" if self.is_ready else "unavailable" if self._is_admitting else "draining"
        workers = await self._placer.snapshot()
        return {
            "cluster": {
                "model": self.model.name,
                "state": state,
                "uptime_s": round(self._clock.now_s() - self._started_s, 3),
                **self._addresses,
            },
            "workers": [worker_report(info, load) for info, load in workers],
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
            async with asyncio.timeout(timeout_s):
                await self._all_closed.wait()
        except TimeoutError:
            for stream in list(self._open.values()):
                self._fail(stream, Unavailable("the server is shutting down"))
        self._lines.flush()

    # ---- from workers and the control plane

    def deliver(self, output: WorkerOutput) -> None:
        """Takes what one step of one worker has for this gateway."""
        for event in output.events:
            self._on_event(event)
        for logprobs in output.prompt_logprobs:
            stream = self._streams.get(logprobs.request_id)
            if stream is not None:
                infos = tuple(token_info(self._tokenizer, token) for token in logprobs.tokens)
                stream.record.prompt_tokens = infos
        for chunk in output.chunks:
            stream = self._streams.get(chunk.request_id)
            if stream is not None:
                self._on_chunk(stream, chunk)
        for failure in output.failures:
            stream = self._streams.get(failure.request_id)
            if stream is not None:
                self._on_failure(stream, failure, output.worker_id)

    def worker_lost(self, worker_id: WorkerId) -> None:
        """Moves what the worker still held elsewhere."""
        self._lost_workers.add(worker_id)
        self._pools.worker_lost(worker_id)
        for stream in list(self._open.values()):
            record = stream.record
            for attempt in [a for a in record.attempts.values() if record.needs(a, worker_id)]:
                self._recover(stream, attempt, _worker_lost(worker_id))

    def control_plane_lost(self) -> None:
        """Nothing can be placed from now on; what workers have goes on."""
        self._pools.control_plane_lost()

    # ---- inside: start

    def _check_admission(self) -> None:
        if reason := self.unready_reason:
            raise Unavailable(reason, retry_after_s=2.0)

    async def _prepare(self, given: GenerateInput) -> PreparedRequest:
        """Checks and tokenises; a long text on a thread of its own, so that streams go on meanwhile."""
        num_characters = num_text_characters(given.text, given.messages)
        return await self._threads.run(num_characters, partial(self._preparer.prepare, given))

    def _accept(self, prepared: PreparedRequest, client: str | None, claimed: ClaimedId | None) -> OpenStream:
        """Opens the record of a request. Its end gives back its place in the quota, and the id where it claimed one."""
        client_id = prepared.request.request_id
        own_id = self._ids.claim(client_id) if claimed is None else None
        request = replace(prepared.request, request_id=self._new_id(client_id))
        samples = [
            OpenSample(
                SampleText(
                    self._tokenizer,
                    prepared.stop,
                    continues_text=prepared.continues_text,
                    min_tokens=request.sampling.min_tokens,
                )
            )
            for _ in range(request.sampling.n)
        ]
        now_s = self._clock.now_s()
        record = OpenRequest(client_id, request, self.gateway_id, now_s, now_s + prepared.timeout_s, samples)
        record.client, record.own_id = client, own_id
        stream = OpenStream(record, self._cancel)
        stream.timer = asyncio.get_running_loop().call_later(prepared.timeout_s, self._expire, stream)
        self._open[record.request_id] = stream
        self._all_closed.clear()
        self._metrics.request_started()
        self._record_event(record, Stage.RECEIVED)
        return stream

    def _new_id(self, client_id: str) -> str:
        """An id for workers. A client may use its own again at once, and what workers still send for an earlier request
        or attempt must not reach a later one."""
        self._num_attempts += 1
        return f"{client_id}~{self._nonce}{self._num_attempts}"

    def _begin(self, stream: OpenStream, request: Request, number: int) -> Attempt:
        attempt = Attempt(request, number)
        stream.record.attempts[request.request_id] = attempt
        self._streams[request.request_id] = stream
        return attempt

    async def _start(self, stream: OpenStream, attempt: Attempt) -> None:
        """Places an attempt and sends it off; another one, where a worker was lost while the answer was on its way.

        Raises:
            ServingError: nobody takes it; or the request has ended meanwhile, with this.
        """
        record = stream.record
        while True:
            request, time_left_s = attempt.request, record.deadline_s - self._clock.now_s()
            wanted = PlaceRequest(
                request.request_id,
                request.num_prompt_tokens,
                request.sampling.n,
                request.max_new_tokens,
                attempt.number,
                frozenset(record.avoided),
            )
            placement = await self._placer.place(wanted, time_left_s)
            if record.error is not None:  # its deadline passed, or the server began to shut down, meanwhile
                self._placer.finished(request.request_id, 0)
                raise record.error
            attempt.placement = record.placement = placement
            pair = (placement.prefill_worker, placement.decode_worker)
            lost = next((worker_id for worker_id in pair if worker_id in self._lost_workers), None)
            if lost is None:
                break
            (attempt,) = self._give_up(stream, attempt, _worker_lost(lost))
        if all(other.placement is not None for other in record.attempts.values()):
            self._move(record, RequestStatus.PLACED)
        self._record_event(record, Stage.PLACED)
        self._metrics.placed(is_local=placement.is_local)
        task = PrefillTask(request, placement, self.gateway_id, record.deadline_s - self._clock.now_s())
        self._workers.send(placement.prefill_worker, task)

    # ---- inside: faults

    def _on_failure(self, stream: OpenStream, failure: RequestFailed, worker_id: WorkerId) -> None:
        error = ERROR_BY_CODE.get(failure.code, InternalError)(failure.message)
        if not isinstance(error, _RECOVERABLE):
            self._fail(stream, error)
            return
        attempt = stream.record.attempts[failure.request_id]
        placement = attempt.placement
        assert placement is not None, "a worker has it"
        if isinstance(error, TransferFailed):  # either may be at fault
            stream.record.avoided.update((placement.prefill_worker, placement.decode_worker))
        elif isinstance(error, Unavailable):
            stream.record.avoided.add(worker_id)
        self._recover(stream, attempt, error)

    def _recover(self, stream: OpenStream, attempt: Attempt, error: ServingError) -> None:
        """Places again what is left of an attempt; ends the request with `error` where that cannot be."""
        if stream.record.is_over:
            return
        try:
            successors = self._give_up(stream, attempt, error)
        except ServingError:
            self._fail(stream, error)
            return
        for successor in successors:
            task = asyncio.create_task(self._start_again(stream, successor, error))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _give_up(self, stream: OpenStream, attempt: Attempt, error: ServingError) -> list[Attempt]:
        """Ends an attempt; those that go on in its place. Raises `error` when there were enough of them."""
        record = stream.record
        if attempt.number + 1 >= MAX_ATTEMPTS:
            raise error
        message = f"attempt {attempt.number} is given up: {error.message}"
        self._lines.log(logger, logging.WARNING, f"attempt {error.code}", message, record.request_id)
        self._end_attempt(stream, attempt, num_output_tokens=0)
        if record.status is RequestStatus.PLACED:
            self._move(record, RequestStatus.RECOVERING)
        self._record_event(record, Stage.RECOVERING)
        self._metrics.recovered(error.code)
        rest = [replace(r, request_id=self._new_id(record.client_id)) for r in record.rest_of(attempt)]
        return [self._begin(stream, request, attempt.number + 1) for request in rest]

    async def _start_again(self, stream: OpenStream, attempt: Attempt, error: ServingError) -> None:
        try:
            await self._start(stream, attempt)
        except Unavailable:  # nobody is left: what the client can use is the fault that led here
            self._fail(stream, error)
        except ServingError as refusal:
            self._fail(stream, refusal)
        except Exception:
            logger.exception("a recovery broke", extra={"request_id": stream.record.request_id})
            self._fail(stream, InternalError("the request could not be placed again; the gateway's log has the cause"))

    # ---- inside: progress

    def _on_event(self, event: TimelineEvent) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:
            return
        record = stream.record
        record.events.append(event)
        if event.stage is Stage.PREFILL_START and record.first_token_s is None:
            record.num_cached_tokens = event.num_tokens  # of the prompt; later attempts find output there, too
        elif event.stage is Stage.HANDOFF_END:
            self._metrics.handoff(event.num_bytes, event.duration_s)
        elif event.stage is Stage.PREEMPTED:
            self._metrics.preempted()
        if event.stage in (Stage.HANDOFF_END, Stage.DECODE_START):
            record.attempts[event.request_id].is_decoding = True

    def _on_chunk(self, stream: OpenStream, chunk: NewTokens) -> None:
        record = stream.record
        deltas = record.take(chunk, self._tokenizer)
        if not deltas:
            return
        attempt = record.attempts[chunk.request_id]
        now_s = self._clock.now_s()
        if record.first_token_s is None:
            record.first_token_s = now_s
        if not attempt.has_first_token:
            attempt.has_first_token = True
            self._placer.first_token(chunk.request_id)
        sample = record.samples[chunk.sample_index]
        if sample.last_token_s is not None:
            self._metrics.inter_token(now_s - sample.last_token_s, sum(len(d.token_ids) for d in deltas))
        sample.last_token_s = now_s
        record.pending.extend(deltas)
        if deltas[-1].finish_reason is not None:
            by_worker = not isinstance(deltas[-1].stop_reason, str)
            self._on_sample_end(stream, attempt, chunk.sample_index, by_worker=by_worker)
        stream.wake()

    def _on_sample_end(self, stream: OpenStream, attempt: Attempt, sample_index: int, *, by_worker: bool) -> None:
        """A sample ended. When a stop string ended it, the workers do not know yet."""
        record = stream.record
        samples = record.samples_of(attempt)
        if all(sample.finish_reason is not None for sample in samples):
            num_output_tokens = sum(len(sample.token_ids) for sample in samples)
            self._end_attempt(stream, attempt, num_output_tokens, is_known=by_worker)
        elif not by_worker:
            self._abort(attempt, sample_index)
        if record.is_whole:
            self._finish(stream)

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
        if error.code == "internal":
            logger.error("request failed: %s", error.message, extra={"request_id": record.request_id})
        else:
            message = f"request failed: {error.message}"
            self._lines.log(logger, logging.WARNING, error.code, message, record.request_id)
        record.error = error
        self._move(record, RequestStatus.FAILED)
        self._metrics.request_failed(error.code, **self._token_counts(record))
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
        self._close(stream)
        stream.wake()

    def _expire(self, stream: OpenStream) -> None:
        self._fail(stream, DeadlineExceeded("the request's deadline passed; allow more time or ask for fewer tokens"))

    def _close(self, stream: OpenStream) -> None:
        """Nothing of the request is left in the gateway; its stream keeps what the client has not read."""
        record = stream.record
        if stream.timer is not None:
            stream.timer.cancel()
        for attempt in list(record.attempts.values()):
            num_output_tokens = sum(len(sample.token_ids) for sample in record.samples_of(attempt))
            self._end_attempt(stream, attempt, num_output_tokens)
        self._open.pop(record.request_id, None)
        self._quota.give_back(record.client)
        if record.own_id is not None:
            record.own_id.release()
        if not self._open:
            self._all_closed.set()

    def _end_attempt(
        self, stream: OpenStream, attempt: Attempt, num_output_tokens: int, *, is_known: bool = False
    ) -> None:
        """Nothing of the attempt is left in the gateway. `is_known`: nothing is left at the workers either."""
        request_id = attempt.request.request_id
        del stream.record.attempts[request_id], self._streams[request_id]
        if attempt.placement is None:
            return  # whoever waits for its placement gives it back
        if not is_known:
            self._abort(attempt, None)
        self._placer.finished(request_id, num_output_tokens)

    def _abort(self, attempt: Attempt, sample_index: int | None) -> None:
        """Tells both workers; the one that knows nothing of the attempt ignores it."""
        if attempt.placement is None:
            return
        message = AbortRequest(attempt.request.request_id, sample_index)
        for worker_id in {attempt.placement.prefill_worker, attempt.placement.decode_worker}:
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


def _worker_lost(worker_id: WorkerId) -> WorkerLost:
    return WorkerLost(f"worker {worker_id} was lost; sending the request again is safe")
