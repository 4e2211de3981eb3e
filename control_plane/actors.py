"""The Ray shells of the control plane and of the gateways: each builds plain objects and delegates.

This is the only file of the package that knows Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio
import ray
import uvicorn
from ray.exceptions import RayError

from control_plane.cluster_scheduler import ClusterScheduler
from control_plane.gateway.bodies import Bodies, largest_body
from control_plane.gateway.grpc_front.server import start_grpc_server
from control_plane.gateway.http_front.openai_server import build_app
from control_plane.gateway.http_front.protocol import make_http_server
from control_plane.gateway.http_front.starting import FrontDoor
from control_plane.gateway.inference import InferenceGateway
from control_plane.gateway.preparation import RequestLimits, RequestPreparer
from control_plane.gateway.service import ModelCard
from control_plane.gateway.summed_log import SummedLog
from control_plane.gateway.text.tokenizer import TextTokenizer, load_tokenizer
from control_plane.link_survey import LinkSurvey, look, measure
from control_plane.metrics import GatewayMetrics
from control_plane.serving_pools import ServingPools
from phasewise.core.clock import MonotonicClock
from phasewise.core.collector import freeze_collector
from phasewise.core.config import ServingConfig, split_address
from phasewise.core.errors import ConfigError, DeadlineExceeded, Overloaded, ServingError, Unavailable
from phasewise.core.handles import ActorHandle, WorkerHandles
from phasewise.core.links import LinkProbe, WorkerLinks
from phasewise.core.logs import setup_logging
from phasewise.core.messages import GatewayLost, PeerLost, WorkerInfo, WorkerLoad, WorkerOutput
from phasewise.core.model_source import resolve_model
from phasewise.core.placement import Placement, PlaceRequest, WorkerId

logger = logging.getLogger(__name__)

_MORE_CALLS = 1024
"""gRPC calls beside those of open requests: refusals on their way, health watches, tokenising."""

SWITCH_INTERVAL_S = 0.0005
"""How long the event loop waits for a thread that tokenises to give up the interpreter, at each of its steps."""

_LINKS_TIMEOUT_S = 5.0  # for a worker to tell of its links


class ControlPlaneActor:
    """Membership and placement of one cluster, over a ClusterScheduler."""

    def __init__(self, config: ServingConfig, log_collector: str | None) -> None:
        setup_logging(
            "control-plane", log_format=config.logging.format, level=config.logging.level, collector=log_collector
        )
        self._health = config.health
        self._transfer = config.transfer
        self._scheduler = ClusterScheduler(
            MonotonicClock(),
            max_waiting=config.scheduler.max_waiting,
            overdue_s=config.health.overdue_s,
            heartbeat_s=config.health.heartbeat_s,
        )
        self._workers = WorkerHandles()
        self._link_asker = RemoteLinkAsker(self._workers)
        self._is_probing = False
        self._gateways: dict[str, ActorHandle] = {}
        self._watches: set[asyncio.Task[None]] = set()
        self._last_loss = ""
        self._has_changed = asyncio.Event()  # a worker was lost, or all stop
        self._is_stopping = False
        self._closed = asyncio.Event()

    async def join(self, info: WorkerInfo, handle: ActorHandle) -> None:
        """A worker has started."""
        self._workers.connect({info.worker_id: handle})
        self._scheduler.worker_joined(info)
        self._watch(self._watch_worker(info.worker_id, handle))
        logger.info("worker joined (%s on %s)", info.role.value, info.device, extra={"worker_id": info.worker_id})

    async def join_gateway(self, gateway_id: str, handle: ActorHandle) -> None:
        self._gateways[gateway_id] = handle
        for member in self._scheduler.registry.members():
            if not member.is_ready:
                handle.worker_lost.remote(member.info.worker_id)
        self._watch(self._watch_gateway(gateway_id, handle))

    async def start_health_checks(self) -> None:
        freeze_collector()
        self._scheduler.listened.begin()
        self._watch(self._check_health())

    async def report(self, load: WorkerLoad) -> None:
        self._scheduler.worker_load(load)

    async def place(self, request: PlaceRequest) -> Placement | ServingError:
        """A refusal comes back as a value: Ray would wrap an exception."""
        try:
            return self._scheduler.place(request)
        except ServingError as error:
            return error

    async def progress(self, news: Sequence[tuple[str, int | None]]) -> None:
        """What became of requests: (id, None) for a first token, (id, number of output tokens) for an end."""
        for request_id, num_output_tokens in news:
            if num_output_tokens is None:
                self._scheduler.first_token(request_id)
            else:
                self._scheduler.finished(request_id, num_output_tokens)

    async def snapshot(self) -> list[tuple[WorkerInfo, WorkerLoad]]:
        return [(member.info, member.load) for member in self._scheduler.registry.members()]

    async def links(self) -> LinkSurvey | ServingError:
        """What workers know of the links between them. An error comes back as a value."""
        try:
            return await look(self._transfer, await self.snapshot(), self._link_asker)
        except ServingError as error:
            return error

    async def probe_links(self, sizes: Sequence[int], timeout_s: float) -> LinkSurvey | ServingError:
        """The same, measured. One at a time: two would measure each other."""
        if self._is_probing:
            return Overloaded("the links are being probed already; ask again later", retry_after_s=timeout_s)
        self._is_probing = True
        try:
            before = await look(self._transfer, await self.snapshot(), self._link_asker)
            probes = await measure(before.pairs, self._link_asker, sizes, timeout_s, MonotonicClock())
            after = await look(self._transfer, await self.snapshot(), self._link_asker)  # with what links have learnt
            return after.with_probes(probes)
        except ServingError as error:
            return error
        finally:
            self._is_probing = False

    async def stop(self) -> None:
        """From now on workers that end are not lost but stopped."""
        self._is_stopping = True
        self._has_changed.set()
        self._closed.set()

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def wait_unservable(self) -> str:
        """Returns when no request can be served any more, with the reason; "" when the cluster was stopped."""
        while not self._is_stopping:
            if reason := self._scheduler.why_unservable():
                return f"{reason}: {self._last_loss}, and lost workers do not come back"
            self._has_changed.clear()
            await self._has_changed.wait()
        return ""

    # ---- inside

    def _watch(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)

    async def _watch_worker(self, worker_id: WorkerId, handle: ActorHandle) -> None:
        """Open as long as the worker lives: its death is an answer to this call."""
        try:
            await handle.wait_closed.remote()
            reason = "its loop ended"
        except RayError as error:
            reason = type(error).__name__
        self._on_worker_lost(worker_id, reason)

    async def _watch_gateway(self, gateway_id: str, handle: ActorHandle) -> None:
        try:
            await handle.wait_closed.remote()
        except RayError:
            logger.error("gateway %s was lost", gateway_id)
        self._gateways.pop(gateway_id, None)
        for worker_id in self._workers.ids():
            self._workers.send(worker_id, GatewayLost(gateway_id))

    async def _check_health(self) -> None:
        while not self._is_stopping:
            await asyncio.sleep(self._health.heartbeat_s)
            for worker_id in self._scheduler.tick():
                self._tell_lost(worker_id, f"silent for {self._health.overdue_s:g} s")
            if self._scheduler.listened.is_behind_pause:
                missed_s = self._scheduler.listened.missed_s
                logger.warning("the control plane did not run for %.1f s; no worker's silence counts for it", missed_s)

    def _on_worker_lost(self, worker_id: WorkerId, reason: str) -> None:
        if not self._is_stopping and self._scheduler.worker_lost(worker_id):
            self._tell_lost(worker_id, reason)

    def _tell_lost(self, worker_id: WorkerId, reason: str) -> None:
        """Everybody hears once: peers free what it held, gateways move its requests.

        Its process may be there still, hanging or without its loop: it ends, so that it holds neither device nor links.
        """
        logger.error("worker was lost: %s", reason, extra={"worker_id": worker_id})
        self._last_loss = f"{worker_id} was lost ({reason})"
        self._has_changed.set()
        handle = self._workers.get(worker_id)
        self._workers.forget(worker_id)
        if handle is not None:
            ray.kill(handle)
        for other in self._workers.ids():
            self._workers.send(other, PeerLost(worker_id))
        for handle in self._gateways.values():
            handle.worker_lost.remote(worker_id)


class RemoteLinkAsker:
    """LinkAsker (control_plane/link_survey.py) over the workers' actors."""

    def __init__(self, workers: WorkerHandles) -> None:
        self._workers = workers

    async def links(self, worker_id: WorkerId, peers: Sequence[WorkerInfo]) -> WorkerLinks:
        handle = self._handle(worker_id)
        return await _answer(handle.links.remote(peers), f"worker {worker_id}", _LINKS_TIMEOUT_S)

    async def probe(self, worker_id: WorkerId, peer: WorkerId, num_bytes: int, timeout_s: float) -> LinkProbe:
        call = self._handle(worker_id).probe_link.remote(peer, num_bytes, timeout_s)
        return await _answer(call, f"worker {worker_id}", timeout_s + _LINKS_TIMEOUT_S)

    def _handle(self, worker_id: WorkerId) -> ActorHandle:
        handle = self._workers.get(worker_id)
        if handle is None:
            raise Unavailable(f"worker {worker_id} was lost meanwhile", retry_after_s=1.0)
        return handle


async def _answer(call: Any, who: str, timeout_s: float) -> Any:
    """What an actor's call returns. Raises Unavailable when `who` is gone or silent."""
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.wrap_future(call.future())
    except (RayError, TimeoutError):
        raise Unavailable(f"{who} does not answer", retry_after_s=2.0) from None


class RemotePlacer:
    """Placer (control_plane/gateway/placer.py) over the control plane's actor.

    What requests have come to is told once per turn of the event loop: a step that brings many first tokens or ends
    costs one call and not one for each.
    """

    def __init__(self, control_plane: ActorHandle) -> None:
        self._control_plane = control_plane
        self._news: list[tuple[str, int | None]] = []

    async def place(self, request: PlaceRequest, timeout_s: float) -> Placement:
        call = self._control_plane.place.remote(request)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await asyncio.wrap_future(call.future())
        except asyncio.CancelledError:
            self.finished(request.request_id, 0)  # the client has left; the placement, if any, is given back
            raise
        except TimeoutError:
            self.finished(request.request_id, 0)
            raise DeadlineExceeded("the request's deadline passed before it was placed") from None
        except RayError:
            raise Unavailable("the control plane does not answer", retry_after_s=2.0) from None
        if isinstance(answer, ServingError):
            raise answer
        return answer

    def first_token(self, request_id: str) -> None:
        self._tell(request_id, None)

    def finished(self, request_id: str, num_output_tokens: int) -> None:
        self._tell(request_id, num_output_tokens)

    def _tell(self, request_id: str, num_output_tokens: int | None) -> None:
        if not self._news:
            asyncio.get_running_loop().call_soon(self._send_news)
        self._news.append((request_id, num_output_tokens))

    def _send_news(self) -> None:
        news, self._news = self._news, []
        self._control_plane.progress.remote(news)

    async def snapshot(self) -> list[tuple[WorkerInfo, WorkerLoad]]:
        try:
            workers: list[tuple[WorkerInfo, WorkerLoad]] = await self._control_plane.snapshot.remote()
        except RayError:
            raise Unavailable("the control plane does not answer", retry_after_s=2.0) from None
        return workers

    async def links(self) -> LinkSurvey:
        return await self._survey(self._control_plane.links.remote(), 2 * _LINKS_TIMEOUT_S)

    async def probe_links(self, sizes: Sequence[int], timeout_s: float) -> LinkSurvey:
        call = self._control_plane.probe_links.remote(sizes, timeout_s)
        return await self._survey(call, timeout_s + 4 * _LINKS_TIMEOUT_S)

    async def _survey(self, call: Any, timeout_s: float) -> LinkSurvey:
        answer: LinkSurvey | ServingError = await _answer(call, "the control plane", timeout_s)
        if isinstance(answer, ServingError):
            raise answer
        return answer


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """What a gateway process is told when it is made."""

    gateway_id: str
    config: ServingConfig
    log_collector: str | None = None


class GatewayActor:
    """One front door: HTTP and gRPC servers over one InferenceGateway.

    Life: made → `bind` (ports) → `load` (tokenizer) → `serve` → … → `drain` → `stop`.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        logs = settings.config.logging
        setup_logging(settings.gateway_id, log_format=logs.format, level=logs.level, collector=settings.log_collector)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._settings = settings
        self._workers = WorkerHandles()
        self._socket: socket.socket | None = None
        self._tokenizer: TextTokenizer | None = None
        self._loop: InferenceGateway | None = None
        self._door = FrontDoor()
        self._bodies: Bodies | None = None
        self._http: uvicorn.Server | None = None
        self._grpc: grpc.aio.Server | None = None
        self._http_task: asyncio.Task[None] | None = None
        self._control_plane_watch: asyncio.Task[None] | None = None
        self._lost: list[WorkerId] = []
        self._lines = SummedLog(MonotonicClock())
        self._closed = asyncio.Event()

    async def bind(self) -> str | ServingError:
        """Takes the HTTP port, and says there that the model is being loaded; its address, or what is wrong."""
        try:
            self._socket = bind_http(self._settings.config.gateway.http)
        except ServingError as error:
            return error
        self._http = make_http_server(self._door)
        self._http_task = asyncio.create_task(self._http.serve(sockets=[self._socket]))
        return format_address(self._socket)

    async def load(self) -> ServingError | None:
        """Reads the tokenizer."""
        try:
            config = self._settings.config
            source, as_tokens = resolve_model(config.model.path), config.gateway.special_tokens_in_messages
            self._tokenizer = await asyncio.to_thread(load_tokenizer, source, special_tokens_in_messages=as_tokens)
        except ServingError as error:
            return error
        return None

    async def has_chat_template(self) -> bool:
        assert self._tokenizer is not None
        return self._tokenizer.chat_template is not None

    async def serve(
        self,
        card: ModelCard,
        infos: Sequence[WorkerInfo],
        workers: Mapping[WorkerId, ActorHandle],
        control_plane: ActorHandle,
    ) -> str | ServingError:
        """Starts both servers and admits requests; the gRPC address, or what is wrong."""
        assert self._tokenizer is not None
        assert self._socket is not None
        config, tokenizer = self._settings.config.gateway, self._tokenizer
        self._workers.connect(workers)
        decoding = (info for info in infos if info.role.can_decode)
        smallest = min(decoding, key=lambda info: info.num_kv_blocks)
        limits = RequestLimits(
            config.default_timeout_s,
            default_max_tokens=config.default_max_tokens,
            max_samples=self._settings.config.scheduler.max_running,
            num_kv_blocks=smallest.num_kv_blocks,
            block_size=smallest.kv_spec.block_size,
        )
        addresses = {"http": format_address(self._socket), "grpc": config.grpc}
        loop = InferenceGateway(
            self._settings.gateway_id,
            card,
            tokenizer,
            RequestPreparer(tokenizer, card, limits),
            RemotePlacer(control_plane),
            self._workers,
            GatewayMetrics(card.name),
            MonotonicClock(),
            pools=ServingPools({info.worker_id: info.role for info in infos}),
            max_open_requests=config.max_open_requests,
            max_open_per_client=config.max_open_per_client,
            addresses=addresses,
        )
        self._loop = loop
        for worker_id in self._lost:  # while the cluster started
            await self.worker_lost(worker_id)
        self._control_plane_watch = asyncio.create_task(self._watch_control_plane(control_plane, loop))
        most_bytes, longest = config.max_body_mib * 2**20, tokenizer.longest_token_bytes
        max_bytes = largest_body(card.context_length, longest, most_bytes)
        self._bodies = Bodies(max_bytes, config.max_open_requests)
        try:
            self._grpc, port = await start_grpc_server(
                loop,
                config.grpc,
                max_message_bytes=largest_body(card.context_length, longest, most_bytes, is_json=False),
                max_calls=config.max_open_requests + _MORE_CALLS,
                bodies=self._bodies,
            )
        except ServingError as error:
            return error
        host, _ = split_address(config.grpc, field="gateway.grpc")
        addresses["grpc"] = f"{host}:{port}"
        app = build_app(loop, self._bodies, cors_origins=config.cors_origins, lines=self._lines)
        self._door.open(app)
        loop.start_admitting()
        freeze_collector()
        return addresses["grpc"]

    async def deliver(self, output: WorkerOutput) -> None:
        """What one step of one worker has for this gateway."""
        if self._loop is not None:
            self._loop.deliver(output)

    async def worker_lost(self, worker_id: WorkerId) -> None:
        if self._loop is None:
            self._lost.append(worker_id)
        else:
            self._loop.worker_lost(worker_id)  # its aborts still go out: a silent worker may live
        self._workers.forget(worker_id)

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests; returns when the open ones have ended."""
        if self._loop is not None:
            await self._loop.drain(timeout_s)

    async def stop(self) -> None:
        """Closes both servers and their ports."""
        if self._grpc is not None:
            await self._grpc.stop(1.0)
        if self._http is not None and self._http_task is not None:
            self._http.should_exit = True
            await self._http_task
        self._lines.flush()
        if self._socket is not None:
            self._socket.close()
        if self._bodies is not None:
            self._bodies.close()
        self._closed.set()

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def _watch_control_plane(self, control_plane: ActorHandle, loop: InferenceGateway) -> None:
        """Open as long as the control plane lives: its death is an answer to this call."""
        with contextlib.suppress(RayError):
            await control_plane.wait_closed.remote()
        loop.control_plane_lost()


def bind_http(address: str) -> socket.socket:
    """A listening socket. Raises ConfigError when the port is taken or the host is not ours."""
    host, port = split_address(address, field="gateway.http")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off on every connection.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"gateway.http: cannot listen on {address} ({error.strerror}); stop what uses the port, or choose "
            "another with --http HOST:PORT (port 0 takes any that is free)",
            field="gateway.http",
        ) from None
    listener.setblocking(False)
    return listener


def format_address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
