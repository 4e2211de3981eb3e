"""A cluster in one thread and in virtual time: a gateway, the cluster scheduler, prefill and decode workers.

Real are all that decide: attempts and open requests, cluster scheduler and health, the rounds of the workers with both
phases, their schedulers and block managers, and both halves of handoffs. Virtual are clock, network, links, the
engine and the cache.

What must hold is checked while it runs, by AssertionError: tokens (gateway.py), KV in its blocks (cache.py), and here
that all blocks add up, each few seconds; at the end that nothing of any request is left anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cli.bench.workload import RequestSpec
from control_plane.cluster_scheduler import ClusterScheduler
from control_plane.membership import Membership
from phasewise.core.config import ServingConfig
from phasewise.core.errors import ServingError
from phasewise.core.heartbeat import Joining
from phasewise.core.messages import LinkLost, PeerLost, WorkerInfo, WorkerLoad
from phasewise.core.placement import PlaceRequest, WorkerId, WorkerRole
from phasewise.core.view import ViewDelta
from tests.virtual_cluster.clock import VirtualTime
from tests.virtual_cluster.engine import prompt_of
from tests.virtual_cluster.gateway import Finished, FirstToken, PlaceAnswer, VirtualGateway
from tests.virtual_cluster.link import Receive
from tests.virtual_cluster.network import Latency, Network
from tests.virtual_cluster.worker import CONTROL_PLANE, VirtualWorker, WorkerShape

GATEWAY = "gateway-0"
CHECK_EVERY_S = 20.0
TIMEOUT_S = 600.0
PATIENCE_S = 60.0
"""After the deadline of the last request nothing may be left for longer."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong, at which second of virtual time: a worker of a role dies, links of all break."""

    deaths: tuple[tuple[float, WorkerRole], ...] = ()
    cuts: tuple[float, ...] = ()


class VirtualControlPlane:
    """The shell of a real membership and scheduler: takes messages, ticks, and tells everybody who is gone."""

    def __init__(self, config: ServingConfig, time: VirtualTime, network: Network) -> None:
        self.scheduler = ClusterScheduler(time, max_waiting=config.scheduler.max_waiting)
        self.membership = Membership(config.health, self, self.scheduler, time)
        self._time = time
        self._network = network
        self._heartbeat_s = config.health.heartbeat_s
        network.join(CONTROL_PLANE, self.receive)
        self._plan_tick()

    def receive(self, message: Any) -> None:
        match message:
            case PlaceRequest(request_id):
                try:
                    answer = PlaceAnswer(request_id, self.scheduler.place(message))
                except ServingError as error:
                    answer = PlaceAnswer(request_id, error)
                self._network.send(GATEWAY, answer, request_id)
            case FirstToken(attempt_id):
                self.scheduler.first_token(attempt_id)
            case Finished(attempt_id, num_output_tokens):
                self.scheduler.finished(attempt_id, num_output_tokens)
            case WorkerLoad():
                self.membership.reported(message)
            case _:
                raise TypeError(f"a control plane gets no {type(message).__name__}")

    def _plan_tick(self) -> None:
        self._time.after(self._heartbeat_s, "tick", self._tick)

    def _tick(self) -> None:
        self.membership.tick()
        self._plan_tick()

    def join(self, info: WorkerInfo) -> None:
        self.membership.expect(info.worker_id, info.role)
        self.membership.joined(Joining(info))

    # ---- Members

    def tell(self, member_id: str, delta: ViewDelta) -> None:
        for gone in delta.gone:
            self._network.send(member_id, PeerLost(gone.member_id), gone.member_id)

    def kill(self, member_id: str) -> None:
        """It has died; the gateway, which is not in the view, hears of it."""
        self._network.send(GATEWAY, PeerLost(member_id), member_id)

    def drain(self, member_id: str, timeout_s: float) -> None:
        raise AssertionError("nobody drains here")

    def change_role(self, member_id: str, role: WorkerRole) -> None:
        raise AssertionError("no role changes here")


class VirtualCluster:
    """`run` replays requests on it. Everything that is random comes from `seed`.

    Attributes:
        workers: those that live, by id.
        lost: those that have died.
        num_broken_transfers: handoffs of which a breaking link has lost a part.
    """

    def __init__(
        self,
        shape: WorkerShape,
        *,
        seed: int,
        latency: Latency,
        faults: Faults,
    ) -> None:
        self.time = VirtualTime()
        self._seed = seed
        self._network = Network(self.time, random.Random(f"network {seed}"), latency)
        self.control_plane = VirtualControlPlane(shape.config, self.time, self._network)
        self.gateway = VirtualGateway(GATEWAY, seed, self.time, self._network)
        self.workers: dict[WorkerId, VirtualWorker] = {}
        self.lost: list[WorkerId] = []
        self.num_broken_transfers = 0
        receivers: dict[WorkerId, Receive] = {}
        pools = shape.config.pools
        roles = [(WorkerRole.PREFILL, i) for i in range(pools.prefill.workers)]
        roles += [(WorkerRole.DECODE, i) for i in range(pools.decode.workers)]
        for role, number in roles:
            worker_id = f"{role.value}-{number}"
            worker = VirtualWorker(worker_id, role, shape, seed, self.time, self._network, receivers)
            self.workers[worker_id] = worker
            self.control_plane.join(worker.info)
        for at_s, role in faults.deaths:
            self.time.at(at_s, f"death in {role.value}", partial(self._lose, role))
        for at_s in faults.cuts:
            self.time.at(at_s, "cut", self._cut)

    def run(self, requests: Sequence[RequestSpec], speed: float = 1.0) -> None:
        """Replays the requests at `speed` times their pace, until all have ended and nothing of them is left."""
        self._submit_next(iter(requests), speed)
        self.time.after(CHECK_EVERY_S, "check", self._check_blocks)
        last_s = (requests[-1].arrival_s or 0.0) / speed
        self.time.at(last_s + TIMEOUT_S + PATIENCE_S, "end of patience", self._assert_empty)
        self.time.run(lambda: self.gateway.ends.num_ended == len(requests) and self._is_empty())
        self._assert_empty()

    # ---- requests

    def _submit_next(self, requests: Iterable[RequestSpec], speed: float) -> None:
        """Plans the next arrival; its prompt is made when it comes."""
        rest = iter(requests)
        spec = next(rest, None)
        if spec is None:
            return
        assert spec.arrival_s is not None

        def arrive() -> None:
            name = f"r{spec.index}"
            self.gateway.submit(
                name, prompt_of(self._seed, name, spec.num_prompt_tokens), spec.num_output_tokens, TIMEOUT_S
            )
            self._submit_next(rest, speed)

        self.time.at(spec.arrival_s / speed, f"arrival of r{spec.index}", arrive)

    # ---- faults

    def _lose(self, role: WorkerRole) -> None:
        """The worker of the role that holds most dies, as soon as one holds anything."""
        held = {i: w.blocks.num_used_blocks for i, w in self.workers.items() if w.info.role is role}
        worker_id = max(held, key=lambda worker_id: held[worker_id])
        if held[worker_id]:
            self.workers.pop(worker_id).lose()
            self.lost.append(worker_id)
        else:
            self.time.after(0.01, f"no death in {role.value} yet", lambda: self._lose(role))

    def _cut(self) -> None:
        """Of each worker the link breaks that the next part goes by, in the middle of it."""

        def cut(sender: WorkerId, receiver: WorkerId) -> None:
            if sender in self.workers and receiver in self.workers:
                transfer_ids = self.workers[sender].link.break_to(receiver)
                self.workers[receiver].receive(LinkLost(sender, "it was cut", transfer_ids))
                self.num_broken_transfers += len(transfer_ids)

        for worker_id, worker in self.workers.items():
            worker.link.in_next_part = partial(cut, worker_id)

    # ---- what must hold

    def _check_blocks(self) -> None:
        for worker in self.workers.values():
            worker.blocks.check()
            load = worker.rounds.load()
            assert load.num_used_blocks + worker.blocks.num_free_blocks == worker.blocks.num_blocks
        self.time.after(CHECK_EVERY_S, "check", self._check_blocks)

    def _is_empty(self) -> bool:
        return not self._left()

    def _left(self) -> dict[str, Any]:
        """What is left of requests, by whose it is."""
        left: dict[str, Any] = {}
        for worker_id, worker in self.workers.items():
            load = worker.rounds.load()
            held = (
                load.num_waiting,
                load.num_running,
                load.num_preempted,
                load.num_reservations,
                load.num_handoffs_out,
                load.num_used_blocks,
                worker.link.num_in_use,
            )
            if any(held):
                left[worker_id] = held
        if self.control_plane.scheduler.num_open:
            left["ledger"] = self.control_plane.scheduler.num_open
        if self.gateway.num_left:
            left["gateway"] = self.gateway.num_left
        return left

    def _assert_empty(self) -> None:
        assert not self._left(), self._left()
        self._check_blocks()
