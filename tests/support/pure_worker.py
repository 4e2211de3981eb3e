"""A worker's rounds alone: no thread, no engine, no tensor. A test is its driver. Nothing here needs torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from engine.batch import StepResult
from kv_transfer.cache_protocol import KVPlace
from phasewise.core.clock import ManualClock
from phasewise.core.config import build_config
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import (
    KVCommit,
    KVPart,
    NewTokens,
    PrefillTask,
    RequestFailed,
    WorkerInfo,
    WorkerLoad,
    WorkerMessage,
    WorkerOutput,
)
from phasewise.core.placement import Placement, WorkerId, WorkerRole
from phasewise.core.profile import DeviceProfile
from phasewise.core.request import Request, SampledToken, SamplingParams
from workers.assemble import Ports, make_round
from workers.round import Step

SPEC = KVCacheSpec(num_layers=2, num_kv_heads=1, head_dim=2, block_size=4, dtype="float32", model_fingerprint="pure")


class PureCache:
    """A worker's cache without KV in it."""

    spec = SPEC
    packs_inside_steps = True
    num_free = 100

    @property
    def cache(self) -> PureCache:
        return self

    @property
    def swap(self) -> PureCache:
        return self

    def give_back(self, places: Iterable[int]) -> None: ...

    def copy_block(self, source: int, target: int) -> None: ...

    def copy_out(self, blocks: list[int]) -> list[int]:
        return blocks

    def copy_in(self, places: list[int], blocks: list[int]) -> None: ...

    def mark(self) -> None: ...

    def beside(self, mark: object) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def aside(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def rejoin(self) -> None: ...

    def pack(self, *_: object) -> None: ...

    def prepare(self, place: KVPlace) -> None: ...

    def can_write_beside(self, place: KVPlace) -> bool:
        return False

    def unpacking(self, *_: object) -> Callable[[], None]:
        return lambda: None


class PureLink:
    """Keeps the parts that are sent. It has `num_buffers` buffers; a test takes parts out of `parts`."""

    is_full = True
    uses_store = False

    def __init__(self) -> None:
        self.num_buffers = 100
        self.parts: list[KVPart] = []

    def name(self, peer: WorkerId) -> str:
        return "pure"

    def part_s(self, peer: WorkerId) -> float:
        return 0.0

    def max_part_bytes(self, peer: WorkerId) -> int:
        return 2**20

    def bytes_per_s(self, peer: WorkerId) -> float:
        return 0.0

    def buffer(self, peer: WorkerId, num_bytes: int) -> object | None:
        return object() if len(self.parts) < self.num_buffers else None

    def give_back(self, wire: Any) -> None: ...

    def send_part(self, peer: WorkerId, part: KVPart, wire: Any) -> None:
        self.parts.append(part)

    def send_commit(self, peer: WorkerId, commit: KVCommit) -> bool:
        return False

    def forget(self, peer: WorkerId) -> None: ...

    def close(self) -> None: ...


class PureWorker:
    """One worker and all that it says. A step's tokens are the positions that they will have."""

    def __init__(self, role: str = "mixed", *, num_blocks: int = 64, **sections: Any) -> None:
        self.clock = ManualClock(100.0)
        self.link = PureLink()
        self.sent: list[tuple[WorkerId, WorkerMessage]] = []
        self.chunks: list[NewTokens] = []
        self.failures: list[RequestFailed] = []
        self.loads: list[WorkerLoad] = []
        config = build_config(sections, source="test")
        profile = DeviceProfile.linear(0.0, 0.001, 0.0, 0.001)
        info = WorkerInfo(
            f"{role}-0", WorkerRole(role), 1, "here", "cpu", "float32", 1, SPEC, num_blocks, 10_000, profile
        )
        self.rounds = make_round(
            info, PureCache(), config, Ports(self, self, self, self.link), self.clock, nullcontext()
        )

    # ---- ports

    def send(self, worker_id: WorkerId, message: WorkerMessage) -> None:
        self.sent.append((worker_id, message))

    def deliver(self, gateway_id: str, output: WorkerOutput) -> None:
        self.chunks += output.chunks
        self.failures += output.failures

    def report(self, load: WorkerLoad) -> None:
        self.loads.append(load)

    # ---- driving

    def ask(
        self, request_id: str, num_tokens: int, decode: str = "", *, time_left_s: float = 60.0, **sampling: Any
    ) -> None:
        request = Request(request_id, tuple(range(num_tokens)), SamplingParams(**sampling))
        placement = Placement(request_id, self.rounds.info.worker_id, decode or self.rounds.info.worker_id)
        self.rounds.take(PrefillTask(request, placement, "gateway-0", time_left_s))

    def begin(self) -> Step | None:
        """Begins a step and gives it to an engine: its layers are computed at once, its tokens come with `end`."""
        step = self.rounds.begin()
        if step is not None:
            for layer in range(SPEC.num_layers):
                self.rounds.layers_done(step, layer, 1)
            self.rounds.submitted(step)
        self.flush()
        return step

    def end(self, step: Step, *, unusable: Iterable[str] = ()) -> None:
        """The engine has computed the step; the logits of the requests `unusable` were NaN."""
        tokens = tuple(
            None
            if item.sequence.request_id in unusable
            else tuple(SampledToken(item.start + item.num_tokens) for _ in range(item.num_samples))
            for item in step.batch.items
        )
        self.rounds.end(step, StepResult(tokens, ((),) * len(tokens)))
        self.flush()

    def run(self) -> None:
        """Steps until there is none to begin."""
        while (step := self.begin()) is not None:
            self.end(step)

    def flush(self) -> None:
        self.rounds.parts.outbox.flush()
        self.rounds.parts.peers.flush_deferred()

    def output(self, request_id: str) -> list[int]:
        chunks = [chunk for chunk in self.chunks if chunk.request_id == request_id]
        assert [chunk.position for chunk in chunks] == list(range(len(chunks)))
        return [token.token_id for chunk in chunks for token in chunk.tokens]

    def said(self, kind: type) -> list[Any]:
        return [message for _, message in self.sent if isinstance(message, kind)]

    def assert_empty(self) -> None:
        self.rounds.parts.blocks.check()
        load = self.rounds.load()
        assert load.num_used_blocks == load.num_waiting == load.num_running == load.num_reservations == 0
