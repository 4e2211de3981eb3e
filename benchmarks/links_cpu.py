"""A part of a handoff between two CPU workers' processes of one host: over TCP, and through Ray's object store.

The time is that of the whole part: packed out of scattered blocks with its checksum, moved, checked, unpacked into
others. `floor` is the bare wire with a message of that size. Parts go alone, and in a row as fast as the link takes
them. The two roads take turns, and of each the best and the median are given: the host may have other work.

    python -m benchmarks.links_cpu --output benchmarks/results/links-cpu.json
"""

from __future__ import annotations

import argparse
import asyncio
import os
import queue
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.link_nodes import unchecked
from benchmarks.offline import device_name, write_result
from cli.ray_runtime import LOOPBACK
from engine.kv_cache import PagedKVCache
from kv_transfer.cache_port import CachePort
from kv_transfer.cache_protocol import KVPlace
from kv_transfer.codec import Codec, WireLayout
from kv_transfer.direct_link import DirectLinks
from kv_transfer.link import ArrivedPart, Link
from kv_transfer.object_store_link import ObjectStoreLink
from kv_transfer.plan import PartSpan
from kv_transfer.staging import check
from kv_transfer.tcp_wire import TcpDevice, TcpWire
from phasewise.core.handles import WorkerHandles
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import KVPart, KVPartAck

HOST = "127.0.0.1"
SPEC = KVCacheSpec(16, 2, 64, 16, "float32", "benchmark")
NUM_TOKENS = 4096
SIZES = {2**16: 100, 2**20: 100, 2**24: 20, 2**26: 8}
"""Bytes of KV in a part → how many are measured in one round."""
TIMEOUT_S = 60.0


class End:
    """A worker's cache, link and mailbox. Calls of Ray come in on asyncio; the worker's loop is a thread."""

    def __init__(self, name: str, road: str) -> None:
        torch.set_num_threads(1)
        self._mailbox: queue.SimpleQueue[tuple[Any, ArrivedPart | None]] = queue.SimpleQueue()
        self._peers = WorkerHandles()
        cache = PagedKVCache(SPEC, NUM_TOKENS // SPEC.block_size, torch.device("cpu"))
        cache.storage.normal_()
        self._port = CachePort(cache, SPEC)
        self._table = random.Random(name).sample(range(cache.num_blocks), cache.num_blocks)
        self._direct: DirectLinks | None = None
        self._device = TcpDevice(HOST)
        self._wire: TcpWire | None = None
        if road == "tcp":
            self._direct = DirectLinks(name, self._device, self._post, check, fingerprint="", host=HOST)
        self._store = ObjectStoreLink(name, self._peers, torch.device("cpu"), self._post)
        self._link: Link = self._direct or self._store

    async def connect(self, ends: dict[str, Any]) -> str:
        self._peers.connect(ends)
        return self._direct.address if self._direct is not None else ""

    async def open(self, peer: str, address: str) -> None:
        assert self._direct is not None
        await asyncio.to_thread(self._direct.open, peer, address, TIMEOUT_S)

    async def token(self) -> bytes:
        return self._device.token()

    async def open_wire(self, token: bytes, rank: int) -> None:
        self._wire = self._device.make(token, rank)
        await asyncio.to_thread(self._wire.connect)

    async def post(self, message: Any) -> None:
        self._post(message)

    async def post_part(self, sender: str, part: KVPart, array: np.ndarray) -> None:
        self._store.receive(sender, part, array)

    async def give(self, size: int, count: int, ahead: int) -> list[float]:
        """When each part began. At most `ahead` of them are not acknowledged."""
        return await asyncio.to_thread(self._give, size, count, ahead)

    async def take(self, size: int, count: int) -> list[float]:
        """When each part was in the cache."""
        return await asyncio.to_thread(self._take, size, count)

    async def raw(self, rank: int, size: int, count: int) -> list[float]:
        """When each message on the bare wire began, or was in; the receiving end asks for each."""
        return await asyncio.to_thread(self._raw, rank, size, count)

    def _post(self, message: Any, arrived: ArrivedPart | None = None) -> None:
        self._mailbox.put((message, arrived))

    def _give(self, size: int, count: int, ahead: int) -> list[float]:
        span, layout = part_of(size)
        starts: list[float] = []
        num_acks = 0
        while num_acks < count:
            if len(starts) < min(count, num_acks + ahead):
                start_s = time.perf_counter()
                wire = self._link.buffer("receiver", layout.num_bytes)
                if wire is not None:
                    self._port.pack(KVPlace(self._table), span, layout, wire)
                    self._link.send_part("receiver", header(len(starts), span, layout), wire)
                    starts.append(start_s)
                    continue
            message, _ = self._mailbox.get(timeout=TIMEOUT_S)
            assert isinstance(message, KVPartAck), message
            num_acks += 1
        return starts

    def _take(self, size: int, count: int) -> list[float]:
        span, layout = part_of(size)
        ends = []
        for _ in range(count):
            message, arrived = self._mailbox.get(timeout=TIMEOUT_S)
            assert arrived is not None and arrived.wire is not None, message
            self._port.unpack(KVPlace(self._table), span, layout, arrived.wire)
            arrived.release()
            ends.append(time.perf_counter())
        return ends

    def _raw(self, rank: int, size: int, count: int) -> list[float]:
        assert self._wire is not None
        data, times = self._device.allocate(size).zero_(), []
        request = torch.zeros(1, dtype=torch.uint8)
        for _ in range(count):
            if rank == 0:
                self._wire.receive(request, None, unchecked).wait()
                times.append(time.perf_counter())
                self._wire.send(data)
            else:
                self._wire.send(request)
                self._wire.receive(data, None, unchecked).wait()
                times.append(time.perf_counter())
        return times


def part_of(size: int) -> tuple[PartSpan, WireLayout]:
    """All layers of so many tokens that their KV has `size` bytes."""
    span = PartSpan(0, SPEC.num_layers, 0, size // SPEC.bytes_per_token)
    return span, WireLayout(span.num_layers, span.num_tokens, SPEC.num_kv_heads, SPEC.head_dim, SPEC.dtype, Codec.NONE)


def header(index: int, span: PartSpan, layout: WireLayout) -> KVPart:
    return KVPart("t", index, 0, span.num_layers, 0, span.num_tokens, layout.num_bytes, layout.dtype, layout.codec)


class Benchmark:
    """Both pairs of ends. `alone_s` and `row_s` are seconds a part, by (road, size), from all rounds."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self.alone_s: dict[tuple[str, int], list[float]] = {}
        self.row_s: dict[tuple[str, int], list[float]] = {}
        make = ray.remote(num_cpus=0)(End).options(max_concurrency=100)
        self._ends = {road: [make.remote(name, road) for name in ("sender", "receiver")] for road in ("tcp", "store")}
        for road, (sender, receiver) in self._ends.items():
            handles = {"sender": sender, "receiver": receiver}
            _, address = ray.get([end.connect.remote(handles) for end in (sender, receiver)])
            if road == "tcp":
                ray.get(sender.open.remote("receiver", address))
                token = ray.get(sender.token.remote())
                ray.get([end.open_wire.remote(token, rank) for rank, end in enumerate((sender, receiver))])

    def round(self, num_parts: dict[int, int]) -> None:
        for size, count in num_parts.items():
            sender, receiver = self._ends["tcp"]
            calls = receiver.raw.remote(1, size, count), sender.raw.remote(0, size, count)
            self._keep(self.alone_s, ("wire", size), *calls)
            for road, (sender, receiver) in self._ends.items():
                self._keep(
                    self.alone_s, (road, size), receiver.take.remote(size, count), sender.give.remote(size, count, 1)
                )
                ends, starts = self._ray.get(
                    [receiver.take.remote(size, count), sender.give.remote(size, count, count)]
                )
                self.row_s.setdefault((road, size), []).append((ends[-1] - starts[0]) / count)

    def _keep(self, kept: dict[tuple[str, int], list[float]], key: tuple[str, int], *calls: Any) -> None:
        ends, starts = self._ray.get(list(calls))
        kept.setdefault(key, []).extend(end - start for start, end in zip(starts, ends, strict=True))

    def rows(self) -> list[dict[str, Any]]:
        """`ours` is TCP, `peer` the object store, `floor` the bare wire; milliseconds a part."""
        rows = []
        for size in dict.fromkeys(size for _, size in self.alone_s):
            for case, kept, of in (
                ("alone, best", self.alone_s, min),
                ("alone, median", self.alone_s, statistics.median),
                ("in a row, best", self.row_s, min),
                ("in a row, median", self.row_s, statistics.median),
            ):
                tcp, store, wire = (
                    round(1000 * of(kept[road, size]), 3) if (road, size) in kept else None
                    for road in ("tcp", "store", "wire")
                )
                case = f"part of {size / 2**20:g} MiB, {case}"
                rows.append(
                    {"case": case, "unit": "ms", "ours": tcp, "floor": wire, "peer": store, "must": None, "goal": None}
                    | {"better": "low"}
                )
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured")
    parser.add_argument("--quick", action="store_true", help="few parts: shows that it runs")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=512 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address=LOOPBACK,
        runtime_env={"env_vars": {"PYTHONPATH": os.getcwd()}},
    )
    try:
        benchmark = Benchmark(ray)
        for _ in range(options.rounds):
            benchmark.round(dict.fromkeys(SIZES, 2) if options.quick else SIZES)
        rows = benchmark.rows()
    finally:
        ray.shutdown()
    for row in rows:
        print(
            f"{row['case']:34} tcp {row['ours']:8.3f}  object store {row['peer']:8.3f}  wire {row['floor'] or '-'} ms"
        )
    if options.output is not None:
        write_result(options.output, device_name("cpu"), ["phasewise", "torch", "ray"], rows)


if __name__ == "__main__":
    main()
