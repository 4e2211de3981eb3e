"""The prefill half of a handoff: offer, push parts inside a window, commit, wait for the receiver's word.

Life of a transfer: kv_transfer/state.py. The owner (the prefill phase) asks for `status` once a step; messages from the
decode worker come in through the `on_…` methods. Nothing here waits.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from kv_transfer.checksum import checksum
from kv_transfer.link import Link
from kv_transfer.plan import CODEC_RAW, WIRE_VERSION, PartSpan, clip_tokens
from kv_transfer.staging import gather, slots_of
from kv_transfer.state import SendStatus, check_send
from phasewise.core.clock import Clock
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import KVAbort, KVAccepted, KVCommit, KVOffer, KVPart
from phasewise.core.placement import WorkerId
from phasewise.core.ports import PeerPort
from phasewise.core.request import Request, SampledToken


@dataclass(slots=True)
class _Transfer:
    peer: WorkerId
    deadline_s: float
    status: SendStatus = SendStatus.OFFERED
    reason: str = ""
    num_cached_tokens: int = 0  # the receiver has these already
    started_unix_s: float = 0.0
    waiting: deque[tuple[PartSpan, list[int]]] = field(default_factory=deque)  # behind the window
    in_flight: dict[int, int] = field(default_factory=dict)  # part index → bytes
    num_parts: int = 0
    commit: KVCommit | None = None


class KVSender:
    """All outgoing transfers of one worker.

    `storage` is the paged cache's tensor (kv_transfer/staging.py). `window_bytes` bounds what is in flight for the
    whole worker; parts beyond it wait as block ids, not as copies. One part may always go.
    """

    def __init__(
        self,
        worker_id: WorkerId,
        storage: torch.Tensor,
        spec: KVCacheSpec,
        link: Link,
        peers: PeerPort,
        clock: Clock,
        window_bytes: int,
    ) -> None:
        self._worker_id = worker_id
        self._storage = storage
        self._spec = spec
        self._link = link
        self._peers = peers
        self._clock = clock
        self._window_bytes = window_bytes
        self._transfers: dict[str, _Transfer] = {}
        self._bytes_in_flight = 0
        self._num_offers = 0
        self.num_bytes_sent = 0

    def offer(self, peer: WorkerId, request: Request, gateway_id: str, time_left_s: float) -> str:
        """Asks `peer` to set blocks aside. The transfer's id is never used twice: a late part finds nothing."""
        self._num_offers += 1
        transfer_id = f"{request.request_id}#{self._worker_id}.{self._num_offers}"
        self._transfers[transfer_id] = _Transfer(peer, self._clock.now_s() + time_left_s)
        self._peers.send(
            peer,
            KVOffer(transfer_id, WIRE_VERSION, self._worker_id, self._spec, request, gateway_id, time_left_s),
        )
        return transfer_id

    def status(self, transfer_id: str) -> SendStatus:
        return self._transfers[transfer_id].status

    def reason(self, transfer_id: str) -> str:
        """Why a transfer failed, or ""."""
        return self._transfers[transfer_id].reason

    def push(self, transfer_id: str, span: PartSpan, block_table: list[int]) -> None:
        """Sends KV that is computed, or queues it behind the window. Tokens that the receiver has are left out.

        The blocks must stay untouched until the transfer has ended. Ignored when it has failed already.
        """
        transfer = self._transfers[transfer_id]
        if transfer.status is SendStatus.FAILED:
            return
        if transfer.status is SendStatus.ACCEPTED:
            self._move(transfer, SendStatus.SENDING)
            transfer.started_unix_s = self._clock.unix_s()
        clipped = clip_tokens(span, transfer.num_cached_tokens)
        if clipped is not None:
            transfer.waiting.append((clipped, block_table))
            self.pump()

    def commit(
        self, transfer_id: str, num_tokens: int, first_tokens: tuple[SampledToken | None, ...], timeout_s: float
    ) -> None:
        """Declares everything pushed; the commit goes out behind the last part. `timeout_s` bounds the rest."""
        transfer = self._transfers[transfer_id]
        if transfer.status is SendStatus.FAILED:
            return
        started = transfer.started_unix_s or self._clock.unix_s()
        transfer.commit = KVCommit(transfer_id, 0, num_tokens, first_tokens, started)
        transfer.deadline_s = min(transfer.deadline_s, self._clock.now_s() + timeout_s)
        self.pump()

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
        for transfer_id, transfer in self._transfers.items():
            while transfer.waiting and self._has_room(transfer.waiting[0][0]):
                span, block_table = transfer.waiting.popleft()
                self._send(transfer_id, transfer, span, block_table)
            due = transfer.commit is not None and not transfer.waiting
            if due and transfer.status in (SendStatus.ACCEPTED, SendStatus.SENDING):
                self._send_commit(transfer)

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
            self._move(transfer, SendStatus.ACCEPTED)

    def on_part_ack(self, transfer_id: str, part_index: int) -> None:
        transfer = self._transfers.get(transfer_id)
        if transfer is not None:
            self._bytes_in_flight -= transfer.in_flight.pop(part_index, 0)
            self.pump()

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

    # ---- inside

    def _has_room(self, span: PartSpan) -> bool:
        size = self._span_bytes(span)
        return self._bytes_in_flight == 0 or self._bytes_in_flight + size <= self._window_bytes

    def _span_bytes(self, span: PartSpan) -> int:
        return self._spec.bytes_per_token * span.num_cells // self._spec.num_layers

    def _send(self, transfer_id: str, transfer: _Transfer, span: PartSpan, block_table: list[int]) -> None:
        slots = slots_of(block_table, self._spec.block_size, span.first_token, span.num_tokens, self._storage.device)
        payload = gather(self._storage, slots, span.first_layer, span.num_layers)
        num_bytes = payload.numel() * payload.element_size()
        part = KVPart(
            transfer_id,
            transfer.num_parts,
            span.first_layer,
            span.num_layers,
            span.first_token,
            span.num_tokens,
            num_bytes,
            CODEC_RAW,
            checksum(payload),
        )
        transfer.in_flight[part.part_index] = num_bytes
        transfer.num_parts += 1
        self._bytes_in_flight += num_bytes
        self.num_bytes_sent += num_bytes
        self._link.send_part(transfer.peer, part, payload)

    def _send_commit(self, transfer: _Transfer) -> None:
        assert transfer.commit is not None
        c = transfer.commit
        self._move(transfer, SendStatus.COMMITTED)
        self._peers.send(
            transfer.peer,
            KVCommit(c.transfer_id, transfer.num_parts, c.num_tokens, c.first_tokens, c.started_unix_s),
        )

    def _move(self, transfer: _Transfer, status: SendStatus) -> None:
        check_send(transfer.status, status)
        transfer.status = status

    def _fail(self, transfer: _Transfer, reason: str) -> None:
        self._move(transfer, SendStatus.FAILED)
        transfer.reason = reason
        transfer.waiting.clear()
        self._release_window(transfer)

    def _release_window(self, transfer: _Transfer) -> None:
        self._bytes_in_flight -= sum(transfer.in_flight.values())
        transfer.in_flight.clear()
