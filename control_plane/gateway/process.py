"""A gateway's process without Ray: its ports, its tokenizer, its service, and their end.

1. made
2. bound      `bind`: the HTTP port is taken; `listen_for_tokens`: workers can reach it
3. loaded     `load`: the tokenizer is read
4. serving    `serve`: requests are taken at both ports
5. draining   `drain`: none is taken any more, those that are open end
6. stopped    `stop`: the ports are closed

Workers may be lost from the beginning on: the service hears of those that were lost before it was made.
More than 15 of our modules are imported: here the parts of the process meet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from control_plane.gateway.inference import InferenceGateway
from control_plane.gateway.placer import Placer
from control_plane.gateway.preparation import RequestLimits, RequestPreparer
from control_plane.gateway.servers import GatewayServers
from control_plane.gateway.service import ModelCard
from control_plane.gateway.text.tokenizer import TextTokenizer, load_tokenizer
from control_plane.metrics import GatewayMetrics
from control_plane.serving_pools import ServingPools
from phasewise.core.clock import MonotonicClock
from phasewise.core.collector import freeze_collector
from phasewise.core.config import ServingConfig
from phasewise.core.handles import ActorHandle, WorkerHandles
from phasewise.core.messages import WorkerInfo, WorkerOutput
from phasewise.core.model_source import resolve_model
from phasewise.core.own_address import own_address
from phasewise.core.placement import WorkerId
from phasewise.delivery.listener import TokenListener


class WatchedPlacer(Placer, Protocol):
    """A control plane whose end can be waited for."""

    async def control_plane_ended(self) -> None:
        """Returns when the control plane's process has ended, however it did."""


class GatewayProcess:
    """One gateway. `service` takes what workers deliver; None before `serve`. Implements OutputTaker
    (phasewise/delivery/listener.py).

    Args:
        secret: the cluster's; workers have to know it.
        head: an address of the cluster: workers reach this gateway at the address from which its host reaches that
            one. "": on this host only.
    """

    def __init__(self, gateway_id: str, config: ServingConfig, secret: str = "", head: str = "") -> None:
        self.service: InferenceGateway | None = None
        self._gateway_id = gateway_id
        self._config = config
        self._servers = GatewayServers(config.gateway)
        self._workers = WorkerHandles()
        self._tokens = TokenListener(gateway_id, secret, self)
        self._head = head
        self._tokenizer: TextTokenizer | None = None
        self._lost: list[WorkerId] = []  # before there was a service
        self._watch: asyncio.Task[None] | None = None
        self._closed = asyncio.Event()

    async def bind(self) -> str:
        """Takes the HTTP port and gives its address. Raises ConfigError when it cannot be had."""
        return await self._servers.bind_http()

    async def listen_for_tokens(self) -> str:
        """Gives the address at which workers' tokens reach this gateway."""
        return await self._tokens.open(own_address(self._head or "127.0.0.1"))

    async def load(self) -> None:
        """Reads the tokenizer. Raises ModelLoadError."""
        as_tokens = self._config.gateway.special_tokens_in_messages
        source = resolve_model(self._config.model.path)
        self._tokenizer = await asyncio.to_thread(load_tokenizer, source, special_tokens_in_messages=as_tokens)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model brings one. After `load`."""
        return self._loaded_tokenizer.chat_template is not None

    async def serve(
        self,
        card: ModelCard,
        infos: Sequence[WorkerInfo],
        workers: Mapping[WorkerId, ActorHandle],
        control_plane: WatchedPlacer,
    ) -> str:
        """Takes requests from now on. Gives the gRPC address. Raises ConfigError when its port cannot be had."""
        self._workers.connect(workers)
        self.service = service = self._make_service(card, infos, control_plane)
        for worker_id in self._lost:
            self.worker_lost(worker_id)
        self._watch = asyncio.create_task(self._watch_control_plane(service, control_plane))
        address = await self._servers.open(service, self._loaded_tokenizer.longest_token_bytes)
        service.start_admitting()
        freeze_collector()
        return address

    def deliver(self, output: WorkerOutput) -> None:
        """What one step of one worker has for this gateway."""
        assert self.service is not None, "workers have its requests only"
        self.service.deliver(output)

    def tokens_lost(self, worker_id: WorkerId) -> None:
        if self.service is not None:
            self.service.tokens_lost(worker_id)

    def worker_lost(self, worker_id: WorkerId) -> None:
        """Moves what the worker still had elsewhere; nothing is sent to it afterwards."""
        if self.service is None:
            self._lost.append(worker_id)
            return
        self.service.worker_lost(worker_id)  # its aborts still go out: a silent worker may live
        self._workers.forget(worker_id)
        self._tokens.forget(worker_id)

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests; returns when the open ones have ended, after `timeout_s` at the latest."""
        if self.service is not None:
            await self.service.drain(timeout_s)

    async def stop(self) -> None:
        """Closes the servers and all ports."""
        await self._servers.close()
        await self._tokens.close()
        if self._watch is not None:
            self._watch.cancel()
        self._closed.set()

    async def wait_closed(self) -> None:
        await self._closed.wait()

    def _make_service(self, card: ModelCard, infos: Sequence[WorkerInfo], placer: Placer) -> InferenceGateway:
        config, tokenizer, clock = self._config.gateway, self._loaded_tokenizer, MonotonicClock()
        smallest = min((info for info in infos if info.role.can_decode), key=lambda info: info.num_kv_blocks)
        limits = RequestLimits(
            config.default_timeout_s,
            default_max_tokens=config.default_max_tokens,
            max_samples=self._config.scheduler.max_running,
            num_kv_blocks=smallest.num_kv_blocks,
            block_size=smallest.kv_spec.block_size,
        )
        return InferenceGateway(
            self._gateway_id,
            card,
            tokenizer,
            RequestPreparer(tokenizer, card, limits),
            placer,
            self._workers,
            GatewayMetrics(card.name),
            clock,
            pools=ServingPools({info.worker_id: info.role for info in infos}),
            max_open_requests=config.max_open_requests,
            max_open_per_client=config.max_open_per_client,
            addresses=self._servers.addresses,
        )

    async def _watch_control_plane(self, service: InferenceGateway, control_plane: WatchedPlacer) -> None:
        await control_plane.control_plane_ended()
        service.control_plane_lost()

    @property
    def _loaded_tokenizer(self) -> TextTokenizer:
        assert self._tokenizer is not None, "`load` comes first"
        return self._tokenizer
