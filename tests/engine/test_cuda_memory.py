"""A worker's memory on a real GPU: the cache takes what is left, the largest step still fits, a lack has words."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.kv_cache import PagedKVCache
from phasewise.core.clock import MonotonicClock
from phasewise.core.config import build_config
from phasewise.core.errors import ConfigError
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.placement import WorkerRole
from workers.build import load_engine
from workers.prepare import prepare_engine
from workers.profiler import full_grid, made_up_step, measure_profile, measure_rates
from workers.settings import WorkerSettings
from workers.sizing import CudaMemory, GpuSizer, StepLimits, largest_steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore"),  # of other versions of torch and Triton than the pinned ones
]

MIB = 2**20
LATER = 256 * MIB  # kernels and plans of libraries, which the driver loads when they are first used
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 64_000,
    "max_position_embeddings": 16_384,
}
MAX_RUNNING = 48


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    CudaMemory("cuda").release()
    yield
    CudaMemory("cuda").release()


def settings(folder: Path, shape: dict[str, Any] | None = None, **sections: Any) -> WorkerSettings:
    (folder / "config.json").write_text(json.dumps({**SHAPE, **(shape or {})}))
    values = {"scheduler": {"max_running": MAX_RUNNING}, **sections}
    values["model"] = {"path": f"random:{folder / 'config.json'}", **values.get("model", {})}
    return WorkerSettings("mixed-0", WorkerRole.MIXED, "cuda", 1, build_config(values, source="test"))


def in_use() -> tuple[int, int]:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free, total


def test_the_cache_takes_what_is_left_and_the_largest_step_still_fits(tmp_path: Path) -> None:
    worker = settings(tmp_path, cache={"gpu_memory_utilization": 0.5})
    engine = load_engine(worker, lambda share: None, MonotonicClock())
    used, total = in_use()
    bound = int(total * 0.5)
    print(f"in use {used / MIB:.0f} of {bound / MIB:.0f} MiB, cache {engine.cache.storage.nbytes / MIB:.0f} MiB")
    assert bound - 2048 * MIB < used <= bound + LATER
    assert engine.max_model_len == 16_384
    for items in largest_steps(StepLimits(16_384, 2048, MAX_RUNNING)):
        engine.runner.run(made_up_step(items, 16, 64_000, shared_block=True))
    used, _ = in_use()
    print(f"after the largest step {used / MIB:.0f} MiB")
    assert used <= bound + LATER


def test_what_was_built_for_the_profile_run_is_gone(tmp_path: Path) -> None:
    free_before, _ = torch.cuda.mem_get_info()
    worker = settings(tmp_path, cache={"gpu_memory_utilization": 0.5})
    engine = prepare_engine(worker, lambda share: None)
    del engine
    CudaMemory("cuda").release()
    free_after, _ = torch.cuda.mem_get_info()
    assert free_before - free_after < 512 * MIB, "libraries and compiled kernels alone"


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    huge = {"hidden_size": 16_384, "intermediate_size": 65_536, "num_hidden_layers": 120}
    with pytest.raises(ConfigError, match=r"model\.path: the weights need \d+\.\d GiB and this GPU has .* × 0\.90; "):
        load_engine(settings(tmp_path, huge), lambda share: None, MonotonicClock())


def test_a_context_that_does_not_fit_says_what_would(tmp_path: Path) -> None:
    long = {"max_position_embeddings": 2**17, "num_key_value_heads": 16}  # 4 GiB of KV a sequence
    few = 4.5 * 2**30 / in_use()[1]
    worker = settings(tmp_path, long, model={"max_model_len": 2**17}, cache={"gpu_memory_utilization": few})
    with pytest.raises(ConfigError, match=r"GiB too little for one sequence of model\.max_model_len 131072: .*lower"):
        load_engine(worker, lambda share: None, MonotonicClock())


def test_running_out_of_memory_has_words() -> None:
    sizer = GpuSizer(CudaMemory("cuda"), 0.9)
    with pytest.raises(ConfigError, match="ran out of memory while testing"), sizer.explained("testing", "stop"):
        torch.empty(2**40, dtype=torch.uint8, device="cuda")


def test_a_profile_of_a_gpu(tmp_path: Path) -> None:
    worker = settings(tmp_path, cache={"kv_cache_gib": 4.0})
    clock = MonotonicClock()
    engine = prepare_engine(worker, lambda share: None)
    profile = measure_profile(engine, full_grid(2048, MAX_RUNNING), clock, 10.0)
    facts = measure_rates(engine, clock)
    print(profile.to_json(), facts)
    assert facts.device == torch.cuda.get_device_name() and facts.memory_bytes_per_s > 1e12
    assert profile.prefill.largest_size == 2048 and profile.decode.largest_size == MAX_RUNNING
    assert profile.prefill_s(2048, 8192) > profile.prefill_s(256)


def test_swapped_kv_comes_back_bit_for_bit_from_memory_that_is_pinned_once() -> None:
    spec, rng = KVCacheSpec(3, 2, 64, 16, "bfloat16"), random.Random(0)
    for _ in range(3):  # memory that stayed pinned could not be pinned again
        cache = PagedKVCache(spec, 100, "cuda", num_swap_blocks=100)
        assert cache.swap.is_pinned
        cache.storage.copy_(torch.randn(cache.storage.shape))
        before, held = cache.blocks_view().clone(), list(range(100))
        rng.shuffle(held)
        swapped = [(blocks, cache.copy_out(blocks)) for blocks in (held[:3], held[3:43], held[43:])]
        cache.storage.fill_(torch.nan)  # enqueued behind copies that may not be over
        cache.copy_in(swapped[1][1], swapped[1][0])
        again = cache.copy_out(swapped[1][0])
        for blocks, places in (swapped[0], (swapped[1][0], again), swapped[2]):
            cache.copy_in(places, blocks)
        assert torch.equal(cache.blocks_view(), before)
        assert cache.swap.num_free == 100
        del cache
