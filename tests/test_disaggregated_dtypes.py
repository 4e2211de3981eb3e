"""KV that is not float32 all the way: fp8 caches, ends of unequal dtype, codecs on the wire."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.kv_cache import PagedKVCache
from engine.loader import LoadedModel
from engine.model_runner import ModelRunner
from kv_transfer.cache_port import CachePort
from kv_transfer.loopback_link import LoopbackLink
from phasewise.core.clock import ManualClock
from phasewise.core.config import build_config
from phasewise.core.kv_spec import FP8
from phasewise.core.messages import PrefillTask, WorkerInfo, WorkerLoad, WorkerMessage, WorkerOutput
from phasewise.core.placement import Placement, WorkerRole
from phasewise.core.profile import DeviceProfile
from phasewise.core.request import Request, SamplingParams
from tests.engine.conftest import SMALL, build_oracle, load, random_prompt
from workers.assemble import Ports, assemble
from workers.driver import WorkerDriver


class Workers:
    """Workers with fp8 caches in one thread; collects tokens and failures."""

    def __init__(
        self,
        loaded: LoadedModel,
        block_sizes: dict[str, int],
        cache_dtypes: dict[str, str],
        link_rate: float = 0.0,
        codec_rate: float = 0.0,
        dtype: str = FP8,
        **transfer: str,
    ) -> None:
        self.workers: dict[str, WorkerDriver] = {}
        self.caches: dict[str, PagedKVCache] = {}
        self.tokens: defaultdict[str, list[int]] = defaultdict(list)
        self.failures: list[str] = []
        mailboxes: dict[str, Any] = {}
        config = build_config(
            {
                "scheduler": {"token_budget": 16},
                "transfer": {"layerwise_threshold_tokens": 8, "layers_per_part": 1, **transfer},
            },
            source="test",
        )
        for worker_id, block_size in block_sizes.items():
            spec = loaded.kv_cache_spec(block_size, cache_dtypes.get(worker_id, dtype))
            cache = PagedKVCache(spec, 96, "cpu")
            cache.storage.fill_(torch.nan)
            runner = ModelRunner(loaded, cache, 256, attention="reference")
            role = WorkerRole(worker_id.partition("-")[0])
            profile = DeviceProfile.linear(0.0, 0.001, 0.0, 0.001)
            info = WorkerInfo(worker_id, role, 1, "here", "cpu", "float32", 1, spec, 96, 256, profile)
            ports = Ports(self, self, self, LoopbackLink(worker_id, mailboxes, rate=link_rate))
            self.caches[worker_id] = cache
            self.workers[worker_id] = assemble(
                info, runner, CachePort(cache, spec), config, ports, ManualClock(100.0), codec_bytes_per_s=codec_rate
            )
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
    kv_bytes = sum(map(len, prompts)) * loaded.kv_cache_spec(8, FP8).bytes_per_token
    sent_bytes = pair.workers["prefill-0"].load().counters["handoff_bytes_out"]
    assert kv_bytes < sent_bytes < 1.05 * kv_bytes, "the values, and a checksum for each part"


def stored(workers: Workers, worker_id: str, num_tokens: int) -> torch.Tensor:
    """The KV of the only prompt that a worker has seen, as float32.  # [num_layers, 2, num_tokens, heads, head_dim]"""
    storage = workers.caches[worker_id].storage.float()
    written = ~storage.isnan().flatten(3).any(-1).any(0).any(0)
    slots = written.nonzero()[:num_tokens, 0]
    return storage[:, :, slots]


@pytest.mark.parametrize(
    ("dtypes", "sections", "lossless"),
    [
        ({"prefill-0": "auto", "decode-0": FP8}, {}, False),
        ({"prefill-0": FP8, "decode-0": "auto"}, {}, True),
        ({"prefill-0": "auto", "decode-0": "auto"}, {"codec": "fp8"}, False),
        ({"prefill-0": "auto", "decode-0": "auto"}, {"codec": "int8"}, False),
        ({"prefill-0": "auto", "decode-0": "auto"}, {}, True),
    ],
)
def test_what_conversions_and_codecs_leave_of_the_kv(
    tmp_path: Path, dtypes: dict[str, str], sections: dict[str, str], lossless: bool
) -> None:
    build_oracle(transformers.LlamaConfig(**SMALL), tmp_path)
    loaded, prompt = load(tmp_path), random_prompt(64)
    pair = Workers(loaded, {"prefill-0": 16, "decode-0": 16}, dtypes, link_rate=1e6, codec_rate=1e9, **sections)
    (tokens,) = pair.run([prompt], "prefill-0", "decode-0", 5)
    assert not pair.failures and len(tokens) == 5
    sent, came = stored(pair, "prefill-0", 64), stored(pair, "decode-0", 64)
    assert torch.equal(sent, came) is lossless
    if sections.get("codec") == "int8":
        assert ((sent - came).abs() <= sent.abs().amax(-1, keepdim=True) / 254 * 1.001).all()
    else:
        assert torch.allclose(came, sent, rtol=2**-4, atol=2**-10), "e4m3 has three bits of mantissa"
    raw_bytes = 64 * loaded.kv_cache_spec(16, "auto").bytes_per_token
    sent_bytes = pair.workers["prefill-0"].load().counters["handoff_bytes_out"]
    assert (sent_bytes < 0.5 * raw_bytes) is (FP8 in dtypes.values() or bool(sections))


def test_a_codec_is_not_used_where_the_link_is_faster(tmp_path: Path) -> None:
    build_oracle(transformers.LlamaConfig(**SMALL), tmp_path)
    loaded = load(tmp_path)
    for link_rate, codec_rate in ((1e9, 1e6), (0.0, 1e9), (1e6, 0.0)):
        pair = Workers(loaded, {"prefill-0": 16, "decode-0": 16}, {}, link_rate, codec_rate, dtype="auto", codec="int8")
        pair.run([random_prompt(64)], "prefill-0", "decode-0", 5)
        assert torch.equal(stored(pair, "prefill-0", 64), stored(pair, "decode-0", 64))
