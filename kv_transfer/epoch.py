"""One epoch of a direct link, from its TCP connection to its end: what both ends of it do alike.

    sending end (kv_transfer/sending_end.py)    receiving end (kv_transfer/receiving_end.py)
    put: Announce ────────────────────────►     asks its pool for a staging buffer, behind all who asked before
                  ◄────────────────────────     Grant
    the KV is computed
    Go, wire.send behind the packing ─────►     wire.receive into the buffer; behind it the writing, and the check
                  ◄────────────────────────     Left; the part goes to the owner's mailbox

A staging buffer ("slab") belongs to the epoch from `put` or Grant on: at the sender until Left, at the receiver until
the part is in the mailbox, and of a part that the link has not written until its owner gives it back. The first
`break_` ends an epoch: it shuts the connection and aborts the wire, and only then does `tear_down` of an end give
buffers back. So no device writes to a buffer, nor for a part to a cache, when its epoch is over.

Threads: `serve` of an end reads the connection, a second one waits for the device, a third aborts. Locks are taken in
the order pool, epoch, channel.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from kv_transfer.channel import Channel, Ping
from kv_transfer.link import Post, PrepareWrite
from kv_transfer.slabs import SlabPool
from kv_transfer.wire import Check, Wire, WireDevice, WireError
from phasewise.core.clock import Clock
from phasewise.core.placement import WorkerId

SMALL_TRIAL_BYTES = 256
NUM_TRIALS = 8
NUM_ROUND_TRIPS = 3
_OPENING = -1  # among the deadlines, which are those of parts otherwise


@dataclass(frozen=True, slots=True)
class LinkResources:
    """What the epochs of one worker and direction share."""

    device: WireDevice
    pool: SlabPool
    post: Post
    prepare_write: PrepareWrite
    check: Check
    clock: Clock
    stall_s: float
    trial_bytes: int

    def pattern(self) -> torch.Tensor:
        """What the trial messages hold.  # uint8 [trial_bytes]"""
        pattern = self.device.allocate(self.trial_bytes)
        words = pattern.view(torch.int64)
        torch.arange(1, words.numel() + 1, out=words)
        words.mul_(0x5851F42D4C957F2D)
        self.device.mark().wait()
        return pattern


class Epoch:
    """The connection and the wire of one epoch, until the first of its threads finds them broken.

    Attributes:
        reason: why it is over, set once under `lock`; "" until then.
        is_up: whether it was opened.
        is_gone: set by the owner, behind everything else.
        trial: a buffer of the wire that is kept until the wire is quiet.  # uint8 [trial_bytes]
        lock, changed: guard what its end knows of parts; `changed` is notified when the epoch breaks.
    """

    def __init__(self, resources: LinkResources, channel: Channel, deadline_s: float, peer: WorkerId = "") -> None:
        self.peer = peer
        self.reason = ""
        self.is_up = False
        self.is_gone = threading.Event()
        self.channel = channel
        self.wire: Wire | None = None
        self.trial: torch.Tensor | None = None
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._device = resources.device
        self._clock = resources.clock
        self._stall_s = resources.stall_s
        self._is_aborted = threading.Event()
        self._deadlines = {_OPENING: deadline_s}

    def make_wire(self, token: bytes, rank: int) -> Wire:
        """From here on a break ends it, whether it is connected or not. Raises WireError when the epoch is over."""
        wire = self._device.make(token, rank)
        with self.lock:
            if not self.reason:
                self.wire = wire
                return wire
        wire.abort()
        raise WireError(self.reason)

    def bound_opening(self, time_left_s: float) -> None:
        """The peer has said how long it tries to open the link."""
        with self.lock:
            self._deadlines[_OPENING] = self._clock.now_s() + time_left_s

    def set_up(self) -> None:
        """It is open: parts may go."""
        with self.lock:
            del self._deadlines[_OPENING]
            self.trial = None
            self.channel.last_heard_s = self._clock.now_s()
            self.is_up = True

    def start_part(self, seq: int) -> None:
        """A part is on the wire: it must not take longer than `stall_s`. Raises WireError when the epoch is over."""
        with self.lock:
            if self.reason:
                raise WireError(self.reason)
            self._deadlines[seq] = self._clock.now_s() + self._stall_s

    def is_on_wire(self, seq: int) -> bool:
        return seq in self._deadlines

    def end_part(self, seq: int) -> None:
        """A part has left the wire."""
        with self.lock:
            del self._deadlines[seq]

    def watch(self) -> None:
        """Breaks the epoch when something is overdue, and says to the peer that this process lives."""
        problem = self._problem()
        if problem:
            self.break_(problem)
        elif self.is_up:
            try:
                self.channel.write(Ping())
            except OSError as error:
                self.break_(str(error))

    def break_(self, reason: str) -> None:
        """Ends the epoch, the first time it is called; any thread. Does not wait."""
        with self.lock:
            if self.reason:
                return
            self.reason = reason
            self.changed.notify_all()
        # Its own thread: an abort can wait for the device, and the device for the abort of another link.
        threading.Thread(target=self._abort, daemon=True, name=f"kv-link-abort-{self.peer}").start()

    def wait_until_quiet(self) -> None:
        """After `break_`: returns when the wire is aborted."""
        self._is_aborted.wait()

    def _problem(self) -> str:
        now_s = self._clock.now_s()
        with self.lock:
            if self.reason or self._is_aborted.is_set():
                return ""
            overdue = [seq for seq, deadline_s in self._deadlines.items() if deadline_s <= now_s]
        if overdue:
            is_opening = overdue[0] == _OPENING
            return "it was not up in time" if is_opening else f"part {overdue[0]} of the epoch is stalled"
        if not self.is_up or self.wire is None:  # nobody reads the connection while the wire connects
            return "the peer closed the connection" if self.channel.is_over() else ""
        silent_s = now_s - self.channel.last_heard_s
        if silent_s > self._stall_s:
            return f"nothing was heard from the peer for {silent_s:.1f} s"
        return self.wire.error()

    def _abort(self) -> None:
        self.channel.shutdown()
        if self.wire is not None:
            self.wire.abort()
        self._is_aborted.set()
