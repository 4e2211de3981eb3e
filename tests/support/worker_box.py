"""Workers in one thread, joined by loopback links and lists: life-cycle tests drive them round by round."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from engine.kv_cache import PagedKVCache
from kv_transfer.cache_port import CachePort
from kv_transfer.incoming import IncomingHandoffs
from kv_transfer.link import ArrivedPart, Link, PrepareWrite
from kv_transfer.loopback_link import Fault, LoopbackLink
from kv_transfer.outgoing import OutgoingHandoffs
from kv_transfer.staging import is_intact
from phasewise.core.clock import ManualClock
from phasewise.core.config import build_config
from phasewise.core.lifecycle import Stage
from phasewise.core.messages import (
    AbortRequest,
    PrefillTask,
    RequestFailed,
    WorkerInfo,
    WorkerLoad,
    WorkerMessage,
    WorkerOutput,
)
from phasewise.core.placement import Placement, WorkerId, WorkerRole
from phasewise.core.profile import DeviceProfile
from phasewise.core.request import FinishReason, Request, SamplingParams
from tests.support.scripted_engine import SPEC, ScriptedRunner
from workers.assemble import Ports, assemble
from workers.driver import WorkerDriver


class WorkerBox:
    """A cluster's workers without a cluster. `lost` workers get nothing any more.

    Attributes:
        num_steps_ahead: how far their engines are ahead of the results that the loop takes: 1 on a GPU, 0 on a CPU.
        links_write: whether parts are written by their link, as direct ones do, or by the loop.
    """

    num_steps_ahead = 0
    links_write = False

    def __init__(
        self, roles: dict[WorkerId, str], *, num_blocks: int = 64, fault: Fault | None = None, **sections: Any
    ) -> None:
        self.clock = ManualClock(100.0)
        self.config = build_config(sections, source="test")
        self.num_swap_blocks = min(int(self.config.cache.swap_gib * 2**30) // SPEC.bytes_per_block, 1024)
        self.workers: dict[WorkerId, WorkerDriver] = {}
        self.runners: dict[WorkerId, ScriptedRunner] = {}
        self.caches: dict[WorkerId, PagedKVCache] = {}
        self.cache_ports: dict[WorkerId, CachePort] = {}
        self.links: dict[WorkerId, LoopbackLink] = {}
        self.sent: list[tuple[WorkerId, WorkerMessage]] = []
        self.lost: set[WorkerId] = set()
        self.tokens: defaultdict[tuple[str, int], dict[int, int]] = defaultdict(dict)
        self.finish: dict[tuple[str, int], FinishReason] = {}
        self.failures: dict[str, RequestFailed] = {}
        self.stages: defaultdict[str, list[Stage]] = defaultdict(list)
        self.outputs: list[WorkerOutput] = []
        self.loads: dict[WorkerId, WorkerLoad] = {}
        mailboxes: dict[WorkerId, Any] = {}
        writers: dict[WorkerId, PrepareWrite] = {}
        for worker_id, role in roles.items():
            cache = PagedKVCache(SPEC, num_blocks, "cpu", self.num_swap_blocks)
            cache.storage.fill_(float("nan"))  # what was never written must never be read
            self.caches[worker_id] = cache
            self.runners[worker_id] = ScriptedRunner(cache, self.num_steps_ahead)
            info = WorkerInfo(
                worker_id,
                WorkerRole(role),
                1,
                "here",
                "cpu",
                "float32",
                1,
                SPEC,
                num_blocks,
                num_blocks * SPEC.block_size,
                DeviceProfile.linear(0.0, 0.001, 0.0, 0.001),
            )
            link = self.links[worker_id] = LoopbackLink(worker_id, mailboxes, fault)
            link.writers = writers
            ports = Ports(self, self, self, self.link_of(worker_id, link))
            port = self.cache_ports[worker_id] = CachePort(cache, SPEC)
            worker = assemble(info, self.runners[worker_id], port, self.config, ports, self.clock)
            self.workers[worker_id] = worker
            mailboxes[worker_id] = worker.post
            if self.links_write:
                writers[worker_id] = worker.prepare_write

    def link_of(self, worker_id: WorkerId, link: LoopbackLink) -> Link:
        """What the worker sends parts over: another one than `link`, if a test wants that."""
        return link

    def outgoing(self, worker_id: WorkerId) -> OutgoingHandoffs:
        return self.workers[worker_id].rounds.parts.sender.outgoing

    def incoming(self, worker_id: WorkerId) -> IncomingHandoffs:
        return self.workers[worker_id].rounds.parts.receiver.incoming

    # ---- ports

    def send(self, worker_id: WorkerId, message: WorkerMessage) -> None:
        self.sent.append((worker_id, message))
        if worker_id not in self.lost:
            self.workers[worker_id].post(message)

    def deliver(self, gateway_id: str, output: WorkerOutput) -> None:
        self.outputs.append(output)
        for chunk in output.chunks:
            key = (chunk.request_id, chunk.sample_index)
            for i, token in enumerate(chunk.tokens):
                assert chunk.position + i not in self.tokens[key], "a token was sent twice"
                self.tokens[key][chunk.position + i] = token.token_id
            if chunk.finish_reason is not None:
                assert key not in self.finish, "a sample ended twice"
                self.finish[key] = chunk.finish_reason
        for failure in output.failures:
            self.failures[failure.request_id] = failure
        for event in output.events:
            self.stages[event.request_id].append(event.stage)

    def report(self, load: WorkerLoad) -> None:
        self.loads[load.worker_id] = load

    # ---- driving

    def submit(
        self,
        request_id: str,
        prompt: list[int],
        prefill: WorkerId,
        decode: WorkerId,
        *,
        time_left_s: float = 60.0,
        **sampling: Any,
    ) -> None:
        request = Request(request_id, tuple(prompt), SamplingParams(**sampling))
        task = PrefillTask(request, Placement(request_id, prefill, decode), "gateway-0", time_left_s)
        self.workers[prefill].post(task)

    def abort(self, request_id: str, sample_index: int | None = None) -> None:
        for worker in self.workers.values():
            worker.post(AbortRequest(request_id, sample_index))

    def round(self) -> None:
        for worker_id, worker in self.workers.items():
            if worker_id not in self.lost:
                worker.round()

    def run(self, max_rounds: int = 2000) -> None:
        """Rounds until nothing is held anywhere and nothing moves."""
        for _ in range(max_rounds):
            before = len(self.sent)
            self.round()
            if len(self.sent) == before and not any(self.holds(w) for w in self.workers if w not in self.lost):
                return
        raise AssertionError(f"still busy: { {w: self.workers[w].load() for w in self.workers} }")

    def run_until(self, condition: Any, max_rounds: int = 500) -> None:
        for _ in range(max_rounds):
            if condition():
                return
            self.round()
        raise AssertionError("the condition never came true")

    def holds(self, worker_id: WorkerId) -> bool:
        load = self.workers[worker_id].load()
        held = (load.num_waiting, load.num_running, load.num_preempted, load.num_reservations, load.num_handoffs_out)
        return any(held) or load.num_used_blocks > 0

    def assert_empty(self) -> None:
        """No block and no request is left anywhere, and every block is accounted for."""
        for worker_id, worker in self.workers.items():
            if worker_id in self.lost:
                continue
            assert not self.holds(worker_id), worker.load()
            worker.rounds.parts.blocks.check()

    def output(self, request_id: str, sample_index: int = 0) -> list[int]:
        tokens = self.tokens[(request_id, sample_index)]
        assert sorted(tokens) == list(range(len(tokens))), "output positions have holes"
        return [tokens[i] for i in range(len(tokens))]


def corrupt(wire: torch.Tensor) -> torch.Tensor:
    """The part with four values turned into others."""
    changed = wire.clone()
    changed[:16] ^= 0xFF
    return changed


def arrived(wire: torch.Tensor) -> ArrivedPart:
    """A part as a link would bring it."""
    return ArrivedPart(wire if is_intact(wire) else None, lambda: None)
