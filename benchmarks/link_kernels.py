"""How fast parts are packed, unpacked and summed on one device, nothing else running there."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.offline import local_device
from engine.kv_cache import PagedKVCache
from kv_transfer.cache_port import CachePort
from kv_transfer.cache_protocol import KVPlace
from kv_transfer.codec import Codec, part_layout, wire_dtype
from kv_transfer.plan import PartSpan
from kv_transfer.staging import is_intact
from phasewise.core.kv_spec import FP8, KVCacheSpec

BLOCK = 16
CASES = {
    "bfloat16 to bfloat16": ("bfloat16", "bfloat16", Codec.NONE),
    "bfloat16 to fp8": ("bfloat16", FP8, Codec.NONE),
    "fp8 to bfloat16": (FP8, "bfloat16", Codec.NONE),
    "fp8 to fp8": (FP8, FP8, Codec.NONE),
    "float32 to float32": ("float32", "float32", Codec.NONE),
    "bfloat16 to bfloat16, codec fp8": ("bfloat16", "bfloat16", Codec.FP8),
    "bfloat16 to bfloat16, codec int8": ("bfloat16", "bfloat16", Codec.INT8),
}
"""(dtype of the sender's cache, of the receiver's, codec)."""

Rate = tuple[str, float, float]
"""(what, GB of the cache per second, the same for a copy that moves as many bytes as must move)."""


def floor_gb_per_s(cache_bytes: int, moved_bytes: int, copy_bytes_per_s: float) -> float:
    """The rate at which a cache's bytes are dealt with when so many bytes are read and written in all."""
    return cache_bytes / (moved_bytes / copy_bytes_per_s) / 1e9


class Kernels:
    """Parts of `num_tokens` tokens in the Llama-3.1-8B shape, scattered over twice as many blocks."""

    def __init__(self, num_tokens: int) -> None:
        self._span = PartSpan(0, 32, 0, num_tokens)
        num_blocks = 2 * -(-num_tokens // BLOCK)
        self._num_blocks = num_blocks
        self._table = random.Random(0).sample(range(num_blocks), num_blocks)
        source = torch.empty(256 << 20, dtype=torch.uint8, device=local_device())
        target = torch.empty_like(source)
        self._copy_bytes_per_s = 2 * source.numel() / _median_s(lambda: target.copy_(source))

    def close(self) -> None:
        """Nothing is left to end."""

    def rates(self, case: str) -> list[Rate]:
        source, target, codec = CASES[case]
        sender, receiver = self._port(source), self._port(target)
        layout = part_layout(sender.spec, self._span, wire_dtype(source, target), codec)
        wire = torch.empty(layout.num_bytes, dtype=torch.uint8, device=local_device())
        place, target_place = KVPlace(self._table), KVPlace(self._table)
        sender.pack(place, self._span, layout, wire)
        sizes = [self._span.num_tokens * port.spec.bytes_per_token for port in (sender, receiver)]
        calls: list[tuple[str, Callable[[], object], int, int]] = [
            ("pack with sum", lambda: sender.pack(place, self._span, layout, wire), sizes[0], sizes[0]),
            ("unpack", lambda: receiver.unpack(target_place, self._span, layout, wire), sizes[1], sizes[1]),
            ("check of the sum", lambda: is_intact(wire), layout.num_bytes, 0),
        ]
        return [
            (
                what,
                num_bytes / _median_s(call) / 1e9,
                floor_gb_per_s(num_bytes, layout.num_bytes + beside, self._copy_bytes_per_s),
            )
            for what, call, num_bytes, beside in calls
        ]

    def _port(self, dtype: str) -> CachePort:
        spec = KVCacheSpec(32, 8, 128, BLOCK, dtype)
        cache = PagedKVCache(spec, self._num_blocks, local_device())
        for layer in cache.storage:
            layer.copy_(torch.randn(layer.shape, device=layer.device))
        return CachePort(cache, spec)


def _median_s(call: Callable[[], object], repeats: int = 15) -> float:
    """By the device's own clock, the calls one behind the other; on a CPU by the host's."""
    for _ in range(2):
        call()
    if local_device() == "cpu":
        times = []
        for _ in range(repeats // 3):
            start_s = time.perf_counter()
            call()
            times.append(time.perf_counter() - start_s)
        return statistics.median(times)
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1000
