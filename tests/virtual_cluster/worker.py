"""A worker in virtual time: the rounds of a real one (workers/round.py), driven by events instead of a thread.

a message comes   it is taken when no step runs, else behind the step; only that a part has arrived is taken inside
a step            takes as long as the engine says; groups of layers are announced one after the other meanwhile
nothing to run    the worker sleeps until a message comes or the next deadline is due
"""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from engine.batch import StepResult
from engine.block_manager import BlockManager
from kv_transfer.link import ArrivedPart
from phasewise.core.config import ServingConfig
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import KVPartAck, WorkerInfo, WorkerLoad, WorkerMessage, WorkerOutput
from phasewise.core.placement import WorkerId, WorkerRole
from phasewise.core.profile import DeviceProfile
from tests.virtual_cluster.cache import VirtualCache
from tests.virtual_cluster.clock import VirtualTime
from tests.virtual_cluster.engine import ScriptedEngine
from tests.virtual_cluster.link import LinkSpeed, Receive, VirtualLink
from tests.virtual_cluster.network import Network, about
from workers.assemble import Ports, make_round
from workers.round import Step

CONTROL_PLANE = "control-plane"


@dataclass(frozen=True, slots=True)
class WorkerShape:
    """What all workers of a virtual cluster have in common. As many blocks as in the cache fit into host memory."""

    config: ServingConfig
    spec: KVCacheSpec
    profile: DeviceProfile
    num_blocks: int
    link: LinkSpeed


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
        spec, num_blocks, num_tokens = shape.spec, shape.num_blocks, shape.num_blocks * shape.spec.block_size
        self.info = WorkerInfo(
            worker_id, role, 0, "", "virtual", spec.dtype, 1, spec, num_blocks, num_tokens, shape.profile
        )
        self.link = VirtualLink(worker_id, time, network, receivers, self.receive, shape.link)
        cache = VirtualCache(spec, num_blocks, num_blocks)
        self.rounds = make_round(
            self.info, cache, shape.config, Ports(self, self, self, self.link), time, nullcontext()
        )
        self._engine = ScriptedEngine(shape.profile, cache, seed)
        self._time = time
        self._network = network
        self._layers_per_part = shape.config.transfer.layers_per_part
        self._kept: deque[tuple[WorkerMessage, ArrivedPart | None]] = deque()
        self._is_computing = False
        self._is_lost = False
        self._next_wake = 0
        receivers[worker_id] = self.receive
        network.join(worker_id, self.receive)
        network.join(f"link of {worker_id}", self.link.on_ack)
        self._plan_wake(time.now_s())

    @property
    def blocks(self) -> BlockManager:
        return self.rounds.parts.blocks

    # ---- ports of the round

    def send(self, worker_id: WorkerId, message: WorkerMessage) -> None:
        self._network.send(worker_id, message, f"{self.info.worker_id} {about(message)}")

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
            at_s = start_s + step_s * (first + count) / num_layers
            self._time.at(at_s, f"layers {first} {name}", partial(self._announce, step, first, count))
        self._time.at(start_s + step_s, f"step {len(step.batch.items)} {name}", partial(self._end, step, result))

    def _announce(self, step: Step, first_layer: int, num_layers: int) -> None:
        if not self._is_lost:
            self.rounds.layers_done(step, first_layer, num_layers)
            self._flush()

    def _end(self, step: Step, result: StepResult) -> None:
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
