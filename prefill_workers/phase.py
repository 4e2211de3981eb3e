"""The prefill phase of a worker: prompts in; first tokens and KV out.

One prompt's life here (queues in prefill_workers/scheduler.py):

    PrefillTask → WAITING → RESERVING (offer sent, not for prompts that stay here) → PREFILLING in chunks
      ├─ stays here: the decode phase adopts the sequence with its blocks
      └─ is handed off: first token out, commit sent → HANDOFF; blocks are kept until the receiver says done

A prompt may begin before its offer is answered (prefill_workers/admission.py): its KV and its commit wait in the sender
for the answer.

Long prompts are pushed layer group by layer group while later layers compute (Splitwise, section 4.3; the sender says
which are long for its link); short ones as one part behind their last layer, before the first token is known. A failed
handoff is offered once more to the same worker, from the KV that is still here; a second failure ends the request here
with `TransferFailed`, and its gateway may try other workers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from engine.batch import ScheduledSequence
from engine.block_manager import BlockManager
from engine.sequence import Sequence
from kv_transfer.plan import PartSpan
from kv_transfer.sender import KVSender
from kv_transfer.state import SendStatus
from phasewise.core.clock import Clock
from phasewise.core.errors import DeadlineExceeded, InternalError, Overloaded, ServingError, TransferFailed, WorkerLost
from phasewise.core.lifecycle import RequestStatus, Stage
from phasewise.core.messages import KVAccepted, KVRefused, NewTokens, PrefillTask
from phasewise.core.outbox import Outbox
from phasewise.core.placement import WorkerId
from phasewise.core.request import SampledToken
from prefill_workers.job import PrefillJob
from prefill_workers.scheduler import PrefillScheduler


class Staying(NamedTuple):
    """Sequences whose prompt is computed and that this worker decodes; they bring references to its blocks."""

    sequences: list[Sequence]
    gateway_id: str
    deadline_s: float


class PrefillPhase:
    """Plans prompt chunks and takes their results. Used by the step loop's thread alone.

    There are more than 20 methods: one for each message, each thing that a round asks, and each end of a prompt.
    """

    def __init__(
        self,
        blocks: BlockManager,
        scheduler: PrefillScheduler,
        sender: KVSender,
        outbox: Outbox,
        clock: Clock,
        max_waiting: int,
    ) -> None:
        self._blocks = blocks
        self.scheduler = scheduler
        self._sender = sender
        self._outbox = outbox
        self._clock = clock
        self._max_waiting = max_waiting
        self._jobs: dict[str, PrefillJob] = {}
        self.counters: dict[str, float] = dict.fromkeys(
            ("handoffs_out", "handoff_failures", "prompt_tokens", "prefix_query_tokens", "prefix_hit_tokens"), 0.0
        )

    # ---- messages

    def on_task(self, task: PrefillTask) -> None:
        """A new prompt. Refused at once when the queue is full."""
        request = task.request
        if request.request_id in self._jobs:  # ids are never used twice, so this is the same message once more
            return
        is_new = task.placement.attempt == 0  # what was taken once is not refused when it has to begin again
        if is_new and len(self.scheduler.waiting) >= self._max_waiting:
            error = Overloaded(f"{self._max_waiting} requests are waiting already", retry_after_s=1.0)
            self._outbox.failure(task.gateway_id, request.request_id, error)
            return
        job = PrefillJob(task, Sequence.of_prompt(request), self._clock.now_s() + task.time_left_s)
        self._jobs[request.request_id] = job
        self.scheduler.add(job)
        self._event(job, Stage.WAITING)

    def on_abort(self, request_id: str, sample_index: int | None) -> bool:
        """Forgets a request, or one sample. True when it was here."""
        job = self._jobs.get(request_id)
        if job is None:
            return False
        if sample_index is not None:
            job.ended_samples.add(sample_index)
            if len(job.ended_samples) < job.num_samples:
                job.handoff.end_sample(sample_index)  # the receiver may have no reservation in which it could note this
                return True
        self._end(job, RequestStatus.CANCELLED, "the request was cancelled")
        return True

    def on_accepted(self, message: KVAccepted) -> None:
        self._sender.on_accepted(message)
        for job in self._jobs.values():
            if job.handoff.transfer_id == message.transfer_id:
                self._event(job, Stage.RESERVED)
                self._note_push(job)

    def on_refused(self, message: KVRefused) -> None:
        """The receiver can never take it: another attempt, or another request like it, would end the same way."""
        self._sender.outgoing.on_failed(message.transfer_id, message.reason)
        for job in list(self._jobs.values()):
            if job.handoff.transfer_id == message.transfer_id:
                self.fail(job.request_id, InternalError(f"the KV handoff was refused: {message.reason}"))

    def on_peer_lost(self, worker_id: WorkerId) -> None:
        """The decode worker is gone: no second offer to it can help."""
        self._sender.on_peer_lost(worker_id)
        for job in list(self._jobs.values()):
            if job.handoff.peer == worker_id:
                error = WorkerLost(f"worker {worker_id} was lost; sending the request again is safe")
                self.fail(job.request_id, error)

    def on_gateway_lost(self, gateway_id: str) -> None:
        for job in list(self._jobs.values()):
            if job.task.gateway_id == gateway_id:
                self._end(job, RequestStatus.CANCELLED, "its gateway was lost")

    def fail(self, request_id: str, error: ServingError) -> None:
        """Ends a request with an error, if it is here."""
        job = self._jobs.get(request_id)
        if job is not None:
            self._outbox.failure(job.task.gateway_id, request_id, error)
            self._end(job, RequestStatus.FAILED, error.message)

    # ---- once a step

    def poll(self) -> None:
        """Deadlines, ended handoffs, new offers: before a step is planned."""
        now_s = self._clock.now_s()
        self._sender.poll()
        for job in list(self._jobs.values()):
            if job.deadline_s <= now_s:
                self.fail(job.request_id, DeadlineExceeded("the request's deadline passed during prefill"))
            elif job.handoff.num_failures > job.num_failures:
                self._on_failed_attempt(job)
            elif job.handoff.status is SendStatus.DONE:
                self.counters["handoffs_out"] += 1
                self._end(job, RequestStatus.FINISHED, "it is done")
        for job in self.scheduler.jobs_to_reserve():
            job.move(RequestStatus.RESERVING)
            self._sender.offer(job.handoff)
            self._event(job, Stage.RESERVE_ASKED)

    def plan(self, budget: int, num_seats: int, only: Collection[str] | None) -> list[ScheduledSequence]:
        """The next step's prompt chunks, within `budget` tokens. `num_seats`, `only`: as PrefillScheduler.schedule."""
        items = []
        for job, num_tokens in self.scheduler.schedule(budget, num_seats, only):
            sequence = job.sequence
            if not job.has_begun:
                job.has_begun = True
                self._begin(job)
            last = num_tokens == sequence.num_unscheduled_tokens
            items.append(ScheduledSequence(sequence, num_tokens, job.num_samples if last else 0))
        return items

    def on_layers_done(self, items: Iterable[ScheduledSequence], first_layer: int, num_layers: int) -> None:
        """Called inside a step, after each layer group: pushes a chunk's KV of those layers, or a short prompt's."""
        for item in items:
            job = self._jobs.get(item.sequence.request_id)
            if job is not None and job.needs_handoff:
                span = PartSpan(first_layer, num_layers, item.start, item.num_tokens)
                self._sender.on_computed(job.handoff, span)
                self._note_push(job)
                if job.handoff.to_send(span) is not None:
                    job.pushed_end = item.start + item.num_tokens

    def revoke(self, items: Iterable[ScheduledSequence]) -> None:
        """The engine broke on the step that computed these chunks. What has left of their KV may be wrong: such a
        handoff is given up, and offered again when the prompt is computed."""
        for item in items:
            job = self._jobs.get(item.sequence.request_id)
            if job is not None and job.sequence is item.sequence and job.pushed_end > item.start:
                job.pushed_end = 0
                self._sender.outgoing.abort(job.handoff, "the engine broke on a step whose KV had left")

    def take(
        self, item: ScheduledSequence, tokens: tuple[SampledToken, ...], prompt_logprobs: tuple[SampledToken, ...]
    ) -> Staying | None:
        """Takes one item's result. Returns what is to be decoded here.

        What was cancelled while the step ran leaves no trace.
        """
        sequence = item.sequence
        job = self._jobs.get(sequence.request_id)
        if job is None or job.sequence is not sequence:
            return None
        sequence.end_step(item.num_tokens)
        self.counters["prompt_tokens"] += item.num_tokens
        self._blocks.publish(sequence)
        job.prompt_logprobs += prompt_logprobs
        return None if sequence.is_prefilling else self._finish(job, tokens)

    def next_deadline_s(self) -> float:
        return min((job.deadline_s for job in self._jobs.values()), default=float("inf"))

    # ---- inside: the end of a prompt

    def _begin(self, job: PrefillJob) -> None:
        """The prompt's first chunk is about to run."""
        self._event(job, Stage.PREFILL_START, num_tokens=job.num_cached_tokens)
        if job.sequence.sampling.prompt_logprobs is None:
            self.counters["prefix_query_tokens"] += job.sequence.num_prompt_tokens
            self.counters["prefix_hit_tokens"] += job.num_cached_tokens
        if job.needs_handoff:
            self._sender.begin(job.handoff, job.sequence.block_table, job.num_cached_tokens)
            self._note_push(job)

    def _finish(self, job: PrefillJob, tokens: tuple[SampledToken, ...]) -> Staying | None:
        """The prompt is computed and its first tokens are sampled, one per sample."""
        self._event(job, Stage.PREFILL_END)
        if job.sequence.sampling.prompt_logprobs is not None:
            self._outbox.prompt_logprobs(job.task.gateway_id, job.described_prompt())
        if job.task.request.max_new_tokens < 1:
            for new in job.empty_outputs():
                self._outbox.tokens(job.task.gateway_id, new)
            self._end(job, RequestStatus.FINISHED, "it has no output")
            return None
        live: list[SampledToken | None] = []
        sequences: list[Sequence] = []
        for index, token in enumerate(tokens, job.sequence.sample_index):
            sequence = job.sequence.fork(index, token)
            reason = sequence.finish_reason()
            goes_on = reason is None and index not in job.ended_samples
            live.append(token if goes_on else None)
            if goes_on:
                sequences.append(sequence)
            new = NewTokens(job.request_id, index, job.sequence.num_output_tokens, (token,), reason)
            self._outbox.tokens(job.task.gateway_id, new)
        self._event(job, Stage.FIRST_TOKEN)
        if not sequences:
            self._end(job, RequestStatus.FINISHED, "every sample ended with its first token")
        elif job.needs_handoff:
            self.scheduler.hand_off(job)
            self._sender.commit(job.handoff, tuple(live))
            if job.is_unanswered:
                self._give_back()
        else:
            for sequence in sequences:
                self._blocks.share(sequence.block_table)
            self._end(job, RequestStatus.DECODING, "it is decoded here")
            return Staying(sequences, job.task.gateway_id, job.deadline_s)
        return None

    # ---- inside: the handoff

    def _note_push(self, job: PrefillJob) -> None:
        if job.handoff.has_begun_sending and not job.has_pushed:
            job.has_pushed = True
            self._event(job, Stage.HANDOFF_START)

    def _on_failed_attempt(self, job: PrefillJob) -> None:
        """The sender offers the handoff once more, or the request ends."""
        job.num_failures = job.handoff.num_failures
        self.counters["handoff_failures"] += 1
        if job.handoff.has_failed:
            error = TransferFailed(f"the KV handoff failed {job.num_failures} times: {job.handoff.reason}")
            self.fail(job.request_id, error)
        elif job.status is RequestStatus.HANDOFF:
            self._give_back()

    def _give_back(self) -> None:
        """A computed prompt waits for room: prompts that do not run yet must not be in its way."""
        for job in self.scheduler.jobs_to_give_back():
            self._sender.outgoing.withdraw(job.handoff, "a prompt that is computed goes first")
            job.move(RequestStatus.WAITING)

    # ---- inside: endings

    def _end(self, job: PrefillJob, status: RequestStatus, reason: str) -> None:
        """Nothing of the job is left here afterwards. `reason`: for its decode worker, if its handoff goes on."""
        self.scheduler.remove(job)
        job.move(status)
        self._sender.forget(job.handoff, reason)
        self._blocks.release(job.sequence.block_table)
        job.sequence.block_table = []
        del self._jobs[job.request_id]

    def _event(self, job: PrefillJob, stage: Stage, *, num_tokens: int = 0) -> None:
        self._outbox.event(job.task.gateway_id, job.request_id, stage, num_tokens=num_tokens)
