"""fp8 weights and KV on the CPU: the plain twins that the kernels are compared with, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.kv_cache import PagedKVCache
from engine.layers.fp8 import FP8_DTYPE, FP8_MAX, quantize_weight, saturate
from engine.layers.linear import Linear
from engine.loader import LoadedModel, check_fp8, load_model
from engine.model_config import read_model_config
from engine.model_runner import ModelRunner
from engine.models.llama import DecoderLayer
from engine.tensor_parallel import Group
from phasewise.core.errors import ConfigError
from phasewise.core.kv_spec import FP8, KVCacheSpec
from phasewise.core.model_source import ModelSource
from tests.engine.conftest import SMALL, Engine, build_oracle, load, random_prompt

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp8")
    build_oracle(transformers.Qwen2Config(**SMALL), path)
    return path


def load_fp8(folder: Path) -> LoadedModel:
    source = ModelSource("hf", folder, "test")
    return load_model(source, dtype="float32", device="cpu", seed=0, progress=lambda share: None, weights="fp8")


def test_conversion_saturates_and_keeps_nan() -> None:
    x = torch.tensor([1e6, -449.0, 448.0, 0.3, 0.0, torch.inf, torch.nan])
    stored = saturate(x, FP8_DTYPE).float()
    assert stored[:-1].tolist() == [448.0, -448.0, 448.0, 0.3125, 0.0, 448.0]
    assert stored[-1].isnan()
    assert saturate(x, torch.bfloat16)[0] > 9e5


def test_a_quantised_weight_is_within_half_a_step_of_each_row() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5008, 64) * torch.logspace(-6, 4, 5008).unsqueeze(1)
    weight[7] = 0
    quantised = quantize_weight(weight)
    assert (quantised.values.float().abs().amax(dim=1) == FP8_MAX).logical_or(weight.abs().amax(dim=1) == 0).all()
    error = (quantised.dequantized() - weight).abs()
    half_step = weight.abs() / 16 + quantised.scales.unsqueeze(1) * 2**-10  # of normal, of subnormal numbers
    assert (error <= half_step * 1.001).all()
    assert (quantised.dequantized()[7] == 0).all()
    factors, before = torch.rand(64), weight.clone()
    folded = quantize_weight(weight, factors)
    assert torch.equal(folded.dequantized(), quantize_weight(weight * factors).dequantized())
    assert torch.equal(weight, before)


def test_a_quantised_product_is_that_of_its_dequantised_weight() -> None:
    torch.manual_seed(0)
    linear = Linear(32, 48, bias=True, dtype=torch.float32, device=CPU)
    linear.rows(0, 48).normal_()
    linear.bias_rows(0, 48).normal_()
    linear.quantize()
    linear.finish_loading()
    assert linear.weight is None and linear.fp8 is not None
    x = torch.randn(5, 32)
    torch.testing.assert_close(linear(x), x @ linear.fp8.dequantized().T + linear.bias)


def test_sizes_that_the_scaled_product_does_not_take_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"multiples of 16, and this model has one of 24 x 32; use model.weights auto"
    ):
        quantize_weight(torch.zeros(24, 32))


def test_folding_the_norms_keeps_the_function(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({**SMALL, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    config = read_model_config(tmp_path / "config.json")
    torch.manual_seed(0)
    layer = DecoderLayer(config, 0, torch.float32, CPU, Group())
    for view in layer.weight_views("").values():
        view.normal_()
    x = torch.randn(7, config.hidden_size)
    before = layer.attention.qkv(layer.attention_norm(x)), layer.mlp(layer.mlp_norm(x))
    layer.fold_norms()
    after = layer.attention.qkv(layer.attention_norm(x)), layer.mlp(layer.mlp_norm(x))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-3)
    assert (layer.attention_norm.weight == 1).all() and (layer.mlp_norm.weight == 1).all()


def test_a_model_with_fp8_weights_is_close_to_the_plain_one_and_has_a_fingerprint_of_its_own(folder: Path) -> None:
    plain, quantised = load(folder), load_fp8(folder)
    prompt = random_prompt(40)
    wanted = Engine(plain).logits(prompt)
    error = (Engine(quantised).logits(prompt) - wanted).norm() / wanted.norm()
    assert 0.01 < error < 0.25, "random weights, which no training made robust"
    assert plain.fingerprint != quantised.fingerprint, "KV of one is not valid for the other"
    assert load_fp8(folder).fingerprint == quantised.fingerprint


@pytest.mark.parametrize("field", ["model.weights", "cache.dtype"])
def test_fp8_is_refused_where_there_are_no_kernels(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_fp8(field, "auto", dtype="float32", device="cpu")
    with pytest.raises(ConfigError, match=rf"{field} fp8 cannot be computed on a CPU; use {field} auto, or") as caught:
        check_fp8(field, "fp8", dtype="bfloat16", device="cpu")
    assert caught.value.field == field
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"NVIDIA A100 has capability 8.0; use"):
        check_fp8(field, "fp8", dtype="bfloat16", device="cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_fp8(field, "fp8", dtype="bfloat16", device="cuda:0")
    with pytest.raises(ConfigError, match=r"needs model.dtype bfloat16 or auto, not float32"):
        check_fp8(field, "fp8", dtype="float32", device="cuda:0")


def test_the_fast_backend_of_the_cpu_refuses_an_fp8_cache(folder: Path) -> None:
    loaded = load(folder)
    cache = PagedKVCache(loaded.kv_cache_spec(8, FP8), 4, "cpu")
    with pytest.raises(ConfigError, match=r"cache.dtype fp8_e4m3 needs a GPU; use cache.dtype auto"):
        ModelRunner(loaded, cache, 256)


def test_blocks_are_copied_byte_by_byte() -> None:
    cache = PagedKVCache(KVCacheSpec(3, 2, 16, 8, FP8), 6, "cpu", num_swap_blocks=3)
    assert cache.storage.element_size() == 1 and cache.spec.bytes_per_block * 6 == cache.storage.numel()
    cache.storage.copy_(torch.randn(cache.storage.shape))
    before = cache.storage.view(torch.uint8).clone().view(3, 2, 6, -1)
    first, second = cache.copy_out([3]), cache.copy_out([4])
    cache.copy_in(first, [3])
    third = cache.copy_out([1, 2])  # into places that are no neighbours
    cache.copy_in(second, [0])
    cache.copy_in(third, [5, 2])
    cache.copy_block(2, 3)
    after = cache.storage.view(torch.uint8).view(3, 2, 6, -1)
    assert torch.equal(after[:, :, [0, 5, 3, 1, 2, 4]], before[:, :, [4, 1, 2, 1, 2, 4]])


def test_tokens_with_an_fp8_cache_do_not_depend_on_chunks_or_batch(folder: Path) -> None:
    options: dict[str, Any] = {"cache_dtype": FP8, "attention": "reference"}
    engine, plain = Engine(load(folder), **options), Engine(load(folder), attention="reference")
    rng = random.Random(0)
    prompts = [random_prompt(n, seed=n) for n in (1, 9, 33, 70)]
    tokens = [engine.generate(prompt, 24) for prompt in prompts]
    assert [engine.generate(prompt, 24, chunk=rng.randrange(1, 20)) for prompt in prompts] == tokens
    assert tokens != [plain.generate(prompt, 24) for prompt in prompts], "the rounding is there"
    engine.close()
