"""Sizes the KV cache of a GPU worker: loads the weights, runs the largest step, gives the rest to KV blocks."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.kv_cache import PagedKVCache
from engine.loader import LoadedModel
from engine.model_config import ModelConfig
from engine.sharding import Shard
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.request import SamplingParams
from workers.driver import Runner
from workers.memory import (
    GpuMemory,
    LargestStep,
    ParameterCount,
    check_weights_fit,
    describe,
    num_kv_blocks,
    out_of_memory,
)
from workers.profiler import made_up_step

logger = logging.getLogger(__name__)

# A context of a multiple of this length is gathered for its chunk (engine/cuda/attention.py): that takes most memory.
_REGULAR = 256
_OUT_OF_MEMORY_SIGNS = ("out of memory", "alloc_failed")

MakeRunner = Callable[[LoadedModel, PagedKVCache, int, int], Runner]
"""(model, cache, max_model_len, max_batch) → runner."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What bounds a step."""

    max_model_len: int
    token_budget: int
    max_running: int


class DeviceMemory(Protocol):
    """What sizing asks of a device."""

    def free_and_total(self) -> tuple[int, int]:
        """(free, total) bytes; the rest may be in use by other processes, too."""

    def release(self) -> None:
        """Returns memory that nothing refers to any more."""


class CudaMemory:
    """The memory of a GPU as its driver sees it."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    def free_and_total(self) -> tuple[int, int]:
        torch.cuda.synchronize(self._device)
        return torch.cuda.mem_get_info(self._device)

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class GpuSizer:
    """Sizes for one load: made before it, asked after it. Every refusal is a ConfigError that names what would fit."""

    def __init__(self, memory: DeviceMemory, utilization: float) -> None:
        self._memory = memory
        free, total = memory.free_and_total()
        self._gpu = GpuMemory(total, total - free, utilization)
        self._weights_bytes = 0

    def check_weights(self, config: ModelConfig, dtype: str, shard: Shard) -> None:
        """Before loading: by the number of parameters that `shard` has of the model that `config` describes."""
        parameters = ParameterCount.of(config, shard)
        alternatives = {} if dtype == "bfloat16" else {"model.dtype bfloat16": parameters.num_bytes("bfloat16")}
        self._weights_bytes = parameters.num_bytes(dtype)
        check_weights_fit(self._gpu, self._weights_bytes, alternatives)

    def num_blocks(
        self,
        loaded: LoadedModel,
        spec: KVCacheSpec,
        limits: StepLimits,
        max_model_len: int | None,
        make_runner: MakeRunner,
    ) -> int:
        """After loading: KV blocks for what is left beside the largest step. `max_model_len`: if the user gave one."""
        self._memory.release()
        self._weights_bytes = self._in_use() - self._gpu.others_bytes
        budget, running = limits.token_budget, limits.max_running
        with self.explained(
            f"running the largest step ({budget} prompt tokens beside {running} decodes)",
            "lower scheduler.token_budget or scheduler.max_running",
        ):
            in_use_bytes = self._run_largest_step(loaded, spec, limits, make_runner)
        self._memory.release()
        step = LargestStep(budget, running, self._weights_bytes, in_use_bytes)
        num_blocks = num_kv_blocks(self._gpu, step, spec, max_model_len)
        logger.info("%s", describe(self._gpu, step, spec, num_blocks))
        return num_blocks

    def _run_largest_step(
        self, loaded: LoadedModel, spec: KVCacheSpec, limits: StepLimits, make_runner: MakeRunner
    ) -> int:
        """Builds a runner over one block of KV, CUDA graphs included, and runs what takes the most memory.

        The bytes in use at the end are what the real runner will need beside its cache: the allocator keeps what a
        step took. What was built here is gone when this returns.
        """
        cache = PagedKVCache(spec, 1, loaded.device)
        runner = make_runner(loaded, cache, limits.max_model_len, limits.max_running)
        # Every row is sampled by the longest way, with log-probabilities.
        sampling = SamplingParams(temperature=1.0, top_p=0.9, logprobs=1)
        for items in largest_steps(limits):
            step = made_up_step(items, spec.block_size, loaded.config.vocab_size, sampling=sampling, shared_block=True)
            runner.submit(step).collect()
        return self._in_use() - cache.storage.nbytes

    @contextlib.contextmanager
    def explained(self, while_doing: str, remedy: str) -> Iterator[None]:
        """Makes the errors of a GPU that runs out of memory inside a ConfigError that says what for."""
        try:
            yield
        except RuntimeError as cause:  # torch.OutOfMemoryError is one; CUDA itself and its libraries raise others
            text = str(cause).lower()
            if not isinstance(cause, torch.OutOfMemoryError) and not any(sign in text for sign in _OUT_OF_MEMORY_SIGNS):
                raise
            raise out_of_memory(self._gpu, self._weights_bytes, while_doing, remedy) from None

    def _in_use(self) -> int:
        free, total = self._memory.free_and_total()
        return total - free


def largest_steps(limits: StepLimits) -> list[list[tuple[int, int]]]:
    """Steps as (tokens computed before, tokens to compute) per sequence: a whole budget of prompts beside all decodes,
    once without context and once behind the longest, and the decodes alone."""
    decodes = [(1, 1)] * limits.max_running
    longest = min(limits.token_budget, limits.max_model_len)
    prompts = [(0, longest)] * (limits.token_budget // longest)
    context = (limits.max_model_len - longest) // _REGULAR * _REGULAR
    return [[*decodes, *prompts], [*decodes, (context, longest)], decodes]
