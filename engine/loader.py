"""ModelSource → a model that is ready to compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.checkpoint import Checkpoint
from engine.gguf_config import read_gguf_config
from engine.gguf_weights import load_gguf
from engine.kv_cache import TORCH_DTYPES, PagedKVCache
from engine.model_config import ModelConfig, read_model_config
from engine.models.llama import LlamaModel
from engine.models.registry import build_model
from engine.tensor_parallel import Group
from engine.weights import files_identity, fill_random, load_safetensors
from phasewise.core.errors import ConfigError
from phasewise.core.gguf_file import GGUFFile
from phasewise.core.kv_spec import FP8, KVCacheSpec
from phasewise.core.model_source import ModelSource, config_file


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its weights on its device, or one rank's part of it, which is what `config` describes.

    `dtype` is what it computes in, whatever its weights and its cache are stored in. `fingerprint` is equal in
    processes that loaded the same weights, whatever their part.
    """

    model: LlamaModel
    config: ModelConfig
    dtype: str
    device: str
    fingerprint: str

    def kv_cache_spec(self, block_size: int, dtype: str = "auto") -> KVCacheSpec:
        """`dtype` of the cache: auto (the model's) or fp8_e4m3."""
        return KVCacheSpec(
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            block_size=block_size,
            dtype=self.dtype if dtype == "auto" else dtype,
            model_fingerprint=self.fingerprint,
        )

    def check_cache(self, cache: PagedKVCache) -> None:
        """Raises ValueError for a cache that was made for another model or device."""
        wanted = self.kv_cache_spec(cache.block_size, FP8 if cache.spec.dtype == FP8 else "auto")
        differences = cache.spec.differences(wanted)
        if cache.spec.dtype != wanted.dtype:
            differences.append(f"dtype: {cache.spec.dtype} here, {wanted.dtype} there")
        if differences or cache.device != self.model.device:
            raise ValueError(f"the KV cache does not fit the model: {'; '.join(differences) or cache.device}")


def resolve_device(device: str) -> str:
    """`auto`: cuda where there is a GPU, else cpu. Raises ConfigError for a device that is not there."""
    has_gpu = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if has_gpu else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"model.device {device!r} is unknown; use auto, cpu or cuda", field="model.device")
    if kind == "cuda" and not has_gpu:
        raise ConfigError("model.device is cuda, but torch finds no GPU; use cpu or auto", field="model.device")
    return device


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto`: float32 on a CPU, bfloat16 on a GPU. Raises ConfigError for anything else that is not supported."""
    if dtype == "auto":
        return "float32" if device.startswith("cpu") else "bfloat16"
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"model.dtype {dtype!r} is not supported; use auto, float32 or bfloat16", field="model.dtype")
    return dtype


def check_fp8(field: str, value: str, *, dtype: str, device: str) -> None:
    """Raises ConfigError where there are no kernels for fp8. `field` is the key that asks for it by `value`."""
    if value == "auto":
        return
    remedy = f"use {field} auto, or model.device cuda on a GPU of compute capability 8.9 or later (Ada, Hopper)"
    if not device.startswith("cuda"):
        raise ConfigError(f"{field} {value} cannot be computed on a CPU; {remedy}", field=field)
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"{field} {value}: {name} has capability {'.'.join(map(str, capability))}; {remedy}", field=field
        )
    if dtype != "bfloat16":
        raise ConfigError(f"{field} {value} needs model.dtype bfloat16 or auto, not {dtype}", field=field)


def load_model(
    source: ModelSource,
    *,
    dtype: str,
    device: str,
    seed: int,
    progress: Callable[[float], None],
    weights: str = "auto",
    group: Group | None = None,
) -> LoadedModel:
    """Reads configuration and weights. `dtype` and `device` may be `auto`; `seed` is for random weights only.

    `progress` is called with growing shares from 0 to 1. `weights` is `auto` (in `dtype`) or `fp8`; see `check_fp8`:
    where that refuses, fp8 weights are multiplied as if they were `dtype`, which is for tests. With a `group`, which
    need not be connected yet, only this rank's part of the weights is read.

    Raises:
        ModelLoadError: one line that names the file, and the tensor or key, that is wrong.
        ConfigError: a device or dtype that cannot be used here, or a model that the group cannot split.
    """
    group = group or Group()
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    torch_dtype, torch_device = TORCH_DTYPES[dtype], torch.device(device)
    progress(0.0)
    if source.kind == "gguf":
        with GGUFFile(source.path) as file:
            config = read_gguf_config(file)
            model = build_model(config, torch_dtype, torch_device, group)
            load_gguf(file, config, model.weight_views(), progress, group.shard)
        identity = files_identity([source.path])
    elif source.kind == "hf":
        config = read_model_config(config_file(source))
        checkpoint = Checkpoint(source.path, config)
        config = checkpoint.config(config)
        model = build_model(config, torch_dtype, torch_device, group)
        load_safetensors(checkpoint, config, model.weight_views(), progress, group.shard)
        identity = files_identity(checkpoint.files)
    else:
        config = read_model_config(config_file(source))
        model = build_model(config, torch_dtype, torch_device, group)
        fill_random(config, model.weight_views(), seed, progress, group.shard)
        identity = f"random/{seed}/{torch_device.type}"
    if weights == "fp8":
        identity += "/fp8"  # their KV is another
        for layer in model.layers:
            layer.quantize()
        if torch_device.type == "cuda":
            torch.cuda.empty_cache()  # what the weights took before is the cache's now
    model.finish_loading()
    progress(1.0)
    return LoadedModel(model, model.config, dtype, device, config.fingerprint(identity))
