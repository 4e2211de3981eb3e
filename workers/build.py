"""The composition of a worker: the one place on the worker's side that knows every concrete class."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

import torch

from decode_workers.phase import DecodeLimits, DecodePhase
from decode_workers.reservations import ReservationQueue
from decode_workers.scheduler import DecodeScheduler
from engine.block_manager import BlockManager
from engine.kv_cache import PagedKVCache
from engine.loader import LoadedModel, load_model
from engine.model_runner import ModelRunner
from engine.sharding import Shard
from engine.tensor_parallel import Group, OtherRanks
from kv_transfer.link import Link
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from phasewise.core.clock import Clock
from phasewise.core.config import ServingConfig
from phasewise.core.errors import ConfigError
from phasewise.core.messages import WorkerInfo
from phasewise.core.model_source import resolve_model
from phasewise.core.outbox import Outbox
from phasewise.core.ports import GatewayPort, LoadPort, PeerPort
from phasewise.core.profile import DeviceProfile
from prefill_workers.phase import PrefillLimits, PrefillPhase
from prefill_workers.scheduler import PrefillScheduler
from workers.profiler import measure_profile
from workers.ranks import Join, LeadingKVCache, Ranks
from workers.settings import WorkerSettings
from workers.worker import LoopSettings, Runner, Worker, WorkerParts

logger = logging.getLogger(__name__)

CPU_TOKEN_BUDGET = 128  # a step stays short enough for an abort to be heard within a second
GPU_TOKEN_BUDGET = 2048  # Splitwise, figure 6: prompt throughput falls beyond


@dataclass(frozen=True, slots=True)
class Ports:
    """How a worker reaches the others."""

    peers: PeerPort
    gateways: GatewayPort
    loads: LoadPort
    link: Link


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """A model in memory with its cache, warmed and measured. `ranks`: the other processes that hold parts of it."""

    runner: Runner
    cache: PagedKVCache
    max_model_len: int
    profile: DeviceProfile
    ranks: Ranks | None = None


def load_engine(settings: WorkerSettings, progress: Callable[[float], None], clock: Clock) -> LoadedEngine:
    """Loads the model, makes the cache, measures the device. `progress` gets 0 … 1.

    Raises:
        ModelLoadError: the model's files are at fault.
        ConfigError: the cache is too small for a single block, or the model cannot be split over the ranks.
    """
    torch.set_num_threads(settings.num_threads)
    group = Group(Shard(0, settings.tensor_parallel))
    ranks = Ranks(settings) if group.size > 1 else None
    try:
        loaded = load_part(settings, group, progress=lambda share: progress(0.95 * share))
        join = _sizes(loaded, settings.config)
        if ranks is not None:
            ranks.wait_loaded()
            ranks.join(join)
        cache, runner = make_part(loaded, settings, group, join, ranks.store_path if ranks else "", ranks)
        if ranks is not None:
            ranks.wait_ready()
    except BaseException:
        if ranks is not None:
            ranks.close()
        raise
    profile = measure_profile(runner, cache.block_size, cache.num_blocks, loaded.config.vocab_size, clock)
    progress(1.0)
    return LoadedEngine(runner, cache, join.max_model_len, profile, ranks)


def load_part(settings: WorkerSettings, group: Group, progress: Callable[[float], None]) -> LoadedModel:
    """This rank's part of the model, on its device. The group need not be connected yet."""
    model = settings.config.model
    return load_model(
        resolve_model(model.path),
        dtype=resolve_dtype(model.dtype, settings.device),
        device=rank_device(settings, group),
        seed=model.seed,
        progress=progress,
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
    spec, device = loaded.kv_cache_spec(settings.config.cache.block_size), loaded.device
    if ranks is not None:
        cache: PagedKVCache = LeadingKVCache(spec, join.num_blocks, device, ranks)
        return cache, make_runner(loaded, cache, join.max_model_len, join.max_batch, ranks)
    cache = PagedKVCache(spec, join.num_blocks, device)
    return cache, make_runner(loaded, cache, join.max_model_len, join.max_batch)


def rank_device(settings: WorkerSettings, group: Group) -> str:
    """GPU r for rank r: torch's symmetric memory wants all ranks to see all GPUs of the group."""
    return f"cuda:{group.rank}" if group.size > 1 and settings.device.startswith("cuda") else settings.device


def _sizes(loaded: LoadedModel, config: ServingConfig) -> Join:
    """How large cache and context are. Raises ConfigError when the cache holds no two blocks."""
    spec = loaded.kv_cache_spec(config.cache.block_size)
    num_blocks = int(config.cache.kv_cache_gib * 2**30) // spec.bytes_per_block
    if num_blocks < 2:
        raise ConfigError(
            f"cache.kv_cache_gib={config.cache.kv_cache_gib} holds no two blocks of {spec.bytes_per_block} bytes; "
            f"give at least {math.ceil(2 * spec.bytes_per_block / 2**30 * 1e4) / 1e4}"
        )
    capacity = num_blocks * spec.block_size
    max_model_len = min(config.model.max_model_len or capacity, loaded.config.max_position_embeddings, capacity)
    return Join(num_blocks, max_model_len, config.scheduler.max_running)


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
    from engine.cuda.runner import CudaModelRunner  # needs Triton, which CPU machines do not have

    return CudaModelRunner(loaded, cache, max_model_len, max_batch=max_batch, others=others)


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto` is float32 on a CPU (few have bfloat16 arithmetic) and bfloat16 on a GPU."""
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else "bfloat16"


def worker_info(settings: WorkerSettings, engine: LoadedEngine) -> WorkerInfo:
    """What the others may know of this worker."""
    return WorkerInfo(
        worker_id=settings.worker_id,
        role=settings.role,
        pid=os.getpid(),
        host=socket.gethostname(),
        device=settings.device,
        dtype=engine.cache.spec.dtype,
        num_threads=settings.num_threads,
        kv_spec=engine.cache.spec,
        num_kv_blocks=engine.cache.num_blocks,
        max_model_len=engine.max_model_len,
        profile=engine.profile,
    )


def assemble(
    info: WorkerInfo, runner: Runner, cache: PagedKVCache, config: ServingConfig, ports: Ports, clock: Clock
) -> Worker:
    """Wires a worker around an engine."""
    spec, scheduler, transfer = info.kv_spec, config.scheduler, config.transfer
    budget = scheduler.token_budget or (CPU_TOKEN_BUDGET if info.device == "cpu" else GPU_TOKEN_BUDGET)
    blocks = BlockManager(info.num_kv_blocks, spec.block_size, prefix_caching=config.cache.prefix_caching)
    outbox = Outbox(info.worker_id, ports.gateways, clock)
    sender = KVSender(info.worker_id, cache.storage, spec, ports.link, ports.peers, clock, transfer.window_mib * 2**20)
    receiver = KVReceiver(cache.storage, spec, ports.peers, clock)
    decode = DecodePhase(
        blocks,
        DecodeScheduler(blocks, scheduler.max_running),
        ReservationQueue(spec.block_size, scheduler.max_running, scheduler.reserve_headroom),
        receiver,
        cache,
        ports.peers,
        outbox,
        clock,
        DecodeLimits(int(config.cache.swap_gib * 2**30) // spec.bytes_per_block),
    )
    prefill = PrefillPhase(
        blocks,
        PrefillScheduler(blocks, lookahead_tokens=2 * budget),
        sender,
        outbox,
        clock,
        PrefillLimits(scheduler.max_waiting, transfer.layerwise_threshold_tokens, transfer.timeout_s, spec.num_layers),
        decode.adopt,
        decode.has_room,
    )
    parts = WorkerParts(runner, blocks, prefill, decode, sender, receiver, outbox)
    loop = LoopSettings(budget, transfer.layers_per_part, config.health.heartbeat_s)
    return Worker(info, parts, ports.peers, ports.loads, clock, loop)
