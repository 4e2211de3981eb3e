"""Backend name → backend."""

from __future__ import annotations

import logging

from engine.attention.backend import AttentionBackend
from engine.attention.reference import ReferenceAttention
from engine.attention.sdpa_cpu import SdpaCpuAttention
from engine.kv_cache import PagedKVCache
from phasewise.core.errors import ConfigError
from phasewise.core.kv_spec import FP8

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "sdpa_cpu", "reference")


def select_backend(name: str, kv_cache: PagedKVCache, windows: tuple[int | None, ...]) -> AttentionBackend:
    """Builds a backend. `auto` is the fastest for the cache's device; a warning tells when that is the plain one.

    Raises:
        ConfigError: unknown name, or a backend that cannot run on the cache's device.
    """
    if name not in BACKENDS:
        raise ConfigError(f"attention backend {name!r} is unknown; known: {', '.join(BACKENDS)}")
    on_cpu = kv_cache.device.type == "cpu"
    if kv_cache.spec.dtype == FP8 and on_cpu and name != "reference":
        raise ConfigError("cache.dtype fp8_e4m3 needs a GPU; use cache.dtype auto on a CPU", field="cache.dtype")
    if name == "sdpa_cpu" and not on_cpu:
        raise ConfigError(f"attention backend 'sdpa_cpu' cannot run on {kv_cache.device}; use auto or reference")
    if name == "reference" or not on_cpu:
        if name == "auto":
            logger.warning("no fast attention backend for %s: using the plain one", kv_cache.device)
        return ReferenceAttention(kv_cache, windows)
    return SdpaCpuAttention(kv_cache, windows)
