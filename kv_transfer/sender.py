"""The sending half of handoffs: packs and sends what kv_transfer/outgoing.py says.

Any owner of a sequence can hand it off: it makes a `Handoff`, gives it to the methods here and reads its state once a
step. Messages of the receiving workers come in through the `on_…` methods. Nothing here waits.
"""

from __future__ import annotations

from collections.abc import Sequence

from kv_transfer.cache_protocol import SendingCache
from kv_transfer.codec import WireLayout
from kv_transfer.link import DeviceFull, Link
from kv_transfer.outgoing import ComputedKV, Handoff, OutgoingHandoffs
from kv_transfer.paths import Paths, SendLimits
from kv_transfer.plan import PartSpan
from kv_transfer.state import SendStatus
from phasewise.core.clock import Clock
from phasewise.core.messages import KVAccepted, KVCommit, KVPart, LinkLost
from phasewise.core.placement import WorkerId
from phasewise.core.ports import PeerPort
from phasewise.core.request import SampledToken


class KVSender:
    """All outgoing handoffs of one worker. Parts that the window or the link has no room for wait as block ids."""

    def __init__(
        self,
        worker_id: WorkerId,
        cache: SendingCache,
        link: Link,
        peers: PeerPort,
        clock: Clock,
        limits: SendLimits,
    ) -> None:
        self._cache = cache
        self._link = link
        self._peers = peers
        self.paths = Paths(cache.spec, link, limits)
        self.outgoing = OutgoingHandoffs(worker_id, cache.spec, peers, clock, limits.window_bytes, limits.timeout_s)
        self.num_bytes_sent = 0
        self.num_parts_stored = 0
        self.num_links_lost = 0

    # ---- for the owner of a sequence

    def offer(self, handoff: Handoff) -> None:
        """Asks the peer to set blocks aside."""
        self.outgoing.offer(handoff, self._link.max_part_bytes(handoff.peer))

    def begin(self, handoff: Handoff, block_table: Sequence[int], num_cached_tokens: int) -> None:
        """The prompt's first chunk is about to run; the prefix cache had the first `num_cached_tokens`.

        Decides whether it is pushed layer by layer. The blocks must stay untouched until the handoff has ended.
        """
        spec, peer, num_tokens = self._cache.spec, handoff.peer, handoff.request.num_prompt_tokens
        is_layerwise = self.paths.is_layerwise(peer, num_tokens, handoff.attempt.dtype or spec.dtype)
        handoff.begin(block_table, spec.num_layers, is_layerwise=is_layerwise)
        if is_layerwise and num_cached_tokens:  # nothing of it is computed, so `on_computed` is not called for it
            self._push(handoff, PartSpan(0, spec.num_layers, 0, num_cached_tokens))

    def on_computed(self, handoff: Handoff, span: PartSpan) -> None:
        """Some layers of a chunk are computed once what is on the current stream is done: pushes them, or everything
        behind the last of a prompt that is pushed as a whole. What the peer has not accepted yet waits for that."""
        to_send = handoff.to_send(span)
        if to_send is not None:
            self._push(handoff, to_send)

    def commit(self, handoff: Handoff, first_tokens: tuple[SampledToken | None, ...]) -> None:
        """Everything is computed: the commit goes out behind the last part."""
        self.outgoing.commit(handoff, first_tokens)
        self._send_due()

    def forget(self, handoff: Handoff, reason: str) -> None:
        """The owner lets go of the handoff and of its blocks: one that goes on is given up."""
        self.outgoing.abort(handoff, reason)
        self.outgoing.forget(handoff)
        has_arrived = handoff.status is SendStatus.DONE and not handoff.num_failures
        if handoff.has_sent_parts and not has_arrived:
            self._cache.rejoin()  # packing may still read the blocks, which may be given away now

    # ---- once a step

    def poll(self) -> None:
        """Gives up attempts whose time is over, sends what is due, and offers again what failed."""
        self.outgoing.expire()
        self._send_due()  # what failed has left room in the window
        for handoff in self.outgoing.take_failures():
            self.offer(handoff)
            if handoff.is_computed:
                self._push(handoff, handoff.whole)

    # ---- messages

    def on_accepted(self, message: KVAccepted) -> None:
        self.outgoing.on_accepted(message)
        self._send_due()

    def on_part_ack(self, transfer_id: str, part_index: int) -> None:
        self.outgoing.on_part_ack(transfer_id, part_index)
        self._send_due()  # even the part of an attempt that is over has given its buffer back

    def on_peer_lost(self, peer: WorkerId) -> None:
        self.outgoing.on_peer_lost(peer)
        self._link.forget(peer)

    def on_link_lost(self, lost: LinkLost) -> None:
        self.num_links_lost += 1
        self.outgoing.on_link_lost(lost)
        self._send_due()  # its buffers are free

    # ---- inside

    def _push(self, handoff: Handoff, span: PartSpan) -> None:
        if handoff.status is SendStatus.FAILED:
            return
        assert handoff.place is not None
        self.outgoing.add(handoff, ComputedKV(span, handoff.place, self._cache.mark()))
        self._send_due()

    def _send_due(self) -> None:
        for handoff, due in self.outgoing.due():
            if isinstance(due, KVCommit):
                if self._link.send_commit(handoff.peer, due):
                    handoff.attempt.commit_on_link = due
                else:
                    self._peers.send(handoff.peer, due)
                continue
            layout, window = self.paths.layout(handoff.peer, due.span, handoff.attempt.dtype), self.outgoing.window
            if window.fits(layout.num_bytes) and not self._send_part(handoff, due, layout):
                window.is_held = self._link.is_full

    def _send_part(self, handoff: Handoff, computed: ComputedKV, layout: WireLayout) -> bool:
        """False when the link has no room for the part now."""
        with self._cache.beside(computed.mark):
            peer, num_bytes, span = handoff.peer, layout.num_bytes, computed.span
            try:
                wire = self._link.buffer(peer, num_bytes)
            except DeviceFull:
                self._on_device_full(handoff, num_bytes)
                return False
            if wire is None:
                return False
            try:
                self._cache.pack(computed.place, span, layout, wire)
            except Exception:
                self._link.give_back(wire)
                raise
            index = self.outgoing.window.sent(handoff.attempt, num_bytes)
            handoff.has_sent_parts = True
            part = KVPart(handoff.transfer_id, index, *span, num_bytes, layout.dtype, layout.codec)
            self.num_bytes_sent += num_bytes
            self.num_parts_stored += self._link.uses_store
            self._link.send_part(peer, part, wire)
            return True

    def _on_device_full(self, handoff: Handoff, num_bytes: int) -> None:
        """A full device must not end the worker. Memory comes back with what is on its way, if anything is."""
        if not self.outgoing.window.num_bytes_in_flight:
            remedy = "lower transfer.window_mib or cache.gpu_memory_utilization"
            self.outgoing.abort(handoff, f"the device has no {num_bytes} bytes left for a part; {remedy}")
