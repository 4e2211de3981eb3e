"""A whole cluster in one process: the real gateway loop, cluster scheduler, workers, engine and handoffs, without Ray.

Workers run their loops on threads and are joined by loopback links. Protocol tests use it as their InferenceService:
all that is missing beside a real cluster is processes (tests/cluster has those).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cli.model_check import check_model
from cli.worker_plan import worker_settings
from control_plane.cluster_scheduler import ClusterScheduler
from control_plane.gateway.inference import InferenceGateway
from control_plane.gateway.preparation import RequestLimits, RequestPreparer
from control_plane.gateway.service import ModelCard
from control_plane.gateway.text.tokenizer import TextTokenizer, load_tokenizer
from control_plane.link_survey import LinkSurvey, look, measure
from control_plane.metrics import GatewayMetrics
from control_plane.serving_pools import ServingPools
from kv_transfer.direct_link import DirectLinks
from kv_transfer.link import Link, WriteReceived
from kv_transfer.loopback_link import LoopbackLink
from kv_transfer.routed_link import RoutedLink
from kv_transfer.staging import check
from kv_transfer.tcp_wire import TcpDevice
from phasewise.core.clock import MonotonicClock
from phasewise.core.config import ServingConfig, build_config
from phasewise.core.links import LinkProbe, WorkerLinks
from phasewise.core.messages import KVPart, PeerLost, WorkerInfo, WorkerLoad, WorkerMessage, WorkerOutput
from phasewise.core.model_source import resolve_model
from phasewise.core.placement import Placement, PlaceRequest, WorkerId
from workers.assemble import Ports, assemble
from workers.build import LoadedEngine, load_engine, worker_info
from workers.driver import WorkerDriver
from workers.probing import probe_link


class LocalCluster:
    """Made by `local_cluster`. `service` is the InferenceGateway; `workers` can be looked into.

    `after_deliver` is called when the gateway has taken an output: a place to lose a worker at a certain token.
    """

    def __init__(self, config: ServingConfig, served_name: str, has_direct_links: bool = False) -> None:
        self.config = config
        self._loop = asyncio.get_running_loop()
        self._clock = MonotonicClock()
        self._news = asyncio.Event()  # something was reported or finished
        self.scheduler = ClusterScheduler(self._clock, max_waiting=config.scheduler.max_waiting)
        self.workers: dict[WorkerId, WorkerDriver] = {}
        self.engines: dict[WorkerId, LoadedEngine] = {}
        self.direct: dict[WorkerId, DirectLinks] = {}
        self._threads: list[threading.Thread] = []
        self.lost: set[WorkerId] = set()
        self.after_deliver: Callable[[], None] = lambda: None
        self._mailboxes: dict[WorkerId, Any] = {}
        for settings in worker_settings(config, "cpu", None):
            engine = load_engine(settings, lambda share: None, self._clock)
            info = worker_info(settings, engine)
            link: Link = LoopbackLink(settings.worker_id, self._mailboxes)
            if has_direct_links:
                self.direct[settings.worker_id] = self._direct_links(info)
                link = RoutedLink(self.direct[settings.worker_id], link)
            ports = Ports(self, self, self, link)
            worker = assemble(info, engine.runner, engine.port, settings.config, ports, self._clock)
            self.workers[settings.worker_id] = worker
            self.engines[settings.worker_id] = engine
            self._mailboxes[settings.worker_id] = worker.post
            self.scheduler.worker_joined(info)
        source = resolve_model(config.model.path)
        facts = check_model(source, config)
        self.tokenizer: TextTokenizer = load_tokenizer(
            source, special_tokens_in_messages=config.gateway.special_tokens_in_messages
        )
        self.card = ModelCard(
            name=served_name,
            context_length=min(w.info.max_model_len for w in self.workers.values()),
            vocab_size=facts.vocab_size,
            dtype="float32",
            created_unix_s=1,
            eos_token_ids=facts.eos_token_ids,
            has_chat_template=self.tokenizer.chat_template is not None,
            sampling=facts.sampling,
        )
        self.metrics = GatewayMetrics(served_name)
        limits = RequestLimits(config.gateway.default_timeout_s)
        self.service = InferenceGateway(
            "gateway-0",
            self.card,
            self.tokenizer,
            RequestPreparer(self.tokenizer, self.card, limits),
            self,
            self,
            self.metrics,
            self._clock,
            pools=ServingPools({worker_id: worker.info.role for worker_id, worker in self.workers.items()}),
            max_open_requests=config.gateway.max_open_requests,
            addresses={},
        )

    def _direct_links(self, info: WorkerInfo) -> DirectLinks:
        def post(message: Any, arrived: Any = None) -> None:
            mailbox = self._mailboxes.get(info.worker_id)
            if mailbox is not None:
                mailbox(message, arrived)

        def prepare_write(part: KVPart, wire: torch.Tensor) -> WriteReceived:
            return self.workers[info.worker_id].prepare_write(part, wire)

        return DirectLinks(
            info.worker_id,
            TcpDevice("127.0.0.1"),
            post,
            check,
            prepare_write,
            fingerprint=info.kv_spec.content,
            host="127.0.0.1",
            slab_bytes=2**16,
            trial_bytes=4096,
        )

    def start(self) -> None:
        for sender, receiver in itertools.product(self.direct, self.direct):
            if self.workers[sender].info.role.can_prefill and self.workers[receiver].info.role.can_decode:
                self.direct[sender].open(receiver, self.direct[receiver].address, 20.0)
        for worker in self.workers.values():
            thread = threading.Thread(target=worker.run, name=worker.info.worker_id)
            thread.start()
            self._threads.append(thread)
        self.service.start_admitting()

    async def stop(self) -> None:
        await self.service.drain(0.0)
        for worker in self.workers.values():
            worker.stop()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        for links in self.direct.values():
            await asyncio.to_thread(links.close)
        for engine in self.engines.values():
            if engine.ranks is not None:
                engine.ranks.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def lose(self, worker_id: WorkerId) -> None:
        """As if its process was killed: it hears nothing, what it says is not heard, and everybody else is told."""
        self.lost.add(worker_id)
        self.workers[worker_id].stop()
        self._mailboxes[worker_id] = lambda message, arrived=None: None
        self.scheduler.worker_lost(worker_id)
        for other in self.workers.keys() - self.lost:
            self.send(other, PeerLost(worker_id))
        self.service.worker_lost(worker_id)

    async def until_empty(self) -> None:
        """Returns when no block and no request is left anywhere; the caller bounds the wait."""
        while not self.is_empty():
            await self._news.wait()
            self._news.clear()

    def is_empty(self) -> bool:
        loads = [member.load for member in self.scheduler.registry.members()]
        held = any(
            (
                load.num_waiting,
                load.num_running,
                load.num_preempted,
                load.num_reservations,
                load.num_handoffs_out,
                load.num_used_blocks,
            )
            != (0,) * 6
            for load in loads
        )
        return not held and self.scheduler.num_open == 0 and self.service.is_idle

    # ---- ports of workers and gateway; workers call from their threads

    def send(self, worker_id: WorkerId, message: WorkerMessage) -> None:
        if worker_id not in self.lost:
            self.workers[worker_id].post(message)

    def deliver(self, gateway_id: str, output: WorkerOutput) -> None:
        self._loop.call_soon_threadsafe(self._deliver, output)

    def _deliver(self, output: WorkerOutput) -> None:
        self.service.deliver(output)
        self.after_deliver()

    def report(self, load: WorkerLoad) -> None:
        with contextlib.suppress(RuntimeError):  # the loop of a test that is over
            self._loop.call_soon_threadsafe(self._on_load, load)

    def _on_load(self, load: WorkerLoad) -> None:
        self.scheduler.worker_load(load)
        self._news.set()

    # ---- Placer

    async def place(self, request: PlaceRequest, timeout_s: float) -> Placement:
        return self.scheduler.place(request)

    def first_token(self, request_id: str) -> None:
        self.scheduler.first_token(request_id)

    def finished(self, request_id: str, num_output_tokens: int) -> None:
        self.scheduler.finished(request_id, num_output_tokens)
        self._news.set()

    async def snapshot(self) -> list[tuple[WorkerInfo, WorkerLoad]]:
        return [(m.info, m.load) for m in self.scheduler.registry.members()]

    async def links(self) -> LinkSurvey:
        return await look(self.config.transfer, await self.snapshot(), _Asker(self.workers))

    async def probe_links(self, sizes: Sequence[int], timeout_s: float) -> LinkSurvey:
        before = await self.links()
        probes = await measure(before.pairs, _Asker(self.workers), sizes, timeout_s, self._clock)
        return (await self.links()).with_probes(probes)


class _Asker:
    """LinkAsker over workers of this process."""

    def __init__(self, workers: dict[WorkerId, WorkerDriver]) -> None:
        self._workers = workers

    async def links(self, worker_id: WorkerId, peers: Sequence[WorkerInfo]) -> WorkerLinks:
        return self._workers[worker_id].links(peers)

    async def probe(self, worker_id: WorkerId, peer: WorkerId, num_bytes: int, timeout_s: float) -> LinkProbe:
        return await probe_link(self._workers[worker_id], peer, num_bytes, timeout_s)


@contextlib.asynccontextmanager
async def local_cluster(
    model: str | Path | dict[str, Any],
    *,
    served_name: str = "test-model",
    has_direct_links: bool = False,
    **sections: Any,
) -> AsyncIterator[LocalCluster]:
    """A running cluster over `model` (a path, or that section), with `sections` of the configuration."""
    section = model if isinstance(model, dict) else {"path": str(model)}
    values = {"model": section, "cache": {"kv_cache_gib": 0.02}, **sections}
    cluster = LocalCluster(build_config(values, source="test"), served_name, has_direct_links)
    cluster.start()
    try:
        yield cluster
    finally:
        await cluster.stop()
