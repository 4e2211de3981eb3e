"""The incoming handoffs of one worker: which parts belong to them, when one is whole, and how it ends. Pure.

Life of a handoff: kv_transfer/state.py. Whether blocks may be set aside is not decided here but by the decode phase
(decode_workers/joining.py), which brings them. A part that belongs to no live handoff (delayed, aborted, expired)
is counted and dropped: the id of its transfer is never used again, so it can reach no block.

What happens to a received part:

    prepare     its layout is checked against its handoff, before its bytes are there
    begin_write its bytes are there: a link that writes it itself asks first, and is told no when the handoff has ended
    end_write   the loop hears that this write is over; until then the handoff keeps its blocks, even when it has ended
    receive     it is written and right: it counts towards its handoff, which ends when the commit is here, too
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from kv_transfer.cache_protocol import KVPlace
from kv_transfer.codec import Codec, WireLayout, part_layout, wire_dtype
from kv_transfer.plan import WIRE_VERSION, PartSpan
from kv_transfer.state import RECEIVE_TRANSITIONS, ReceiveStatus, check
from phasewise.core.clock import Clock
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import KVAccepted, KVCommit, KVDone, KVFailed, KVOffer, KVPart, KVRefused, LinkLost
from phasewise.core.placement import WorkerId
from phasewise.core.ports import PeerPort


class WrongPart(Exception):
    """A part cannot be one of its handoff; the message says why."""


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
    writing: set[int] = field(default_factory=set)  # parts that a link writes, until the loop hears of them
    num_cells: int = 0
    num_bytes: int = 0
    block_hashes: list[bytes] = field(default_factory=list)  # its owner's: what the prefix cache is to know
    commit: KVCommit | None = None
    dropped_samples: set[int] = field(default_factory=set)  # cancelled before they began
    place: KVPlace = field(init=False)

    def __post_init__(self) -> None:
        self.place = KVPlace(self.block_table)

    def move(self, status: ReceiveStatus) -> None:
        check(RECEIVE_TRANSITIONS, self.status, status)
        self.status = status

    def layout_of(self, part: KVPart, spec: KVCacheSpec, *, is_right: bool = True) -> WireLayout:
        """What the part looks like, for a cache of `spec`. Raises WrongPart; `is_right`: its checksum, if known."""
        prompt_len = self.offer.request.num_prompt_tokens
        inside = 0 <= part.first_layer < part.first_layer + part.num_layers <= spec.num_layers
        if not inside or part.first_token < self.num_cached_tokens or part.num_tokens <= 0:
            raise WrongPart(f"part {part.part_index} lies outside the cache")
        if part.first_token + part.num_tokens > prompt_len:
            raise WrongPart(f"part {part.part_index} goes beyond the prompt's {prompt_len} tokens")
        dtype = wire_dtype(self.offer.spec.dtype, spec.dtype)
        if part.dtype != dtype or part.codec not in list(Codec):
            came = f"{part.dtype} with codec {part.codec!r}"
            raise WrongPart(f"part {part.part_index} comes as {came}; {dtype} was agreed on")
        layout = part_layout(spec, span_of(part), dtype, Codec(part.codec))
        if part.num_bytes != layout.num_bytes:
            raise WrongPart(f"part {part.part_index} has {part.num_bytes} bytes where {layout.num_bytes} were due")
        if not is_right:
            raise WrongPart(f"the checksum of part {part.part_index} does not match")
        return layout


def span_of(part: KVPart) -> PartSpan:
    return PartSpan(part.first_layer, part.num_layers, part.first_token, part.num_tokens)


def refusal(offer: KVOffer, ours: KVCacheSpec) -> str:
    """Why a worker whose cache is `ours` can never take the offer, or "": checked before anything moves."""
    if offer.wire_version != WIRE_VERSION:
        return f"wire version {offer.wire_version} there, {WIRE_VERSION} here"
    if offer.spec.content_fingerprint != ours.content_fingerprint:
        return "KV caches differ: " + "; ".join(ours.differences(offer.spec))
    return ""


@dataclass(slots=True)
class ReceiverCounters:
    num_bytes: int = 0
    checksum_failures: int = 0
    late_parts: int = 0  # of no live handoff
    leases_expired: int = 0


class IncomingHandoffs:
    """All of one worker. Ended ones stay until their owner takes them with `pop_ended`.

    `guard` is held for moments in which it changes which handoffs there are, or which parts are being written:
    `find`, `begin_write` and `end_write` may be called from any thread, all else belongs to one. There are more than 20
    methods: one for each event and for each way in which a handoff ends.
    """

    def __init__(self, spec: KVCacheSpec, peers: PeerPort, clock: Clock, guard: AbstractContextManager[object]) -> None:
        self.spec = spec
        self._peers = peers
        self._clock = clock
        self._guard = guard
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

    def find(self, transfer_id: str) -> Reservation | None:
        """The live handoff of that id."""
        return self._reservations.get(transfer_id)

    # ---- parts

    def accept(self, reservation: Reservation) -> None:
        """Takes an offer into blocks that links may write to from now on, and tells its sender."""
        offer = reservation.offer
        with self._guard:
            self._reservations[offer.transfer_id] = reservation
        accepted = KVAccepted(offer.transfer_id, reservation.num_cached_tokens, self.spec.dtype)
        self._peers.send(offer.sender, accepted)

    def begin_write(self, reservation: Reservation, part_index: int) -> bool:
        """A link is about to write a part into its blocks; False when it must not."""
        with self._guard:
            is_live = self._reservations.get(reservation.offer.transfer_id) is reservation
            if not is_live or part_index in reservation.writing or part_index in reservation.parts:
                return False
            reservation.writing.add(part_index)
        return True

    def end_write(self, part: KVPart) -> None:
        """The device is done with what a link wrote for the part, or the write could not begin after all."""
        of_ended = (r for r in self._ended if r.offer.transfer_id == part.transfer_id)
        with self._guard:
            reservation = self._reservations.get(part.transfer_id) or next(of_ended)
            reservation.writing.remove(part.part_index)

    def check(self, part: KVPart, *, is_right: bool) -> tuple[Reservation, WireLayout] | None:
        """A part has come: what it is of, and how it is to be written. None when nothing is to be done with it.

        `is_right`: its checksum. A wrong one fails the whole handoff; nothing of it is ever decoded.
        """
        reservation = self._reservations.get(part.transfer_id)
        if reservation is None:
            self.counters.late_parts += 1
        elif part.part_index not in reservation.parts:
            self.counters.checksum_failures += not is_right
            try:
                return reservation, reservation.layout_of(part, self.spec, is_right=is_right)
            except WrongPart as error:
                self.fail(part.transfer_id, str(error))
        return None

    def receive(self, reservation: Reservation, part: KVPart) -> None:
        """A part that `check` let through is in its blocks, for what the current stream gets behind this."""
        if reservation.status is ReceiveStatus.RESERVED:
            reservation.move(ReceiveStatus.RECEIVING)
        reservation.parts.add(part.part_index)
        reservation.num_cells += part.num_layers * part.num_tokens
        reservation.num_bytes += part.num_bytes
        self.counters.num_bytes += part.num_bytes
        self._finish_if_whole(reservation)

    # ---- messages, and once a step

    def on_commit(self, commit: KVCommit) -> None:
        reservation = self._reservations.get(commit.transfer_id)
        if reservation is None:
            return
        request = reservation.offer.request
        if commit.num_tokens != request.num_prompt_tokens or len(commit.first_tokens) != request.sampling.n:
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
        """Gives a handoff up and tells the sender."""
        reservation = self._reservations.get(transfer_id)
        if reservation is not None:
            self._end(reservation, ReceiveStatus.FAILED, reason)
            self._peers.send(reservation.offer.sender, KVFailed(transfer_id, reason))

    def refuse(self, transfer_id: str, reason: str) -> None:
        """Gives a handoff up; its sender is told that another worker may take it."""
        reservation = self._reservations.get(transfer_id)
        if reservation is not None:
            self._end(reservation, ReceiveStatus.FAILED, reason)
            self._peers.send(reservation.offer.sender, KVRefused(transfer_id, reason, others_may=True))

    def on_peer_lost(self, peer: WorkerId) -> None:
        for reservation in self.reservations:
            if reservation.offer.sender == peer:
                self._end(reservation, ReceiveStatus.FAILED, f"worker {peer} was lost")

    def on_link_lost(self, lost: LinkLost) -> None:
        """Handoffs that lost parts cannot become whole."""
        for transfer_id in sorted(lost.transfer_ids):
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
        with self._guard:
            ended = [reservation for reservation in self._ended if not reservation.writing]
            self._ended = [reservation for reservation in self._ended if reservation.writing]
        return ended

    # ---- inside

    def _finish_if_whole(self, reservation: Reservation) -> None:
        commit = reservation.commit
        if commit is None or len(reservation.parts) < commit.num_parts:
            return
        wanted = self.spec.num_layers * (commit.num_tokens - reservation.num_cached_tokens)
        if reservation.num_cells != wanted:
            self.fail(commit.transfer_id, f"{reservation.num_cells} layer-token cells came, {wanted} were due")
            return
        self._end(reservation, ReceiveStatus.DONE, "")
        self._peers.send(reservation.offer.sender, KVDone(commit.transfer_id))

    def _end(self, reservation: Reservation, status: ReceiveStatus, reason: str) -> None:
        reservation.move(status)
        reservation.reason = reason
        with self._guard:
            del self._reservations[reservation.offer.transfer_id]
            self._ended.append(reservation)
