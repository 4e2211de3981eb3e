"""How many KV blocks a GPU gets, and the words of every refusal. No GPU: the memory is a number that tests move."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.kv_cache import PagedKVCache
from engine.loader import LoadedModel, load_model
from engine.model_config import ModelConfig, read_model_config
from engine.model_runner import ModelRunner
from engine.sharding import Shard
from engine.tensor_parallel import Group
from phasewise.core.config import build_config
from phasewise.core.errors import ConfigError
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.model_source import ModelSource
from phasewise.core.placement import WorkerRole
from workers.memory import (
    GIB,
    GpuMemory,
    LargestStep,
    ParameterCount,
    blocks_of_size,
    check_weights_fit,
    num_kv_blocks,
    out_of_memory,
)
from workers.prepare import prepare_engine
from workers.profiler import PreparedEngine
from workers.settings import WorkerSettings
from workers.sizing import GpuSizer, StepLimits, largest_steps

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
SPEC_8B = KVCacheSpec(32, 8, 128, 16, "bfloat16")
H100 = GpuMemory(int(79.1 * GIB), int(0.5 * GIB), 0.9)
STEP_8B = LargestStep(2048, 256, 15 * GIB, 18 * GIB)


def config_of(folder: Path, **values: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, **values}))
    return read_model_config(folder / "config.json")


TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 256,
}


def load(folder: Path, **values: Any) -> LoadedModel:
    config_of(folder, **TINY, **values)
    source = ModelSource("random", folder / "config.json", "tiny")
    return load_model(source, dtype="float32", device="cpu", seed=0, progress=lambda share: None)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"architectures": ["Qwen2ForCausalLM"]},
        {"architectures": ["Qwen3ForCausalLM"]},
    ],
)
def test_parameters_are_counted_as_the_model_has_them(values: dict[str, Any], num_ranks: int, tmp_path: Path) -> None:
    from engine.models.registry import build_model

    config = config_of(tmp_path, **TINY, **values)
    shard = Shard(0, num_ranks)
    views = build_model(config, torch.float32, torch.device("cpu"), Group(shard)).weight_views()
    count = ParameterCount.of(config, shard)
    assert count.products + count.others == sum(view.numel() for view in views.values())
    products = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    in_products = [v for n, v in views.items() if n.endswith(".weight") and n.split(".")[-2] in products]
    assert count.products == sum(view.numel() for view in in_products)


def test_8b_weights(tmp_path: Path) -> None:
    assert ParameterCount.of(config_of(tmp_path)).num_bytes("bfloat16") == 2 * 8_030_261_248


def test_weights_that_fit_are_not_mentioned() -> None:
    check_weights_fit(H100, 70 * GIB, {})


def test_weights_that_do_not_fit_say_what_would() -> None:
    with pytest.raises(ConfigError) as caught:
        check_weights_fit(H100, 140 * GIB, {"model.dtype bfloat16": 70 * GIB, "something else": 100 * GIB})
    assert caught.value.message == (
        "model.path: the weights need 140.0 GiB and this GPU has 79.1 GiB × 0.90; use model.dtype bfloat16 "
        "(70.0 GiB), or a GPU with at least 156 GiB, or a smaller model"
    )
    with pytest.raises(ConfigError, match=r"0\.90, of which 20\.0 GiB were in use before; use cache\.gpu_memory_ut"):
        check_weights_fit(GpuMemory(80 * GIB, 20 * GIB, 0.9), 55 * GIB, {})


def test_blocks_are_what_is_left_beside_the_largest_step() -> None:
    left = int(int(79.1 * GIB) * 0.9) - 18 * GIB
    assert num_kv_blocks(H100, STEP_8B, SPEC_8B, None) == left // SPEC_8B.bytes_per_block == 27_233
    assert num_kv_blocks(H100, STEP_8B, SPEC_8B, 131_072) == 27_233
    half = GpuMemory(H100.total_bytes, H100.others_bytes, 0.5)
    assert num_kv_blocks(half, STEP_8B, SPEC_8B, None) < 27_233 // 2


@pytest.mark.parametrize(
    ("total_gib", "max_model_len", "expected"),
    [
        (
            24,
            131_072,
            "cache: 12.4 GiB too little for one sequence of model.max_model_len 131072: this GPU has 24.0 GiB × 0.90; "
            "the weights take 15.0 GiB and the largest step 2.5 GiB; lower model.max_model_len to 29488, or use a GPU "
            "with more memory",
        ),
        (
            24,
            32_768,
            "cache: 0.4 GiB too little for one sequence of model.max_model_len 32768: this GPU has 24.0 GiB × 0.90; "
            "the weights take 15.0 GiB and the largest step 2.5 GiB; lower model.max_model_len to 29488, or raise "
            "cache.gpu_memory_utilization to 0.92, or lower scheduler.max_running (256) or scheduler.token_budget "
            "(2048), or use a GPU with more memory",
        ),
        (
            19,
            None,
            "cache: 0.9 GiB too little for two KV blocks: this GPU has 19.0 GiB × 0.90; the weights take 15.0 GiB "
            "and the largest step 2.5 GiB; raise cache.gpu_memory_utilization to 0.95, or lower scheduler.max_running "
            "(256) or scheduler.token_budget (2048), or use a GPU with more memory",
        ),
    ],
)
def test_too_few_blocks_say_by_how_much_and_what_to_change(
    total_gib: int, max_model_len: int | None, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        num_kv_blocks(GpuMemory(total_gib * GIB, GIB // 2, 0.9), STEP_8B, SPEC_8B, max_model_len)
    assert caught.value.message == expected


def test_what_is_advised_is_enough() -> None:
    gpu = GpuMemory(24 * GIB, GIB // 2, 0.92)
    assert num_kv_blocks(gpu, STEP_8B, SPEC_8B, 32_768) >= 2048
    assert num_kv_blocks(GpuMemory(24 * GIB, GIB // 2, 0.9), STEP_8B, SPEC_8B, 29_488) == 1843


def test_a_cache_of_a_given_size() -> None:
    assert blocks_of_size(1.0, SPEC_8B, None) == 512
    assert blocks_of_size(1.0, SPEC_8B, 8192) == 512
    with pytest.raises(ConfigError, match=r"holds no two blocks of 2097152 bytes; give at least 0\.004$"):
        blocks_of_size(0.003, SPEC_8B, None)
    with pytest.raises(ConfigError, match=r"=1\.0 holds 8192 tokens, and model\.max_model_len is 8193; give at least"):
        blocks_of_size(1.0, SPEC_8B, 8193)


def test_the_largest_steps() -> None:
    first, second, third = largest_steps(StepLimits(131_072, 2048, 256))
    assert first == [(1, 1)] * 256 + [(0, 2048)]
    assert second == [(1, 1)] * 256 + [(129_024, 2048)]
    assert third == [(1, 1)] * 256
    short = largest_steps(StepLimits(100, 256, 2))
    assert short == [[(1, 1)] * 2 + [(0, 100)] * 2, [(1, 1)] * 2 + [(0, 100)], [(1, 1)] * 2]


class FakeMemory:
    """A device with 1 MiB: `used` is moved by whoever pretends to use it."""

    def __init__(self) -> None:
        self.used = 100_000
        self.num_releases = 0

    def free_and_total(self) -> tuple[int, int]:
        return 2**20 - self.used, 2**20

    def release(self) -> None:
        self.num_releases += 1


def making(memory: FakeMemory, step_bytes: int) -> Callable[[LoadedModel, PagedKVCache, int, int], ModelRunner]:
    def make(loaded: LoadedModel, cache: PagedKVCache, max_model_len: int, max_batch: int) -> ModelRunner:
        memory.used += cache.storage.nbytes + step_bytes
        return ModelRunner(loaded, cache, max_model_len)

    return make


def test_the_profile_run_runs_and_its_own_cache_does_not_count(tmp_path: Path) -> None:
    memory = FakeMemory()
    sizer = GpuSizer(memory, 0.5)
    loaded = load(tmp_path)
    sizer.check_weights(loaded.config, "float32", Shard())
    memory.used += 200_000
    spec = loaded.kv_cache_spec(16)
    limits = StepLimits(256, 64, 4)
    blocks = sizer.num_blocks(loaded, spec, limits, None, making(memory, 50_000))
    assert blocks == (2**19 - 100_000 - 200_000 - 50_000) // spec.bytes_per_block
    assert memory.num_releases >= 2


def test_weights_are_checked_before_they_are_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path: the weights need 30\.\d GiB .* model\.dtype bfloat16|smaller"):
        GpuSizer(FakeMemory(), 0.9).check_weights(config_of(tmp_path), "float32", Shard())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
)
def test_out_of_memory_in_the_profile_run_is_a_message(error: Exception, tmp_path: Path) -> None:
    memory = FakeMemory()
    sizer = GpuSizer(memory, 0.5)
    loaded = load(tmp_path)

    def make(*_: object) -> ModelRunner:
        raise error

    with pytest.raises(ConfigError) as caught:
        sizer.num_blocks(loaded, loaded.kv_cache_spec(16), StepLimits(256, 64, 4), None, make)
    assert caught.value.message.startswith(
        "cache: the GPU ran out of memory while running the largest step (64 prompt tokens beside 4 decodes): it has"
    )
    assert "lower scheduler.token_budget or scheduler.max_running, or use a GPU with more memory" in str(caught.value)


def test_other_faults_are_no_lack_of_memory() -> None:
    sizer = GpuSizer(FakeMemory(), 0.5)
    with pytest.raises(RuntimeError, match="boom"), sizer.explained("x", "y"):
        raise RuntimeError("boom")


def test_out_of_memory_is_one_line() -> None:
    message = out_of_memory(H100, 15 * GIB, "loading the weights", "end other processes on it").message
    assert message == (
        "cache: the GPU ran out of memory while loading the weights: it has 79.1 GiB × 0.90, the weights take "
        "15.0 GiB; end other processes on it, or use a GPU with more memory"
    )


def test_a_gpu_worker_from_settings_to_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The CPU by another name plays a GPU of 1 MiB."""
    memory = FakeMemory()
    monkeypatch.setattr("workers.prepare.CudaMemory", lambda device: memory)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "FAKE 1 MiB")
    config_of(tmp_path, **TINY)

    def start(**cache: Any) -> PreparedEngine:
        config = build_config(
            {
                "model": {"path": f"random:{tmp_path / 'config.json'}", "dtype": "float32"},
                "cache": cache,
                "scheduler": {"token_budget": 64, "max_running": 4},
            },
            source="test",
        )
        settings = WorkerSettings("mixed-0", WorkerRole.MIXED, "cpu:0", torch.get_num_threads(), config)
        return prepare_engine(settings, lambda share: None)

    with caplog.at_level("INFO"):
        engine = start(gpu_memory_utilization=0.8)
    assert engine.cache.num_blocks == (int(2**20 * 0.8) - 100_000) // 4096 + 1  # its own block, which nobody used here
    assert engine.max_model_len == 256
    assert (engine.facts.device, engine.facts.kv_blocks) == ("FAKE 1 MiB", engine.cache.num_blocks)
    assert "KV cache: " in caplog.text and "the largest step and the CUDA graphs" in caplog.text
    assert start(kv_cache_gib=0.0001).cache.num_blocks == 26
    with pytest.raises(ConfigError, match=r"model\.path: the weights need 0\.1 MiB"):
        start(gpu_memory_utilization=0.15)
