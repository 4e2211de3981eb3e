"""Direct links of one worker: parts from device to device, each pair of workers and direction over a wire of its own.

Every worker listens; the sending one opens. A link lives in epochs (kv_transfer/link_epoch.py): when one breaks, its
wire is aborted, its slabs come back, `LinkLost` is posted, and the sender opens the next in the background, with
growing pauses, until it is up or the peer is forgotten. Control messages of handoffs do not go this way.

Threads, all daemons: one accepts; one watches (deadlines, errors of wires, pings); two for each link and end: one that
opens, reads the connection and cleans up, one that waits for the device; one that aborts, while it does. `buffer`,
`send_part` and `ArrivedPart.release` belong to the step loop's thread, everything else may be called from any.
"""

from __future__ import annotations

import logging
import socket
import threading
import uuid

import torch

from kv_transfer.channel import Channel, Hello, differences
from kv_transfer.link import Land, Post, to_mailbox
from kv_transfer.link_epoch import ReceiveEpoch, Room, SendEpoch, Trial
from kv_transfer.plan import WIRE_VERSION
from kv_transfer.slabs import Slab, SlabPool
from kv_transfer.wire import Check, Mark, WireDevice, WireError
from phasewise.core.clock import Clock, MonotonicClock
from phasewise.core.errors import TransferFailed
from phasewise.core.messages import KVCommit, KVPart, LinkLost
from phasewise.core.placement import WorkerId

logger = logging.getLogger(__name__)

_GREETING_S = 5.0  # for a stranger's first message
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0  # before another try
_JOIN_S = 5.0
_SEAL_BYTES = 4096  # more than a checksum: a part has room for all of its KV


class _Peer:
    """A worker that this one sends to."""

    def __init__(self, peer: WorkerId, address: str) -> None:
        self.peer = peer
        self.address = address
        self.trial = Trial(0.0, 0.0)
        self.epoch: SendEpoch | None = None
        self.failure = ""
        self.has_answer = threading.Event()  # of the first try: up, or `failure`
        self.is_forgotten = threading.Event()


class DirectLinks:
    """A `Link` (kv_transfer/link.py) to every worker that `open` was called for, and the receiving end of others'.

    Every part that `send_part` took ends with its KVPartAck, or with a LinkLost that names its transfer.
    """

    def __init__(
        self,
        worker_id: WorkerId,
        device: WireDevice,
        post: Post,
        check: Check,
        land: Land = lambda part, wire: to_mailbox,
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

        `fingerprint`, which may be set later, is what two ends must agree on; `secret` is what both must know. A part
        holds up to slab_bytes of KV. Takes some (num_slabs_out + num_slabs_in) * slab_bytes of the device, where
        smaller parts take only as much as they need, and 2 * trial_bytes while a link opens.
        """
        if slab_bytes % 16 or trial_bytes % 256:
            raise ValueError("slab_bytes must be a multiple of 16 and trial_bytes of 256")
        self._worker_id = worker_id
        self._device = device
        self._post = post
        self.fingerprint = fingerprint
        self._secret = secret
        self._clock = clock or MonotonicClock()
        self._stall_s = stall_s
        slab_bytes += _SEAL_BYTES
        out_pool, in_pool = (
            SlabPool(device.allocate(count * slab_bytes), slab_bytes) for count in (num_slabs_out, num_slabs_in)
        )
        self._out = Room(device, out_pool, post, land, check, self._clock, stall_s, trial_bytes)
        self._in = Room(device, in_pool, post, land, check, self._clock, stall_s, trial_bytes)
        self._packing: dict[int, tuple[Slab, Mark]] = {}  # by address: given out by `buffer` at that mark, not sent yet
        self.is_full = False
        self._process = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._peers: dict[WorkerId, _Peer] = {}
        self._senders: dict[WorkerId, ReceiveEpoch] = {}  # the newest of each, also when it is over
        self._epochs: set[SendEpoch | ReceiveEpoch] = set()  # to be watched
        self._threads: set[threading.Thread] = set()
        self._is_closed = threading.Event()
        self._listener = socket.create_server((host, 0), backlog=128)
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._start("accept", self._accept)
        self._start("watch", self._watch)

    # ---- Link

    def max_part_bytes(self, peer: WorkerId) -> int:
        return self._out.pool.slab_bytes

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
        entry = self._peers.get(peer)
        epoch = entry.epoch if entry is not None else None
        return epoch is not None and epoch.is_up and not epoch.reason

    def buffer(self, peer: WorkerId, num_bytes: int) -> torch.Tensor | None:
        """Also after a LinkLost of another peer it pays to ask again."""
        if num_bytes > self._out.pool.slab_bytes:
            raise ValueError(f"a part of {num_bytes} bytes; at most {self._out.pool.slab_bytes} go at once")
        self.is_full = False
        entry, pool = self._peers.get(peer), self._out.pool
        epoch = entry.epoch if entry is not None else None
        if len(self._peers) > 1 and epoch is not None:
            held = epoch.num_ungranted_bytes
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
        self._out.pool.give_back(slab, self._device.mark())

    @property
    def uses_store(self) -> bool:
        return False

    def send_part(self, peer: WorkerId, part: KVPart, wire: torch.Tensor) -> None:
        slab, ready = self._packing.pop(wire.data_ptr())
        assert wire.numel() == part.num_bytes, f"{wire.numel()} bytes for a part of {part.num_bytes}"
        entry = self._peers.get(peer)
        epoch = entry.epoch if entry is not None else None
        if epoch is None or not epoch.is_up or not epoch.put(part, slab, ready, self._device.mark()):
            self._out.pool.give_back(slab)
            self._post(LinkLost(peer, f"the link to {peer} is not up", frozenset({part.transfer_id})), None)

    def send_commit(self, peer: WorkerId, commit: KVCommit) -> bool:
        entry = self._peers.get(peer)
        epoch = entry.epoch if entry is not None else None
        return epoch is not None and epoch.is_up and epoch.send_commit(commit)

    def forget(self, peer: WorkerId) -> None:
        with self._lock:
            entry, incoming = self._peers.pop(peer, None), self._senders.pop(peer, None)
            if entry is not None:
                entry.is_forgotten.set()
        for epoch in (entry.epoch if entry is not None else None, incoming):
            if epoch is not None:
                epoch.break_(f"worker {peer} is gone")

    def close(self) -> None:
        """Ends all links and threads; posts nothing more than what is under way."""
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        with self._lock:
            peers = [*self._peers, *self._senders]
            epochs, threads = set(self._epochs), set(self._threads)
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`, which closing would not
        for peer in peers:
            self.forget(peer)
        for epoch in epochs:
            epoch.break_("this worker closes its links")
        for thread in threads:
            thread.join(_JOIN_S)
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
        self._start(f"send-{peer}", self._keep_open, entry, timeout_s)
        if not entry.has_answer.wait(timeout_s + _JOIN_S):  # its epoch says sooner what is wrong
            entry.failure = f"no answer after {timeout_s:.0f} s"
        if entry.failure:
            self.forget(peer)
            raise TransferFailed(f"no link from {self._worker_id} to {peer} at {address}: {entry.failure}")

    def _keep_open(self, entry: _Peer, timeout_s: float) -> None:
        number, pause_s = 0, _FIRST_PAUSE_S
        while not entry.is_forgotten.is_set():
            number += 1
            reason, was_up = self._run_sender(entry, number, timeout_s)
            if not entry.has_answer.is_set():
                entry.failure = reason
                entry.has_answer.set()
                return
            if entry.is_forgotten.is_set():
                return
            logger.warning("link to %s, epoch %d: %s", entry.peer, number, reason)
            pause_s = _FIRST_PAUSE_S if was_up else min(2 * pause_s, _LONGEST_PAUSE_S)
            entry.is_forgotten.wait(pause_s)

    def _run_sender(self, entry: _Peer, number: int, timeout_s: float) -> tuple[str, bool]:
        """One epoch, to its end: why it ended, and whether it had been up."""
        try:
            channel = Channel.connect(entry.address, timeout_s)
        except (OSError, ValueError) as error:
            return f"cannot connect: {error}", False
        epoch = SendEpoch(self._out, channel, self._clock.now_s() + timeout_s, entry.peer)
        with self._lock:
            entry.epoch = epoch
            self._epochs.add(epoch)
        if entry.is_forgotten.is_set():
            epoch.break_(f"worker {entry.peer} is gone")
        try:
            entry.trial = epoch.open(self._hello(self._worker_id, entry.peer, self._process, number, timeout_s))
            entry.has_answer.set()
            epoch.serve()
        except Exception as error:
            self._break(epoch, error)
        self._end(epoch, channel)
        return epoch.reason, epoch.is_up

    # ---- the receiving ends

    def _accept(self) -> None:
        while not self._is_closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError as error:  # closed, or out of descriptors
                if not self._is_closed.wait(_FIRST_PAUSE_S):
                    logger.error("cannot accept a link: %s", error)
                continue
            self._start("receive", self._run_receiver, connection)

    def _run_receiver(self, connection: socket.socket) -> None:
        """One epoch, to its end."""
        channel = Channel(connection)
        epoch = ReceiveEpoch(self._in, channel, self._clock.now_s() + _GREETING_S)
        with self._lock:
            self._epochs.add(epoch)
        if self._is_closed.is_set():
            epoch.break_("this worker closes its links")
        try:
            theirs = epoch.greet()
            ours = self._hello(theirs.sender, self._worker_id, theirs.process, theirs.epoch, theirs.time_left_s)
            reason = differences(ours, theirs) or self._succeed(epoch, theirs)
            if reason:
                epoch.refuse(reason)
                raise WireError(reason)
            epoch.open(ours)
            epoch.serve()
        except Exception as error:
            self._break(epoch, error)
        self._end(epoch, channel)

    def _succeed(self, epoch: ReceiveEpoch, hello: Hello) -> str:
        """Makes `epoch` its sender's newest, once the one before is over; or says why it cannot be."""
        with self._lock:
            old = self._senders.get(hello.sender)
            if old is not None and old.process == epoch.process and old.number >= epoch.number:
                return f"epoch {epoch.number} is over, {old.number} has begun"
            self._senders[hello.sender] = epoch
        if old is not None:
            old.break_(f"{hello.sender} began a new epoch")
            if not old.is_gone.wait(hello.time_left_s):
                return f"epoch {old.number} has not ended yet"
        return ""

    # ---- both

    def _hello(self, sender: WorkerId, receiver: WorkerId, process: str, epoch: int, time_left_s: float) -> Hello:
        kind, fingerprint, secret = self._device.kind, self.fingerprint, self._secret
        return Hello(WIRE_VERSION, kind, fingerprint, sender, receiver, process, epoch, time_left_s, secret)

    def _break(self, epoch: SendEpoch | ReceiveEpoch, error: Exception) -> None:
        if not isinstance(error, OSError | WireError):
            logger.exception("the link with %s broke", epoch.peer)
        epoch.break_(str(error) or type(error).__name__)

    def _end(self, epoch: SendEpoch | ReceiveEpoch, channel: Channel) -> None:
        lost = epoch.tear_down()
        with self._lock:
            self._epochs.discard(epoch)
        channel.close()
        if epoch.is_up and not self._is_closed.is_set():
            self._post(LinkLost(epoch.peer, epoch.reason, lost), None)
        epoch.is_gone.set()

    def _watch(self) -> None:
        while not self._is_closed.wait(self._stall_s / 8):
            with self._lock:
                epochs = list(self._epochs)
            for epoch in epochs:
                epoch.watch()

    def _start(self, name: str, function: object, *arguments: object) -> None:
        def run() -> None:
            try:
                function(*arguments)  # type: ignore[operator]
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, daemon=True, name=f"kv-link-{name}")
        with self._lock:
            self._threads.add(thread)
        thread.start()
