"""A handoff between two workers whose caches are counts: run as a script where torch cannot be imported."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from kv_transfer.codec import WireLayout
from kv_transfer.incoming import Reservation
from kv_transfer.link import ArrivedPart, DeviceFull
from kv_transfer.outgoing import Handoff
from kv_transfer.paths import SendLimits
from kv_transfer.plan import PartSpan
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.state import ReceiveStatus, SendStatus
from phasewise.core.clock import ManualClock
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import KVAbort, KVAccepted, KVCommit, KVDone, KVFailed, KVOffer, KVPart
from phasewise.core.request import Request, SampledToken, SamplingParams

SPEC = KVCacheSpec(num_layers=4, num_kv_heads=1, head_dim=2, block_size=16, dtype="float32", model_fingerprint="m")
NUM_TOKENS = 100


class CountingCache:
    """Counts the layer-token cells that go out and come in."""

    spec = SPEC

    def __init__(self) -> None:
        self.num_cells = 0

    def mark(self) -> None:
        """Everything is done at once."""

    def beside(self, mark: None) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def rejoin(self) -> None: ...

    def pack(self, place: Any, span: PartSpan, layout: WireLayout, wire: dict[str, int]) -> None:
        wire["cells"] = span.num_cells

    def prepare(self, place: Any) -> None: ...

    def can_write_beside(self, place: Any) -> bool:
        return True

    def unpacking(self, place: Any, span: PartSpan, layout: WireLayout, wire: dict[str, int]) -> Callable[[], None]:
        def write() -> None:
            self.num_cells += wire["cells"]

        return write


class VirtualLink:
    """Brings parts at once. `num_full`: so many times there is no memory for one."""

    is_full = False
    uses_store = False

    def __init__(self, receive: Callable[[KVPart, ArrivedPart], None]) -> None:
        self._receive = receive
        self.num_full = 0

    def name(self, peer: str) -> str:
        return "virtual"

    def part_s(self, peer: str) -> float:
        return 0.0

    def max_part_bytes(self, peer: str) -> int:
        return 1000

    def bytes_per_s(self, peer: str) -> float:
        return 1e9

    def buffer(self, peer: str, num_bytes: int) -> dict[str, int]:
        if self.num_full:
            self.num_full -= 1
            raise DeviceFull
        return {}

    def give_back(self, wire: dict[str, int]) -> None: ...

    def send_part(self, peer: str, part: KVPart, wire: dict[str, int]) -> None:
        self._receive(part, ArrivedPart(wire, lambda: None))

    def send_commit(self, peer: str, commit: KVCommit) -> bool:
        return False

    def forget(self, peer: str) -> None: ...

    def close(self) -> None: ...


class Pair:
    """A sender and a receiver; messages wait in `sent` until `deliver`."""

    def __init__(self) -> None:
        clock = ManualClock(0.0)
        self.sent: list[Any] = []
        self.reservation: Reservation | None = None
        self.cache = CountingCache()
        self.receiver = KVReceiver(self.cache, self, clock, nullcontext())
        self.link = VirtualLink(self.receiver.on_part)
        limits = SendLimits(window_bytes=1 << 20, threshold_tokens=50)
        self.sender = KVSender("prefill-0", CountingCache(), self.link, self, clock, limits)

    def send(self, worker_id: str, message: Any) -> None:
        self.sent.append(message)

    def deliver(self) -> None:
        while self.sent:
            match message := self.sent.pop(0):
                case KVOffer():
                    self.reservation = self.receiver.accept(message, list(range(7)), 0, 60.0)
                case KVAccepted():
                    self.sender.on_accepted(message)
                case KVCommit():
                    self.receiver.incoming.on_commit(message)
                case KVAbort(transfer_id, reason):
                    self.receiver.incoming.on_abort(transfer_id, reason)
                case KVDone(transfer_id):
                    self.sender.outgoing.on_done(transfer_id)
                case KVFailed():
                    raise AssertionError(message)


def hand_off(num_full: int) -> int:
    """One handoff, layer by layer, over a link that has no memory so often at first; how often it failed."""
    pair = Pair()
    pair.link.num_full = num_full
    request = Request("r", tuple(range(NUM_TOKENS)), SamplingParams(max_tokens=5))
    handoff = Handoff("decode-0", request, "gateway-0", 60.0)
    pair.sender.offer(handoff)
    pair.deliver()
    pair.sender.begin(handoff, list(range(7)), 0)
    for layer in range(SPEC.num_layers):
        pair.sender.on_computed(handoff, PartSpan(layer, 1, 0, NUM_TOKENS))
    pair.sender.commit(handoff, (SampledToken(1),))
    pair.deliver()
    pair.sender.poll()
    pair.deliver()
    assert handoff.status is SendStatus.DONE, handoff.reason
    assert pair.reservation is not None and pair.reservation.status is ReceiveStatus.DONE
    assert pair.reservation.num_cells == SPEC.num_layers * NUM_TOKENS
    pair.sender.forget(handoff, "it is done")
    return handoff.num_failures


if __name__ == "__main__":
    print([hand_off(num_full) for num_full in (0, 1)], "torch" in sys.modules)
