"""What the servers call: a request is checked, tokenised and started; the gateway's state is told.

    generate()   check and tokenise (preparation.py) → an open request (driver.py) → its stream (streams.py)
    deliver()    what workers say → the open requests

What becomes of an open request is decided in attempts.py. More than 15 of our modules are imported: here the parts of a
gateway, and what is reported of its cluster, meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from control_plane.gateway.cluster_report import worker_report
from control_plane.gateway.driver import RequestDriver
from control_plane.gateway.link_report import link_report
from control_plane.gateway.placer import Placer
from control_plane.gateway.preparation import RequestPreparer
from control_plane.gateway.quota import Quota, share_of
from control_plane.gateway.request_ids import ClaimedId, RequestIds
from control_plane.gateway.service import GenerateInput, ModelCard
from control_plane.gateway.streams import OpenStream
from control_plane.gateway.text.threads import TextThreads, num_text_characters
from control_plane.gateway.text.tokenizer import TextTokenizer
from control_plane.link_survey import check_probes
from control_plane.metrics import GatewayMetrics
from control_plane.serving_pools import ServingPools
from phasewise.core.clock import Clock
from phasewise.core.errors import ServingError, Unavailable
from phasewise.core.heartbeat import OpenAttempt
from phasewise.core.messages import WorkerOutput
from phasewise.core.placement import WorkerId, WorkerRole
from phasewise.core.ports import PeerPort


class InferenceGateway:
    """Implements InferenceService (service.py); workers and the control plane call it, too.

    There are more than 20 methods: one for each question of the servers and for each event of the cluster.
    """

    def __init__(
        self,
        gateway_id: str,
        card: ModelCard,
        tokenizer: TextTokenizer,
        preparer: RequestPreparer,
        placer: Placer,
        workers: PeerPort,
        metrics: GatewayMetrics,
        clock: Clock,
        *,
        pools: ServingPools,
        max_open_requests: int,
        addresses: Mapping[str, str],
        max_open_per_client: int | None = None,
    ) -> None:
        self.gateway_id = gateway_id
        self.model = card
        self._tokenizer = tokenizer
        self._preparer = preparer
        self._placer = placer
        self._metrics = metrics
        self._clock = clock
        self._quota = Quota("requests open", max_open_requests, max_open_per_client or share_of(max_open_requests))
        self._requests = RequestDriver(gateway_id, tokenizer, placer, workers, metrics, clock, self._quota)
        self._ids = RequestIds()
        self._pools = pools
        self._threads = TextThreads()
        self._addresses = addresses
        self._started_s = clock.now_s()
        self._is_admitting = False

    # ---- InferenceService

    @property
    def is_ready(self) -> bool:
        return not self.unready_reason

    @property
    def unready_reason(self) -> str:
        if reason := self._pools.why_unservable:
            return reason
        return "" if self._is_admitting else "the server is not taking requests: it is starting or shutting down"

    def claim_id(self, request_id: str) -> ClaimedId:
        try:
            return self._ids.claim(request_id)
        except ServingError as error:
            self._metrics.request_refused(error.code)
            raise

    async def generate(self, request: GenerateInput) -> OpenStream:
        """Accepts a request and starts it. An error that is raised was counted, and nothing is left of the request."""
        try:
            self._check_admission()
            self._quota.take(request.client)
        except ServingError as error:
            self._metrics.request_refused(error.code)
            raise
        try:
            # A long text is tokenised on a thread of its own, so that streams go on meanwhile.
            num_characters = num_text_characters(request.text, request.messages)
            num_characters += sum(len(sample.token_ids) for sample in request.resume_after)
            prepared = await self._threads.run(num_characters, partial(self._preparer.prepare, request))
            self._check_admission()  # much may have happened meanwhile
            own_id = self._ids.claim(prepared.request.request_id) if request.claimed is None else None
            stream = self._requests.open(prepared, request.client, own_id)
        except BaseException as error:  # a cancellation, too, gives the place back; all are raised again
            self._quota.give_back(request.client)
            if isinstance(error, ServingError):
                self._metrics.request_refused(error.code)
            raise
        await self._requests.start(stream)
        return stream

    async def tokenize(
        self, text: str | None, messages: tuple[Mapping[str, Any], ...] | None, model: str | None
    ) -> list[int]:
        work = partial(self._preparer.tokenize, text, messages, model)
        return await self._threads.run(num_text_characters(text, messages), work)

    def detokenize(self, token_ids: Sequence[int], model: str | None) -> str:
        self._preparer.check_model(model)
        self._preparer.check_detokenize(token_ids)
        return self._tokenizer.decode(token_ids)

    async def status(self) -> dict[str, Any]:
        state = "ready" if self.is_ready else "unavailable" if self._is_admitting else "draining"
        workers = await self._placer.snapshot()
        return {
            "cluster": {
                "model": self.model.name,
                "state": state,
                "uptime_s": round(self._clock.now_s() - self._started_s, 3),
                **self._addresses,
            },
            "workers": [worker_report(info, load) for info, load in workers],
            "gateway": {
                "id": self.gateway_id,
                "open_requests": self._requests.num_open,
                "waiting": self._requests.num_waiting,
            },
        }

    async def links(self) -> dict[str, Any]:
        return link_report(await self._placer.links(), self.model.context_length)

    async def probe_links(self, sizes: Sequence[int], timeout_s: float) -> dict[str, Any]:
        check_probes(sizes, timeout_s)
        return link_report(await self._placer.probe_links(sizes, timeout_s), self.model.context_length)

    async def metrics_text(self) -> tuple[bytes, str]:
        return self._metrics.render(await self._placer.snapshot())

    # ---- life of the gateway

    @property
    def is_idle(self) -> bool:
        """True when nothing of any request is left."""
        return self._requests.is_idle

    def start_admitting(self) -> None:
        self._is_admitting = True

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests and waits for the open ones; what is left after `timeout_s` is ended."""
        self._is_admitting = False
        await self._requests.drain(timeout_s)

    # ---- from workers and the control plane

    def deliver(self, output: WorkerOutput) -> None:
        """Takes what one step of one worker has for this gateway."""
        self._requests.deliver(output)

    def worker_lost(self, worker_id: WorkerId) -> None:
        """Moves what the worker still held elsewhere."""
        self._pools.worker_lost(worker_id)
        self._requests.worker_lost(worker_id)

    def worker_ready(self, worker_id: WorkerId, role: WorkerRole) -> None:
        """The worker takes requests."""
        self._pools.worker_ready(worker_id, role)

    def worker_paused(self, worker_id: WorkerId) -> None:
        """The worker takes no new requests, and goes on with those that it has."""
        self._pools.worker_lost(worker_id)

    def open_attempts(self) -> tuple[OpenAttempt, ...]:
        """What is placed, for a control plane that builds its ledger anew."""
        return self._requests.open_attempts()

    def tokens_lost(self, worker_id: WorkerId) -> None:
        """Places again what may lack tokens of a worker that lives."""
        self._requests.tokens_lost(worker_id)

    def _check_admission(self) -> None:
        if reason := self.unready_reason:
            raise Unavailable(reason, retry_after_s=2.0)
