"""One epoch of a direct link, from its TCP connection to its end: both halves, and what they share.

    sender                                  receiver
    put: Announce ────────────────────────► asks its pool for a slab, behind all who asked before
                  ◄──────────────────────── Grant
    the KV is computed
    Go, wire.send behind the packing ─────► wire.receive into the slab; behind it `land`, and the check
                  ◄──────────────────────── Left; the part goes to the owner's mailbox

A slab belongs to the epoch from `put` or Grant on: at the sender until Left, at the receiver until the part is in the
mailbox, and of a part that is not landed until its owner gives it back. The first `break_` ends an epoch: it shuts the
connection and aborts the wire, and only then does `tear_down` give slabs back. So no device writes to a slab, nor for a
part to a cache, when its epoch is over.

Threads: `serve` reads the connection, a second one waits for the device, a third aborts. Locks are taken in the order
pool, epoch, channel.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from dataclasses import dataclass
from functools import partial

import torch

from kv_transfer.channel import (
    Announce,
    Channel,
    Commit,
    Go,
    Grant,
    Hello,
    Left,
    Ping,
    Ready,
    Refused,
    Token,
    differences,
)
from kv_transfer.link import ArrivedPart, Land, Landed, Landing, Post
from kv_transfer.slabs import Slab, SlabPool
from kv_transfer.wire import Check, Mark, Receipt, Wire, WireDevice, WireError
from phasewise.core.clock import Clock
from phasewise.core.messages import KVCommit, KVPart, KVPartAck
from phasewise.core.placement import WorkerId

_SMALL_TRIAL_BYTES = 256
_NUM_TRIALS = 8
_NUM_ROUND_TRIPS = 3
_OPENING = -1  # among the deadlines, which are those of parts otherwise


@dataclass(frozen=True, slots=True)
class Trial:
    """What opening a link measured: its rate, and what a part costs besides: one and a half round trips of control
    messages, and a message of next to no bytes."""

    bytes_per_s: float
    part_s: float


@dataclass(frozen=True, slots=True)
class Room:
    """What the epochs of one worker share."""

    device: WireDevice
    pool: SlabPool
    post: Post
    land: Land
    check: Check
    clock: Clock
    stall_s: float
    trial_bytes: int


class _Epoch:
    """What both halves share. `reason` is set once, when it breaks; `is_aborted` when the wire is quiet."""

    def __init__(self, room: Room, channel: Channel, deadline_s: float) -> None:
        self.peer: WorkerId = ""
        self.reason = ""
        self.is_up = False
        self.is_gone = threading.Event()  # set by the owner, behind everything else
        self._room = room
        self._channel = channel
        self._wire: Wire | None = None
        self._trial: torch.Tensor | None = None  # kept until the wire is quiet
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._is_aborted = threading.Event()
        self._deadlines = {_OPENING: deadline_s}

    def break_(self, reason: str) -> None:
        """Ends the epoch, the first time it is called; any thread. Does not wait."""
        with self._lock:
            if self.reason:
                return
            self.reason = reason
            self._changed.notify_all()
        # Its own thread: an abort can wait for the device, and the device for the abort of another link.
        threading.Thread(target=self._abort, daemon=True, name=f"kv-link-abort-{self.peer}").start()

    def watch(self) -> None:
        """Breaks the epoch when something is overdue, and says to the peer that this process lives."""
        problem = self._problem()
        if problem:
            self.break_(problem)
        elif self.is_up:
            try:
                self._channel.send(Ping())
            except OSError as error:
                self.break_(str(error))

    def _problem(self) -> str:
        now_s = self._room.clock.now_s()
        with self._lock:
            if self.reason or self._is_aborted.is_set():
                return ""
            late = [seq for seq, deadline_s in self._deadlines.items() if deadline_s <= now_s]
        if late:
            return "it was not up in time" if late[0] == _OPENING else f"part {late[0]} of the epoch is stalled"
        if not self.is_up or self._wire is None:  # nobody reads the connection while the wire connects
            return "the peer closed the connection" if self._channel.is_over() else ""
        silent_s = now_s - self._channel.last_heard_s
        if silent_s > self._room.stall_s:
            return f"nothing was heard from the peer for {silent_s:.1f} s"
        return self._wire.error()

    def _abort(self) -> None:
        self._channel.shutdown()
        if self._wire is not None:
            self._wire.abort()
        self._is_aborted.set()

    def _make_wire(self, token: bytes, rank: int) -> Wire:
        """From here on `_abort` ends it, whether it is connected or not."""
        wire = self._room.device.make(token, rank)
        with self._lock:
            if not self.reason:
                self._wire = wire
                return wire
        wire.abort()
        raise WireError(self.reason)

    def _up(self) -> None:
        with self._lock:
            del self._deadlines[_OPENING]
            self._trial = None
            self._channel.last_heard_s = self._room.clock.now_s()
            self.is_up = True

    def _start_deadline(self, seq: int) -> None:
        """Raises WireError when the epoch is over."""
        with self._lock:
            if self.reason:
                raise WireError(self.reason)
            self._deadlines[seq] = self._room.clock.now_s() + self._room.stall_s

    def _pattern(self) -> torch.Tensor:
        """What the trial messages hold.  # uint8 [trial_bytes]"""
        pattern = self._room.device.allocate(self._room.trial_bytes)
        words = pattern.view(torch.int64)
        torch.arange(1, words.numel() + 1, out=words)
        words.mul_(0x5851F42D4C957F2D)
        self._room.device.mark().wait()
        return pattern


@dataclass(slots=True, eq=False)
class _Outgoing:
    """A part at the sender: `ready` when its KV is computed and what is ahead of it packed, `packed` soon after."""

    seq: int
    part: KVPart
    slab: Slab
    ready: Mark
    packed: Mark
    is_granted: bool = False


class SendEpoch(_Epoch):
    """The sending half."""

    def __init__(self, room: Room, channel: Channel, deadline_s: float, peer: WorkerId) -> None:
        super().__init__(room, channel, deadline_s)
        self.peer = peer
        self._num_parts = 0
        self._parts: dict[int, _Outgoing] = {}  # until Left
        self._unsent: deque[_Outgoing] = deque()
        self._pusher = threading.Thread(target=self._push, daemon=True, name=f"kv-link-push-{peer}")

    def open(self, hello: Hello) -> Trial:
        """Greets, makes the wire and tries it; gives what the trial measured. Raises OSError or WireError."""
        channel, room = self._channel, self._room
        channel.send(hello)
        answer = channel.receive()
        if isinstance(answer, Refused):
            raise WireError(f"refused: {answer.reason}")
        if not isinstance(answer, Hello):
            raise ConnectionError(f"{answer} where a greeting was due")
        problem = differences(hello, answer)
        if problem:
            raise WireError(problem)
        self._trial = self._pattern()
        token = room.device.token()
        wire = self._make_wire(token, 0)
        channel.send(Token(token.hex()))
        wire.connect()
        wire.send(self._trial[:_SMALL_TRIAL_BYTES]).wait()
        wire.send(self._trial).wait()
        round_trip_s = float("inf")
        for seq in range(_NUM_ROUND_TRIPS):
            start_s = room.clock.now_s()
            channel.send(Go(seq))
            answer = channel.receive()
            if answer != Grant(seq):
                raise WireError(answer.reason if isinstance(answer, Refused) else f"{answer} where Grant was due")
            round_trip_s = min(round_trip_s, room.clock.now_s() - start_s)
        start_s = room.clock.now_s()
        wire.send(self._trial[:_SMALL_TRIAL_BYTES]).wait()
        part_s = 1.5 * round_trip_s + room.clock.now_s() - start_s
        start_s = room.clock.now_s()
        for _ in range(_NUM_TRIALS):
            mark = wire.send(self._trial)
        mark.wait()
        rate = _NUM_TRIALS * room.trial_bytes / max(room.clock.now_s() - start_s, 1e-9)
        answer = channel.receive()
        if not isinstance(answer, Ready):
            raise WireError(answer.reason if isinstance(answer, Refused) else f"{answer} where Ready was due")
        self._up()
        self._pusher.start()
        return Trial(rate, part_s)

    @property
    def num_ungranted_bytes(self) -> int:
        """Of parts that the receiver has no room for yet."""
        with self._lock:
            return sum(entry.slab.size for entry in self._parts.values() if not entry.is_granted)

    def put(self, part: KVPart, slab: Slab, ready: Mark, packed: Mark) -> bool:
        """Takes a part; False when the epoch is over."""
        with self._lock:
            if self.reason:
                return False
            entry = _Outgoing(self._num_parts, part, slab, ready, packed)
            self._num_parts += 1
            self._parts[entry.seq] = entry
            self._unsent.append(entry)
            try:
                self._channel.send(Announce(entry.seq, part))
            except OSError as error:
                self.break_(str(error))
        return True

    def send_commit(self, commit: KVCommit) -> bool:
        """Sends a commit, if it is small, and says whether it did; no answer comes."""
        if len(commit.first_tokens) != 1 or any(token and token.top_logprobs for token in commit.first_tokens):
            return False
        try:
            self._channel.send(Commit(commit))
        except OSError as error:
            self.break_(str(error))
            return False
        return True

    def serve(self) -> None:
        """Takes the receiver's answers until the epoch ends. Raises OSError."""
        while True:
            message = self._channel.receive()
            if isinstance(message, Grant) and message.seq in self._parts:
                with self._changed:
                    self._parts[message.seq].is_granted = True
                    self._changed.notify_all()
            elif isinstance(message, Left) and message.seq in self._deadlines:
                with self._lock:
                    if self.reason:
                        return
                    entry = self._parts.pop(message.seq)
                    del self._deadlines[message.seq]
                self._room.pool.give_back(entry.slab)
                self._room.post(KVPartAck(entry.part.transfer_id, entry.part.part_index), None)
            else:
                raise ConnectionError(f"{message} is not expected")

    def tear_down(self) -> frozenset[str]:
        """After `break_`: waits for the abort, ends the second thread, gives all slabs back.

        Returns the transfers whose parts were on their way.
        """
        self._is_aborted.wait()
        if self._pusher.ident is not None:
            self._pusher.join()
        self._trial = self._wire = None
        for entry in self._parts.values():
            self._room.pool.give_back(entry.slab)
        return frozenset(entry.part.transfer_id for entry in self._parts.values())

    def _push(self) -> None:
        """Second thread: sends parts in their order, each when it is granted and its KV computed."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self.reason or (self._unsent and self._unsent[0].is_granted))
                    if self.reason:
                        return
                    entry = self._unsent.popleft()
                entry.ready.wait()
                self._start_deadline(entry.seq)
                self._channel.send(Go(entry.seq))
                assert self._wire is not None
                self._wire.send(entry.slab.buffer, entry.packed)
        except Exception as error:  # whatever it is, such as one of the device: nobody else would notice
            self.break_(str(error) or type(error).__name__)


@dataclass(slots=True, eq=False)
class _Incoming:
    """A part at the receiver."""

    seq: int
    part: KVPart
    slab: Slab | None = None
    landing: Landing | None = None
    receipt: Receipt | None = None
    is_landed: bool = False


class ReceiveEpoch(_Epoch):
    """The receiving half. `process` and `number` say which epoch of the peer's it is."""

    def __init__(self, room: Room, channel: Channel, deadline_s: float) -> None:
        super().__init__(room, channel, deadline_s)
        self.process = ""
        self.number = 0
        self._parts: dict[int, _Incoming] = {}  # until it is in the mailbox
        self._arriving: queue.SimpleQueue[_Incoming | None] = queue.SimpleQueue()
        self._finisher = threading.Thread(target=self._finish, daemon=True, name="kv-link-finish")

    def greet(self) -> Hello:
        """The peer's first message. Raises OSError."""
        hello = self._channel.receive()
        if not isinstance(hello, Hello):
            raise ConnectionError(f"{hello} where a greeting was due")
        self.peer, self.process, self.number = hello.sender, hello.process, hello.epoch
        with self._lock:
            self._deadlines[_OPENING] = self._room.clock.now_s() + hello.time_left_s
        return hello

    def refuse(self, reason: str) -> None:
        self._channel.send(Refused(reason))

    def open(self, answer: Hello) -> None:
        """Answers the greeting, makes the wire and tries it. Raises OSError or WireError."""
        channel, room = self._channel, self._room
        pattern = self._pattern()
        trial = self._trial = room.device.allocate(room.trial_bytes)
        room.check(trial, torch.empty(1, dtype=torch.bool, device=trial.device))  # compiles what it needs
        room.device.mark().wait()  # the wire's stream must not write to what the last owner's kernels still use
        channel.send(answer)
        token = channel.receive()
        if not isinstance(token, Token):
            raise ConnectionError(f"{token} where a token was due")
        wire = self._make_wire(bytes.fromhex(token.data), 1)
        wire.connect()

        def matches(data: torch.Tensor, answer: torch.Tensor) -> None:
            is_right = (data.view(torch.int64) == pattern[: data.numel()].view(torch.int64)).all()
            answer.copy_(is_right, non_blocking=True)

        small, large = _SMALL_TRIAL_BYTES, room.trial_bytes
        sizes = [small, large, small] + [large] * _NUM_TRIALS
        receipts = [wire.receive(trial[:size], None, matches) for size in sizes]
        for _ in range(_NUM_ROUND_TRIPS):  # all receives are posted: they are not what the sender measures
            go = channel.receive()
            if not isinstance(go, Go):
                raise ConnectionError(f"{go} where Go was due")
            channel.send(Grant(go.seq))
        if not all(receipt.wait() for receipt in receipts):
            self.refuse("a trial message came with wrong content")
            raise WireError("a trial message came with wrong content")
        self._up()
        self._finisher.start()
        channel.send(Ready())

    def serve(self) -> None:
        """Takes announcements and posts receives until the epoch ends. Raises OSError or WireError."""
        while True:
            message = self._channel.receive()
            if isinstance(message, Announce) and 0 < message.part.num_bytes <= self._room.pool.slab_bytes:
                entry = _Incoming(message.seq, message.part)
                self._room.pool.ask(self, message.part.num_bytes, partial(self._grant, entry))
                self._prepare(entry)  # while the sender hears of its slab
            elif isinstance(message, Go) and message.seq in self._parts and message.seq not in self._deadlines:
                self._receive(self._parts[message.seq])
            elif isinstance(message, Commit):
                self._room.post(message.commit, None)
            else:
                raise ConnectionError(f"{message} is not expected")

    def tear_down(self) -> frozenset[str]:
        """After `break_`: waits for the abort, ends the second thread, gives all slabs back.

        Returns the transfers whose parts were on their way.
        """
        self._room.pool.withdraw(self)
        self._is_aborted.wait()
        if self._wire is not None:
            self._wire.abort()  # again: the first may not have waited for what this thread was just enqueueing
        self._arriving.put(None)
        if self._finisher.ident is not None:
            self._finisher.join()
        self._trial = self._wire = None
        for entry in self._parts.values():
            if entry.slab is not None:
                self._room.pool.give_back(entry.slab)
            if entry.is_landed:
                self._room.post(entry.part, ArrivedPart(None, _nothing, Landed.LOST))
        return frozenset(entry.part.transfer_id for entry in self._parts.values())

    def _grant(self, entry: _Incoming, slab: Slab) -> bool:
        with self._lock:
            if self.reason:
                return False
            entry.slab = slab
            self._parts[entry.seq] = entry
            try:
                self._channel.send(Grant(entry.seq))
            except OSError as error:
                self.break_(str(error))
        return True

    def _prepare(self, entry: _Incoming) -> None:
        if entry.slab is not None and entry.landing is None:
            entry.landing = self._room.land(entry.part, entry.slab.buffer)

    def _receive(self, entry: _Incoming) -> None:
        self._prepare(entry)
        assert self._wire is not None and entry.slab is not None
        self._start_deadline(entry.seq)

        def land_and_check(data: torch.Tensor, answer: torch.Tensor) -> None:
            assert entry.landing is not None
            entry.is_landed = entry.landing()
            entry.landing = None  # it holds its handoff
            self._room.check(data, answer)

        entry.receipt = self._wire.receive(entry.slab.buffer, entry.slab.last_use, land_and_check)
        self._arriving.put(entry)

    def _finish(self) -> None:
        """Second thread: hands parts over in their order, each when it is in."""
        try:
            while (entry := self._arriving.get()) is not None:
                assert entry.receipt is not None and entry.slab is not None
                is_right, slab = entry.receipt.wait(), entry.slab
                with self._lock:
                    if self.reason:
                        return  # it may be torn: the abort ends receives, too
                    del self._parts[entry.seq], self._deadlines[entry.seq]
                if is_right and not entry.is_landed:
                    arrived = ArrivedPart(slab.buffer, partial(self._release, slab))
                else:
                    self._room.pool.give_back(slab)
                    landed = Landed.RIGHT if is_right else Landed.WRONG
                    arrived = ArrivedPart(None, _nothing, landed if entry.is_landed else None)
                self._room.post(entry.part, arrived)
                self._channel.send(Left(entry.seq))
        except Exception as error:  # whatever it is, such as one of the device: nobody else would notice
            self.break_(str(error) or type(error).__name__)

    def _release(self, slab: Slab) -> None:
        self._room.pool.give_back(slab, self._room.device.mark())


def _nothing() -> None:
    """The release of a part that keeps nothing."""
