"""The composition of a worker: the one place on the worker's side that knows every concrete class."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from engine.gguf_config import read_gguf_config
from engine.kv_cache import PagedKVCache
from engine.loader import LoadedModel, check_fp8, load_model
from engine.model_config import ModelConfig, read_model_config
from engine.model_runner import ModelRunner
from engine.sharding import Shard
from engine.tensor_parallel import Group, OtherRanks
from kv_transfer.cache_port import CachePort
from kv_transfer.codec import Codec
from phasewise.core.clock import Clock
from phasewise.core.errors import ConfigError
from phasewise.core.gguf_file import GGUFFile
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import WorkerInfo
from phasewise.core.model_source import ModelSource, config_file, model_facts, resolve_model
from phasewise.core.profile import DeviceProfile, ProfileFacts
from workers.driver import Runner
from workers.memory import CPU_KV_CACHE_GIB, blocks_of_size
from workers.profiler import (
    PreparedEngine,
    device_name,
    measure_codec,
    measure_profile,
    model_shape,
    start_up_grid,
    warm_up,
)
from workers.ranked_cache import LeadingCachePort, LeadingKVCache
from workers.ranks import Join, Ranks
from workers.settings import WorkerSettings, token_budget
from workers.sizing import CudaMemory, GpuSizer, StepLimits

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """A model in memory with its cache, warmed and measured.

    `ranks`: the other processes that hold parts of it. `codec_bytes_per_s`: as SendLimits has it.
    """

    runner: Runner
    cache: PagedKVCache
    port: CachePort
    max_model_len: int
    profile: DeviceProfile
    dtype: str
    ranks: Ranks | None = None
    codec_bytes_per_s: float = 0.0


def load_engine(settings: WorkerSettings, progress: Callable[[float], None], clock: Clock) -> LoadedEngine:
    """Loads the model, makes the cache, measures the device. `progress` gets 0 … 1.

    Raises:
        ModelLoadError: the model's files are at fault.
        ConfigError: the model, or a cache worth having, does not fit; `model.profile` is of another worker; the model
            cannot be split over the ranks; or fp8 is wanted where it cannot be computed.
    """
    config = settings.config
    written = _written_profile(settings)  # a wrong one is said before the wait for the weights
    ranks = Ranks(settings) if settings.tensor_parallel > 1 else None
    try:
        engine = prepare_engine(settings, lambda share: progress(0.95 * share), ranks)
        grid = start_up_grid(settings.device, token_budget(config, settings.device), config.scheduler.max_running)
        if written is None:
            profile = measure_profile(engine, grid, clock)
        else:
            warm_up(engine, grid, clock)
            profile = written
        codec = Codec(config.transfer.codec)
        engine.port.warm_up(cache_dtypes(settings), codec)
        codec_rate = measure_codec(engine.port, codec, clock)
    except BaseException:
        if ranks is not None:
            ranks.close()
        raise
    progress(1.0)
    dtype = resolve_dtype(config.model.dtype, settings.device)
    return LoadedEngine(
        engine.runner, engine.cache, engine.port, engine.max_model_len, profile, dtype, ranks, codec_rate
    )


def prepare_engine(
    settings: WorkerSettings, progress: Callable[[float], None], ranks: Ranks | None = None
) -> PreparedEngine:
    """Loads the model and makes its cache and runner; as `load_engine`, without measuring."""
    torch.set_num_threads(settings.num_threads)
    config = settings.config
    source = resolve_model(config.model.path)
    model_config = _read_config(source)
    dtype = resolve_dtype(config.model.dtype, settings.device)
    check_fp8("model.weights", config.model.weights, dtype=dtype, device=settings.device)
    check_fp8("cache.dtype", config.cache.dtype, dtype=dtype, device=settings.device)
    takes, wanted = model_facts(source).context, config.model.max_model_len
    context = takes.at_most(wanted)
    gib, running = config.cache.kv_cache_gib, config.scheduler.max_running
    if gib is None and settings.tensor_parallel > 1 and settings.device != "cpu":
        raise ConfigError(
            "cache.kv_cache_gib: set it (GiB per GPU): the KV cache is sized by itself for workers of one GPU only",
            field="cache.kv_cache_gib",
        )

    group = Group(Shard(0, settings.tensor_parallel))

    def load() -> LoadedModel:
        return load_part(settings, group, progress)

    def prepared(loaded: LoadedModel, spec: KVCacheSpec, num_blocks: int) -> PreparedEngine:
        max_model_len = min(context, num_blocks * spec.block_size)
        if max_model_len < context:
            reason = f"the KV cache holds no more; the model takes {takes.tokens} ({takes.reason})"
            logger.info("the context is %d tokens: %s", max_model_len, reason)
        swap_bytes = int(config.cache.swap_gib * 2**30) if settings.role.can_decode else 0
        num_swap_blocks = swap_bytes // (spec.bytes_per_block * settings.tensor_parallel)
        join = Join(num_blocks, max_model_len, running, num_swap_blocks)
        if ranks is not None:
            ranks.wait_loaded()
            ranks.join(join)
        cache, runner = make_part(loaded, settings, group, join, ranks.store_path if ranks else "", ranks)
        whole = replace(spec, num_kv_heads=model_config.num_kv_heads)
        port = CachePort(cache, whole)
        if ranks is not None:
            ranks.wait_ready()
            port = LeadingCachePort(cache, whole, group, ranks)
        runner.warm_up(token_budget(config, settings.device))
        facts = profile_facts(settings, model_config, spec, num_blocks)
        return PreparedEngine(runner, cache, port, max_model_len, model_config.vocab_size, facts)

    if settings.device == "cpu":
        loaded = load()
        spec = loaded.kv_cache_spec(config.cache.block_size, config.cache.dtype)
        return prepared(loaded, spec, blocks_of_size(gib or CPU_KV_CACHE_GIB, spec, wanted))
    sizer = GpuSizer(CudaMemory(settings.device), config.cache.gpu_memory_utilization)
    sizer.check_weights(model_config, dtype, group.shard)
    with sizer.explained("loading the weights", "end other processes on it, or use a smaller model"):
        loaded = load()
    spec = loaded.kv_cache_spec(config.cache.block_size, config.cache.dtype)
    if gib is not None:
        num_blocks = blocks_of_size(gib, spec, wanted)
        remedy = f"lower cache.kv_cache_gib ({gib})"
    else:
        limits = StepLimits(context, token_budget(config, settings.device), running)
        num_blocks = sizer.num_blocks(loaded, spec, limits, wanted, make_runner)
        remedy = f"lower cache.gpu_memory_utilization ({config.cache.gpu_memory_utilization})"
    with sizer.explained("making the KV cache and the CUDA graphs", remedy):
        return prepared(loaded, spec, num_blocks)


def load_part(settings: WorkerSettings, group: Group, progress: Callable[[float], None]) -> LoadedModel:
    """This rank's part of the model, on its device. The group need not be connected yet."""
    model = settings.config.model
    return load_model(
        resolve_model(model.path),
        dtype=resolve_dtype(model.dtype, settings.device),
        device=rank_device(settings, group),
        seed=model.seed,
        progress=progress,
        weights=model.weights,
        group=group,
    )


def make_part(
    loaded: LoadedModel,
    settings: WorkerSettings,
    group: Group,
    join: Join,
    store_path: str,
    ranks: Ranks | None = None,
) -> tuple[PagedKVCache, ModelRunner]:
    """Joins the group, if there is one, and makes this rank's cache and runner. `ranks` only on rank 0."""
    if group.size > 1:
        group.connect(store_path, loaded.model.device)
    caching, device = settings.config.cache, loaded.device
    spec = loaded.kv_cache_spec(caching.block_size, caching.dtype)
    if ranks is not None:
        cache: PagedKVCache = LeadingKVCache(spec, join.num_blocks, device, join.num_swap_blocks, ranks)
        return cache, make_runner(loaded, cache, join.max_model_len, join.max_batch, ranks)
    cache = PagedKVCache(spec, join.num_blocks, device, join.num_swap_blocks)
    return cache, make_runner(loaded, cache, join.max_model_len, join.max_batch)


def rank_device(settings: WorkerSettings, group: Group) -> str:
    """GPU r for rank r: torch's symmetric memory wants all ranks to see all GPUs of the group."""
    return f"cuda:{group.rank}" if group.size > 1 and settings.device.startswith("cuda") else settings.device


def profile_facts(
    settings: WorkerSettings, config: ModelConfig, spec: KVCacheSpec | None = None, num_blocks: int = 0
) -> ProfileFacts:
    """What a profile of this worker is a profile of; the capacity, where it is known."""
    model, dtype = settings.config.model, resolve_dtype(settings.config.model.dtype, settings.device)
    return ProfileFacts(
        device=device_name(settings.device, settings.num_threads),
        model=model_shape(config),
        dtype=dtype if model.weights == "auto" else f"{dtype}, {model.weights} weights",
        tensor_parallel=settings.tensor_parallel,
        kv_blocks=num_blocks,
        block_size=settings.config.cache.block_size,
        kv_bytes_per_token=spec.bytes_per_token if spec is not None else 0,
    )


def cache_dtypes(settings: WorkerSettings) -> set[str]:
    """Those of the KV caches that this worker may hand over to, or take over from, its own among them."""
    config = settings.config
    pools = (config.pools.prefill, config.pools.decode, config.pools.mixed)
    named = {config.cache.dtype, *(pool.cache_dtype or "auto" for pool in pools)}
    return {resolve_dtype(config.model.dtype, settings.device) if dtype == "auto" else dtype for dtype in named}


def _written_profile(settings: WorkerSettings) -> DeviceProfile | None:
    model = settings.config.model
    if model.profile is None:
        return None
    profile = DeviceProfile.read(model.profile)
    profile.check_is_of(profile_facts(settings, _read_config(resolve_model(model.path))), source=model.profile)
    return profile


def _read_config(source: ModelSource) -> ModelConfig:
    if source.kind != "gguf":
        return read_model_config(config_file(source))
    with GGUFFile(source.path) as file:
        return read_gguf_config(file)


def make_runner(
    loaded: LoadedModel,
    cache: PagedKVCache,
    max_model_len: int,
    max_batch: int,
    others: OtherRanks | None = None,
) -> ModelRunner:
    """The fast runner on a GPU, the plain one elsewhere, and for shapes that the kernels do not know."""
    head_dim = loaded.config.head_dim
    if cache.device.type != "cuda":
        return ModelRunner(loaded, cache, max_model_len, others=others)
    if head_dim & (head_dim - 1) or head_dim < 16:
        logger.warning("no fast kernels for head dim %d: using plain attention", head_dim)
        return ModelRunner(loaded, cache, max_model_len, others=others)
    if loaded.config.mlp_bias:
        logger.warning("no fast kernels for an MLP with biases: using the plain runner")
        return ModelRunner(loaded, cache, max_model_len, others=others)
    from engine.cuda.runner import CudaModelRunner  # needs Triton, which CPU machines do not have

    return CudaModelRunner(loaded, cache, max_model_len, max_batch=max_batch, others=others)


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto` is float32 on a CPU (few have bfloat16 arithmetic) and bfloat16 on a GPU."""
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else "bfloat16"


def worker_info(settings: WorkerSettings, engine: LoadedEngine, link_address: str = "") -> WorkerInfo:
    """What the others may know of this worker."""
    return WorkerInfo(
        worker_id=settings.worker_id,
        role=settings.role,
        pid=os.getpid(),
        host=socket.gethostname(),
        device=settings.device,
        dtype=engine.dtype,
        num_threads=settings.num_threads,
        kv_spec=engine.port.spec,
        num_kv_blocks=engine.cache.num_blocks,
        max_model_len=engine.max_model_len,
        profile=engine.profile,
        link_address=link_address,
    )
