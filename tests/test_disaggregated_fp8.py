"""fp8 KV through a handoff: the tokens of a prefill and a decode worker are those of one mixed worker."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.kv_cache import PagedKVCache
from engine.loader import LoadedModel
from engine.model_runner import ModelRunner
from kv_transfer.loopback_link import LoopbackLink
from phasewise.core.clock import ManualClock
from phasewise.core.config import build_config
from phasewise.core.kv_spec import FP8
from phasewise.core.messages import PrefillTask, WorkerInfo, WorkerLoad, WorkerMessage, WorkerOutput
from phasewise.core.placement import Placement, WorkerRole
from phasewise.core.profile import DeviceProfile
from phasewise.core.request import Request, SamplingParams
from tests.engine.conftest import SMALL, build_oracle, load, random_prompt
from workers.build import Ports, assemble
from workers.worker import Worker


class Workers:
    """Workers with fp8 caches in one thread; collects tokens and failures."""

    def __init__(self, loaded: LoadedModel, block_sizes: dict[str, int], cache_dtypes: dict[str, str]) -> None:
        self.workers: dict[str, Worker] = {}
        self.tokens: defaultdict[str, list[int]] = defaultdict(list)
        self.failures: list[str] = []
        mailboxes: dict[str, Any] = {}
        ports = Ports(self, self, self, LoopbackLink(mailboxes))
        config = build_config(
            {
                "scheduler": {"token_budget": 16},
                "transfer": {"layerwise_threshold_tokens": 8, "layers_per_part": 1},
            },
            source="test",
        )
        for worker_id, block_size in block_sizes.items():
            spec = loaded.kv_cache_spec(block_size, cache_dtypes.get(worker_id, FP8))
            cache = PagedKVCache(spec, 96, "cpu")
            cache.storage.fill_(torch.nan)
            runner = ModelRunner(loaded, cache, 256, attention="reference")
            role = WorkerRole(worker_id.partition("-")[0])
            profile = DeviceProfile.linear(0.0, 0.001, 0.0, 0.001)
            info = WorkerInfo(worker_id, role, 1, "here", "cpu", "float32", 1, spec, 96, 256, profile)
            self.workers[worker_id] = assemble(info, runner, cache, config, ports, ManualClock(100.0))
            mailboxes[worker_id] = self.workers[worker_id].post

    def send(self, worker_id: str, message: WorkerMessage) -> None:
        self.workers[worker_id].post(message)

    def deliver(self, gateway_id: str, output: WorkerOutput) -> None:
        for chunk in output.chunks:
            self.tokens[chunk.request_id] += [token.token_id for token in chunk.tokens]
        self.failures += [failure.message for failure in output.failures]

    def report(self, load: WorkerLoad) -> None: ...

    def run(self, prompts: list[list[int]], prefill: str, decode: str, num_tokens: int) -> list[list[int]]:
        for i, prompt in enumerate(prompts):
            request = Request(f"r{i}", tuple(prompt), SamplingParams(temperature=0.0, max_tokens=num_tokens))
            task = PrefillTask(request, Placement(f"r{i}", prefill, decode), "gateway", 60.0)
            self.workers[prefill].post(task)
        for _ in range(2000):
            for worker in self.workers.values():
                worker.round()
            if self.failures or sum(map(len, self.tokens.values())) == len(prompts) * num_tokens:
                break
        return [self.tokens[f"r{i}"] for i in range(len(prompts))]


def test_a_handoff_of_fp8_kv_changes_no_token(tmp_path: Path) -> None:
    build_oracle(transformers.LlamaConfig(**SMALL), tmp_path)
    loaded, rng = load(tmp_path), random.Random(4)
    prompts = [random_prompt(rng.randrange(1, 90), seed=i) for i in range(6)]
    alone = Workers(loaded, {"mixed-0": 16}, {}).run(prompts, "mixed-0", "mixed-0", 20)
    pair = Workers(loaded, {"prefill-0": 16, "decode-0": 8}, {})
    assert pair.run(prompts, "prefill-0", "decode-0", 20) == alone
    assert not pair.failures and all(len(tokens) == 20 for tokens in alone)
    sent = pair.workers["prefill-0"].load().counters
    assert sent["handoff_bytes_out"] == sum(map(len, prompts)) * loaded.kv_cache_spec(8, FP8).bytes_per_token


def test_ends_with_unequal_caches_refuse_each_other(tmp_path: Path) -> None:
    build_oracle(transformers.LlamaConfig(**SMALL), tmp_path)
    pair = Workers(load(tmp_path), {"prefill-0": 16, "decode-0": 16}, {"decode-0": "auto"})
    pair.run([random_prompt(20)], "prefill-0", "decode-0", 5)
    assert pair.failures and "dtype: float32 here, fp8_e4m3 there" in pair.failures[0]
