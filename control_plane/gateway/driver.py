"""Carries out what attempts.py decides: asks for placements, sets deadlines, counts and logs ends.

Everything runs on one asyncio loop; nothing here blocks. Every wait has the request's deadline. More than 15 of our
modules are imported, for what is decided, counted, logged and told of a request meets here.
"""

from __future__ import annotations

import asyncio
import logging
import secrets

from control_plane.gateway.attempts import Attempts
from control_plane.gateway.open_requests import Attempt, OpenRequest, PreparedRequest, stage_durations
from control_plane.gateway.placer import Placer
from control_plane.gateway.quota import Quota
from control_plane.gateway.request_ids import ClaimedId
from control_plane.gateway.streams import OpenStream
from control_plane.gateway.summed_log import SummedLog
from control_plane.gateway.text.detokenizer import TokenTexts
from control_plane.metrics import GatewayMetrics
from phasewise.core.clock import Clock
from phasewise.core.errors import InternalError, ServingError, Unavailable
from phasewise.core.heartbeat import OpenAttempt
from phasewise.core.lifecycle import RequestStatus
from phasewise.core.messages import WorkerOutput
from phasewise.core.placement import Placement, WorkerId
from phasewise.core.ports import PeerPort

logger = logging.getLogger(__name__)


class RequestDriver:
    """Runs the open requests of a gateway. Implements RequestOwner (attempts.py).

    Args:
        quota: where each request has taken one; its end gives it back.
    """

    def __init__(
        self,
        gateway_id: str,
        texts: TokenTexts,
        placer: Placer,
        workers: PeerPort,
        metrics: GatewayMetrics,
        clock: Clock,
        quota: Quota,
    ) -> None:
        self._attempts = Attempts(gateway_id, secrets.token_hex(4), texts, placer, workers, self, metrics, clock)
        self._placer = placer
        self._metrics = metrics
        self._clock = clock
        self._quota = quota
        self._lines = SummedLog(clock)
        self._streams: dict[str, OpenStream] = {}  # of the open requests, by the id of the first attempt
        self._recoveries: set[asyncio.Task[None]] = set()
        self._has_ended = asyncio.Event()  # set at each end of a request; `drain` clears it

    @property
    def num_open(self) -> int:
        return len(self._streams)

    @property
    def num_waiting(self) -> int:
        """Open requests that no token has come for."""
        return sum(record.first_token_s is None for record in self._attempts.open_requests)

    @property
    def is_idle(self) -> bool:
        """True when nothing of any request is left."""
        return not self._streams and not self._attempts.num_attempts and not self._recoveries

    def open(self, prepared: PreparedRequest, client: str | None, own_id: ClaimedId | None) -> OpenStream:
        """Opens a request. Its end gives back its place in the quota, and `own_id`."""
        record = self._attempts.resume(prepared) if prepared.samples else self._attempts.open(prepared).record
        stream = OpenStream(record, self._attempts, client, own_id)
        loop = asyncio.get_running_loop()
        stream.timer = loop.call_later(prepared.timeout_s, self._attempts.expire, record)
        self._streams[record.request_id] = stream
        self._metrics.request_started()
        return stream

    async def start(self, stream: OpenStream) -> None:
        """Places a request that was just opened. However this is left by an error, the request has ended.

        Raises:
            ServingError: nobody takes it, or it has ended meanwhile.
        """
        record = stream.record
        try:
            for attempt in list(record.attempts.values()):  # one, or of a resumed request one for each sample
                await self._place(attempt)
            if not record.attempts and not record.is_over:
                self._attempts.end_resumed(record)
        except BaseException:  # a cancellation or a fault of ours: nothing may stay open; raised again
            self._attempts.cancel(record)
            raise
        if record.error is not None:
            raise record.error

    def deliver(self, output: WorkerOutput) -> None:
        """Takes what one step of one worker has for this gateway."""
        for attempt in self._attempts.deliver(output):
            self._place_again(attempt)

    def open_attempts(self) -> tuple[OpenAttempt, ...]:
        """What is placed, for a control plane that builds its ledger anew."""
        attempts = [attempt for record in self._attempts.open_requests for attempt in record.attempts.values()]
        return tuple(_as_open(a, a.placement) for a in attempts if a.placement is not None)

    def worker_lost(self, worker_id: WorkerId) -> None:
        for attempt in self._attempts.worker_lost(worker_id):
            self._place_again(attempt)

    def tokens_lost(self, worker_id: WorkerId) -> None:
        for attempt in self._attempts.tokens_lost(worker_id):
            self._place_again(attempt)

    async def drain(self, timeout_s: float) -> None:
        """Waits for the open requests; what is left after `timeout_s` is ended."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._streams:
                    self._has_ended.clear()
                    await self._has_ended.wait()
        except TimeoutError:
            for record in list(self._attempts.open_requests):
                self._attempts.fail(record, Unavailable("the server is shutting down"))
        self._lines.flush()

    # ---- placements

    async def _place(self, attempt: Attempt) -> None:
        """Has an attempt placed; another one, where a worker was lost while the answer was on its way."""
        waiting: Attempt | None = attempt
        while waiting is not None:
            time_left_s = waiting.record.deadline_s - self._clock.now_s()
            try:
                placement = await self._placer.place(waiting.wanted, time_left_s)
            except ServingError as error:
                self._attempts.refused(waiting, error)
                return
            waiting = self._attempts.placed(waiting, placement)

    def _place_again(self, attempt: Attempt) -> None:
        task = asyncio.create_task(self._recover(attempt))
        self._recoveries.add(task)
        task.add_done_callback(self._recoveries.discard)

    async def _recover(self, attempt: Attempt) -> None:
        try:
            await self._place(attempt)
        except Exception:
            record = attempt.record
            logger.exception("a recovery broke", extra={"request_id": record.request_id})
            error = InternalError("the request could not be placed again; the gateway's log has the cause")
            self._attempts.fail(record, error)

    # ---- RequestOwner

    def has_news(self, record: OpenRequest) -> None:
        self._streams[record.request_id].news.set()

    def given_up(self, attempt: Attempt, error: ServingError) -> None:
        self._metrics.recovered(error.code)
        message = f"attempt {attempt.number} is given up: {error.message}"
        self._lines.log(logger, logging.WARNING, f"attempt {error.code}", message, attempt.record.request_id)

    def ended(self, record: OpenRequest) -> None:
        """Nothing of the request is left here; its stream keeps what the client has not read."""
        stream = self._streams.pop(record.request_id)
        stream.ended()
        self._quota.give_back(stream.client)
        self._has_ended.set()
        if record.status is RequestStatus.FINISHED:
            self._count_finished(record)
        else:
            self._count_unfinished(record)

    def _count_finished(self, record: OpenRequest) -> None:
        reason, first_token_s = record.samples[0].finish_reason, record.first_token_s
        assert reason is not None and first_token_s is not None, "every sample has ended"
        self._metrics.request_finished(
            reason.value,
            num_prompt_tokens=record.request.num_prompt_tokens,
            num_output_tokens=record.num_output_tokens - record.num_resumed,
            num_cached_tokens=record.num_cached_tokens,
            e2e_s=self._clock.now_s() - record.received_s,
            ttft_s=first_token_s - record.received_s,
            stages=stage_durations(record.events),
            num_samples=len(record.samples),
        )

    def _count_unfinished(self, record: OpenRequest) -> None:
        num_prompt_tokens = len(record.request.prompt_token_ids) if record.first_token_s is not None else 0
        num_output_tokens = record.num_output_tokens - record.num_resumed
        counts = {"num_prompt_tokens": num_prompt_tokens, "num_output_tokens": num_output_tokens}
        if record.status is RequestStatus.CANCELLED:
            self._metrics.cancelled(**counts)
            return
        assert record.error is not None
        self._metrics.request_failed(record.error.code, **counts)
        message = f"request failed: {record.error.message}"
        if record.error.code == "internal":
            logger.error("%s", message, extra={"request_id": record.request_id})
        else:
            self._lines.log(logger, logging.WARNING, record.error.code, message, record.request_id)


def _as_open(attempt: Attempt, placement: Placement) -> OpenAttempt:
    wanted = attempt.wanted
    return OpenAttempt(
        placement, wanted.num_prompt_tokens, wanted.num_samples, wanted.max_tokens, attempt.has_first_token
    )
