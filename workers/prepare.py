"""From a worker's settings to an engine that can compute: checks, weights, the size of the cache, runner and port."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from engine.loader import LoadedModel, check_fp8, resolve_dtype
from engine.model_config import ModelConfig
from engine.sharding import Shard
from engine.tensor_parallel import Group
from phasewise.core.context_length import ContextLength
from phasewise.core.errors import ConfigError
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.model_source import model_facts, resolve_model
from workers.engine_facts import profile_facts, read_config
from workers.memory import CPU_KV_CACHE_GIB, blocks_of_size
from workers.profiler import PreparedEngine
from workers.rank_parts import load_part, make_part, make_port, make_runner
from workers.ranks import Join, Ranks
from workers.settings import WorkerSettings, token_budget
from workers.sizing import CudaMemory, GpuSizer, StepLimits

logger = logging.getLogger(__name__)


def prepare_engine(
    settings: WorkerSettings, progress: Callable[[float], None], ranks: Ranks | None = None
) -> PreparedEngine:
    """Loads the model and makes its cache and runner; as `load_engine`, without measuring."""
    torch.set_num_threads(settings.num_threads)
    preparation = _Preparation.of(settings, ranks)
    return preparation.on_cpu(progress) if settings.device == "cpu" else preparation.on_gpu(progress)


@dataclass(frozen=True, slots=True)
class _Preparation:
    """What is known of an engine before its weights are loaded.

    `takes` is the longest context of the model, `context` the longest that is wanted of it. `ranks` on rank 0 of
    several.
    """

    settings: WorkerSettings
    model: ModelConfig
    dtype: str
    takes: ContextLength
    context: int
    group: Group
    ranks: Ranks | None

    @staticmethod
    def of(settings: WorkerSettings, ranks: Ranks | None) -> _Preparation:
        """Raises ModelLoadError or ConfigError for what can be known to be wrong before the weights are read."""
        config = settings.config
        source = resolve_model(config.model.path)
        model = read_config(source)
        dtype = resolve_dtype(config.model.dtype, settings.device)
        check_fp8("model.weights", config.model.weights, dtype=dtype, device=settings.device)
        check_fp8("cache.dtype", config.cache.dtype, dtype=dtype, device=settings.device)
        takes = model_facts(source).context
        context = takes.at_most(config.model.max_model_len)
        if config.cache.kv_cache_gib is None and settings.tensor_parallel > 1 and settings.device != "cpu":
            raise ConfigError(
                "cache.kv_cache_gib: set it (GiB per GPU): the KV cache is sized by itself for workers of one GPU only",
                field="cache.kv_cache_gib",
            )
        group = Group(Shard(0, settings.tensor_parallel))
        return _Preparation(settings, model, dtype, takes, context, group, ranks)

    def on_cpu(self, progress: Callable[[float], None]) -> PreparedEngine:
        config = self.settings.config
        loaded = load_part(self.settings, self.group, progress)
        spec = loaded.kv_cache_spec(config.cache.block_size, config.cache.dtype)
        gib = config.cache.kv_cache_gib or CPU_KV_CACHE_GIB
        return self._make(loaded, spec, blocks_of_size(gib, spec, config.model.max_model_len))

    def on_gpu(self, progress: Callable[[float], None]) -> PreparedEngine:
        """Raises ConfigError when the GPU's memory does not suffice for a part of it: for what, and what would."""
        settings, config = self.settings, self.settings.config
        caching, wanted = config.cache, config.model.max_model_len
        sizer = GpuSizer(CudaMemory(settings.device), caching.gpu_memory_utilization)
        sizer.check_weights(self.model, self.dtype, self.group.shard)
        with sizer.explained("loading the weights", "end other processes on it, or use a smaller model"):
            loaded = load_part(settings, self.group, progress)
        spec = loaded.kv_cache_spec(caching.block_size, caching.dtype)
        if caching.kv_cache_gib is not None:
            num_blocks = blocks_of_size(caching.kv_cache_gib, spec, wanted)
            remedy = f"lower cache.kv_cache_gib ({caching.kv_cache_gib})"
        else:
            limits = StepLimits(self.context, token_budget(config, settings.device), config.scheduler.max_running)
            num_blocks = sizer.num_blocks(loaded, spec, limits, wanted, make_runner)
            remedy = f"lower cache.gpu_memory_utilization ({caching.gpu_memory_utilization})"
        with sizer.explained("making the KV cache and the CUDA graphs", remedy):
            return self._make(loaded, spec, num_blocks)

    def _make(self, loaded: LoadedModel, spec: KVCacheSpec, num_blocks: int) -> PreparedEngine:
        """Cache, runner and port, on all ranks together. `spec`: of this rank's heads."""
        settings, ranks = self.settings, self.ranks
        config = settings.config
        max_model_len = min(self.context, num_blocks * spec.block_size)
        if max_model_len < self.context:
            reason = f"the KV cache holds no more; the model takes {self.takes.tokens} ({self.takes.reason})"
            logger.info("the context is %d tokens: %s", max_model_len, reason)
        swap_bytes = int(config.cache.swap_gib * 2**30) if settings.role.can_decode else 0
        num_swap_blocks = swap_bytes // (spec.bytes_per_block * settings.tensor_parallel)
        join = Join(num_blocks, max_model_len, config.scheduler.max_running, num_swap_blocks)
        if ranks is not None:
            ranks.wait_loaded()
            ranks.join(join)
        store_path = ranks.store_path if ranks is not None else ""
        cache, runner = make_part(loaded, settings, self.group, join, store_path, ranks)
        whole = replace(spec, num_kv_heads=self.model.num_kv_heads)
        if ranks is not None:
            ranks.wait_ready()
        port = make_port(cache, whole, self.group, ranks)
        runner.warm_up(token_budget(config, settings.device))
        facts = profile_facts(settings, self.model, spec, num_blocks)
        return PreparedEngine(runner, cache, port, max_model_len, self.model.vocab_size, facts)
