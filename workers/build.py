"""Loads a worker's engine: prepared on all its ranks, then warmed up and measured."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from engine.kv_cache import PagedKVCache
from engine.loader import resolve_dtype
from kv_transfer.cache_port import CachePort
from kv_transfer.codec import Codec
from phasewise.core.clock import Clock
from phasewise.core.messages import WorkerInfo
from phasewise.core.profile import DeviceProfile
from workers.driver import Runner
from workers.engine_facts import cache_dtypes, written_profile
from workers.prepare import prepare_engine
from workers.profiler import measure_codec, measure_profile, start_up_grid, warm_up
from workers.ranks import Ranks
from workers.settings import WorkerSettings, token_budget


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
    written = written_profile(settings)  # before the weights, so that a wrong one is reported at once
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


def worker_info(settings: WorkerSettings, engine: LoadedEngine, link_address: str = "") -> WorkerInfo:
    """What gateways, control plane and other workers are told of this worker."""
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
