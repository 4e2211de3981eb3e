"""One rank's part of a worker's engine: its weights, its cache and its runner. A worker of one GPU is rank 0 of one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from engine.kv_cache import PagedKVCache
from engine.loader import LoadedModel, load_model, resolve_dtype
from engine.model_runner import ModelRunner
from engine.tensor_parallel import Command, Group, OtherRanks
from kv_transfer.cache_port import CachePort
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.model_source import resolve_model
from workers.driver import Runner
from workers.ranked_cache import LeadingCachePort, LeadingKVCache
from workers.ranks import Join, Ranks
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)


class RankRunner(Runner, Protocol):
    """A runner of either kind (engine/model_runner.py, engine/cuda/runner.py), on any rank."""

    def warm_up(self, token_budget: int) -> None:
        """As ModelRunner.warm_up."""

    def carry_out(self, command: Command) -> None:
        """As ModelRunner.carry_out."""


def load_part(settings: WorkerSettings, group: Group, progress: Callable[[float], None]) -> LoadedModel:
    """This rank's part of the model, on its device. The group need not be connected yet. Raises as `load_model`."""
    model = settings.config.model
    return load_model(
        resolve_model(model.path),
        dtype=resolve_dtype(model.dtype, settings.device),
        device=_rank_device(settings, group),
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
) -> tuple[PagedKVCache, RankRunner]:
    """Joins the group, if there is one, and makes this rank's cache and runner. `ranks` only on rank 0.

    Raises:
        RuntimeError: a rank did not join in time.
        ConfigError: as the runner's constructor, or host memory for the swap space is missing.
    """
    if group.size > 1:
        group.connect(store_path, loaded.model.device)
    caching, device = settings.config.cache, loaded.device
    spec = loaded.kv_cache_spec(caching.block_size, caching.dtype)
    if ranks is not None:
        cache: PagedKVCache = LeadingKVCache(spec, join.num_blocks, device, join.num_swap_blocks, ranks)
        return cache, make_runner(loaded, cache, join.max_model_len, join.max_batch, ranks)
    cache = PagedKVCache(spec, join.num_blocks, device, join.num_swap_blocks)
    return cache, make_runner(loaded, cache, join.max_model_len, join.max_batch)


def make_port(cache: PagedKVCache, whole: KVCacheSpec, group: Group, ranks: Ranks | None) -> CachePort:
    """Rank 0's port to the KV of the `whole` worker. `ranks` when there are others, which must take commands."""
    return CachePort(cache, whole) if ranks is None else LeadingCachePort(cache, whole, group, ranks)


def make_runner(
    loaded: LoadedModel,
    cache: PagedKVCache,
    max_model_len: int,
    max_batch: int,
    others: OtherRanks | None = None,
) -> RankRunner:
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


def _rank_device(settings: WorkerSettings, group: Group) -> str:
    """GPU r for rank r: torch's symmetric memory wants all ranks to see all GPUs of the group."""
    return f"cuda:{group.rank}" if group.size > 1 and settings.device.startswith("cuda") else settings.device
