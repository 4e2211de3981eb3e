"""What the processes of the benchmarks of handoffs hold (benchmarks/nodes.py): a device and one end of direct links.

    LinkEnd     links, and a bare wire to compare them with
    CacheEnd    a KV cache with both halves of a handoff, without an engine

One with an engine is in benchmarks/link_worker.py.

Where there is no GPU the device is the host, and wires are sockets. Control messages of handoffs go through pipes.
Times are those of `time.perf_counter`, which on Linux is one clock for all processes of a host. The imports are more
than 15 of our own: an end does by hand what a whole worker is wired for.
"""

from __future__ import annotations

import os
import queue
import random
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.nodes import TIMEOUT_S
from benchmarks.offline import local_device
from engine.kv_cache import PagedKVCache
from kv_transfer.cache_port import CachePort
from kv_transfer.cache_protocol import KVPlace
from kv_transfer.codec import CHECKSUM_BYTES, Codec, part_layout
from kv_transfer.direct_link import DirectLinks
from kv_transfer.incoming import refusal
from kv_transfer.link import ArrivedPart, WriteReceived, write_nothing
from kv_transfer.outgoing import Handoff
from kv_transfer.paths import SendLimits
from kv_transfer.plan import PartSpan
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.staging import check
from kv_transfer.state import ReceiveStatus, SendStatus
from kv_transfer.wire import Wire, WireDevice
from phasewise.core.clock import MonotonicClock
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import (
    KVAbort,
    KVAccepted,
    KVCommit,
    KVDone,
    KVFailed,
    KVOffer,
    KVPart,
    KVPartAck,
    KVRefused,
    LinkLost,
)
from phasewise.core.request import Request, SampledToken, SamplingParams
from workers.link_sizes import sizes_for

MIB = 2**20
OPEN_S = 60.0
NUM_AHEAD = 16  # offers of pushes that are paced


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """As transfer.* of the configuration: what a worker with one peer has, if nothing else is said."""

    channels: int = sizes_for(1).channels
    num_slabs_out: int = sizes_for(1).num_slabs
    num_slabs_in: int = sizes_for(1).num_slabs
    slab_bytes: int = sizes_for(1).slab_mib * MIB


def link_device(channels: int, *, is_only_user: bool = True) -> WireDevice:
    """The GPU, or the host where there is none. `is_only_user`: nothing else in the process uses NCCL."""
    if torch.cuda.is_available():
        from kv_transfer.nccl_wire import NcclDevice

        torch.cuda.init()
        return NcclDevice(0, channels, is_only_user=is_only_user)
    from kv_transfer.tcp_wire import TcpDevice

    return TcpDevice("127.0.0.1")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def unchecked(data: torch.Tensor, answer: torch.Tensor) -> None:
    """The check of a wire that is measured alone."""
    answer.fill_(True)


class LinkEnd:
    """Links to others, and the mailbox that they post to."""

    def __init__(self, name: str, controls: Mapping[str, Connection], settings: LinkSettings) -> None:
        self.name = name
        self.mailbox: queue.SimpleQueue[tuple[Any, ArrivedPart | None]] = queue.SimpleQueue()
        self._controls = controls
        self._device = link_device(settings.channels)
        self._wire: Wire | None = None
        self._memory_before = memory()
        self.links = DirectLinks(
            name,
            self._device,
            self.post,
            check,
            self.prepare_write,
            fingerprint="benchmark",
            host="127.0.0.1",
            num_slabs_out=settings.num_slabs_out,
            num_slabs_in=settings.num_slabs_in,
            slab_bytes=settings.slab_bytes,
            stall_s=20.0,
        )
        for control in controls.values():
            threading.Thread(target=self._listen, args=(control,), daemon=True).start()

    def address(self) -> str:
        return self.links.address

    def open(self, peer: str, address: str) -> float:
        """The link's rate in bytes/s."""
        self.links.open(peer, address, OPEN_S)
        return self.links.bytes_per_s(peer)

    def memory(self) -> dict[str, float]:
        """MiB beyond what this process had before its first link."""
        synchronize()
        return {name: value - self._memory_before[name] for name, value in memory().items()}

    def close(self) -> None:
        self.links.close()
        if self._wire is not None:
            self._wire.abort()

    def post(self, message: Any, arrived: ArrivedPart | None = None) -> None:
        self.mailbox.put((message, arrived))

    def prepare_write(self, part: KVPart, wire: torch.Tensor) -> WriteReceived:
        """Writes a part where it belongs, if this end has a cache."""
        return write_nothing

    def send(self, worker_id: str, message: Any) -> None:
        """PeerPort."""
        self._controls[worker_id].send(message)

    def raw_token(self) -> bytes:
        return self._device.token()

    def raw_open(self, token: bytes, rank: int) -> None:
        """Also sends or receives once: NCCL connects at the first operation, at both ends together."""
        self._wire = self._device.make(token, rank)
        self._wire.connect()
        data = self._device.allocate(16)
        if rank == 0:
            self._wire.send(data).wait()
        else:
            self._wire.receive(data, None, unchecked).wait()

    def raw_send(self, num_bytes: int, count: int) -> float:
        """When the first of `count` messages began: once the other end has posted all its receives."""
        assert self._wire is not None
        data = self._device.allocate(num_bytes)
        synchronize()
        while self.mailbox.get(timeout=TIMEOUT_S)[0] != "posted":
            pass  # an acknowledgement that came behind the end of its handoff
        start_s = time.perf_counter()
        marks = [self._wire.send(data) for _ in range(count)]
        marks[-1].wait()
        return start_s

    def raw_receive(self, sender: str, num_bytes: int, count: int) -> float:
        """When the last message was in."""
        assert self._wire is not None
        data = self._device.allocate(num_bytes)
        synchronize()
        receipts = [self._wire.receive(data, None, unchecked) for _ in range(count)]
        self.send(sender, "posted")
        for receipt in receipts:
            receipt.wait()
        return time.perf_counter()

    def _listen(self, control: Connection) -> None:
        while True:
            try:
                self.post(control.recv())
            except (EOFError, OSError):
                return


class CacheEnd(LinkEnd):
    """A cache of random values; prompts of any length lie in the same scattered blocks of it."""

    def __init__(
        self,
        name: str,
        controls: Mapping[str, Connection],
        settings: LinkSettings,
        spec: KVCacheSpec,
        num_blocks: int,
        window_bytes: int,
    ) -> None:
        super().__init__(name, controls, settings)
        cache = PagedKVCache(spec, num_blocks, local_device())
        torch.manual_seed(zlib.crc32(name.encode()))
        for layer in cache.storage:
            layer.copy_(torch.randn(layer.shape, device=layer.device))
        self._port = CachePort(cache, spec)
        self._table = random.Random(name).sample(range(num_blocks), num_blocks)
        clock = MonotonicClock()
        self._sender = KVSender(name, self._port, self.links, self, clock, SendLimits(window_bytes))
        self._receiver = KVReceiver(self._port, self, clock, threading.Lock())
        self._num_offers = 0
        self._num_taken = 0

    def prepare_write(self, part: KVPart, wire: torch.Tensor) -> WriteReceived:
        return self._receiver.prepare_write(part, wire)

    def give(self, peer: str, length: int, count: int) -> float:
        """Hands a prompt over so often, all at once; the moment at which the first push began."""
        return self.give_all(peer, [length] * count)

    def give_all(self, peer: str, lengths: Sequence[int]) -> float:
        handoffs = [self._offer(peer, length) for length in lengths]
        self._until(lambda: all(handoff.status is SendStatus.ACCEPTED for handoff in handoffs))
        synchronize()
        start_s = time.perf_counter()
        for handoff in handoffs:
            self._push(handoff)
            self._sender.commit(handoff, (SampledToken(1),))
        self._until(lambda: all(handoff.status is SendStatus.DONE for handoff in handoffs))
        for handoff in handoffs:
            self._sender.forget(handoff, "it is done")
        return start_s

    def take(self, count: int) -> float:
        """Receives `count` handoffs; the moment at which the last was in the cache."""
        self._num_taken = 0
        self._until(lambda: self._num_taken == count)
        synchronize()
        return time.perf_counter()

    def push_at(self, peer: str, length: int, bytes_per_s: float, duration_s: float) -> tuple[int, float]:
        """Pushes prompts that are given up when they have left, at that rate or as fast as they go: bytes, seconds."""
        period_s = length * self._port.spec.bytes_per_token / bytes_per_s
        offered: deque[Handoff] = deque()
        pushed: list[Handoff] = []
        before, start_s = self._sender.num_bytes_sent, time.perf_counter()
        next_s = start_s
        while (now_s := time.perf_counter()) < start_s + duration_s:
            while len(offered) + len(pushed) < NUM_AHEAD:
                offered.append(self._offer(peer, length))
            if offered and now_s >= next_s and offered[0].status is SendStatus.ACCEPTED:
                self._push(offered[0])
                pushed.append(offered.popleft())
                next_s = max(next_s + period_s, now_s - 10 * period_s)
            self._handle(max(next_s - now_s, 0.001))
            for handoff in [handoff for handoff in pushed if not handoff.is_leaving]:
                self._give_up(handoff)
                pushed.remove(handoff)
        elapsed_s, num_bytes = time.perf_counter() - start_s, self._sender.num_bytes_sent - before
        self._until(lambda: not any(handoff.is_leaving for handoff in pushed))
        for handoff in (*pushed, *offered):
            self._give_up(handoff)
        return num_bytes, elapsed_s

    def content(self, length: int) -> list[int]:
        """The checksum of a prompt's KV in the cache's own dtype."""
        spec = self._port.spec
        span = PartSpan(0, spec.num_layers, 0, length)
        layout = part_layout(spec, span, spec.dtype, Codec.NONE)
        wire = self._device.allocate(layout.num_bytes)
        self._port.pack(KVPlace(self._table), span, layout, wire)
        return wire[-CHECKSUM_BYTES:].tolist()

    def num_checksum_failures(self) -> int:
        return self._receiver.incoming.counters.checksum_failures

    def _offer(self, peer: str, length: int) -> Handoff:
        self._num_offers += 1
        request = Request(f"{self.name}-{self._num_offers}", (0,) * length, SamplingParams(max_tokens=2))
        handoff = Handoff(peer, request, "gateway", time.monotonic() + TIMEOUT_S)
        self._sender.offer(handoff)
        return handoff

    def _push(self, handoff: Handoff) -> None:
        self._sender.begin(handoff, self._table, 0)
        self._sender.on_computed(handoff, handoff.whole)

    def _give_up(self, handoff: Handoff) -> None:
        self._sender.forget(handoff, "a benchmark's")

    def _until(self, condition: Callable[[], bool]) -> None:
        end_s = time.perf_counter() + TIMEOUT_S
        while not condition():
            if time.perf_counter() > end_s:
                raise TimeoutError(f"a handoff did not end within {TIMEOUT_S:.0f} s")
            self._handle(1.0)

    def _handle(self, timeout_s: float) -> None:
        """One message, if it comes in time."""
        try:
            message, arrived = self.mailbox.get(timeout=timeout_s)
        except queue.Empty:
            return
        sender, receiver = self._sender, self._receiver
        match message:
            case KVOffer():
                problem = refusal(message, self._port.spec)
                assert not problem, problem
                receiver.accept(message, self._table, 0, float("inf"))
            case KVAccepted():
                sender.on_accepted(message)
            case KVPart():
                assert arrived is not None
                receiver.on_part(message, arrived)
            case KVPartAck(transfer_id, part_index):
                sender.on_part_ack(transfer_id, part_index)
            case KVCommit():
                receiver.incoming.on_commit(message)
            case KVDone(transfer_id):
                sender.outgoing.on_done(transfer_id)
            case KVAbort(transfer_id, reason):
                receiver.incoming.on_abort(transfer_id, reason)
            case KVRefused() | KVFailed() | LinkLost():
                raise RuntimeError(f"{self.name}: {message}")
        for ended in receiver.incoming.pop_ended():
            if ended.status is not ReceiveStatus.DONE:
                raise RuntimeError(f"{self.name}: {ended.reason}")
            self._num_taken += 1


def memory() -> dict[str, float]:
    """MiB: of this process on the host, of its device as the driver counts, and of that what torch has reserved."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    found = {"resident": resident / MIB, "device": 0.0, "reserved": 0.0}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {"device": (total - free) / MIB, "reserved": torch.cuda.memory_reserved() / MIB}
    return found
