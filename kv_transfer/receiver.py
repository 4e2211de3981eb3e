"""The receiving half of handoffs: writes parts into reserved blocks, as kv_transfer/incoming.py says.

A direct link writes parts itself (`prepare_write`), behind their bytes and beside the steps; the loop hears of each
later (`on_part`), and writes those that no link has written.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from kv_transfer.cache_protocol import ReceivingCache, WireBuffer
from kv_transfer.incoming import IncomingHandoffs, Reservation, WrongPart, span_of
from kv_transfer.link import ArrivedPart, WriteOutcome, WriteReceived, write_nothing
from phasewise.core.clock import Clock
from phasewise.core.messages import KVOffer, KVPart
from phasewise.core.ports import PeerPort


class KVReceiver:
    """All incoming handoffs of one worker: `incoming`. `prepare_write` and what it returns may be called from any
    thread, all else belongs to the step loop's."""

    def __init__(
        self, cache: ReceivingCache, peers: PeerPort, clock: Clock, guard: AbstractContextManager[object]
    ) -> None:
        """`guard`: a lock, where links write received parts on threads of their own."""
        self._cache = cache
        self.incoming = IncomingHandoffs(cache.spec, peers, clock, guard)

    def accept(self, offer: KVOffer, block_table: list[int], num_cached_tokens: int, lease_end_s: float) -> Reservation:
        """Takes the offer into `block_table`, whose first `num_cached_tokens` tokens are in place already."""
        reservation = Reservation(offer, block_table, num_cached_tokens, lease_end_s)
        self._cache.prepare(reservation.place)
        self.incoming.accept(reservation)
        return reservation

    def prepare_write(self, part: KVPart, wire: WireBuffer) -> WriteReceived:
        """`PrepareWrite` (kv_transfer/link.py) of this worker."""
        reservation = self.incoming.find(part.transfer_id)
        if reservation is None:
            return write_nothing
        try:
            layout = reservation.layout_of(part, self._cache.spec)
        except WrongPart:  # the loop fails its handoff when it hears of the part
            return write_nothing
        write = self._cache.unpacking(reservation.place, span_of(part), layout, wire)
        return partial(self._write_received, reservation, part, write)

    def on_part(self, part: KVPart, arrived: ArrivedPart) -> None:
        """A part has come, or its link has given it up. Nothing is written of a probe (kv_transfer/prober.py)."""
        incoming, is_right = self.incoming, arrived.wire is not None or arrived.written is WriteOutcome.RIGHT
        try:
            if arrived.written is not None:
                incoming.end_write(part)
            if part.is_probe:
                incoming.counters.checksum_failures += not is_right
            elif arrived.written is not WriteOutcome.LOST and (found := incoming.check(part, is_right=is_right)):
                reservation, layout = found
                if arrived.wire is not None:
                    self._cache.unpacking(reservation.place, span_of(part), layout, arrived.wire)()
                incoming.receive(reservation, part)
        finally:
            arrived.release()

    def _write_received(self, reservation: Reservation, part: KVPart, write: Callable[[], None]) -> bool:
        can_write = self._cache.can_write_beside(reservation.place)
        if not can_write or not self.incoming.begin_write(reservation, part.part_index):
            return False
        try:
            write()
        except BaseException:  # raised again: the link breaks, and no word of this part will come
            self.incoming.end_write(part)
            raise
        return True
