"""A WorkerBox behind a real gateway loop and a real cluster scheduler, in one thread: what a client sees of faults."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from control_plane.cluster_scheduler import ClusterScheduler
from control_plane.gateway.inference import InferenceGateway
from control_plane.gateway.preparation import RequestLimits, RequestPreparer
from control_plane.gateway.service import GenerateInput, ModelCard, SamplingInput
from control_plane.gateway.streams import OpenStream
from control_plane.gateway.text.tokenizer import TextTokenizer
from control_plane.gateway.text.vocabulary import IdVocabulary
from control_plane.metrics import GatewayMetrics
from control_plane.serving_pools import ServingPools
from phasewise.core.lifecycle import Stage
from phasewise.core.messages import PeerLost, PrefillTask, WorkerInfo, WorkerLoad, WorkerOutput
from phasewise.core.placement import Placement, PlaceRequest, WorkerId
from tests.support.generated_stream import deltas_of
from tests.support.scripted_engine import VOCAB
from tests.support.worker_box import WorkerBox

_MAX_TURNS = 3000


class GatewayBox(WorkerBox):
    """Requests come in by `ask`, answers are what their streams give.

    Attributes:
        ids: token ids by (client's id, sample index), as the stream has given them.
        before_deliver: sees every output of a worker before the gateway does.
    """

    def __init__(self, roles: dict[WorkerId, str], *, max_waiting: int = 100, **options: Any) -> None:
        super().__init__(roles, **options)
        self.scheduler = ClusterScheduler(self.clock, max_waiting=max_waiting)
        for worker in self.workers.values():
            self.scheduler.worker_joined(worker.info)
        tokenizer = TextTokenizer(IdVocabulary(VOCAB), vocab_size=VOCAB, eos_token_ids=(), chat_template=None)
        card = ModelCard("m", 100_000, VOCAB, "float32", 1, (), False)
        self.metrics = GatewayMetrics("m")
        self.loop = InferenceGateway(
            "gateway-0",
            card,
            tokenizer,
            RequestPreparer(tokenizer, card, RequestLimits(600.0)),
            self,
            self,
            self.metrics,
            self.clock,
            pools=ServingPools({worker.info.worker_id: worker.info.role for worker in self.workers.values()}),
            max_open_requests=100,
            addresses={},
        )
        self.loop.start_admitting()
        self.streams: dict[str, OpenStream] = {}
        self.ids: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        self.text: defaultdict[tuple[str, int], str] = defaultdict(str)
        self.before_deliver: Callable[[WorkerOutput], None] = lambda output: None
        self._readers: dict[str, asyncio.Task[None]] = {}

    # ---- ports

    def deliver(self, gateway_id: str, output: WorkerOutput) -> None:
        super().deliver(gateway_id, output)
        self.before_deliver(output)
        self.loop.deliver(output)

    def report(self, load: WorkerLoad) -> None:
        super().report(load)
        self.scheduler.worker_load(load)

    async def place(self, request: PlaceRequest, timeout_s: float) -> Placement:
        return self.scheduler.place(request)

    def first_token(self, request_id: str) -> None:
        self.scheduler.first_token(request_id)

    def finished(self, request_id: str, num_output_tokens: int) -> None:
        self.scheduler.finished(request_id, num_output_tokens)

    async def snapshot(self) -> list[tuple[WorkerInfo, WorkerLoad]]:
        return [(m.info, m.load) for m in self.scheduler.registry.members()]

    # ---- driving

    async def ask(self, request_id: str, prompt: list[int], timeout_s: float = 600.0, **sampling: Any) -> OpenStream:
        options = SamplingInput(temperature=0.0, **sampling)
        given = GenerateInput(token_ids=tuple(prompt), sampling=options, request_id=request_id, timeout_s=timeout_s)
        stream = self.streams[request_id] = await self.loop.generate(given)
        self._readers[request_id] = asyncio.create_task(self._read(stream))
        return stream

    async def turn(self) -> None:
        self.round()
        for _ in range(4):  # a recovery is a task: placing, sending, waking the reader
            await asyncio.sleep(0)

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(_MAX_TURNS):
            if condition():
                return
            await self.turn()
        raise AssertionError("the condition never came true")

    async def answer(self, request_id: str) -> None:
        """Returns when the stream has ended; raises its error."""
        reader = self._readers[request_id]
        await self.until(reader.done)
        reader.result()

    def lose(self, worker_id: WorkerId, *, gateway_first: bool = True) -> None:
        """The worker is dead, and the control plane says so; to the workers a round before the gateway, or after."""
        self.lost.add(worker_id)
        self.scheduler.worker_lost(worker_id)
        if gateway_first:
            self.loop.worker_lost(worker_id)
        for other in self.workers:
            if other not in self.lost:
                self.workers[other].post(PeerLost(worker_id))
        if not gateway_first:
            self.round()
            self.loop.worker_lost(worker_id)

    def stages_of(self, request_id: str) -> list[Stage]:
        return [event.stage for event in self.streams[request_id].record.events]

    def tasks(self) -> list[tuple[WorkerId, PrefillTask]]:
        return [(worker_id, m) for worker_id, m in self.sent if isinstance(m, PrefillTask)]

    async def assert_nothing_left(self) -> None:
        """Neither at the workers, nor in the gateway, nor in the ledger."""
        await self.until(lambda: not any(self.holds(w) for w in self.workers if w not in self.lost))
        self.assert_empty()
        assert self.loop.is_idle
        assert self.scheduler.num_open == 0
        for worker_id, work in self.scheduler.candidates.items():
            left = (
                work.num_pending_prompts,
                work.num_pending_prompt_tokens,
                work.num_decoding,
                round(work.num_pledged_tokens, 6),
            )
            assert left == (0, 0, 0, 0), worker_id

    async def _read(self, stream: OpenStream) -> None:
        async for delta in deltas_of(stream):
            self.ids[(stream.request_id, delta.sample_index)].extend(delta.token_ids)
            self.text[(stream.request_id, delta.sample_index)] += delta.text
