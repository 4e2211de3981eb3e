"""The decode half of a handoff: check an offer, receive parts into reserved blocks, release the whole at the commit.

Life of a transfer: kv_transfer/state.py. Whether blocks may be set aside is not decided here but by the decode phase
(decode_workers/reservations.py), which calls `accept` with the blocks. A part that belongs to no live transfer (late,
aborted, expired) is counted and dropped: its transfer's id is never used again, so it can reach no block.

A direct link writes parts into their blocks itself (`land`), behind their bytes and beside the steps. What the loop
hears of a part comes later, and until then its blocks are nobody else's, even when the handoff has failed meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from kv_transfer.cache_protocol import KVPlace, ReceivingCache, WireBuffer
from kv_transfer.codec import Codec, WireLayout, part_layout, wire_dtype
from kv_transfer.link import ArrivedPart, Landed, Landing, to_mailbox
from kv_transfer.plan import WIRE_VERSION, PartSpan
from kv_transfer.state import ReceiveStatus, check_receive
from phasewise.core.clock import Clock
from phasewise.core.messages import KVAccepted, KVCommit, KVDone, KVFailed, KVOffer, KVPart, LinkLost
from phasewise.core.placement import WorkerId
from phasewise.core.ports import PeerPort


@dataclass(slots=True, eq=False)
class Reservation:
    """Blocks set aside for one handoff, and what has come in for it."""

    offer: KVOffer
    block_table: list[int]
    num_cached_tokens: int
    lease_end_s: float
    status: ReceiveStatus = ReceiveStatus.RESERVED
    reason: str = ""
    parts: set[int] = field(default_factory=set)
    landing: set[int] = field(default_factory=set)  # parts that a link writes, until the loop hears of them
    num_cells: int = 0
    num_bytes: int = 0
    block_hashes: list[bytes] = field(default_factory=list)  # its owner's: what the prefix cache is to know
    commit: KVCommit | None = None
    dropped_samples: set[int] = field(default_factory=set)  # cancelled before they began
    place: KVPlace = field(init=False)

    def __post_init__(self) -> None:
        self.place = KVPlace(self.block_table)


@dataclass(slots=True)
class ReceiverCounters:
    num_bytes: int = 0
    checksum_failures: int = 0
    late_parts: int = 0
    leases_expired: int = 0


class KVReceiver:
    """All incoming transfers of one worker. Ended ones stay until their owner takes them with `pop_ended`."""

    def __init__(self, cache: ReceivingCache, peers: PeerPort, clock: Clock) -> None:
        self._cache = cache
        self._spec = cache.spec
        self._peers = peers
        self._clock = clock
        self._lock = threading.Lock()  # guards which reservations there are, and what lands in them
        self._reservations: dict[str, Reservation] = {}
        self._ended: list[Reservation] = []
        self.counters = ReceiverCounters()

    @property
    def num_reservations(self) -> int:
        """With those that have ended and were not taken: they hold blocks."""
        return len(self._reservations) + len(self._ended)

    @property
    def has_ended(self) -> bool:
        """Whether `pop_ended` may have something."""
        return bool(self._ended)

    @property
    def reservations(self) -> list[Reservation]:
        return list(self._reservations.values())

    def refusal(self, offer: KVOffer) -> str:
        """Why this worker can never take the offer, or "": checked before anything moves."""
        if offer.wire_version != WIRE_VERSION:
            return f"wire version {offer.wire_version} there, {WIRE_VERSION} here"
        if offer.spec.content_fingerprint != self._spec.content_fingerprint:
            return "KV caches differ: " + "; ".join(self._spec.differences(offer.spec))
        return ""

    def accept(self, offer: KVOffer, block_table: list[int], num_cached_tokens: int, lease_end_s: float) -> Reservation:
        """Takes the offer into `block_table`, whose first `num_cached_tokens` tokens are in place already."""
        reservation = Reservation(offer, block_table, num_cached_tokens, lease_end_s)
        self._cache.prepare(reservation.place)
        with self._lock:
            self._reservations[offer.transfer_id] = reservation
        self._peers.send(offer.sender, KVAccepted(offer.transfer_id, num_cached_tokens, self._spec.dtype))
        return reservation

    def land(self, part: KVPart, wire: WireBuffer) -> Landing:
        """`Land` (kv_transfer/link.py) of this worker."""
        reservation = self._reservations.get(part.transfer_id)
        if reservation is None:
            return to_mailbox
        layout = self._layout(part, reservation)
        if isinstance(layout, str):
            return to_mailbox
        write = self._cache.unpacking(reservation.place, _span(part), layout, wire)
        return partial(self._land, reservation, part.part_index, write)

    def on_part(self, part: KVPart, arrived: ArrivedPart) -> None:
        """Takes a part, and writes it where its link did not. A wrong sum fails the whole handoff; nothing of it is
        ever decoded.

        Of a probe (kv_transfer/prober.py) nothing is written.
        """
        try:
            if arrived.landed is not None:
                self._touched_down(part)
            if part.is_probe:
                self.counters.checksum_failures += arrived.wire is None
            elif arrived.landed is not Landed.LOST:
                self._take_part(part, arrived)
        finally:
            arrived.release()

    def on_commit(self, commit: KVCommit) -> None:
        reservation = self._reservations.get(commit.transfer_id)
        if reservation is None:
            return
        request = reservation.offer.request
        if commit.num_tokens != len(request.prompt_token_ids) or len(commit.first_tokens) != request.sampling.n:
            self.fail(commit.transfer_id, "the commit does not fit the offer")
            return
        reservation.commit = commit
        self._finish_if_whole(reservation)

    def on_abort(self, transfer_id: str, reason: str) -> None:
        """The sender gave up: it needs no answer."""
        reservation = self._reservations.get(transfer_id)
        if reservation is not None:
            self._end(reservation, ReceiveStatus.FAILED, reason)

    def fail(self, transfer_id: str, reason: str) -> None:
        """Gives a transfer up and tells the sender."""
        reservation = self._reservations.get(transfer_id)
        if reservation is not None:
            self._end(reservation, ReceiveStatus.FAILED, reason)
            self._peers.send(reservation.offer.sender, KVFailed(transfer_id, reason))

    def on_peer_lost(self, peer: WorkerId) -> None:
        for reservation in self.reservations:
            if reservation.offer.sender == peer:
                self._end(reservation, ReceiveStatus.FAILED, f"worker {peer} was lost")

    def on_link_lost(self, lost: LinkLost) -> None:
        """Handoffs that lost parts cannot become whole."""
        for transfer_id in lost.transfer_ids:
            self.fail(transfer_id, f"the link from {lost.peer} broke: {lost.reason}")

    def expire(self) -> None:
        """Ends reservations whose lease is over."""
        now_s = self._clock.now_s()
        for reservation in self.reservations:
            if reservation.lease_end_s <= now_s:
                self.counters.leases_expired += 1
                self.fail(reservation.offer.transfer_id, "the reservation's lease is over")

    def next_deadline_s(self) -> float:
        """When `expire` has something to do next; infinity when never."""
        return min((r.lease_end_s for r in self._reservations.values()), default=float("inf"))

    def pop_ended(self) -> list[Reservation]:
        """Reservations that are DONE (their blocks are the caller's now) or FAILED (free them), once each.

        What the current stream gets behind this may read and write those blocks.
        """
        with self._lock:
            ended = [reservation for reservation in self._ended if not reservation.landing]
            self._ended = [reservation for reservation in self._ended if reservation not in ended]
        return ended

    # ---- inside

    def _land(self, reservation: Reservation, part_index: int, write: Callable[[], None]) -> bool:
        with self._lock:
            if self._reservations.get(reservation.offer.transfer_id) is not reservation:
                return False
            if part_index in reservation.landing | reservation.parts or not self._cache.can_write_beside(
                reservation.place
            ):
                return False
            reservation.landing.add(part_index)
        try:
            write()
        except BaseException:  # raised again: the link breaks, and no word of this part will come
            with self._lock:
                reservation.landing.discard(part_index)
            raise
        return True

    def _touched_down(self, part: KVPart) -> None:
        of_ended = (r for r in self._ended if r.offer.transfer_id == part.transfer_id)
        with self._lock:
            reservation = self._reservations.get(part.transfer_id) or next(of_ended)
            reservation.landing.remove(part.part_index)

    def _take_part(self, part: KVPart, arrived: ArrivedPart) -> None:
        reservation = self._reservations.get(part.transfer_id)
        if reservation is None:
            self.counters.late_parts += 1
            return
        if part.part_index in reservation.parts:
            return
        layout = self._layout(part, reservation)
        is_right = arrived.wire is not None or arrived.landed is Landed.RIGHT
        if isinstance(layout, str) or not is_right:
            self.counters.checksum_failures += not is_right
            wrong_sum = f"the checksum of part {part.part_index} does not match"
            self.fail(part.transfer_id, layout if isinstance(layout, str) else wrong_sum)
            return
        if reservation.status is ReceiveStatus.RESERVED:
            self._move(reservation, ReceiveStatus.RECEIVING)
        if arrived.wire is not None:
            self._cache.unpacking(reservation.place, _span(part), layout, arrived.wire)()
        reservation.parts.add(part.part_index)
        reservation.num_cells += part.num_layers * part.num_tokens
        reservation.num_bytes += part.num_bytes
        self.counters.num_bytes += part.num_bytes
        self._finish_if_whole(reservation)

    def _layout(self, part: KVPart, reservation: Reservation) -> WireLayout | str:
        """What the part looks like; or, as words, why it cannot be a part of this handoff."""
        spec, prompt_len = self._spec, len(reservation.offer.request.prompt_token_ids)
        inside = 0 <= part.first_layer < part.first_layer + part.num_layers <= spec.num_layers
        if not inside or part.first_token < reservation.num_cached_tokens or part.num_tokens <= 0:
            return f"part {part.part_index} lies outside the cache"
        if part.first_token + part.num_tokens > prompt_len:
            return f"part {part.part_index} goes beyond the prompt's {prompt_len} tokens"
        dtype = wire_dtype(reservation.offer.spec.dtype, spec.dtype)
        if part.dtype != dtype or part.codec not in list(Codec):
            return f"part {part.part_index} comes as {part.dtype} with codec {part.codec!r}; {dtype} was agreed on"
        layout = part_layout(spec, _span(part), dtype, Codec(part.codec))
        if part.num_bytes != layout.num_bytes:
            return f"part {part.part_index} has {part.num_bytes} bytes where {layout.num_bytes} were due"
        return layout

    def _finish_if_whole(self, reservation: Reservation) -> None:
        commit = reservation.commit
        if commit is None or len(reservation.parts) < commit.num_parts:
            return
        wanted = self._spec.num_layers * (commit.num_tokens - reservation.num_cached_tokens)
        if reservation.num_cells != wanted:
            self.fail(commit.transfer_id, f"{reservation.num_cells} layer-token cells came, {wanted} were due")
            return
        self._end(reservation, ReceiveStatus.DONE, "")
        self._peers.send(reservation.offer.sender, KVDone(commit.transfer_id))

    def _end(self, reservation: Reservation, status: ReceiveStatus, reason: str) -> None:
        self._move(reservation, status)
        reservation.reason = reason
        with self._lock:
            del self._reservations[reservation.offer.transfer_id]
            self._ended.append(reservation)

    def _move(self, reservation: Reservation, status: ReceiveStatus) -> None:
        check_receive(reservation.status, status)
        reservation.status = status


def _span(part: KVPart) -> PartSpan:
    return PartSpan(part.first_layer, part.num_layers, part.first_token, part.num_tokens)
