"""The sending end of one epoch of a direct link (kv_transfer/epoch.py)."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from kv_transfer.channel import Announce, Channel, Commit, Go, Grant, Hello, Left, Ready, Refused, Token, differences
from kv_transfer.epoch import NUM_ROUND_TRIPS, NUM_TRIALS, SMALL_TRIAL_BYTES, Epoch, LinkResources
from kv_transfer.slabs import Slab
from kv_transfer.wire import Mark, WireError
from phasewise.core.messages import KVCommit, KVPart, KVPartAck
from phasewise.core.placement import WorkerId


@dataclass(frozen=True, slots=True)
class Trial:
    """What opening a link measured: its rate, and what a part costs besides: one and a half round trips of control
    messages, and a message of next to no bytes."""

    bytes_per_s: float
    part_s: float


@dataclass(slots=True, eq=False)
class _OutgoingPart:
    """`ready` when its KV is computed and what is ahead of it packed, `packed` soon after."""

    seq: int
    part: KVPart
    slab: Slab
    ready: Mark
    packed: Mark
    is_granted: bool = False


class SendingEnd:
    """`epoch` is its connection and its end."""

    def __init__(self, resources: LinkResources, channel: Channel, deadline_s: float, peer: WorkerId) -> None:
        self.epoch = Epoch(resources, channel, deadline_s, peer)
        self._resources = resources
        self._channel = channel
        self._num_parts = 0
        self._parts: dict[int, _OutgoingPart] = {}  # until Left
        self._unsent: deque[_OutgoingPart] = deque()
        self._pusher = threading.Thread(target=self._push, daemon=True, name=f"kv-link-push-{peer}")

    def open(self, hello: Hello) -> Trial:
        """Greets, makes the wire and tries it; gives what the trial measured. Raises OSError or WireError."""
        channel, epoch, resources = self._channel, self.epoch, self._resources
        channel.write(hello)
        answer = channel.read()
        if isinstance(answer, Refused):
            raise WireError(f"refused: {answer.reason}")
        if not isinstance(answer, Hello):
            raise ConnectionError(f"{answer} where a greeting was due")
        problem = differences(hello, answer)
        if problem:
            raise WireError(problem)
        trial = epoch.trial = resources.pattern()
        token = resources.device.token()
        wire = epoch.make_wire(token, 0)
        channel.write(Token(token.hex()))
        wire.connect()
        wire.send(trial[:SMALL_TRIAL_BYTES]).wait()
        wire.send(trial).wait()
        round_trip_s = min(self._round_trip_s(seq) for seq in range(NUM_ROUND_TRIPS))
        start_s = resources.clock.now_s()
        wire.send(trial[:SMALL_TRIAL_BYTES]).wait()
        part_s = 1.5 * round_trip_s + resources.clock.now_s() - start_s
        start_s = resources.clock.now_s()
        for _ in range(NUM_TRIALS):
            mark = wire.send(trial)
        mark.wait()
        rate = NUM_TRIALS * resources.trial_bytes / max(resources.clock.now_s() - start_s, 1e-9)
        self._expect(Ready())
        epoch.set_up()
        self._pusher.start()
        return Trial(rate, part_s)

    @property
    def num_ungranted_bytes(self) -> int:
        """Of parts that the receiver has no room for yet."""
        with self.epoch.lock:
            return sum(entry.slab.size for entry in self._parts.values() if not entry.is_granted)

    def put(self, part: KVPart, slab: Slab, ready: Mark, packed: Mark) -> bool:
        """Takes a part; False when the epoch is over."""
        with self.epoch.lock:
            if self.epoch.reason:
                return False
            entry = _OutgoingPart(self._num_parts, part, slab, ready, packed)
            self._num_parts += 1
            self._parts[entry.seq] = entry
            self._unsent.append(entry)
            try:
                self._channel.write(Announce(entry.seq, part))
            except OSError as error:
                self.epoch.break_(str(error))
        return True

    def put_commit(self, commit: KVCommit) -> bool:
        """Sends a commit, if it is small, and says whether it did; no answer comes."""
        if len(commit.first_tokens) != 1 or any(token and token.top_logprobs for token in commit.first_tokens):
            return False
        try:
            self._channel.write(Commit(commit))
        except OSError as error:
            self.epoch.break_(str(error))
            return False
        return True

    def serve(self) -> None:
        """Takes the receiver's answers until the epoch ends. Raises OSError."""
        epoch = self.epoch
        while True:
            message = self._channel.read()
            if isinstance(message, Grant) and message.seq in self._parts:
                with epoch.changed:
                    self._parts[message.seq].is_granted = True
                    epoch.changed.notify_all()
            elif isinstance(message, Left) and epoch.is_on_wire(message.seq):
                with epoch.lock:
                    if epoch.reason:
                        return
                    entry = self._parts.pop(message.seq)
                    epoch.end_part(message.seq)
                self._resources.pool.give_back(entry.slab)
                self._resources.post(KVPartAck(entry.part.transfer_id, entry.part.part_index), None)
            else:
                raise ConnectionError(f"{message} is not expected")

    def tear_down(self) -> frozenset[str]:
        """After `break_`: waits for the abort, ends the second thread, gives all staging buffers back.

        Returns the transfers whose parts were on their way.
        """
        self.epoch.wait_until_quiet()
        if self._pusher.ident is not None:
            self._pusher.join()
        self.epoch.trial = self.epoch.wire = None
        for entry in self._parts.values():
            self._resources.pool.give_back(entry.slab)
        return frozenset(entry.part.transfer_id for entry in self._parts.values())

    # ---- inside

    def _round_trip_s(self, seq: int) -> float:
        start_s = self._resources.clock.now_s()
        self._channel.write(Go(seq))
        self._expect(Grant(seq))
        return self._resources.clock.now_s() - start_s

    def _expect(self, due: Grant | Ready) -> None:
        """Raises WireError when the receiver's next message is another one."""
        answer = self._channel.read()
        if answer != due:
            what = f"{answer} where {type(due).__name__} was due"
            raise WireError(answer.reason if isinstance(answer, Refused) else what)

    def _push(self) -> None:
        """Second thread: sends parts in their order, each when it is granted and its KV computed."""
        epoch = self.epoch
        try:
            while True:
                with epoch.changed:
                    epoch.changed.wait_for(lambda: epoch.reason or (self._unsent and self._unsent[0].is_granted))
                    if epoch.reason:
                        return
                    entry = self._unsent.popleft()
                entry.ready.wait()
                epoch.start_part(entry.seq)
                self._channel.write(Go(entry.seq))
                assert epoch.wire is not None
                epoch.wire.send(entry.slab.buffer, entry.packed)
        except Exception as error:  # whatever it is, such as one of the device: nobody else would notice
            epoch.break_(str(error) or type(error).__name__)
