"""The decode phase of a worker: KV in, tokens out.

One request's life here:

    KVOffer → waits for room (decode_workers/joining.py)
      → reserved: blocks set aside, parts come in (kv_transfer/receiver.py)
      → commit, all parts right: one sequence per living sample joins the running batch → one token a step
      → ends with a reason: blocks released, full ones remembered by the prefix cache

Sequences of a mixed worker come in through `adopt`, with their blocks. A preempted sequence's KV waits in host memory.

More than 15 of our modules are imported: incoming handoffs, blocks, swap space and the running batch meet here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Sequence as Seq
from typing import Protocol

from decode_workers.joining import JoiningRules, Occupancy, ReservationQueue
from decode_workers.scheduler import DecodeJob, DecodePlan, DecodeScheduler
from engine.batch import ScheduledSequence
from engine.block_manager import BlockManager
from engine.sequence import Sequence
from kv_transfer.incoming import Reservation, refusal
from kv_transfer.receiver import KVReceiver
from kv_transfer.state import ReceiveStatus
from phasewise.core.clock import Clock
from phasewise.core.errors import DeadlineExceeded, Overloaded, ServingError
from phasewise.core.lifecycle import RequestStatus, Stage
from phasewise.core.messages import KVDone, KVFailed, KVOffer, KVRefused, NewTokens
from phasewise.core.outbox import Outbox
from phasewise.core.placement import WorkerId
from phasewise.core.ports import PeerPort
from phasewise.core.recent import RecentNames
from phasewise.core.request import SampledToken


class SwapSpace(Protocol):
    """Places for blocks in host memory (engine/kv_cache.py)."""

    @property
    def num_free(self) -> int: ...

    def give_back(self, places: Iterable[int]) -> None: ...


class Cache(Protocol):
    """The cache's moves between its blocks and host memory (engine/kv_cache.py)."""

    @property
    def swap(self) -> SwapSpace: ...

    def copy_block(self, source: int, target: int) -> None: ...

    def copy_out(self, blocks: list[int]) -> list[int]: ...

    def copy_in(self, places: list[int], blocks: list[int]) -> None: ...


class DecodePhase:
    """Plans decode steps and takes their results. Used by the step loop's thread alone."""

    def __init__(
        self,
        blocks: BlockManager,
        rules: JoiningRules,
        receiver: KVReceiver,
        cache: Cache,
        peers: PeerPort,
        outbox: Outbox,
        clock: Clock,
    ) -> None:
        self._blocks = blocks
        self.scheduler = DecodeScheduler(blocks, rules.max_running)
        self._rules = rules
        self._offers = ReservationQueue(rules)
        self._receiver = receiver
        self._incoming = receiver.incoming
        self._cache = cache
        self._peers = peers
        self._outbox = outbox
        self._clock = clock
        self._swapped: dict[DecodeJob, list[int]] = {}  # the places of its blocks
        self._first_deadline_s = float("inf")  # no job's is before
        self._handed_in = RecentNames()
        self.has_made_room = False  # the last plan preempted somebody, who may come back at once
        self.counters: dict[str, float] = dict.fromkeys(("output_tokens", "preemptions", "handoffs_in"), 0.0)

    # ---- messages

    def on_offer(self, offer: KVOffer) -> None:
        """An offer that can never be taken is refused at once; others wait for room."""
        if offer.request.request_id in self._handed_in:  # only our word that it came was lost
            self._peers.send(offer.sender, KVDone(offer.transfer_id))
            return
        reason = refusal(offer, self._incoming.spec) or self._rules.impossible(offer)
        if reason:
            self._peers.send(offer.sender, KVRefused(offer.transfer_id, reason))
        else:
            self._offers.add(offer, self._clock.now_s() + offer.time_left_s)

    def on_transfer_abort(self, transfer_id: str, reason: str) -> None:
        self._offers.remove(lambda waiting: waiting.offer.transfer_id == transfer_id)
        self._incoming.on_abort(transfer_id, reason)

    def on_abort(self, request_id: str, sample_index: int | None) -> bool:
        """Forgets a request, or one sample. True when something of it was here."""
        self._settle()
        found = False
        for job in list(self.scheduler.jobs()):
            same = job.sequence.request_id == request_id
            if same and sample_index in (None, job.sequence.sample_index):
                self._end(job, RequestStatus.CANCELLED)
                found = True
        for reservation in self._incoming.reservations:
            request = reservation.offer.request
            if request.request_id != request_id:
                continue
            found = True
            if sample_index is not None:
                reservation.dropped_samples.add(sample_index)
            if sample_index is None or len(reservation.dropped_samples) == request.sampling.n:
                self._incoming.fail(reservation.offer.transfer_id, "the request was cancelled")
        if sample_index is None:
            for offer in self._offers.remove(lambda waiting: waiting.offer.request.request_id == request_id):
                self._peers.send(offer.sender, KVRefused(offer.transfer_id, "the request was cancelled"))
                found = True
        return found

    def on_peer_lost(self, worker_id: WorkerId) -> None:
        self._offers.remove(lambda waiting: waiting.offer.sender == worker_id)
        self._incoming.on_peer_lost(worker_id)

    def on_gateway_lost(self, gateway_id: str) -> None:
        self._settle()
        self._offers.remove(lambda waiting: waiting.offer.gateway_id == gateway_id)
        for job in list(self.scheduler.jobs()):
            if job.gateway_id == gateway_id:
                self._end(job, RequestStatus.CANCELLED)
        for reservation in self._incoming.reservations:
            if reservation.offer.gateway_id == gateway_id:
                self._incoming.fail(reservation.offer.transfer_id, "its gateway was lost")

    def fail(self, request_id: str, error: ServingError) -> None:
        """Ends all samples of a request with an error, if any decodes here: a request fails as a whole."""
        jobs = [job for job in self.scheduler.jobs() if job.sequence.request_id == request_id]
        if jobs:
            self._outbox.failure(jobs[0].gateway_id, request_id, error)
        for job in jobs:
            self._end(job, RequestStatus.FAILED)

    def adopt(self, sequences: Iterable[Sequence], gateway_id: str, deadline_s: float) -> None:
        """Takes sequences into the running batch. They bring their references to this worker's blocks."""
        for sequence in sequences:
            self.scheduler.add(sequence, gateway_id, deadline_s)
        self._first_deadline_s = min(self._first_deadline_s, deadline_s)

    # ---- once a step

    def poll(self, num_staying: int) -> None:
        """Deadlines, leases, ended handoffs, waiting offers: before a step is planned.

        `num_staying`: samples of prompts that run on this worker now and are to be adopted.
        """
        now_s = self._clock.now_s()
        if self._first_deadline_s <= now_s:
            self._fail_overdue(now_s)
        for offer in self._offers.remove(lambda waiting: waiting.deadline_s <= now_s):
            self._peers.send(offer.sender, KVFailed(offer.transfer_id, "no room came free in the request's time"))
        self._incoming.expire()
        self._settle()
        while self._offers and (waiting := self._offers.next_acceptable(self._occupancy(num_staying))):
            # What the prefix cache has of the prompt need not travel.
            prompt = Sequence.of_prompt(waiting.offer.request)
            has_room = self._blocks.allocate_prompt(prompt)
            assert has_room, "the joining rules have counted the blocks"
            cached = prompt.num_computed_tokens
            reservation = self._receiver.accept(waiting.offer, prompt.block_table, cached, waiting.deadline_s)
            # Now, while the sender computes or packs, and not when all has come: it takes long.
            self._blocks.hash_ahead(prompt, prompt.num_tokens)
            reservation.block_hashes = prompt.block_hashes

    def plan(self, only: Collection[str] | None) -> list[ScheduledSequence]:
        """The next step's decodes; carries out the preemptions and copies that they need.

        `only`: the requests that may take part; None for all.
        """
        plan = self.scheduler.schedule(only)
        self.has_made_room = bool(plan.swap_out)
        if plan.swap_out or plan.copies or plan.swap_in:
            self._carry_out(plan)
        # A request that failed for want of swap space may have taken planned samples with it.
        return [ScheduledSequence(job.sequence, 1, 1) for job in plan.jobs if job.status is RequestStatus.DECODING]

    def take(self, items: Seq[ScheduledSequence], results: Seq[tuple[SampledToken, ...] | None]) -> None:
        """Takes the tokens of one step, as StepResult.tokens. What ended while the step ran leaves no trace."""
        job_of, num_tokens = self.scheduler.job_of, 0
        for item, tokens in zip(items, results, strict=True):
            sequence = item.sequence
            job = job_of.get(sequence)
            if job is None or tokens is None:
                continue
            num_tokens += 1
            sequence.end_step(1)
            sequence.token_ids.append(tokens[0].token_id)
            if job.status is RequestStatus.DECODING:  # else it was preempted meanwhile, and has no blocks
                self._blocks.publish(sequence)
            if not job.has_stepped:
                job.has_stepped = True
                self._outbox.event(job.gateway_id, sequence.request_id, Stage.DECODE_START)
            reason, position = sequence.finish_reason(), sequence.num_output_tokens - 1
            new = NewTokens(sequence.request_id, sequence.sample_index, position, tokens, reason)
            self._outbox.tokens(job.gateway_id, new)
            if reason is not None:
                self._end(job, RequestStatus.FINISHED)
        self.counters["output_tokens"] += num_tokens

    @property
    def num_free_seats(self) -> int:
        """How many samples may join the batch: those of prompts that run on this worker now are not taken off."""
        return self._rules.num_free_seats(self._occupancy(num_staying=0))

    @property
    def num_reservations(self) -> int:
        return self._incoming.num_reservations + len(self._offers)

    def next_deadline_s(self) -> float:
        jobs = min((job.deadline_s for job in self.scheduler.jobs()), default=float("inf"))
        return min(jobs, self._offers.next_deadline_s(), self._incoming.next_deadline_s())

    # ---- inside

    def _settle(self) -> None:
        """Takes over handoffs that have ended. Before an abort too, which must find them among the sequences."""
        for reservation in self._incoming.pop_ended():
            # The first of two offers may become whole beside the second, when its abort is still on its way.
            is_first = reservation.offer.request.request_id not in self._handed_in
            if is_first and reservation.status is ReceiveStatus.DONE:
                self._begin(reservation)
            self._blocks.release(reservation.block_table)

    def _occupancy(self, num_staying: int) -> Occupancy:
        num_reserved = sum(r.offer.request.sampling.n for r in self._incoming.reservations)
        return Occupancy(
            self._blocks.num_free_blocks,
            len(self.scheduler.running),
            len(self.scheduler.preempted),
            num_reserved + num_staying,
        )

    def _begin(self, reservation: Reservation) -> None:
        """A handoff is whole: its samples join the running batch, sharing the prompt's blocks."""
        commit, request, gateway_id = reservation.commit, reservation.offer.request, reservation.offer.gateway_id
        assert commit is not None
        self.counters["handoffs_in"] += 1
        self._handed_in.add(request.request_id)
        for again in self._offers.remove(lambda waiting: waiting.offer.request.request_id == request.request_id):
            self._peers.send(again.sender, KVDone(again.transfer_id))
        duration_s = max(self._clock.unix_s() - commit.started_unix_s, 0.0)
        self._outbox.event(
            gateway_id, request.request_id, Stage.HANDOFF_END, num_bytes=reservation.num_bytes, duration_s=duration_s
        )
        prompt = Sequence.of_prompt(request)
        prompt.num_computed_tokens = commit.num_tokens
        prompt.block_table, prompt.block_hashes = reservation.block_table, reservation.block_hashes
        samples, dropped = enumerate(commit.first_tokens, request.sample_index), reservation.dropped_samples
        sequences = [prompt.fork(i, token) for i, token in samples if token is not None and i not in dropped]
        for sequence in sequences:
            self._blocks.share(sequence.block_table)
            self._blocks.publish(sequence)
        self.adopt(sequences, gateway_id, reservation.lease_end_s)

    def _carry_out(self, plan: DecodePlan) -> None:
        for job, blocks in plan.swap_out:
            if job.status is not RequestStatus.PREEMPTED:
                continue  # its request failed a moment ago, in this loop
            self.counters["preemptions"] += 1
            if len(blocks) > self._cache.swap.num_free:
                error = Overloaded("KV blocks and swap space are used up", retry_after_s=5.0)
                self.fail(job.sequence.request_id, error)
                continue
            self._swapped[job] = self._cache.copy_out(blocks)
            self._outbox.event(job.gateway_id, job.sequence.request_id, Stage.PREEMPTED)
        for source, target in plan.copies:
            self._cache.copy_block(source, target)
        for job in plan.swap_in:
            self._cache.copy_in(self._swapped.pop(job), job.sequence.block_table[: job.num_swapped_blocks])
            self._outbox.event(job.gateway_id, job.sequence.request_id, Stage.RESUMED)

    def _fail_overdue(self, now_s: float) -> None:
        for job in list(self.scheduler.jobs()):
            if job.deadline_s <= now_s:
                self.fail(job.sequence.request_id, DeadlineExceeded("the request's deadline passed during decode"))
        self._first_deadline_s = min((job.deadline_s for job in self.scheduler.jobs()), default=float("inf"))

    def _end(self, job: DecodeJob, status: RequestStatus) -> None:
        """Nothing of the sample is left here afterwards."""
        self.scheduler.remove(job)
        job.move(status)
        self._cache.swap.give_back(self._swapped.pop(job, ()))
