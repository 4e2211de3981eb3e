"""The prefill half of a handoff: offer, push parts inside a window, commit, wait for the receiver's word.

Life of a transfer: kv_transfer/state.py. The owner (the prefill phase) asks for `status` once a step; messages from the
decode worker come in through the `on_…` methods. Nothing here waits.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import torch

from kv_transfer.cache_port import CachePort, KVPlace
from kv_transfer.codec import ALIGNMENT, Codec, WireLayout, choose, is_lossless, wire_dtype
from kv_transfer.link import Link
from kv_transfer.plan import WIRE_VERSION, PartSpan, clip_tokens, cut
from kv_transfer.state import SendStatus, check_send
from phasewise.core.clock import Clock
from phasewise.core.handoff_cost import HandoffPath
from phasewise.core.kv_spec import FP8, KVCacheSpec
from phasewise.core.links import LinkFacts
from phasewise.core.messages import KVAbort, KVAccepted, KVCommit, KVOffer, KVPart, LinkLost
from phasewise.core.placement import WorkerId
from phasewise.core.ports import PeerPort
from phasewise.core.request import Request, SampledToken


@dataclass(frozen=True, slots=True)
class _Computed:
    """KV that can go. `mark`: when it is in the cache."""

    span: PartSpan
    place: KVPlace
    mark: torch.cuda.Event | None


@dataclass(slots=True)
class _Transfer:
    peer: WorkerId
    deadline_s: float
    status: SendStatus = SendStatus.OFFERED
    reason: str = ""
    num_cached_tokens: int = 0  # the receiver has these already
    dtype: str = ""  # of the values on the wire
    started_unix_s: float = 0.0
    place: KVPlace | None = None
    early: list[_Computed] = field(default_factory=list)  # computed before the offer was accepted
    waiting: deque[_Computed] = field(default_factory=deque)  # parts, behind the window
    in_flight: dict[int, int] = field(default_factory=dict)  # part index → bytes
    num_parts: int = 0
    commit: KVCommit | None = None
    on_link: KVCommit | None = None  # the commit, while nothing else brings it
    commit_timeout_s: float = float("inf")  # from the commit, or from the acceptance if that is later


@dataclass(frozen=True, slots=True)
class SendLimits:
    """What the sender needs of the configuration.

    Attributes:
        window_bytes: bounds what is in flight for the whole worker; one part may always go.
        codec: the one that may be used on a link which is slower than it.
        codec_bytes_per_s: at which this worker encodes, measured; 0.0: not known, and none is used.
        num_groups, chunk_tokens, threshold_tokens: how prompts are pushed layer by layer, as HandoffPath has it.
    """

    window_bytes: int
    codec: Codec = Codec.NONE
    codec_bytes_per_s: float = 0.0
    num_groups: int = 1
    chunk_tokens: int = 2**31
    threshold_tokens: int | None = None


class KVSender:
    """All outgoing transfers of one worker. Parts that the window or the link has no room for wait as block ids.

    `late` brings what the step need not wait for: offers.
    """

    def __init__(
        self,
        worker_id: WorkerId,
        cache: CachePort,
        link: Link,
        peers: PeerPort,
        late: PeerPort,
        clock: Clock,
        limits: SendLimits,
    ) -> None:
        self._worker_id = worker_id
        self._cache = cache
        self._link = link
        self._peers = peers
        self._late = late
        self._clock = clock
        self._limits = limits
        self._transfers: dict[str, _Transfer] = {}
        self._bytes_in_flight = 0
        self._num_offers = 0
        self.num_bytes_sent = 0
        self.num_parts_stored = 0
        self.num_links_lost = 0

    def offer(
        self, peer: WorkerId, request: Request, gateway_id: str, time_left_s: float, timeout_s: float = float("inf")
    ) -> str:
        """Asks `peer` to set blocks aside. The transfer's id is never used twice: a late part finds nothing.

        `time_left_s` is the request's; `timeout_s` bounds the transfer, where that is less.
        """
        self._num_offers += 1
        transfer_id = f"{request.request_id}#{self._worker_id}.{self._num_offers}"
        self._transfers[transfer_id] = _Transfer(peer, self._clock.now_s() + min(time_left_s, timeout_s))
        self._late.send(
            peer,
            KVOffer(transfer_id, WIRE_VERSION, self._worker_id, self._cache.spec, request, gateway_id, time_left_s),
        )
        return transfer_id

    def status(self, transfer_id: str) -> SendStatus:
        return self._transfers[transfer_id].status

    def reason(self, transfer_id: str) -> str:
        """Why a transfer failed, or ""."""
        return self._transfers[transfer_id].reason

    def is_layerwise(self, transfer_id: str, num_tokens: int) -> bool:
        """Whether a prompt should be pushed layer by layer, by what the link is now."""
        transfer = self._transfers[transfer_id]
        return self._path(transfer.peer, transfer.dtype or self._cache.spec.dtype).is_layerwise(num_tokens)

    def facts(self, peer: WorkerId, spec: KVCacheSpec) -> LinkFacts:
        """What is known of the way to a worker whose cache is `spec`. May be called from any thread."""
        ours = self._cache.spec
        dtype = wire_dtype(ours.dtype, spec.dtype)
        layout = self._layout(peer, self._one_token, dtype)
        fits = ours.content_fingerprint == spec.content_fingerprint
        return LinkFacts(
            peer,
            self._link.name(peer),
            self._link.bytes_per_s(peer),
            self._link.part_s(peer),
            self._link.max_part_bytes(peer),
            dtype,
            layout.codec.value,
            layout.content_bytes,
            is_lossless(layout.codec, ours.dtype, spec.dtype),
            "" if fits else "; ".join(ours.differences(spec)),
        )

    def push(self, transfer_id: str, span: PartSpan, block_table: list[int]) -> None:
        """Sends KV that is computed once what is on the current stream is done, or queues it: behind the window, and
        until the offer is accepted. Tokens that the receiver has are left out.

        The blocks must stay untouched until the transfer has ended. Ignored when it has failed already.
        """
        transfer = self._transfers[transfer_id]
        if transfer.status is SendStatus.FAILED:
            return
        if transfer.place is None or transfer.place.block_table != block_table:
            transfer.place = KVPlace(block_table)
        computed = _Computed(span, transfer.place, self._cache.mark())
        if transfer.status is SendStatus.OFFERED:
            transfer.early.append(computed)
        else:
            self._queue(transfer, computed)
            self.pump()

    def _queue(self, transfer: _Transfer, computed: _Computed) -> None:
        if transfer.status is SendStatus.ACCEPTED:
            self._move(transfer, SendStatus.SENDING)
            transfer.started_unix_s = self._clock.unix_s()
        clipped = clip_tokens(computed.span, transfer.num_cached_tokens)
        if clipped is not None:
            cell = self._cache.layout(PartSpan(0, 1, 0, 1), transfer.dtype, Codec.NONE)
            seal_bytes = cell.num_bytes - cell.content_bytes  # at most: padding and checksum
            max_cells = (self._link.max_part_bytes(transfer.peer) - seal_bytes - ALIGNMENT) // cell.content_bytes
            parts = cut(clipped, max_cells)
            transfer.waiting.extend(replace(computed, span=part) for part in parts)

    def commit(
        self, transfer_id: str, num_tokens: int, first_tokens: tuple[SampledToken | None, ...], timeout_s: float
    ) -> None:
        """Declares everything pushed; the commit goes out behind the last part.

        `timeout_s` bounds the rest, from the acceptance on: the receiver may have to make room first.
        """
        transfer = self._transfers[transfer_id]
        if transfer.status is SendStatus.FAILED:
            return
        transfer.commit = KVCommit(transfer_id, 0, num_tokens, first_tokens, 0.0)
        transfer.commit_timeout_s = timeout_s
        if transfer.status is not SendStatus.OFFERED:
            self._bound(transfer)
            self.pump()

    def commit_waits_for_answer(self, transfer_id: str) -> bool:
        """Whether `commit` was called and the offer is not answered: until then it may be called again."""
        transfer = self._transfers[transfer_id]
        return transfer.status is SendStatus.OFFERED and transfer.commit is not None

    def abort(self, transfer_id: str, reason: str) -> None:
        """Gives a transfer up and tells the receiver."""
        transfer = self._transfers.get(transfer_id)
        if transfer is not None and transfer.status not in (SendStatus.DONE, SendStatus.FAILED):
            self._fail(transfer, reason)
            self._peers.send(transfer.peer, KVAbort(transfer_id, reason))

    def forget(self, transfer_id: str) -> None:
        """Drops the record of an ended transfer."""
        transfer = self._transfers.pop(transfer_id)
        assert transfer.status in (SendStatus.DONE, SendStatus.FAILED), transfer.status

    def pump(self) -> None:
        """Sends what the window allows, in the order in which the transfers began; then commits that are due."""
        is_full = False
        for transfer_id, transfer in self._transfers.items():
            while transfer.waiting and not is_full:
                computed = transfer.waiting[0]
                layout = self._layout(transfer.peer, computed.span, transfer.dtype)
                # Nobody passes a part that the window is too full for: smaller ones would keep it out for ever.
                is_full = self._bytes_in_flight > 0 and (
                    self._bytes_in_flight + layout.num_bytes > self._limits.window_bytes
                )
                if is_full:
                    break
                if not self._send(transfer_id, transfer, computed, layout):
                    is_full = self._link.is_full  # nor one that the link has no room for
                    break
                transfer.waiting.popleft()
            due = transfer.commit is not None and not transfer.waiting
            if due and transfer.status in (SendStatus.ACCEPTED, SendStatus.SENDING):
                self._send_commit(transfer)

    @property
    def is_held_back(self) -> bool:
        """Whether computed KV waits for what is under way to arrive."""
        return self._bytes_in_flight > 0 and any(transfer.waiting for transfer in self._transfers.values())

    def expire(self) -> None:
        """Fails transfers whose time is over."""
        now_s = self._clock.now_s()
        for transfer_id, transfer in list(self._transfers.items()):
            if transfer.deadline_s <= now_s:
                self.abort(transfer_id, "the handoff's time is over")

    def next_deadline_s(self) -> float:
        """When `expire` has something to do next; infinity when never."""
        ended = (SendStatus.DONE, SendStatus.FAILED)
        return min((t.deadline_s for t in self._transfers.values() if t.status not in ended), default=float("inf"))

    # ---- messages from the receiver

    def on_accepted(self, message: KVAccepted) -> None:
        transfer = self._transfers.get(message.transfer_id)
        if transfer is not None and transfer.status is SendStatus.OFFERED:
            transfer.num_cached_tokens = message.num_cached_tokens
            transfer.dtype = wire_dtype(self._cache.spec.dtype, message.dtype)
            self._move(transfer, SendStatus.ACCEPTED)
            self._bound(transfer)
            for computed in transfer.early:
                self._queue(transfer, computed)
            transfer.early.clear()
            self.pump()

    def on_part_ack(self, transfer_id: str, part_index: int) -> None:
        transfer = self._transfers.get(transfer_id)
        if transfer is not None:
            self._bytes_in_flight -= transfer.in_flight.pop(part_index, 0)
        self.pump()  # even that of a transfer that is over has given its buffer back

    def on_done(self, transfer_id: str) -> None:
        transfer = self._transfers.get(transfer_id)
        if transfer is not None and transfer.status in (SendStatus.OFFERED, SendStatus.COMMITTED):
            self._release_window(transfer)
            self._move(transfer, SendStatus.DONE)

    def on_failed(self, transfer_id: str, reason: str) -> None:
        """The receiver refused or gave up; it has freed its blocks."""
        transfer = self._transfers.get(transfer_id)
        if transfer is not None and transfer.status not in (SendStatus.DONE, SendStatus.FAILED):
            self._fail(transfer, reason)

    def on_peer_lost(self, peer: WorkerId) -> None:
        for transfer in self._transfers.values():
            if transfer.peer == peer and transfer.status not in (SendStatus.DONE, SendStatus.FAILED):
                self._fail(transfer, f"worker {peer} was lost")
        self._link.forget(peer)

    def on_link_lost(self, lost: LinkLost) -> None:
        """Gives up the transfers whose parts were on that link. Another attempt takes another road.

        A commit may have been on it behind parts that had all arrived: it is sent again.
        """
        self.num_links_lost += 1
        for transfer_id in lost.transfer_ids:
            self.abort(transfer_id, f"the link to {lost.peer} broke: {lost.reason}")
        for transfer in self._transfers.values():
            if transfer.peer == lost.peer and transfer.status is SendStatus.COMMITTED and transfer.on_link is not None:
                self._peers.send(transfer.peer, transfer.on_link)
                transfer.on_link = None
        self.pump()  # its buffers are free

    # ---- inside

    def _bound(self, transfer: _Transfer) -> None:
        transfer.deadline_s = min(transfer.deadline_s, self._clock.now_s() + transfer.commit_timeout_s)

    def _send(self, transfer_id: str, transfer: _Transfer, computed: _Computed, layout: WireLayout) -> bool:
        """False when the link has no room for the part now."""
        with self._cache.beside(computed.mark):
            return self._pack_and_send(transfer_id, transfer, computed, layout)

    def _pack_and_send(self, transfer_id: str, transfer: _Transfer, computed: _Computed, layout: WireLayout) -> bool:
        peer, num_bytes, span = transfer.peer, layout.num_bytes, computed.span
        try:
            wire = self._link.buffer(peer, num_bytes)
        except torch.OutOfMemoryError:  # a full device must not end the worker
            if not self._bytes_in_flight:  # else memory comes back with what is on its way
                remedy = "lower transfer.window_mib or cache.gpu_memory_utilization"
                self.abort(transfer_id, f"the device has no {num_bytes} bytes left for a part; {remedy}")
            return False
        if wire is None:
            return False
        try:
            self._cache.pack(computed.place, span, layout, wire)
        except Exception:
            self._link.give_back(wire)
            raise
        part = KVPart(
            transfer_id,
            transfer.num_parts,
            span.first_layer,
            span.num_layers,
            span.first_token,
            span.num_tokens,
            num_bytes,
            layout.dtype,
            layout.codec,
        )
        transfer.in_flight[part.part_index] = num_bytes
        transfer.num_parts += 1
        self._bytes_in_flight += num_bytes
        self.num_bytes_sent += num_bytes
        self.num_parts_stored += self._link.uses_store
        self._link.send_part(peer, part, wire)
        return True

    def _layout(self, peer: WorkerId, span: PartSpan, dtype: str) -> WireLayout:
        """With the codec where that is worth it on the link as it is now."""
        cache, limits = self._cache, self._limits
        layout = cache.layout(span, dtype, Codec.NONE)
        if limits.codec is not Codec.NONE and dtype != FP8:
            encoded = cache.layout(span, dtype, limits.codec)
            rates = self._link.bytes_per_s(peer), limits.codec_bytes_per_s
            if choose(limits.codec, layout.num_bytes, encoded.num_bytes, *rates) is limits.codec:
                return encoded
        return layout

    def _path(self, peer: WorkerId, dtype: str) -> HandoffPath:
        link, limits = self._link, self._limits
        return HandoffPath(
            self._layout(peer, self._one_token, dtype).content_bytes,
            link.bytes_per_s(peer),
            link.part_s(peer),
            link.max_part_bytes(peer),
            limits.num_groups,
            limits.chunk_tokens,
            limits.threshold_tokens,
        )

    @property
    def _one_token(self) -> PartSpan:
        return PartSpan(0, self._cache.spec.num_layers, 0, 1)

    def _send_commit(self, transfer: _Transfer) -> None:
        assert transfer.commit is not None
        c = transfer.commit
        self._move(transfer, SendStatus.COMMITTED)
        started = transfer.started_unix_s or self._clock.unix_s()
        commit = replace(c, num_parts=transfer.num_parts, started_unix_s=started)
        if self._link.send_commit(transfer.peer, commit):
            transfer.on_link = commit
        else:
            self._peers.send(transfer.peer, commit)

    def _move(self, transfer: _Transfer, status: SendStatus) -> None:
        check_send(transfer.status, status)
        transfer.status = status

    def _fail(self, transfer: _Transfer, reason: str) -> None:
        self._move(transfer, SendStatus.FAILED)
        if transfer.num_parts:  # its blocks may be given away now, and its commit be on its way
            self._cache.rejoin()
        transfer.reason = reason
        transfer.early.clear()
        transfer.waiting.clear()
        self._release_window(transfer)

    def _release_window(self, transfer: _Transfer) -> None:
        self._bytes_in_flight -= sum(transfer.in_flight.values())
        transfer.in_flight.clear()
