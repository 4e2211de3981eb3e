"""How much memory the KV cache may have, and what to say when it is too little. Pure: bytes in, blocks or words out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.model_config import ModelConfig
from engine.sharding import Shard
from phasewise.core.errors import ConfigError
from phasewise.core.kv_spec import DTYPE_BYTES, KVCacheSpec

GIB = 2**30
CPU_KV_CACHE_GIB = 1.0
MIN_BLOCKS = 2


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters of a rank's part: those of its layers' products, and all others (embedding, head, norms, biases)."""

    products: int
    others: int

    @staticmethod
    def of(whole: ModelConfig, shard: Shard = Shard()) -> ParameterCount:  # noqa: B008 (frozen)
        """Raises ConfigError when the model cannot be split so."""
        config = shard.part(whole)
        hidden, queries = config.hidden_size, config.num_heads * config.head_dim
        keys_values = 2 * config.num_kv_heads * config.head_dim
        products = hidden * (queries + keys_values) + queries * hidden + 3 * hidden * config.intermediate_size
        others = 2 * hidden
        others += (queries + keys_values) * config.qkv_bias + hidden * config.output_bias
        others += (2 * config.intermediate_size + hidden) * config.mlp_bias + 2 * config.head_dim * config.qk_norm
        head = 0 if config.tie_word_embeddings else shard.vocab(config.vocab_size)[1]
        embeddings = (config.vocab_size + head) * hidden
        return ParameterCount(config.num_layers * products, config.num_layers * others + embeddings + hidden)

    def num_bytes(self, dtype: str) -> int:
        return (self.products + self.others) * DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """A GPU's memory, and the share of it that may be in use by all together.

    `others_bytes` is what was in use before this worker loaded anything: other processes and CUDA's own context.
    """

    total_bytes: int
    others_bytes: int
    utilization: float

    @property
    def usable_bytes(self) -> int:
        """For this worker."""
        return int(self.total_bytes * self.utilization) - self.others_bytes

    def __str__(self) -> str:
        others = f", of which {_gib(self.others_bytes)} were in use before" if self.others_bytes > 2 * GIB else ""
        return f"{_gib(self.total_bytes)} × {self.utilization:.2f}{others}"

    def utilization_for(self, num_bytes: int) -> float | None:
        """The share, rounded up, at which `num_bytes` would fit; None when that is above 0.97."""
        needed = math.ceil((num_bytes + self.others_bytes) / self.total_bytes * 100) / 100
        return needed if needed <= 0.97 else None


def check_weights_fit(memory: GpuMemory, weights_bytes: int, alternatives: Mapping[str, int]) -> None:
    """Called before anything is loaded. `alternatives`: other settings → bytes of the weights with them.

    Raises:
        ConfigError: the weights alone do not fit; the message names what would.
    """
    if weights_bytes <= memory.usable_bytes:
        return
    ways = [f"{name} ({_gib(size)})" for name, size in alternatives.items() if size <= memory.usable_bytes]
    utilization = memory.utilization_for(weights_bytes)
    if utilization is not None:
        ways.append(f"cache.gpu_memory_utilization {utilization:.2f} or more")
    ways.append(f"a GPU with at least {math.ceil(weights_bytes / memory.utilization / GIB)} GiB")
    ways.append("a smaller model")
    raise ConfigError(
        f"model.path: the weights need {_gib(weights_bytes)} and this GPU has {memory}; use {', or '.join(ways)}",
        field="model.path",
    )


@dataclass(frozen=True, slots=True)
class LargestStep:
    """What the profile run ran, and the bytes on the GPU at its end, KV blocks not counted.

    `in_use_bytes` counts weights, activations, CUDA graphs, libraries and other processes.
    """

    token_budget: int
    max_running: int
    weights_bytes: int
    in_use_bytes: int


def num_kv_blocks(memory: GpuMemory, step: LargestStep, spec: KVCacheSpec, max_model_len: int | None) -> int:
    """Blocks that fit beside everything else. `max_model_len` is the user's, or None where any will do.

    Raises:
        ConfigError: they are fewer than one sequence of `max_model_len` needs, or than two.
    """
    left = int(memory.total_bytes * memory.utilization) - step.in_use_bytes
    num_blocks = max(left, 0) // spec.bytes_per_block
    wanted = max(math.ceil((max_model_len or 1) / spec.block_size), MIN_BLOCKS)
    if num_blocks >= wanted:
        return num_blocks
    missing = wanted * spec.bytes_per_block - left
    beside = step.in_use_bytes - memory.others_bytes - step.weights_bytes
    ways = []
    if max_model_len is not None and num_blocks >= MIN_BLOCKS:
        ways.append(f"lower model.max_model_len to {num_blocks * spec.block_size}")
    utilization = memory.utilization_for(step.in_use_bytes - memory.others_bytes + wanted * spec.bytes_per_block)
    if utilization is not None:
        ways.append(f"raise cache.gpu_memory_utilization to {utilization:.2f}")
    if beside >= missing:
        ways.append(f"lower scheduler.max_running ({step.max_running}) or scheduler.token_budget ({step.token_budget})")
    ways.append("use a GPU with more memory")
    whole = "two KV blocks" if max_model_len is None else f"one sequence of model.max_model_len {max_model_len}"
    raise ConfigError(
        f"cache: {_gib(missing)} too little for {whole}: this GPU has {memory}; the weights take "
        f"{_gib(step.weights_bytes)} and the largest step {_gib(beside)}; {', or '.join(ways)}",
        field="cache.gpu_memory_utilization",
    )


def describe(memory: GpuMemory, step: LargestStep, spec: KVCacheSpec, num_blocks: int) -> str:
    """A line for the log: where the memory goes."""
    beside = step.in_use_bytes - memory.others_bytes - step.weights_bytes
    return (
        f"KV cache: {_gib(num_blocks * spec.bytes_per_block)}, {num_blocks} blocks of {spec.block_size} tokens; "
        f"the GPU has {memory}, the weights take {_gib(step.weights_bytes)}, the largest step and the CUDA graphs "
        f"{_gib(beside)}"
    )


def blocks_of_size(kv_cache_gib: float, spec: KVCacheSpec, max_model_len: int | None) -> int:
    """Blocks in a cache of a given size. `max_model_len` is the user's, or None where any will do.

    Raises:
        ConfigError: they are fewer than one sequence of `max_model_len` needs, or than two.
    """
    num_blocks = int(kv_cache_gib * GIB) // spec.bytes_per_block
    wanted = max(math.ceil((max_model_len or 1) / spec.block_size), MIN_BLOCKS)
    if num_blocks >= wanted:
        return num_blocks
    at_least = math.ceil(wanted * spec.bytes_per_block / GIB * 1e4) / 1e4
    if num_blocks < MIN_BLOCKS:
        reason, remedy = f"holds no two blocks of {spec.bytes_per_block} bytes", ""
    else:
        num_tokens = num_blocks * spec.block_size
        reason = f"holds {num_tokens} tokens, and model.max_model_len is {max_model_len}"
        remedy = f", or lower model.max_model_len to {num_tokens}"
    raise ConfigError(
        f"cache.kv_cache_gib={kv_cache_gib} {reason}; give at least {at_least}{remedy}", field="cache.kv_cache_gib"
    )


def out_of_memory(memory: GpuMemory, weights_bytes: int, while_doing: str, remedy: str) -> ConfigError:
    """The GPU had no memory left for something: what it was, and what to change."""
    return ConfigError(
        f"cache: the GPU ran out of memory while {while_doing}: it has {memory}, the weights take "
        f"{_gib(weights_bytes)}; {remedy}, or use a GPU with more memory",
        field="cache.gpu_memory_utilization",
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"
