"""A gateway's process without Ray: its ports, its tokenizer, its service, its place in the cluster, and its end.

1. bound      the HTTP port is taken; it answers that the cluster starts
2. loaded     the tokenizer is read
3. serving    workers are there that can serve: requests are taken at both ports, and the gateway joins the cluster
4. draining   `drain`: none is taken any more, those that are open end; then the gateway leaves and ends
5. stopped    `stop`: the ports are closed

It follows the view: requests of a worker that is gone are placed again. More than 15 of our modules are imported, for a
gateway's parts and its place in the cluster meet here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Coroutine
from typing import Any

from control_plane.gateway.inference import InferenceGateway
from control_plane.gateway.model_card import model_card
from control_plane.gateway.placer import Placer
from control_plane.gateway.preparation import RequestLimits, RequestPreparer
from control_plane.gateway.servers import GatewayServers
from control_plane.gateway.service import ModelCard
from control_plane.gateway.text.tokenizer import TextTokenizer, load_tokenizer
from control_plane.metrics import GatewayMetrics
from control_plane.serving_pools import ServingPools, why_unservable
from phasewise.core.birth import MemberBirth
from phasewise.core.clock import MonotonicClock
from phasewise.core.cluster_member import ClusterMember, End, MemberEvents
from phasewise.core.collector import freeze_collector
from phasewise.core.errors import ServingError
from phasewise.core.handles import ActorHandle, Find, WorkerHandles, answer_of
from phasewise.core.heartbeat import Description
from phasewise.core.messages import WorkerInfo, WorkerOutput
from phasewise.core.model_source import ModelSource, resolve_model
from phasewise.core.own_address import own_address
from phasewise.core.placement import WorkerId
from phasewise.core.view import GatewayInfo, Member, View, ViewChange, ViewDelta
from phasewise.delivery.listener import TokenListener

logger = logging.getLogger(__name__)

_CLOCK = MonotonicClock()
_VIEW_S = 5.0
_LOOK_AGAIN_S = 0.2  # while there are no workers that could serve


class GatewayProcess:
    """One gateway. `service` takes what workers deliver; None before it serves. `end` ends the process.

    Implements OutputTaker (phasewise/delivery/listener.py).
    """

    def __init__(self, birth: MemberBirth, control_plane: ActorHandle, placer: Placer, find: Find, end: End) -> None:
        config, gateway_id = birth.config, birth.member_id
        self.service: InferenceGateway | None = None
        self._gateway_id = gateway_id
        self._config = config
        self._control_plane = control_plane
        self._placer = placer
        self._end = end
        self._servers = GatewayServers(config.gateway)
        self._workers = WorkerHandles(find)
        self._tokens = TokenListener(gateway_id, birth.secret, self)
        self._head = birth.head or "127.0.0.1"
        events = MemberEvents(self._on_change, end)
        self._member = ClusterMember(gateway_id, control_plane, config.health.heartbeat_s, events, _CLOCK)
        self._serving: asyncio.Future[ModelCard] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_leaving = False
        self._closed = asyncio.Event()

    async def run(self) -> None:
        """The gateway's whole life. Returns when it was stopped.

        Raises:
            ServingError: a port or the tokenizer cannot be had (the control plane was told), or the control plane does
                not take this gateway.
        """
        try:
            await self._servers.bind_http()
            source = resolve_model(self._config.model.path)
            as_tokens = self._config.gateway.special_tokens_in_messages
            tokenizer = await asyncio.to_thread(load_tokenizer, source, special_tokens_in_messages=as_tokens)
            self._member.loading(1.0)
            card = await self._open(source, tokenizer, await self._until_servable())
        except ServingError as error:
            await self._member.failed(error)
            raise
        addresses, host = self._servers.addresses, socket.gethostname()
        tokens = await self._tokens.open(own_address(self._head))
        info = GatewayInfo(self._gateway_id, os.getpid(), host, addresses["http"], addresses["grpc"], tokens)
        await self._member.join(info)
        freeze_collector()
        self._serving.set_result(card)
        await self._closed.wait()

    async def wait_serving(self) -> ModelCard:
        """Returns when requests are taken, with what is served."""
        return await asyncio.shield(self._serving)

    def describe(self) -> Description:
        return self._member.describe(open_attempts=() if self.service is None else self.service.open_attempts())

    # ---- OutputTaker

    def deliver(self, output: WorkerOutput) -> None:
        """What one step of one worker has for this gateway."""
        assert self.service is not None, "workers have its requests only"
        self.service.deliver(output)

    def tokens_lost(self, worker_id: WorkerId) -> None:
        if self.service is not None:
            self.service.tokens_lost(worker_id)

    # ---- what it is told

    def view_changed(self, delta: ViewDelta) -> None:
        self._member.view_changed(delta)

    def drain(self, timeout_s: float) -> None:
        """Takes no more requests; ends when the open ones have ended, after `timeout_s` at the latest."""
        if not self._is_leaving:
            self._is_leaving = True
            self._begin(self._leave(timeout_s))

    def terminate(self) -> None:
        """Drains at the wish of its host, within the drain time of the configuration."""
        self._begin(self._member.draining())
        self.drain(self._config.gateway.drain_s)

    async def stop(self) -> None:
        """Closes the servers and all ports."""
        self._member.close()
        await self._close_ports()
        self._closed.set()

    # ---- inside

    async def _until_servable(self) -> list[WorkerInfo]:
        """The workers of a view in which a request could be placed."""
        while True:
            try:
                view: View = await answer_of(self._control_plane.view.remote(), _VIEW_S)
            except ServingError:
                raise
            except Exception as error:  # it is being started again
                logger.warning("the control plane does not answer (%s); asking again", type(error).__name__)
            else:
                ready = [member for member in view.workers() if member.takes_work]
                if not why_unservable((), {member.role for member in ready if member.role is not None}):
                    return [member.info for member in ready if isinstance(member.info, WorkerInfo)]
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _open(self, source: ModelSource, tokenizer: TextTokenizer, workers: list[WorkerInfo]) -> ModelCard:
        card = model_card(source, self._config, workers, has_chat_template=tokenizer.chat_template is not None)
        self.service = service = self._make_service(card, tokenizer, workers)
        await self._servers.open(service, tokenizer.longest_token_bytes)
        service.start_admitting()
        return card

    def _make_service(self, card: ModelCard, tokenizer: TextTokenizer, workers: list[WorkerInfo]) -> InferenceGateway:
        config = self._config.gateway
        smallest = min((info for info in workers if info.role.can_decode), key=lambda info: info.num_kv_blocks)
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
            self._placer,
            self._workers,
            GatewayMetrics(card.name),
            _CLOCK,
            pools=ServingPools({info.worker_id: info.role for info in workers}),
            max_open_requests=config.max_open_requests,
            max_open_per_client=config.max_open_per_client,
            addresses=self._servers.addresses,
        )

    def _on_change(self, change: ViewChange) -> None:
        assert self.service is not None, "it joins when it serves"
        for member in (*change.joined, *change.changed):
            if member.role is not None and member.info is not None:
                self._meet(self.service, member)
        for gone in change.gone:
            self.service.worker_lost(gone.member_id)  # its aborts still go out: a silent worker may live
            self._workers.forget(gone.member_id)
            self._tokens.forget(gone.member_id)

    def _meet(self, service: InferenceGateway, member: Member) -> None:
        self._workers.expect(member.member_id)
        if member.takes_work and member.role is not None:
            service.worker_ready(member.member_id, member.role)
        else:
            service.worker_paused(member.member_id)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close_ports(self) -> None:
        await self._servers.close()
        await self._tokens.close()

    async def _leave(self, timeout_s: float) -> None:
        if self.service is not None:
            await self.service.drain(timeout_s)
        await self._close_ports()
        await self._member.leave()
        self._closed.set()
        self._end("", 0)
