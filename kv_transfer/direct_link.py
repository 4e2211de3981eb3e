"""Direct links of a worker: parts from device to device, each pair of workers and direction over a wire of its own.

Every worker listens (kv_transfer/link_listener.py); the sending one opens. A link lives in epochs
(kv_transfer/epoch.py): when one breaks, its wire is aborted, its staging buffers come back, `LinkLost` is posted, and
the sender opens the next in the background, with growing pauses, until it is up or the peer is forgotten. Control
messages of handoffs do not go this way, except commits.

Threads, all daemons: one accepts; one watches (deadlines, errors of wires, pings); two for each link and end: one that
opens, reads the connection and cleans up, one that waits for the device; one that aborts, while it does. `buffer`,
`send_part` and `ArrivedPart.release` belong to the step loop's thread, everything else may be called from any.
"""

from __future__ import annotations

import logging
import threading
import uuid

import torch

from kv_transfer.channel import Channel, LinkIdentity
from kv_transfer.epoch import LinkResources
from kv_transfer.epoch_runner import JOIN_S, EpochRunner
from kv_transfer.link import Post, PrepareWrite, write_nothing
from kv_transfer.link_listener import LinkListener
from kv_transfer.receiving_end import ReceivingEnd
from kv_transfer.sending_end import SendingEnd, Trial
from kv_transfer.slabs import Slab, SlabPool
from kv_transfer.wire import Check, Mark, WireDevice
from phasewise.core.clock import Clock, MonotonicClock
from phasewise.core.errors import TransferFailed
from phasewise.core.messages import KVCommit, KVPart, LinkLost
from phasewise.core.placement import WorkerId

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0  # before another try
_SEAL_BYTES = 4096  # more than a checksum: a part has room for all of its KV


class _Peer:
    """A worker that this one sends to. `end` is that of its newest epoch."""

    def __init__(self, peer: WorkerId, address: str) -> None:
        self.peer = peer
        self.address = address
        self.trial = Trial(0.0, 0.0)
        self.end: SendingEnd | None = None
        self.failure = ""
        self.has_answer = threading.Event()  # of the first try: up, or `failure`
        self.is_forgotten = threading.Event()


class DirectLinks:
    """A `Link` (kv_transfer/link.py) to every worker that `open` was called for, and the receiving end of others'.

    Every part that `send_part` took ends with its KVPartAck, or with a LinkLost that names its transfer.

    Attributes:
        identity: what the other ends must agree with.
        outgoing, incoming: what the epochs of each direction share.
    """

    uses_store = False

    def __init__(
        self,
        worker_id: WorkerId,
        device: WireDevice,
        post: Post,
        check: Check,
        prepare_write: PrepareWrite = lambda part, wire: write_nothing,
        *,
        fingerprint: str,
        host: str,
        secret: str = "",
        num_slabs_out: int = 2,
        num_slabs_in: int = 2,
        slab_bytes: int = 128 << 20,
        stall_s: float = 5.0,
        trial_bytes: int = 16 << 20,
        clock: Clock | None = None,
    ) -> None:
        """`host`: the name or number by which others reach this one, and where it listens.

        `fingerprint` is what two ends must agree on; `secret` is what both must know. A part holds up to slab_bytes of
        KV. Takes some (num_slabs_out + num_slabs_in) * slab_bytes of the device, where smaller parts take only as much
        as they need, and 2 * trial_bytes while a link opens. Raises ValueError for sizes that no device takes.
        """
        if slab_bytes % 16 or trial_bytes % 256:
            raise ValueError("slab_bytes must be a multiple of 16 and trial_bytes of 256")
        self._device = device
        self._post = post
        self._clock = clock or MonotonicClock()
        slab_bytes += _SEAL_BYTES
        self.outgoing, self.incoming = (
            LinkResources(
                device,
                SlabPool(device.allocate(count * slab_bytes), slab_bytes),
                post,
                prepare_write,
                check,
                self._clock,
                stall_s,
                trial_bytes,
            )
            for count in (num_slabs_out, num_slabs_in)
        )
        self.identity = LinkIdentity(worker_id, device.kind, fingerprint, secret)
        self._packing: dict[int, tuple[Slab, Mark]] = {}  # by address: given out by `buffer` at that mark, not sent yet
        self.is_full = False
        self._process = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._peers: dict[WorkerId, _Peer] = {}
        self._runner = EpochRunner(post, stall_s)
        self._listener = LinkListener(self.incoming, self.identity, self._runner, host)
        self.address = self._listener.address
        self._runner.start("watch", self._runner.watch)

    @property
    def ends(self) -> list[SendingEnd | ReceivingEnd]:
        """Of all epochs that are open, or being opened."""
        return self._runner.ends

    # ---- Link

    def max_part_bytes(self, peer: WorkerId) -> int:
        return self.outgoing.pool.slab_bytes

    def bytes_per_s(self, peer: WorkerId) -> float:
        entry = self._peers.get(peer)
        return entry.trial.bytes_per_s if entry is not None else 0.0

    def part_s(self, peer: WorkerId) -> float:
        entry = self._peers.get(peer)
        return entry.trial.part_s if entry is not None else 0.0

    def name(self, peer: WorkerId) -> str:
        return self._device.kind.partition(" ")[0]

    def is_up(self, peer: WorkerId) -> bool:
        """Whether parts can be sent to the peer now."""
        return self._live_end(peer) is not None

    def buffer(self, peer: WorkerId, num_bytes: int) -> torch.Tensor | None:
        """Also after a LinkLost of another peer it pays to ask again."""
        if num_bytes > self.outgoing.pool.slab_bytes:
            raise ValueError(f"a part of {num_bytes} bytes; at most {self.outgoing.pool.slab_bytes} go at once")
        self.is_full = False
        entry, pool = self._peers.get(peer), self.outgoing.pool
        end = entry.end if entry is not None else None
        if len(self._peers) > 1 and end is not None:
            held = end.num_ungranted_bytes
            if held and held + num_bytes > pool.num_bytes - pool.slab_bytes:
                return None  # a peer that grants nothing must not hold what others could use
        slab = pool.try_take(num_bytes)
        if slab is None:
            self.is_full = True
            return None
        self._packing[slab.buffer.data_ptr()] = slab, self._device.mark()
        return slab.buffer

    def give_back(self, wire: torch.Tensor) -> None:
        slab, _ = self._packing.pop(wire.data_ptr())
        self.outgoing.pool.give_back(slab, self._device.mark())

    def send_part(self, peer: WorkerId, part: KVPart, wire: torch.Tensor) -> None:
        slab, ready = self._packing.pop(wire.data_ptr())
        assert wire.numel() == part.num_bytes, f"{wire.numel()} bytes for a part of {part.num_bytes}"
        end = self._live_end(peer)
        if end is None or not end.put(part, slab, ready, self._device.mark()):
            self.outgoing.pool.give_back(slab)
            self._post(LinkLost(peer, f"the link to {peer} is not up", frozenset({part.transfer_id})), None)

    def send_commit(self, peer: WorkerId, commit: KVCommit) -> bool:
        end = self._live_end(peer)
        return end is not None and end.put_commit(commit)

    def forget(self, peer: WorkerId) -> None:
        with self._lock:
            entry = self._peers.pop(peer, None)
        if entry is not None:
            entry.is_forgotten.set()
            if entry.end is not None:
                entry.end.epoch.break_(f"worker {peer} is gone")
        self._listener.forget(peer)

    def close(self) -> None:
        """Ends all links and threads; posts nothing more than what is under way."""
        if self._runner.is_closed.is_set():
            return
        self._runner.is_closed.set()
        self._listener.stop()
        for peer in list(self._peers):
            self.forget(peer)
        self._runner.close()
        self._listener.close()

    # ---- the sending ends

    def open(self, peer: WorkerId, address: str, timeout_s: float) -> None:
        """Returns when the link to the worker that listens at `address` is up; from then on it is kept up.

        Raises TransferFailed, saying why it is not; then it is not tried again.
        """
        entry = _Peer(peer, address)
        with self._lock:
            assert peer not in self._peers, f"a link to {peer} exists"
            self._peers[peer] = entry
        self._runner.start(f"send-{peer}", lambda: self._keep_open(entry, timeout_s))
        if not entry.has_answer.wait(timeout_s + JOIN_S):  # its epoch says sooner what is wrong
            entry.failure = f"no answer after {timeout_s:.0f} s"
        if entry.failure:
            self.forget(peer)
            ours = self.identity.worker_id
            raise TransferFailed(f"no link from {ours} to {peer} at {address}: {entry.failure}")

    # ---- inside

    def _live_end(self, peer: WorkerId) -> SendingEnd | None:
        """None while parts cannot be sent to the peer."""
        entry = self._peers.get(peer)
        end = entry.end if entry is not None else None
        return end if end is not None and end.epoch.is_up and not end.epoch.reason else None

    def _keep_open(self, entry: _Peer, timeout_s: float) -> None:
        number, pause_s = 0, _FIRST_PAUSE_S
        while not entry.is_forgotten.is_set():
            number += 1
            reason, was_up = self._run_epoch(entry, number, timeout_s)
            if not entry.has_answer.is_set():
                entry.failure = reason
                entry.has_answer.set()
                return
            if entry.is_forgotten.is_set():
                return
            logger.warning("link to %s, epoch %d: %s", entry.peer, number, reason)
            pause_s = _FIRST_PAUSE_S if was_up else min(2 * pause_s, _LONGEST_PAUSE_S)
            entry.is_forgotten.wait(pause_s)

    def _run_epoch(self, entry: _Peer, number: int, timeout_s: float) -> tuple[str, bool]:
        """One epoch, to its end: why it ended, and whether it had been up."""
        try:
            channel = Channel.connect(entry.address, timeout_s)
        except (OSError, ValueError) as error:
            return f"cannot connect: {error}", False
        end = entry.end = SendingEnd(self.outgoing, channel, self._clock.now_s() + timeout_s, entry.peer)
        hello = self.identity.hello(self.identity.worker_id, entry.peer, self._process, number, timeout_s)

        def work() -> None:
            if entry.is_forgotten.is_set():  # perhaps before it could find this epoch
                end.epoch.break_(f"worker {entry.peer} is gone")
            entry.trial = end.open(hello)
            entry.has_answer.set()
            end.serve()

        self._runner.run(end, channel, work)
        return end.epoch.reason, end.epoch.is_up
