"""A worker in virtual time: the rounds of a real one (workers/round.py), driven by events instead of a thread.

a message comes   it is taken when no step runs, else behind the step; only that a part has arrived is taken inside
a step            takes as long as the engine says; groups of layers are announced one after the other meanwhile
nothing to run    the worker sleeps until a message comes or the next deadline is due
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from decode_workers.joining import JoiningRules
from kv_transfer.paths import SendLimits
from workers.round import RoundLimits, Step, WorkerParts, WorkerRound

from decode_workers.phase import DecodePhase
from decode_workers.scheduler import DecodeScheduler
from engine.block_manager import BlockManager
from kv_transfer.link import ArrivedPart
from kv_transfer.prober import LinkProber
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import KVPart, KVPartAck, WorkerInfo, WorkerLoad, WorkerMessage, WorkerOutput
from phasewise.core.outbox import Outbox, PeerOutbox
from phasewise.core.placement import WorkerId, WorkerRole
from phasewise.core.profile import DeviceProfile
from prefill_workers.phase import PrefillPhase
from prefill_workers.scheduler import PrefillScheduler
from tests.virtual_cluster.cache import VirtualCache
from tests.virtual_cluster.clock import VirtualTime
from tests.virtual_cluster.engine import ScriptedEngine
from tests.virtual_cluster.link import LinkSpeed, Receive, VirtualLink
from tests.virtual_cluster.network import Network

CONTROL_PLANE = "control-plane"


@dataclass(frozen=True, slots=True)
class WorkerShape:
    """What all workers of a virtual cluster have in common."""

    spec: KVCacheSpec
    profile: DeviceProfile
    num_blocks: int = 2048
    num_swap_blocks: int = 2048
    token_budget: int = 2048
    max_running: int = 256
    max_waiting: int = 2000
    layers_per_part: int = 8
    window_bytes: int = 2**28
    handoff_timeout_s: float = 30.0
    heartbeat_s: float = 1.0
    link: LinkSpeed = field(default_factory=LinkSpeed)


class VirtualWorker:
    """One worker. `receive` takes what the network brings; `receivers` has every worker that links reach."""

    def __init__(
        self,
        worker_id: WorkerId,
        role: WorkerRole,
        shape: WorkerShape,
        seed: int,
        time: VirtualTime,
        network: Network,
        receivers: dict[WorkerId, Receive],
    ) -> None:
        spec, num_blocks = shape.spec, shape.num_blocks
        self.info = WorkerInfo(
            worker_id,
            role,
            0,
            "",
            "virtual",
            spec.dtype,
            1,
            spec,
            num_blocks,
            num_blocks * spec.block_size,
            shape.profile,
        )
        self.blocks = BlockManager(num_blocks, spec.block_size)
        self.link = VirtualLink(worker_id, time, network, receivers, self.receive, shape.link)
        self._time = time
        self._network = network
        self._layers_per_part = shape.layers_per_part
        cache = VirtualCache(spec, num_blocks, shape.num_swap_blocks)
        self._engine = ScriptedEngine(shape.profile, cache, seed)
        self.rounds = self._make_rounds(shape, cache)
        self._kept: deque[tuple[WorkerMessage, ArrivedPart | None]] = deque()
        self._is_computing = False
        self._is_lost = False
        self._next_wake = 0
        receivers[worker_id] = self.receive
        network.join(worker_id, self.receive)
        network.join(f"link of {worker_id}", self.link.on_ack)
        self._plan_wake(time.now_s())

    def _make_rounds(self, shape: WorkerShape, cache: VirtualCache) -> WorkerRound:
        """Wires the parts of a worker as workers/assemble.py does."""
        worker_id, blocks, time = self.info.worker_id, self.blocks, self._time
        num_groups = math.ceil(shape.spec.num_layers / shape.layers_per_part)
        limits = SendLimits(
            shape.window_bytes, shape.handoff_timeout_s, num_groups=num_groups, chunk_tokens=shape.token_budget
        )
        peers, outbox = PeerOutbox(self), Outbox(worker_id, self, time)
        sender = KVSender(worker_id, cache, self.link, peers, time, limits)
        receiver = KVReceiver(cache, peers, time)
        prompts = PrefillScheduler(blocks, lookahead_tokens=2 * shape.token_budget)
        rules = JoiningRules(shape.num_blocks, shape.spec.block_size, shape.max_running, headroom=0.05)
        running = DecodeScheduler(blocks, shape.max_running)
        decode = DecodePhase(blocks, running, rules, receiver, cache, peers, outbox, time, prompts.num_staying)
        prefill = PrefillPhase(blocks, prompts, sender, outbox, time, shape.max_waiting, decode.adopt, decode.has_room)
        prober = LinkProber(worker_id, cache, self.link, time)
        parts = WorkerParts(blocks, prefill, decode, sender, receiver, prober, outbox, peers)
        return WorkerRound(self.info, parts, peers, self, time, RoundLimits(shape.token_budget, shape.heartbeat_s))

    # ---- ports of the round

    def send(self, worker_id: WorkerId, message: WorkerMessage) -> None:
        about = getattr(message, "transfer_id", "") or getattr(message, "request_id", "")
        self._network.send(worker_id, message, f"{self.info.worker_id} {about}")

    def deliver(self, gateway_id: str, output: WorkerOutput) -> None:
        self._network.send(gateway_id, output, self.info.worker_id)

    def report(self, load: WorkerLoad) -> None:
        self._network.send(CONTROL_PLANE, load, self.info.worker_id)

    # ---- messages

    def receive(self, message: WorkerMessage, arrived: ArrivedPart | None = None) -> None:
        """Takes a message, from the network or from the link."""
        if self._is_lost:
            return
        if not self._is_computing:
            if self.rounds.take(message, arrived):
                self._plan_wake(self._time.now_s())
        elif isinstance(message, KVPartAck) and self.rounds.is_held_back:
            self.rounds.take(message)
        else:
            self._kept.append((message, arrived))

    def receive_part(self, part: KVPart, arrived: ArrivedPart) -> None:
        self.receive(part, arrived)

    def lose(self) -> None:
        """The process is gone: it hears nothing, and says nothing more."""
        self._is_lost = True
        self._network.lose(self.info.worker_id)
        self._network.lose(f"link of {self.info.worker_id}")

    # ---- rounds

    def _plan_wake(self, at_s: float) -> None:
        """Of several wakes that are planned only the newest counts."""
        self._next_wake += 1
        number = self._next_wake

        def wake() -> None:
            if number == self._next_wake and not self._is_computing and not self._is_lost:
                self._begin()

        self._time.at(at_s, f"wake {self.info.worker_id}", wake)

    def _begin(self) -> None:
        while self._kept:
            self.rounds.take(*self._kept.popleft())
        step = self.rounds.begin()
        if step is not None:
            self._compute(step)
        self._flush()
        if step is None:
            self.rounds.report(idle=True)
            has_more = self.rounds.has_more
            self._plan_wake(self._time.now_s() if has_more else self.rounds.next_deadline_s())

    def _compute(self, step: Step) -> None:
        self._is_computing = True
        name, num_layers = self.info.worker_id, self.info.kv_spec.num_layers
        start_s, step_s = self._time.now_s(), self._engine.step_s(step.batch)
        result = self._engine.run(step.batch)
        self.rounds.submitted(step)
        for first in range(0, num_layers, self._layers_per_part) if step.prompts else ():
            count = min(self._layers_per_part, num_layers - first)
            self._time.at(
                start_s + step_s * (first + count) / num_layers,
                f"layers {first} {name}",
                lambda first=first, count=count: self._announce(step, first, count),
            )
        self._time.at(start_s + step_s, f"step {len(step.batch.items)} {name}", lambda: self._end(step, result))

    def _announce(self, step: Step, first_layer: int, num_layers: int) -> None:
        if not self._is_lost:
            self.rounds.layers_done(step, first_layer, num_layers)
            self._flush()

    def _end(self, step: Step, result: Any) -> None:
        if self._is_lost:
            return
        self._is_computing = False
        self.rounds.end(step, result)
        self._flush()
        self.rounds.report(idle=False)
        self._begin()

    def _flush(self) -> None:
        self.rounds.parts.outbox.flush()
        self.rounds.parts.peers.flush_deferred()
