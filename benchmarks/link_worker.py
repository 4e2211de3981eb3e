"""A process of the handoff's benchmarks with a whole worker: its engine, its loop, its direct links.

It wires them by hand, so it imports more than 15 of our modules.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.link_nodes import LinkEnd, LinkSettings, link_device
from benchmarks.nodes import TIMEOUT_S
from benchmarks.offline import local_device
from engine.loader import resolve_dtype
from kv_transfer.link import ArrivedPart, WriteReceived, write_nothing
from phasewise.core.clock import MonotonicClock
from phasewise.core.config import build_config
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import AbortRequest, KVPart, PrefillTask, WorkerLoad, WorkerOutput
from phasewise.core.placement import Placement, WorkerRole
from phasewise.core.profile import DeviceProfile
from phasewise.core.request import Request, SamplingParams
from workers.assemble import Ports, assemble
from workers.build import LoadedEngine, worker_info
from workers.driver import WorkerDriver
from workers.prepare import prepare_engine
from workers.ranks import Ranks
from workers.settings import WorkerSettings


class WorkerEnd(LinkEnd):
    """A mixed worker whose loop runs on a thread; every request says where it is decoded."""

    def __init__(
        self,
        name: str,
        controls: Mapping[str, Connection],
        settings: LinkSettings,
        values: dict[str, Any],
        tensor_parallel: int = 1,
    ) -> None:
        # First: NCCL reads its channels once, before the ranks' communicator.
        link_device(settings.channels, is_only_user=tensor_parallel == 1)
        config = build_config(values, source="benchmark")
        worker_settings = WorkerSettings(
            name, WorkerRole.MIXED, local_device(), 1, config, tensor_parallel=tensor_parallel
        )
        self._ranks = Ranks(worker_settings) if tensor_parallel > 1 else None
        prepared = prepare_engine(worker_settings, lambda share: None, self._ranks)
        profile = DeviceProfile.linear(0, 0, 0, 0)
        dtype = resolve_dtype(config.model.dtype, worker_settings.device)
        engine = LoadedEngine(
            prepared.runner, prepared.cache, prepared.port, prepared.max_model_len, profile, dtype, self._ranks
        )
        self._worker: WorkerDriver | None = None
        super().__init__(name, controls, settings)
        self._spec = engine.port.spec
        self._vocab_size = prepared.vocab_size
        self._changed = threading.Condition()  # guards what comes out
        self._tokens: dict[str, list[int]] = {}
        self._num_finished = 0
        self._deliveries: deque[tuple[float, int]] = deque(maxlen=100_000)
        self._faults: list[str] = []
        info = worker_info(worker_settings, engine)
        ports = Ports(self, self, self, self.links)
        self._worker = assemble(info, engine.runner, engine.port, config, ports, MonotonicClock())
        self._loop = threading.Thread(target=self._worker.run, daemon=True)
        self._loop.start()

    def post(self, message: Any, arrived: ArrivedPart | None = None) -> None:
        assert self._worker is not None, "nobody sends before all processes are up"
        self._worker.post(message, arrived)

    def prepare_write(self, part: KVPart, wire: torch.Tensor) -> WriteReceived:
        return write_nothing if self._worker is None else self._worker.prepare_write(part, wire)

    def spec(self) -> KVCacheSpec:
        return self._spec

    def serve(self, decode: str, prefix: str, lengths: Sequence[int], max_tokens: int) -> float:
        """Prompts at once, to be decoded at `decode`: seconds until all have their first token."""
        with self._changed:
            self._tokens.clear()
        start_s = time.perf_counter()
        for i, length in enumerate(lengths):
            self._generate(f"{prefix}-{i}", length, max_tokens, decode)
        self._wait(lambda: len(self._tokens) == len(lengths))
        return self._deliveries[-1][0] - start_s

    def finished(self, count: int) -> None:
        """Waits until so many requests have ended here since the last time."""
        self._wait(lambda: self._num_finished >= count)
        with self._changed:
            self._num_finished -= count

    def tokens(self) -> dict[str, list[int]]:
        """What came out here since the last time, by request."""
        with self._changed:
            tokens, self._tokens = self._tokens, {}
        return tokens

    def fill(self, batch: int, context: int, max_tokens: int) -> None:
        """Returns when `batch` sequences are being decoded."""
        self.serve(self.name, "fill", [context] * batch, max_tokens)
        self._wait(lambda: all(len(tokens) > 10 for tokens in self._tokens.values()))

    def step_ms(self, num_steps: int) -> float:
        """The mean of the next decode steps."""
        with self._changed:
            self._deliveries.clear()
        self._wait(lambda: len(self._deliveries) > num_steps)
        with self._changed:
            times = [at_s for at_s, _ in self._deliveries]
        return 1000 * (times[num_steps] - times[0]) / num_steps

    def empty(self) -> None:
        """Ends what `fill` began."""
        for request_id in list(self._tokens):
            self._worker.post(AbortRequest(request_id))

    def num_checksum_failures(self) -> int:
        return self._worker.rounds.parts.receiver.incoming.counters.checksum_failures

    def close(self) -> None:
        self._worker.stop()
        self._loop.join(20.0)
        super().close()
        if self._ranks is not None:
            self._ranks.close()

    # ---- ports of the worker

    def deliver(self, gateway_id: str, output: WorkerOutput) -> None:
        with self._changed:
            num_tokens = 0
            for chunk in output.chunks:
                self._tokens.setdefault(chunk.request_id, []).extend(token.token_id for token in chunk.tokens)
                self._num_finished += chunk.finish_reason is not None
                num_tokens += len(chunk.tokens)
            if num_tokens:
                self._deliveries.append((time.perf_counter(), num_tokens))
            self._faults += [f"{failure.request_id}: {failure.message}" for failure in output.failures]
            self._changed.notify_all()

    def report(self, load: WorkerLoad) -> None:
        """LoadPort: nobody asks."""

    def _generate(self, request_id: str, length: int, max_tokens: int, decode: str) -> None:
        rng = random.Random(request_id)
        prompt = tuple(rng.randrange(self._vocab_size) for _ in range(length))
        request = Request(request_id, prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens))
        self._worker.post(PrefillTask(request, Placement(request_id, self.name, decode), "gateway", 2 * TIMEOUT_S))

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            is_met = self._changed.wait_for(lambda: self._faults or condition(), TIMEOUT_S)
        if self._faults or not is_met:
            raise RuntimeError(f"{self.name}: {self._faults[:3] or f'nothing for {TIMEOUT_S:.0f} s'}")
