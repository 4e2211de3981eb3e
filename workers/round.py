"""What a worker decides, round by round: messages in, a step to run, its result in, messages out. Pure.

A round, which workers/driver.py carries out:

    take      messages: between steps all of them, inside a step only that parts have arrived elsewhere
    begin     deadlines, leases, ended handoffs, new offers; then a step, or nothing
                  the decode phase plans its tokens first, the prefill phase within what is left of the token budget
    submitted the engine has the step; KV of long prompts has left while later layers computed (`layers_done`)
    end       each phase takes its results: of this step, or of the one before where the engine computes a step ahead
    report    the load, when it changed

A sequence may be part of a step before the token of the step before is known here: the engine feeds it on the device.
What such a step computed for a sequence that turns out to have ended is dropped.

A step on which the engine breaks (`failed`) is dropped, and so is the one that was built on it: the sequences are as
before. Its requests are tried again in halves (workers/bisection.py), and only the one that breaks a step alone ends.

The two phases meet here and know nothing of each other. The prefill phase plans with the number of the decode phase's
free seats, and returns the sequences that stay on this worker; the decode phase reserves beside those that will stay.
Both halves of handoffs and the probes of links meet here, too, so more than 15 of our modules are imported.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from decode_workers.phase import DecodePhase
from engine.batch import ScheduledBatch, ScheduledSequence, StepResult
from engine.block_manager import BlockManager
from kv_transfer.link import ArrivedPart
from kv_transfer.prober import LinkProber, ProbeLink
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from phasewise.core.clock import Clock
from phasewise.core.errors import InternalError, Unavailable
from phasewise.core.messages import (
    AbortRequest,
    GatewayLost,
    KVAbort,
    KVAccepted,
    KVCommit,
    KVDone,
    KVFailed,
    KVOffer,
    KVPart,
    KVPartAck,
    KVRefused,
    LinkLost,
    PeerLost,
    PrefillTask,
    WorkerInfo,
    WorkerLoad,
    WorkerMessage,
)
from phasewise.core.outbox import Outbox, PeerOutbox
from phasewise.core.placement import WorkerState
from phasewise.core.ports import LoadPort
from phasewise.core.recent import RecentNames
from prefill_workers.phase import PrefillPhase
from workers.bisection import Bisection

UNUSABLE = "the model computed NaN or infinite logits for this request; its KV or the weights may be damaged"
BROKEN = "the engine failed on this request, tried again alone; the worker's log has the cause"


@dataclass(frozen=True, slots=True)
class RoundLimits:
    """What a round needs of the configuration."""

    token_budget: int
    heartbeat_s: float
    report_interval_s: float = 0.05


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a worker's rounds are made of (workers/assemble.py)."""

    blocks: BlockManager
    prefill: PrefillPhase
    decode: DecodePhase
    sender: KVSender
    receiver: KVReceiver
    prober: LinkProber
    outbox: Outbox
    peers: PeerOutbox


@dataclass(frozen=True, slots=True)
class Step:
    """A batch for the engine: decodes first, then prompts."""

    decodes: list[ScheduledSequence]
    prompts: list[ScheduledSequence]

    @property
    def items(self) -> tuple[ScheduledSequence, ...]:
        return (*self.decodes, *self.prompts)

    @property
    def batch(self) -> ScheduledBatch:
        return ScheduledBatch(self.items)


@dataclass(frozen=True, slots=True)
class _Over:
    """What has ended. Messages may overtake each other on the way here: what comes after its own end must not begin."""

    requests: RecentNames = field(default_factory=RecentNames)
    transfers: RecentNames = field(default_factory=RecentNames)
    workers: RecentNames = field(default_factory=RecentNames)
    gateways: RecentNames = field(default_factory=RecentNames)


class WorkerRound:
    """The decisions of one worker. Used by one thread; nothing here waits."""

    def __init__(
        self,
        info: WorkerInfo,
        parts: WorkerParts,
        loads: LoadPort,
        clock: Clock,
        limits: RoundLimits,
    ) -> None:
        self.info = info
        self.parts = parts
        self.limits = limits
        self._state = WorkerState.READY
        self._loads = loads
        self._clock = clock
        self._over = _Over()
        self._suspects = Bisection()
        self._num_steps = 0
        self._num_broken_steps = 0
        self._num_aborts = 0
        self._num_reports = 0
        self._last_load: WorkerLoad | None = None
        self._last_report_s = float("-inf")

    # ---- messages

    def take(self, message: WorkerMessage | ProbeLink, arrived: ArrivedPart | None = None) -> bool:
        """Takes a message, and what came with the header of a part. Whether a round may have something to do now.

        Parts come one after the other, and the last of a handoff, or its commit, is the one that leads to something.
        """
        parts = self.parts
        match message:
            case PrefillTask():
                self._on_task(message)
            case KVOffer():
                self._on_offer(message)
            case KVAccepted():
                parts.prefill.on_accepted(message)
            case KVPart():
                assert arrived is not None
                parts.receiver.on_part(message, arrived)
                return parts.receiver.incoming.has_ended
            case KVPartAck(transfer_id, part_index):
                parts.prober.on_part_ack(transfer_id)
                parts.sender.on_part_ack(transfer_id, part_index)  # even a probe's: its buffer has come back
            case KVCommit():
                parts.receiver.incoming.on_commit(message)
                return parts.receiver.incoming.has_ended
            case KVDone(transfer_id):
                parts.sender.outgoing.on_done(transfer_id)
            case ProbeLink():
                parts.prober.start(message)
            case _:
                self._on_end(message)
        return True

    # ---- a step

    def begin(self) -> Step | None:
        """Ends what is over, offers and reserves, and plans the next step; None when there is nothing to compute."""
        if self._suspects.is_trying:
            return None  # the next step depends on the result
        parts = self.parts
        parts.prefill.poll()
        parts.decode.poll(parts.prefill.scheduler.num_staying)
        parts.prober.poll()  # behind the parts of handoffs
        while (trial := self._suspects.next_trial()) is not None:
            if step := self._plan(trial.token_budget, trial.requests):
                self._suspects.begin()
                return step
            self._suspects.passed()  # nothing of it is left to compute
        return self._plan(self.limits.token_budget, None)

    def layers_done(self, step: Step, first_layer: int, num_layers: int) -> None:
        """The KV of these layers is in the cache, for all prompts of the step."""
        self.parts.prefill.on_layers_done(step.prompts, first_layer, num_layers)

    def submitted(self, step: Step) -> None:
        """The engine computes the step: the next one is planned behind it."""
        for item in step.decodes:
            item.sequence.begin_step(1)
        for item in step.prompts:
            item.sequence.begin_step(item.num_tokens)
            self.parts.blocks.hash_ahead(item.sequence, item.sequence.num_scheduled_tokens)

    def end(self, step: Step, result: StepResult) -> None:
        """Takes the results of the oldest step that was submitted. What has no usable logits fails."""
        parts, num_decodes = self.parts, len(step.decodes)
        self._num_steps += 1
        if self._suspects.is_trying:
            self._suspects.passed()
        if None in result.tokens:
            self._fail_unusable(step, result)
        parts.decode.take(step.decodes, result.tokens[:num_decodes])
        of_prompts = result.tokens[num_decodes:], result.prompt_logprobs[num_decodes:]
        for item, tokens, prompt_logprobs in zip(step.prompts, *of_prompts, strict=True):
            if tokens is not None and (staying := parts.prefill.take(item, tokens, prompt_logprobs)):
                parts.decode.adopt(*staying)

    def failed(self, step: Step, dropped: Sequence[Step] = ()) -> str | None:
        """The engine broke on the step: its requests are tried again. Returns the id of the one that ends with that.

        `dropped`: the steps in flight whose results are not taken, this one and what was built on it; empty where it
        could not be submitted.
        """
        self._num_broken_steps += 1
        for item in (item for one in dropped for item in one.items):
            item.sequence.revoke_step(item.num_tokens)
        for one in (step, *dropped):
            self.parts.prefill.revoke(one.prompts)
        num_tokens: dict[str, int] = {}
        for item in step.items:
            request_id = item.sequence.request_id
            num_tokens[request_id] = num_tokens.get(request_id, 0) + item.num_tokens
        cause = self._suspects.broke(num_tokens)
        if cause is not None:
            self._fail([item for item in step.items if item.sequence.request_id == cause], BROKEN)
        return cause

    @property
    def is_held_back(self) -> bool:
        """Whether computed KV waits for word that parts have arrived: take that inside a step, too."""
        return self.parts.sender.outgoing.is_held_back

    @property
    def has_more(self) -> bool:
        """Whether another round may have something to do at once although this one had no step."""
        return self.parts.decode.has_made_room

    def next_deadline_s(self) -> float:
        """When a round has something to do, if no message comes before: at the latest with the next heartbeat."""
        parts = self.parts
        return min(
            parts.prefill.next_deadline_s(),
            parts.decode.next_deadline_s(),
            parts.sender.outgoing.next_deadline_s(),
            parts.prober.next_deadline_s(),
            self._clock.now_s() + self.limits.heartbeat_s,
        )

    def stop(self) -> None:
        """Reports that no round follows."""
        self._state = WorkerState.STOPPED
        self.report(idle=True)

    # ---- the load

    def report(self, *, idle: bool) -> None:
        """Reports the load when it changed, at most every `report_interval_s` while busy, and as a heartbeat."""
        now_s = self._clock.now_s()
        since_s = now_s - self._last_report_s
        if not idle and since_s < self.limits.report_interval_s:
            return
        load = self.load()
        if load != self._last_load or since_s >= self.limits.heartbeat_s:
            self._last_load = load
            self._last_report_s = now_s
            self._num_reports += 1
            self._loads.report(replace(load, number=self._num_reports))

    def load(self) -> WorkerLoad:
        """What this worker holds, right now."""
        parts, prompts, decodes = self.parts, self.parts.prefill.scheduler, self.parts.decode.scheduler
        return WorkerLoad(
            worker_id=self.info.worker_id,
            role=self.info.role,
            state=self._state,
            num_waiting=len(prompts.waiting),
            num_running=len(prompts.running) + len(decodes.running),
            num_preempted=len(decodes.preempted),
            num_reservations=parts.decode.num_reservations,
            num_handoffs_out=len(prompts.handing_off),
            waiting_prompt_tokens=prompts.num_waiting_tokens,
            num_kv_blocks=parts.blocks.num_blocks,
            num_used_blocks=parts.blocks.num_used_blocks,
            num_cached_blocks=parts.blocks.num_cached_blocks,
            counters=self._counters(),
        )

    # ---- inside

    def _plan(self, token_budget: int, only: Collection[str] | None) -> Step | None:
        """A step of what is ready, or of these requests `only`."""
        parts = self.parts
        decodes = parts.decode.plan(only)
        prompts = parts.prefill.plan(token_budget - len(decodes), parts.decode.num_free_seats, only)
        return Step(decodes, prompts) if decodes or prompts else None

    def _on_task(self, task: PrefillTask) -> None:
        if task.request.request_id in self._over.requests or task.gateway_id in self._over.gateways:
            return  # its abort overtook it
        if self._state is WorkerState.READY and self.info.role.can_prefill:
            self.parts.prefill.on_task(task)
        else:
            error = Unavailable(f"worker {self.info.worker_id} ({self.info.role.value}) takes no prompts now")
            self.parts.outbox.failure(task.gateway_id, task.request.request_id, error)

    def _on_offer(self, offer: KVOffer) -> None:
        over = self._over
        is_over = offer.transfer_id in over.transfers or offer.sender in over.workers
        if is_over or offer.request.request_id in over.requests or offer.gateway_id in over.gateways:
            self.parts.peers.send(offer.sender, KVFailed(offer.transfer_id, "it was cancelled"))
        elif self._state is WorkerState.READY and self.info.role.can_decode:
            self.parts.decode.on_offer(offer)
        else:
            reason = f"worker {self.info.worker_id} ({self.info.role.value}) takes no handoffs now"
            self.parts.peers.send(offer.sender, KVFailed(offer.transfer_id, reason))

    def _on_end(self, message: WorkerMessage) -> None:
        """A request, a handoff, a link, a worker or a gateway has ended before its time."""
        parts, over = self.parts, self._over
        match message:
            case AbortRequest(request_id, sample_index):
                if sample_index is None:
                    over.requests.add(request_id)
                in_prefill = parts.prefill.on_abort(request_id, sample_index)
                in_decode = parts.decode.on_abort(request_id, sample_index)
                self._num_aborts += in_prefill or in_decode
            case KVRefused():
                parts.prefill.on_refused(message)
            case KVFailed(transfer_id, reason):
                parts.sender.outgoing.on_failed(transfer_id, reason)  # another attempt may succeed
            case KVAbort(transfer_id, reason):
                over.transfers.add(transfer_id)
                parts.decode.on_transfer_abort(transfer_id, reason)
            case LinkLost():
                parts.sender.on_link_lost(message)
                parts.receiver.incoming.on_link_lost(message)
                parts.prober.on_link_lost(message)
            case PeerLost(worker_id):
                over.workers.add(worker_id)
                parts.prefill.on_peer_lost(worker_id)
                parts.decode.on_peer_lost(worker_id)
                parts.prober.on_peer_lost(worker_id)
            case GatewayLost(gateway_id):
                over.gateways.add(gateway_id)
                parts.prefill.on_gateway_lost(gateway_id)
                parts.decode.on_gateway_lost(gateway_id)

    def _fail_unusable(self, step: Step, result: StepResult) -> None:
        entries = zip(step.items, result.tokens, strict=True)
        self._fail([item for item, tokens in entries if tokens is None], UNUSABLE)

    def _fail(self, items: Collection[ScheduledSequence], reason: str) -> None:
        """Ends the items' requests with InternalError, if they are here still.

        The KV of their earlier steps may be the cause, such as NaN: nobody else shall find it in the prefix cache.
        """
        for item in items:
            self.parts.blocks.unpublish(item.sequence.block_table)
        error = InternalError(reason)
        for request_id in {item.sequence.request_id for item in items}:
            self.parts.prefill.fail(request_id, error)
            self.parts.decode.fail(request_id, error)

    def _counters(self) -> dict[str, float]:
        receiver, sender = self.parts.receiver.incoming.counters, self.parts.sender
        return {
            **self.parts.prefill.counters,
            **self.parts.decode.counters,
            "steps": float(self._num_steps),
            "broken_steps": float(self._num_broken_steps),
            "aborts": float(self._num_aborts),
            "handoff_bytes_out": float(sender.num_bytes_sent),
            "handoff_bytes_in": float(receiver.num_bytes),
            "checksum_failures": float(receiver.checksum_failures),
            "late_parts": float(receiver.late_parts),
            "parts_stored": float(sender.num_parts_stored),
            "links_lost": float(sender.num_links_lost),
            "leases_expired": float(receiver.leases_expired),
        }
