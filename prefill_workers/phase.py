"""The prefill phase of a worker: prompts in; first tokens and KV out.

One prompt's life here (queues in prefill_workers/scheduler.py):

    PrefillTask → WAITING → RESERVING (offer sent, not for prompts that stay here) → PREFILLING in chunks
      ├─ stays here: the decode phase adopts the sequence with its blocks
      └─ is handed off: first token out, commit sent → HANDOFF; blocks are kept until the receiver says done

A prompt that finds nothing running begins before its offer is answered: the answer takes milliseconds, there is room
almost always, and nobody else could use the time. Its KV and its commit wait in the sender for the answer.

Long prompts are pushed layer group by layer group while later layers compute (Splitwise, section 4.3; the sender says
which are long for its link); short ones as one part behind their last layer, before the first token is known. A failed
handoff is offered once more to the same worker, from the KV that is still here; a second failure ends the request here
with `TransferFailed`, and its gateway may try other workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from engine.batch import ScheduledSequence
from engine.block_manager import BlockManager
from engine.sequence import Sequence
from kv_transfer.plan import PartSpan
from kv_transfer.sender import KVSender
from kv_transfer.state import SendStatus
from phasewise.core.clock import Clock
from phasewise.core.errors import DeadlineExceeded, InternalError, Overloaded, ServingError, TransferFailed, WorkerLost
from phasewise.core.lifecycle import RequestStatus, Stage
from phasewise.core.messages import KVAccepted, KVFailed, KVRefused, NewTokens, PrefillTask, PromptLogprobs
from phasewise.core.outbox import Outbox
from phasewise.core.placement import WorkerId
from phasewise.core.request import FinishReason, SampledToken
from prefill_workers.scheduler import PrefillJob, PrefillScheduler


class PrefillPhase:
    """Plans prompt chunks and takes their results. Used by the step loop's thread alone.

    `adopt(sequences, task, deadline_s)` gives sequences that stay on this worker to its decode phase;
    `has_decode_room(n)` tells whether it would take n more, beside those of `scheduler.num_staying`.
    """

    def __init__(
        self,
        blocks: BlockManager,
        scheduler: PrefillScheduler,
        sender: KVSender,
        outbox: Outbox,
        clock: Clock,
        max_waiting: int,
        adopt: Callable[[list[Sequence], PrefillTask, float], None],
        has_decode_room: Callable[[int], bool],
    ) -> None:
        self._blocks = blocks
        self.scheduler = scheduler
        self._sender = sender
        self._outbox = outbox
        self._clock = clock
        self._max_waiting = max_waiting
        self._adopt = adopt
        self._has_decode_room = has_decode_room
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
        sequence = Sequence(
            request_id=request.request_id,
            sampling=request.sampling,
            token_ids=list(request.prompt_token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            sample_index=request.sample_index,
            num_resumed_tokens=request.num_resumed_tokens,
            cache_salt=request.cache_salt,
        )
        job = PrefillJob(task, sequence, self._clock.now_s() + task.time_left_s)
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
            if len(job.ended_samples) < job.task.request.sampling.n:
                job.handoff.end_sample(sample_index)  # the receiver may have no reservation in which it could note this
                return True
        self._drop(job, RequestStatus.CANCELLED, "the request was cancelled")
        return True

    def on_accepted(self, message: KVAccepted) -> None:
        self._sender.on_accepted(message)
        for job in self._jobs.values():
            if job.handoff.transfer_id == message.transfer_id:
                self._event(job, Stage.RESERVED)
                self._note_push(job)

    def on_failed(self, message: KVFailed) -> None:
        """The receiver gave up; another attempt may succeed."""
        self._sender.on_failed(message.transfer_id, message.reason)

    def on_refused(self, message: KVRefused) -> None:
        """The receiver can never take it: another attempt, or another request like it, would end the same way."""
        self._sender.on_failed(message.transfer_id, message.reason)
        for job in list(self._jobs.values()):
            if job.handoff.transfer_id == message.transfer_id:
                self._fail(job, InternalError(f"the KV handoff was refused: {message.reason}"))

    def on_peer_lost(self, worker_id: WorkerId) -> None:
        """The decode worker is gone: no second offer to it can help."""
        self._sender.on_peer_lost(worker_id)
        for job in list(self._jobs.values()):
            if job.task.placement.decode_worker == worker_id:
                self._fail(job, WorkerLost(f"worker {worker_id} was lost; sending the request again is safe"))

    def on_gateway_lost(self, gateway_id: str) -> None:
        for job in list(self._jobs.values()):
            if job.task.gateway_id == gateway_id:
                self._drop(job, RequestStatus.CANCELLED, "its gateway was lost")

    def fail(self, request_id: str, error: ServingError) -> None:
        """Ends a request with an error, if it is here."""
        job = self._jobs.get(request_id)
        if job is not None:
            self._fail(job, error)

    # ---- once a step

    def poll(self) -> None:
        """Deadlines, ended handoffs, new offers: before a step is planned."""
        now_s = self._clock.now_s()
        self._sender.poll()
        for job in list(self._jobs.values()):
            if job.deadline_s <= now_s:
                self._fail(job, DeadlineExceeded("the request's deadline passed during prefill"))
            else:
                self._poll_handoff(job)
        computed = self._computed_without_room()
        for job in self.scheduler.jobs_to_reserve():
            if not self._may_reserve_beside(job, computed):
                continue
            job.move(RequestStatus.RESERVING)
            self._sender.offer(job.handoff)
            self._event(job, Stage.RESERVE_ASKED)

    def plan(self, budget: int) -> list[ScheduledSequence]:
        """Prompt chunks for the next step, within `budget` tokens."""
        items = []
        has_computed = bool(self._computed_without_room())  # once: the queue may be long, and each job is asked about
        for job, num_tokens in self.scheduler.schedule(budget, lambda job: self._may_start(job, has_computed)):
            sequence = job.sequence
            if sequence.num_scheduled_tokens == job.num_cached_tokens:
                self._begin(job)
            last = num_tokens == sequence.num_unscheduled_tokens
            items.append(ScheduledSequence(sequence, num_tokens, sequence.sampling.n if last else 0))
        return items

    def on_layers_done(self, items: Iterable[ScheduledSequence], first_layer: int, num_layers: int) -> None:
        """Called inside a step, after each layer group: pushes a chunk's KV of those layers, or a short prompt's."""
        for item in items:
            job = self._jobs.get(item.sequence.request_id)
            if job is not None and job.needs_handoff:
                span = PartSpan(first_layer, num_layers, item.start, item.num_tokens)
                self._sender.on_computed(job.handoff, span)
                self._note_push(job)

    def take(
        self, item: ScheduledSequence, tokens: tuple[SampledToken, ...], prompt_logprobs: tuple[SampledToken, ...]
    ) -> None:
        """Takes one item's result. What was cancelled while the step ran leaves no trace."""
        sequence = item.sequence
        job = self._jobs.get(sequence.request_id)
        if job is None or job.sequence is not sequence:
            return
        sequence.end_step(item.num_tokens)
        self.counters["prompt_tokens"] += item.num_tokens
        self._blocks.publish(sequence)
        if sequence.sampling.prompt_logprobs is not None:
            job.prompt_logprobs.extend(prompt_logprobs)
        if not sequence.is_prefilling:
            self._finish(job, tokens)

    @property
    def num_handoffs(self) -> int:
        return sum(job.status is RequestStatus.HANDOFF for job in self._jobs.values())

    @property
    def waiting_prompt_tokens(self) -> int:
        return sum(j.sequence.num_unscheduled_tokens for j in self.scheduler.waiting + self.scheduler.running)

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

    def _finish(self, job: PrefillJob, tokens: tuple[SampledToken, ...]) -> None:
        """The prompt is computed and its first tokens are sampled, one per sample."""
        self.scheduler.finish_prefill(job)
        self._event(job, Stage.PREFILL_END)
        if job.sequence.sampling.prompt_logprobs is not None:
            first = SampledToken(job.sequence.token_ids[0])
            logprobs = PromptLogprobs(job.request_id, (first, *job.prompt_logprobs))
            self._outbox.prompt_logprobs(job.task.gateway_id, logprobs)
        live: list[SampledToken | None] = []
        position = job.sequence.num_output_tokens
        has_output = job.task.request.max_new_tokens > 0
        for index, token in enumerate(tokens, job.sequence.sample_index):
            # Without output the token only showed that the prompt's logits are usable.
            reason = self._fork(job.sequence, index, token).finish_reason() if has_output else FinishReason.LENGTH
            goes_on = reason is None and index not in job.ended_samples
            live.append(token if goes_on else None)
            chunk = NewTokens(job.request_id, index, position, (token,) if has_output else (), reason)
            self._outbox.chunk(job.task.gateway_id, chunk)
        if has_output:
            self._event(job, Stage.FIRST_TOKEN)
        if all(token is None for token in live):
            self._drop(job, RequestStatus.FINISHED, "every sample ended with its first token, or without one")
        elif job.needs_handoff:
            self._hand_off(job, tuple(live))
        else:
            self._keep(job, live)

    def _fork(self, sequence: Sequence, sample_index: int, token: SampledToken) -> Sequence:
        """The sequence of one sample: the prompt and its first token. Blocks are shared by the caller."""
        return replace(
            sequence,
            sample_index=sample_index,
            token_ids=[*sequence.token_ids, token.token_id],
            block_table=list(sequence.block_table),
            block_hashes=list(sequence.block_hashes),
        )

    def _keep(self, job: PrefillJob, live: list[SampledToken | None]) -> None:
        """Decoding goes on here: the decode phase takes over, with a reference to the blocks for each sample."""
        first = job.sequence.sample_index
        sequences = [self._fork(job.sequence, i, token) for i, token in enumerate(live, first) if token is not None]
        for sequence in sequences:
            self._blocks.share(sequence.block_table)
        self._adopt(sequences, job.task, job.deadline_s)
        job.move(RequestStatus.DECODING)
        self._forget(job, "it is decoded here")

    def _hand_off(self, job: PrefillJob, first_tokens: tuple[SampledToken | None, ...]) -> None:
        job.move(RequestStatus.HANDOFF)
        self._sender.commit(job.handoff, first_tokens)
        if self._is_unanswered(job):
            self._unreserve_waiting()

    # ---- inside: the handoff

    def _computed_without_room(self) -> list[PrefillJob]:
        """Computed prompts that nobody has accepted yet: they hold blocks here until somebody does."""
        return [j for j in self._jobs.values() if j.status is RequestStatus.HANDOFF and self._is_unanswered(j)]

    def _may_reserve_beside(self, job: PrefillJob, computed: list[PrefillJob]) -> bool:
        """Whether `job` would neither take the room that they wait for, nor wait for the blocks that they hold."""
        peers = {other.task.placement.decode_worker for other in computed}
        if not peers:
            return True
        return job.task.placement.decode_worker not in peers and self._fits(job)

    def _fits(self, job: PrefillJob) -> bool:
        return self._blocks.blocks_for(job.sequence.num_tokens) <= self._blocks.num_free_blocks

    def _is_unanswered(self, job: PrefillJob) -> bool:
        return job.handoff.status is SendStatus.OFFERED

    def _may_start(self, job: PrefillJob, has_computed: bool) -> bool:
        """Is there room to decode what this prompt leads to? Never needed when its first token is its last, or it has
        no output.

        `has_computed`: whether computed prompts wait for room.
        """
        request = job.task.request
        if has_computed and not self._fits(job):
            return False  # it waits for blocks that they hold; those behind it may have the room that they wait for
        if request.max_new_tokens <= 1:
            return True
        if job.needs_handoff:
            if self._is_unanswered(job):
                return not has_computed and self._may_start_unanswered(job)
            return job.handoff.status is SendStatus.ACCEPTED
        return self._has_decode_room(request.sampling.n)

    def _may_start_unanswered(self, job: PrefillJob) -> bool:
        """Nothing else would run; and if the answer takes long, others can pass: half of the free blocks are left.

        Only the first in the queue: one that passed others would then take their offers' places, again and again.
        """
        first = next(other for other in self.scheduler.waiting if other.needs_handoff)
        if first is not job or self.scheduler.running:
            return False
        return 2 * self._blocks.blocks_for(job.sequence.num_tokens) <= self._blocks.num_free_blocks

    def _note_push(self, job: PrefillJob) -> None:
        if job.handoff.has_begun_sending and not job.has_pushed:
            job.has_pushed = True
            self._event(job, Stage.HANDOFF_START)

    def _poll_handoff(self, job: PrefillJob) -> None:
        handoff = job.handoff
        if handoff.num_failures > job.num_failures:
            job.num_failures = handoff.num_failures
            self.counters["handoff_failures"] += 1
            if handoff.has_failed:
                self._fail(job, TransferFailed(f"the KV handoff failed {job.num_failures} times: {handoff.reason}"))
            elif job.status is RequestStatus.HANDOFF:
                self._unreserve_waiting()
        elif handoff.status is SendStatus.DONE:
            self.counters["handoffs_out"] += 1
            job.move(RequestStatus.FINISHED)
            self._forget(job, "it is done")

    def _unreserve_waiting(self) -> None:
        """Gives back what prompts that do not run yet have reserved, where that could be in each other's way.

        A computed prompt without room there holds blocks here; a prompt that has room there may be waiting for blocks
        here. Without this the two would wait for each other.
        """
        computed = self._computed_without_room()
        for job in self.scheduler.waiting:
            if job.status is RequestStatus.RESERVING and not self._may_reserve_beside(job, computed):
                self._sender.withdraw(job.handoff, "a prompt that is computed goes first")
                job.move(RequestStatus.WAITING)

    # ---- inside: endings

    def _fail(self, job: PrefillJob, error: ServingError) -> None:
        self._outbox.failure(job.task.gateway_id, job.request_id, error)
        self._drop(job, RequestStatus.FAILED, error.message)

    def _drop(self, job: PrefillJob, status: RequestStatus, reason: str) -> None:
        self.scheduler.remove(job)
        job.move(status)
        self._forget(job, reason)

    def _forget(self, job: PrefillJob, reason: str) -> None:
        """Nothing of the job is left here afterwards."""
        self._sender.forget(job.handoff, reason)
        self._blocks.release(job.sequence.block_table)
        job.sequence.block_table = []
        del self._jobs[job.request_id]

    def _event(self, job: PrefillJob, stage: Stage, *, num_tokens: int = 0) -> None:
        self._outbox.event(job.task.gateway_id, job.request_id, stage, num_tokens=num_tokens)
