"""One worker: an engine, the two phases, a mailbox and the step loop that joins them. A plain class, no Ray.

A round of the loop:

    mailbox → phases (messages are taken between steps; inside one only that parts have arrived elsewhere)
    poll      deadlines, leases, ended handoffs, new offers
    plan      the decode phase its tokens first, then the prefill phase within what is left of the token budget
    submit    one ragged batch to the engine; KV of long prompts leaves while later layers compute
    collect   the results of the step before: an engine on a GPU computes one step while the next is prepared
    take      each phase its results; one message to each gateway; a load report when something changed

What this step need not wait for is sent to other workers when the device has something to do, and at the end.

A sequence may so be part of a step before the token of the step before is known here: the engine feeds it on the
device. What such a step computed for a sequence that turns out to have ended is dropped.

When there is nothing to run the loop sleeps in the mailbox, until a message comes that may lead to a step or the next
deadline is due.
"""

from __future__ import annotations

import logging
import queue
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from decode_workers.phase import DecodePhase
from engine.batch import DeviceLost, PendingStep, ScheduledBatch, ScheduledSequence
from engine.block_manager import BlockManager
from kv_transfer.link import ArrivedPart, WriteReceived
from kv_transfer.plan import WIRE_VERSION
from kv_transfer.prober import LinkProber, ProbeLink
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from phasewise.core.clock import Clock
from phasewise.core.errors import InternalError, Unavailable
from phasewise.core.links import WorkerLinks
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
from phasewise.core.ports import LoadPort, PeerPort
from phasewise.core.recent import RecentNames
from prefill_workers.phase import PrefillPhase
from workers.roles import may_prefill, may_reserve

logger = logging.getLogger(__name__)

_ACK_S = 0.0005  # how late a step's end may be noticed while parts wait
_UNUSABLE = "the model computed NaN or infinite logits for this request; its KV or the weights may be damaged"


class Runner(Protocol):
    """The engine as the loop sees it (engine/model_runner.py)."""

    @property
    def num_steps_ahead(self) -> int: ...

    def submit(
        self,
        batch: ScheduledBatch,
        on_layers_done: Callable[[int, int], None] | None = None,
        layers_per_group: int = 0,
    ) -> PendingStep: ...


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """What the loop needs of the configuration.

    With `is_alone`, a worker of one rank, KV leaves while layers compute; else right behind a step: several ranks take
    part in packing, and they are not between two layers together.
    """

    token_budget: int
    layers_per_part: int
    heartbeat_s: float
    report_interval_s: float = 0.05
    is_alone: bool = True


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a worker is made of (workers/build.py)."""

    runner: Runner
    blocks: BlockManager
    prefill: PrefillPhase
    decode: DecodePhase
    sender: KVSender
    receiver: KVReceiver
    prober: LinkProber
    outbox: Outbox
    peers: PeerOutbox


@dataclass(frozen=True, slots=True)
class _StepInFlight:
    """A step that the engine was given, and for whom."""

    step: PendingStep
    decodes: list[ScheduledSequence]
    prompts: list[ScheduledSequence]


class Worker:
    """`post` may be called from any thread; everything else belongs to the thread that calls `run`."""

    def __init__(
        self,
        info: WorkerInfo,
        parts: WorkerParts,
        peers: PeerPort,
        loads: LoadPort,
        clock: Clock,
        settings: LoopSettings,
    ) -> None:
        self.info = info
        self._parts = parts
        self._peers = peers
        self._loads = loads
        self._clock = clock
        self._settings = settings
        self._mailbox: queue.SimpleQueue[tuple[WorkerMessage | ProbeLink, ArrivedPart | None] | None]
        self._mailbox = queue.SimpleQueue()
        self._kept: deque[tuple[WorkerMessage | ProbeLink, ArrivedPart | None]] = deque()  # came inside a step
        self._role = info.role
        self._state = WorkerState.READY
        self._stopping = False
        self._in_flight: deque[_StepInFlight] = deque()
        self._num_steps = 0
        self._num_aborts = 0
        # Requests, transfers, workers and gateways that are over. Messages may overtake each other on the way here:
        # what comes after its own end must not begin.
        self._gone = RecentNames()
        self._num_reports = 0
        self._last_load: WorkerLoad | None = None
        self._last_report_s = float("-inf")

    # ---- from any thread

    def post(self, message: WorkerMessage | ProbeLink, arrived: ArrivedPart | None = None) -> None:
        """Puts a message, and what came with the header of a part, into the mailbox."""
        self._mailbox.put((message, arrived))

    def prepare_write(self, part: KVPart, wire: torch.Tensor) -> WriteReceived:
        """`PrepareWrite` (kv_transfer/link.py), for links."""
        return self._parts.receiver.prepare_write(part, wire)

    def links(self, peers: Sequence[WorkerInfo]) -> WorkerLinks:
        """The ways to other workers, as far as they are known."""
        facts = tuple(self._parts.sender.paths.facts(peer.worker_id, peer.kv_spec) for peer in peers)
        layers = self._settings.layers_per_part or self.info.kv_spec.num_layers
        return WorkerLinks(self.info.worker_id, WIRE_VERSION, layers, self._settings.token_budget, facts)

    def stop(self) -> None:
        """Makes `run` return after the round that it is in."""
        self._stopping = True
        self._mailbox.put(None)

    # ---- the loop's thread

    def run(self) -> None:
        """Rounds until `stop`."""
        while not self._stopping:
            if not self.round():
                self._report(idle=True)
                self._wait()
        self._state = WorkerState.STOPPED
        self._report(idle=True)

    def round(self) -> bool:
        """One round without waiting. True when there may be more to do at once."""
        self._drain_mailbox()
        parts = self._parts
        parts.prefill.poll()
        parts.decode.poll()
        parts.prober.poll()  # behind the parts of handoffs
        decodes = parts.decode.plan()
        prompts = parts.prefill.plan(self._settings.token_budget - len(decodes))
        has_work = bool(decodes or prompts)
        # Behind no new step, all are taken: the one after them may not find their newest tokens on the device.
        num_ahead = parts.runner.num_steps_ahead if has_work and self._submit(decodes, prompts) else 0
        parts.peers.flush_deferred()
        while len(self._in_flight) > num_ahead:
            has_work = True
            self._collect(self._in_flight.popleft())
        parts.outbox.flush()
        parts.peers.flush_deferred()
        self._report(idle=False)
        return has_work or parts.decode.has_made_room

    def load(self) -> WorkerLoad:
        """What this worker holds, right now."""
        parts = self._parts
        return WorkerLoad(
            worker_id=self.info.worker_id,
            role=self._role,
            state=self._state,
            num_waiting=len(parts.prefill.scheduler.waiting),
            num_running=len(parts.prefill.scheduler.running) + len(parts.decode.scheduler.running),
            num_preempted=len(parts.decode.scheduler.preempted),
            num_reservations=parts.decode.num_reservations,
            num_handoffs_out=parts.prefill.num_handoffs,
            waiting_prompt_tokens=parts.prefill.waiting_prompt_tokens,
            num_kv_blocks=parts.blocks.num_blocks,
            num_used_blocks=parts.blocks.num_used_blocks,
            num_cached_blocks=parts.blocks.num_cached_blocks,
            counters=self._counters(),
        )

    # ---- inside

    def _submit(self, decodes: list[ScheduledSequence], prompts: list[ScheduledSequence]) -> bool:
        """False when the engine broke on the step."""
        parts, layers_per_part = self._parts, self._settings.layers_per_part
        items = (*decodes, *prompts)

        done: list[tuple[int, int]] = []

        def on_layers_done(first_layer: int, num_layers: int) -> None:
            if self._settings.is_alone:
                parts.prefill.on_layers_done(prompts, first_layer, num_layers)
            else:
                done.append((first_layer, num_layers))
            parts.peers.flush_deferred()  # the device has something to do meanwhile

        try:
            step = parts.runner.submit(ScheduledBatch(items), on_layers_done if prompts else None, layers_per_part)
            for first_layer, num_layers in done:
                parts.prefill.on_layers_done(prompts, first_layer, num_layers)
        except DeviceLost:
            raise
        except Exception:
            self._fail_step(items)
            return False
        for item in items:
            item.sequence.begin_step(item.num_tokens)
        for item in prompts:
            parts.blocks.hash_ahead(item.sequence, item.sequence.num_scheduled_tokens)
        self._in_flight.append(_StepInFlight(step, decodes, prompts))
        return True

    def _collect(self, flight: _StepInFlight) -> None:
        parts, items = self._parts, (*flight.decodes, *flight.prompts)
        while parts.sender.is_held_back and not flight.step.is_done():
            self._take_ack_inside()
        try:
            result = flight.step.collect()
        except DeviceLost:
            raise
        except Exception:
            self._fail_step(items)
            return
        self._num_steps += 1
        entries = list(zip(items, result.tokens, result.prompt_logprobs, strict=True))
        self._fail([item for item, tokens, _ in entries if tokens is None], _UNUSABLE)
        num_decodes = len(flight.decodes)
        parts.decode.take((item, tokens[0]) for item, tokens, _ in entries[:num_decodes] if tokens is not None)
        for item, tokens, prompt_logprobs in entries[num_decodes:]:
            if tokens is not None:
                parts.prefill.take(item, tokens, prompt_logprobs)

    def _fail_step(self, items: Collection[ScheduledSequence]) -> None:
        """The engine broke on this batch: its requests end, the worker lives on."""
        logger.exception("a step failed", extra={"worker_id": self.info.worker_id})
        self._fail(items, "the engine failed on this request's batch; the worker's log has the cause")

    def _fail(self, items: Collection[ScheduledSequence], reason: str) -> None:
        """Ends the items' requests with InternalError, if they are here still.

        The KV of their earlier steps may be the cause, such as NaN: nobody else shall find it in the prefix cache.
        """
        for item in items:
            self._parts.blocks.unpublish(item.sequence.block_table)
        for request_id in {item.sequence.request_id for item in items}:
            error = InternalError(reason)
            self._parts.prefill.fail(request_id, error)
            self._parts.decode.fail(request_id, error)

    def _take_ack_inside(self) -> None:
        """Inside a step: takes the word that a part has arrived, whose room others wait for. All else waits."""
        try:
            entry = self._mailbox.get(timeout=_ACK_S)
        except queue.Empty:
            return
        if entry is None:
            return  # `stop`: seen behind this round
        if isinstance(entry[0], KVPartAck):
            self._dispatch(*entry)
        else:
            self._kept.append(entry)

    def _drain_mailbox(self) -> None:
        while self._kept:
            self._dispatch(*self._kept.popleft())
        while True:
            try:
                entry = self._mailbox.get_nowait()
            except queue.Empty:
                return
            if entry is not None:
                self._dispatch(*entry)

    def _wait(self) -> None:
        """Sleeps until a message comes that may lead to a step, a deadline is due, or a heartbeat is.

        Parts come one after the other: a round for each would keep the interpreter from the link's threads.
        """
        parts = self._parts
        due_s = min(
            parts.prefill.next_deadline_s(),
            parts.decode.next_deadline_s(),
            parts.sender.next_deadline_s(),
            parts.prober.next_deadline_s(),
            self._clock.now_s() + self._settings.heartbeat_s,
        )
        while (left_s := due_s - self._clock.now_s()) > 0:
            try:
                entry = self._mailbox.get(timeout=left_s)
            except queue.Empty:
                return
            if entry is None:
                return
            self._dispatch(*entry)
            if parts.receiver.incoming.has_ended or not isinstance(entry[0], KVPart | KVCommit):
                return

    def _dispatch(self, message: WorkerMessage | ProbeLink, arrived: ArrivedPart | None) -> None:
        parts = self._parts
        match message:
            case PrefillTask():
                self._on_task(message)
            case AbortRequest(request_id, sample_index):
                if sample_index is None:
                    self._gone.add(request_id)
                in_prefill = parts.prefill.on_abort(request_id, sample_index)
                in_decode = parts.decode.on_abort(request_id, sample_index)
                self._num_aborts += in_prefill or in_decode
            case KVOffer():
                self._on_offer(message)
            case KVAccepted():
                parts.prefill.on_accepted(message)
            case KVRefused():
                parts.prefill.on_refused(message)
            case KVFailed():
                parts.prefill.on_failed(message)
            case KVPart():
                assert arrived is not None
                parts.receiver.on_part(message, arrived)
            case KVPartAck(transfer_id, part_index):
                parts.prober.on_part_ack(transfer_id)
                parts.sender.on_part_ack(transfer_id, part_index)  # even a probe's: its buffer has come back
            case KVCommit():
                parts.receiver.incoming.on_commit(message)
            case KVAbort(transfer_id, reason):
                self._gone.add(transfer_id)
                parts.decode.on_transfer_abort(transfer_id, reason)
            case KVDone(transfer_id):
                parts.sender.on_done(transfer_id)
            case PeerLost(worker_id):
                self._gone.add(worker_id)
                parts.prefill.on_peer_lost(worker_id)
                parts.decode.on_peer_lost(worker_id)
                parts.prober.on_peer_lost(worker_id)
            case LinkLost():
                parts.sender.on_link_lost(message)
                parts.receiver.incoming.on_link_lost(message)
                parts.prober.on_link_lost(message)
            case ProbeLink():
                parts.prober.start(message)
            case GatewayLost(gateway_id):
                self._gone.add(gateway_id)
                parts.prefill.on_gateway_lost(gateway_id)
                parts.decode.on_gateway_lost(gateway_id)

    def _on_task(self, task: PrefillTask) -> None:
        if task.request.request_id in self._gone or task.gateway_id in self._gone:
            return  # its abort overtook it
        if may_prefill(self._role, self._state):
            self._parts.prefill.on_task(task)
        else:
            error = Unavailable(f"worker {self.info.worker_id} ({self._role.value}) takes no prompts now")
            self._parts.outbox.failure(task.gateway_id, task.request.request_id, error)

    def _on_offer(self, offer: KVOffer) -> None:
        names = (offer.transfer_id, offer.request.request_id, offer.sender, offer.gateway_id)
        if any(name in self._gone for name in names):
            self._peers.send(offer.sender, KVFailed(offer.transfer_id, "it was cancelled"))
        elif may_reserve(self._role, self._state):
            self._parts.decode.on_offer(offer)
        else:
            reason = f"worker {self.info.worker_id} ({self._role.value}) takes no handoffs now"
            self._peers.send(offer.sender, KVFailed(offer.transfer_id, reason))

    def _report(self, *, idle: bool) -> None:
        """Reports the load when it changed, at most every `report_interval_s` while busy, and as a heartbeat."""
        now_s = self._clock.now_s()
        since_s = now_s - self._last_report_s
        if not idle and since_s < self._settings.report_interval_s:
            return
        load = self.load()
        if load != self._last_load or since_s >= self._settings.heartbeat_s:
            self._last_load = load
            self._last_report_s = now_s
            self._num_reports += 1
            self._loads.report(replace(load, number=self._num_reports))

    def _counters(self) -> dict[str, float]:
        receiver = self._parts.receiver.incoming.counters
        return {
            **self._parts.prefill.counters,
            **self._parts.decode.counters,
            "steps": float(self._num_steps),
            "aborts": float(self._num_aborts),
            "handoff_bytes_out": float(self._parts.sender.num_bytes_sent),
            "handoff_bytes_in": float(receiver.num_bytes),
            "checksum_failures": float(receiver.checksum_failures),
            "late_parts": float(receiver.late_parts),
            "parts_stored": float(self._parts.sender.num_parts_stored),
            "links_lost": float(self._parts.sender.num_links_lost),
            "leases_expired": float(receiver.leases_expired),
        }
