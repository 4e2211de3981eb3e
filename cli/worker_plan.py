"""Which workers a configuration asks for: their devices, threads and names."""

from __future__ import annotations

import os

from phasewise.core.config import PoolConfig, ServingConfig
from phasewise.core.errors import ConfigError
from phasewise.core.placement import WorkerRole
from workers.settings import WorkerSettings


def choose_device(config: ServingConfig, num_gpus: int) -> str:
    """The device of every worker, `cpu` or `cuda`. `auto` takes GPUs where there are any.

    Raises:
        ConfigError: the workers need more GPUs than there are.
    """
    wanted, num_needed = config.model.device, config.pools.num_devices
    if wanted == "cpu" or (wanted == "auto" and num_gpus == 0):
        return "cpu"
    if num_gpus < num_needed:
        raise ConfigError(
            f"pools: {config.pools.num_workers} workers need {num_needed} GPUs and Ray sees {num_gpus}; "
            "lower the number of workers or tensor_parallel, or set --device cpu"
        )
    return "cuda"


def worker_settings(
    config: ServingConfig, device: str, collector: str | None, secret: str = "", head: str = ""
) -> list[WorkerSettings]:
    """One entry per worker. Threads that are not given are the machine's cores shared out, at least one each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(cores // config.pools.num_devices, 1)
    pools: list[tuple[WorkerRole, PoolConfig]] = [
        (WorkerRole.PREFILL, config.pools.prefill),
        (WorkerRole.DECODE, config.pools.decode),
        (WorkerRole.MIXED, config.pools.mixed),
    ]
    return [
        WorkerSettings(
            f"{role.value}-{i}",
            role,
            device,
            pool.threads or share,
            config.with_cache_of(pool),
            collector,
            pool.tensor_parallel,
            secret,
            head,
        )
        for role, pool in pools
        for i in range(pool.workers)
    ]
