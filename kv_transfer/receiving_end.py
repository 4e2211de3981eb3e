"""The receiving end of one epoch of a direct link (kv_transfer/epoch.py)."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from functools import partial

import torch

from kv_transfer.channel import Announce, Channel, Commit, Go, Grant, Hello, Left, Ready, Refused, Token
from kv_transfer.epoch import NUM_ROUND_TRIPS, NUM_TRIALS, SMALL_TRIAL_BYTES, Epoch, LinkResources
from kv_transfer.link import ArrivedPart, WriteOutcome, WriteReceived
from kv_transfer.slabs import Slab
from kv_transfer.wire import Receipt, WireError
from phasewise.core.messages import KVPart


@dataclass(slots=True, eq=False)
class _IncomingPart:
    """`write` is made ready while the bytes are on their way."""

    seq: int
    part: KVPart
    slab: Slab | None = None
    write: WriteReceived | None = None
    receipt: Receipt | None = None
    is_written: bool = False


class ReceivingEnd:
    """`epoch` is its connection and its end; `process` and `number` say which epoch of the peer's it is."""

    def __init__(self, resources: LinkResources, channel: Channel, deadline_s: float) -> None:
        self.epoch = Epoch(resources, channel, deadline_s)
        self.process = ""
        self.number = 0
        self._resources = resources
        self._channel = channel
        self._parts: dict[int, _IncomingPart] = {}  # until it is in the mailbox
        self._arriving: queue.SimpleQueue[_IncomingPart | None] = queue.SimpleQueue()
        self._finisher = threading.Thread(target=self._finish, daemon=True, name="kv-link-finish")

    def greet(self) -> Hello:
        """The peer's first message. Raises OSError."""
        hello = self._channel.read()
        if not isinstance(hello, Hello):
            raise ConnectionError(f"{hello} where a greeting was due")
        self.epoch.peer, self.process, self.number = hello.sender, hello.process, hello.epoch
        self.epoch.bound_opening(hello.time_left_s)
        return hello

    def refuse(self, reason: str) -> None:
        self._channel.write(Refused(reason))

    def open(self, answer: Hello) -> None:
        """Answers the greeting, makes the wire and tries it. Raises OSError or WireError."""
        channel, epoch, resources = self._channel, self.epoch, self._resources
        pattern = resources.pattern()
        trial = epoch.trial = resources.device.allocate(resources.trial_bytes)
        resources.check(trial, torch.empty(1, dtype=torch.bool, device=trial.device))  # compiles what it needs
        resources.device.mark().wait()  # the wire's stream must not write to what the last owner's kernels still use
        channel.write(answer)
        token = channel.read()
        if not isinstance(token, Token):
            raise ConnectionError(f"{token} where a token was due")
        wire = epoch.make_wire(bytes.fromhex(token.data), 1)
        wire.connect()

        def matches(data: torch.Tensor, answer: torch.Tensor) -> None:
            is_right = (data.view(torch.int64) == pattern[: data.numel()].view(torch.int64)).all()
            answer.copy_(is_right, non_blocking=True)

        small, large = SMALL_TRIAL_BYTES, resources.trial_bytes
        sizes = [small, large, small] + [large] * NUM_TRIALS
        receipts = [wire.receive(trial[:size], None, matches) for size in sizes]
        for _ in range(NUM_ROUND_TRIPS):  # all receives are posted: they are not what the sender measures
            go = channel.read()
            if not isinstance(go, Go):
                raise ConnectionError(f"{go} where Go was due")
            channel.write(Grant(go.seq))
        if not all(receipt.wait() for receipt in receipts):
            self.refuse("a trial message came with wrong content")
            raise WireError("a trial message came with wrong content")
        epoch.set_up()
        self._finisher.start()
        channel.write(Ready())

    def serve(self) -> None:
        """Takes announcements and posts receives until the epoch ends. Raises OSError or WireError."""
        pool = self._resources.pool
        while True:
            message = self._channel.read()
            if isinstance(message, Announce) and 0 < message.part.num_bytes <= pool.slab_bytes:
                entry = _IncomingPart(message.seq, message.part)
                pool.ask(self, message.part.num_bytes, partial(self._grant, entry))
                self._prepare(entry)  # while the sender hears of its staging buffer
            elif isinstance(message, Go) and message.seq in self._parts and not self.epoch.is_on_wire(message.seq):
                self._receive(self._parts[message.seq])
            elif isinstance(message, Commit):
                self._resources.post(message.commit, None)
            else:
                raise ConnectionError(f"{message} is not expected")

    def tear_down(self) -> frozenset[str]:
        """After `break_`: waits for the abort, ends the second thread, gives all staging buffers back.

        Returns the transfers whose parts were on their way.
        """
        epoch, pool = self.epoch, self._resources.pool
        pool.withdraw(self)
        epoch.wait_until_quiet()
        if epoch.wire is not None:
            epoch.wire.abort()  # again: the first may not have waited for what this thread was just enqueueing
        self._arriving.put(None)
        if self._finisher.ident is not None:
            self._finisher.join()
        epoch.trial = epoch.wire = None
        for entry in self._parts.values():
            if entry.slab is not None:
                pool.give_back(entry.slab)
            if entry.is_written:
                self._resources.post(entry.part, ArrivedPart(None, _nothing, WriteOutcome.LOST))
        return frozenset(entry.part.transfer_id for entry in self._parts.values())

    # ---- inside

    def _grant(self, entry: _IncomingPart, slab: Slab) -> bool:
        with self.epoch.lock:
            if self.epoch.reason:
                return False
            entry.slab = slab
            self._parts[entry.seq] = entry
            try:
                self._channel.write(Grant(entry.seq))
            except OSError as error:
                self.epoch.break_(str(error))
        return True

    def _prepare(self, entry: _IncomingPart) -> None:
        if entry.slab is not None and entry.write is None:
            entry.write = self._resources.prepare_write(entry.part, entry.slab.buffer)

    def _receive(self, entry: _IncomingPart) -> None:
        self._prepare(entry)
        wire = self.epoch.wire
        assert wire is not None and entry.slab is not None
        self.epoch.start_part(entry.seq)

        def write_and_check(data: torch.Tensor, answer: torch.Tensor) -> None:
            assert entry.write is not None
            entry.is_written = entry.write()
            entry.write = None  # it holds its handoff
            self._resources.check(data, answer)

        entry.receipt = wire.receive(entry.slab.buffer, entry.slab.last_use, write_and_check)
        self._arriving.put(entry)

    def _finish(self) -> None:
        """Second thread: hands parts over in their order, each when it is in."""
        epoch, resources = self.epoch, self._resources
        try:
            while (entry := self._arriving.get()) is not None:
                assert entry.receipt is not None and entry.slab is not None
                is_right, slab = entry.receipt.wait(), entry.slab
                with epoch.lock:
                    if epoch.reason:
                        return  # it may be torn: the abort ends receives, too
                    del self._parts[entry.seq]
                    epoch.end_part(entry.seq)
                if is_right and not entry.is_written:
                    arrived = ArrivedPart(slab.buffer, partial(self._release, slab))
                else:
                    resources.pool.give_back(slab)
                    outcome = WriteOutcome.RIGHT if is_right else WriteOutcome.WRONG
                    arrived = ArrivedPart(None, _nothing, outcome if entry.is_written else None)
                resources.post(entry.part, arrived)
                self._channel.write(Left(entry.seq))
        except Exception as error:  # whatever it is, such as one of the device: nobody else would notice
            epoch.break_(str(error) or type(error).__name__)

    def _release(self, slab: Slab) -> None:
        self._resources.pool.give_back(slab, self._resources.device.mark())


def _nothing() -> None:
    """The release of a part that keeps nothing."""
