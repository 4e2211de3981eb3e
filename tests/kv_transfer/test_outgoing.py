"""What may be sent, in which order, and what is tried again: without links, caches and threads."""

from __future__ import annotations

from kv_transfer.outgoing import MAX_ATTEMPTS, ComputedKV, Handoff, OutgoingHandoffs
from kv_transfer.plan import PartSpan
from kv_transfer.state import SendStatus
from phasewise.core.clock import ManualClock
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import KVAbort, KVAccepted, KVCommit, KVOffer, LinkLost, WorkerMessage
from phasewise.core.request import Request, SampledToken, SamplingParams

SPEC = KVCacheSpec(num_layers=4, num_kv_heads=1, head_dim=2, block_size=16, dtype="float32", model_fingerprint="m")
LAYER_BYTES = 2 * 2 * 4  # of one token: keys and values of two float32 numbers
FIRST = SampledToken(7)


class Peers:
    def __init__(self) -> None:
        self.sent: list[tuple[str, WorkerMessage]] = []

    def send(self, worker_id: str, message: WorkerMessage) -> None:
        self.sent.append((worker_id, message))

    def take(self) -> list[WorkerMessage]:
        sent, self.sent = self.sent, []
        return [message for _, message in sent]


class Box:
    """A link that takes everything, unless the test says otherwise; every part counts as `part_bytes`."""

    def __init__(self, window_bytes: int = 1000, part_bytes: int = 100) -> None:
        self.clock = ManualClock(100.0)
        self.peers = Peers()
        self.outgoing = OutgoingHandoffs("prefill-0", SPEC, self.peers, self.clock, window_bytes, timeout_s=30.0)
        self.part_bytes = part_bytes
        self.full_peers: set[str] = set()  # the link has no buffer for them

    def offer(self, name: str, num_tokens: int = 10, n: int = 1, peer: str = "decode-0") -> Handoff:
        request = Request(name, tuple(range(num_tokens)), SamplingParams(max_tokens=5, n=n))
        handoff = Handoff(peer, request, "gateway-0", self.clock.now_s() + 60)
        self.outgoing.offer(handoff, 10**6)
        return handoff

    def accept(self, handoff: Handoff, num_cached_tokens: int = 0) -> None:
        self.outgoing.on_accepted(KVAccepted(handoff.transfer_id, num_cached_tokens, "float32"))

    def compute(self, handoff: Handoff, *, is_layerwise: bool = False) -> list[PartSpan]:
        """All layers of the whole prompt, layer by layer; what of it could be sent."""
        handoff.begin([3, 1], SPEC.num_layers, is_layerwise=is_layerwise)
        spans = [PartSpan(layer, 1, 0, handoff.request.num_prompt_tokens) for layer in range(SPEC.num_layers)]
        to_send = [span for span in map(handoff.to_send, spans) if span is not None]
        for span in to_send:
            self.add(handoff, span)
        return to_send

    def add(self, handoff: Handoff, span: PartSpan) -> None:
        assert handoff.place is not None
        self.outgoing.add(handoff, ComputedKV(span, handoff.place, None))

    def send_due(self) -> list[tuple[str, PartSpan | KVCommit]]:
        sent: list[tuple[str, PartSpan | KVCommit]] = []
        for handoff, due in self.outgoing.due():
            name = handoff.request.request_id
            if isinstance(due, KVCommit):
                sent.append((name, due))
            elif self.outgoing.window.fits(self.part_bytes) and handoff.peer not in self.full_peers:
                self.outgoing.window.sent(handoff.attempt, self.part_bytes)
                sent.append((name, due.span))
        return sent


def test_computed_kv_and_the_commit_wait_for_the_answer_and_leave_out_what_the_receiver_has() -> None:
    box = Box()
    handoff = box.offer("r")
    assert box.compute(handoff) == [PartSpan(0, 4, 0, 10)], "as a whole, behind the last layer"
    box.outgoing.commit(handoff, (FIRST,))
    assert box.send_due() == [] and handoff.status is SendStatus.OFFERED
    box.accept(handoff, num_cached_tokens=4)
    part, (_, commit) = box.send_due()
    assert part == ("r", PartSpan(0, 4, 4, 6))
    assert isinstance(commit, KVCommit) and (commit.num_parts, commit.num_tokens) == (1, 10)
    assert handoff.status is SendStatus.COMMITTED
    assert box.send_due() == []
    box.outgoing.on_done(handoff.transfer_id)
    assert handoff.status is SendStatus.DONE and box.outgoing.window.num_bytes_in_flight == 0
    box.outgoing.forget(handoff)
    assert box.outgoing.transfer_ids == []


def test_layers_go_one_by_one_and_the_window_holds_them_back_until_a_part_has_arrived() -> None:
    box = Box(window_bytes=200)
    handoff = box.offer("r")
    box.accept(handoff)
    assert len(box.compute(handoff, is_layerwise=True)) == 4
    assert [span.first_layer for _, span in box.send_due() if isinstance(span, PartSpan)] == [0, 1]
    assert box.outgoing.is_held_back
    box.outgoing.commit(handoff, (FIRST,))
    assert box.send_due() == [], "the commit goes behind the last part"
    box.outgoing.on_part_ack(handoff.transfer_id, 0)
    box.outgoing.on_part_ack(handoff.transfer_id, 1)
    kinds = [type(due) for _, due in box.send_due()]
    assert kinds == [PartSpan, PartSpan, KVCommit]


def test_one_part_may_always_go_and_nobody_passes_one_that_does_not_fit() -> None:
    box = Box(window_bytes=100, part_bytes=150)
    first, second = box.offer("first"), box.offer("second")
    for handoff in (first, second):
        box.accept(handoff)
        box.compute(handoff)
    assert [name for name, _ in box.send_due()] == ["first"]
    box.part_bytes = 10
    small = box.offer("small")
    box.accept(small)
    box.compute(small)
    box.part_bytes = 150
    assert box.send_due() == [], "the second is first in the queue, and too large"
    box.outgoing.on_part_ack(first.transfer_id, 0)
    assert [name for name, _ in box.send_due()] == ["second"]


def test_a_peer_that_the_link_has_no_room_for_is_passed() -> None:
    box = Box()
    for name, peer in (("waits", "decode-0"), ("goes", "decode-1")):
        handoff = box.offer(name, peer=peer)
        box.accept(handoff)
        box.compute(handoff)
    box.full_peers.add("decode-0")
    assert [name for name, _ in box.send_due()] == ["goes"]


def test_a_failure_is_offered_again_once_everything_is_computed_and_sent_again() -> None:
    box = Box()
    handoff = box.offer("r", n=2)
    box.accept(handoff)
    handoff.begin([3, 1], SPEC.num_layers, is_layerwise=True)
    box.add(handoff, PartSpan(0, 1, 0, 10))
    box.send_due()
    box.outgoing.on_failed(handoff.transfer_id, "a checksum")
    assert (handoff.status, handoff.reason) == (SendStatus.FAILED, "a checksum")
    assert box.outgoing.window.num_bytes_in_flight == 0
    assert box.outgoing.take_failures() == [], "it is computed to its end first"
    box.outgoing.commit(handoff, (FIRST, FIRST))
    handoff.end_sample(1)
    assert box.outgoing.take_failures() == [handoff] and not handoff.has_failed
    box.peers.take()
    box.outgoing.offer(handoff, 10**6)
    box.add(handoff, handoff.whole)
    (offer,) = box.peers.take()
    assert isinstance(offer, KVOffer) and offer.transfer_id.endswith(".2")
    box.accept(handoff)
    part, (_, commit) = box.send_due()
    assert part == ("r", PartSpan(0, 4, 0, 10))
    assert isinstance(commit, KVCommit) and commit.first_tokens == (FIRST, None), "what ended meanwhile does not begin"
    box.outgoing.on_failed(handoff.transfer_id, "again")
    assert box.outgoing.take_failures() == []
    assert handoff.has_failed and handoff.num_failures == MAX_ATTEMPTS
    assert box.outgoing.take_failures() == [] and handoff.num_failures == MAX_ATTEMPTS, "counted once"


def test_a_withdrawn_offer_is_no_attempt() -> None:
    box = Box()
    handoff = box.offer("r")
    first = handoff.transfer_id
    box.peers.take()
    box.outgoing.withdraw(handoff, "another goes first")
    assert box.peers.take() == [KVAbort(first, "another goes first")]
    assert handoff.status is SendStatus.PLANNED and box.outgoing.transfer_ids == []
    box.accept(handoff)  # the answer to what was withdrawn
    assert handoff.status is SendStatus.PLANNED
    box.outgoing.offer(handoff, 10**6)
    assert handoff.transfer_id != first and handoff.num_failures == 0


def test_a_computed_handoff_has_its_time_from_the_acceptance_on() -> None:
    box = Box()
    handoff = box.offer("r")
    box.compute(handoff)
    box.outgoing.commit(handoff, (FIRST,))
    assert box.outgoing.next_deadline_s() == 160.0, "the request's own"
    box.clock.advance(10)
    box.accept(handoff)
    assert box.outgoing.next_deadline_s() == 140.0
    box.clock.advance(30)
    box.outgoing.expire()
    assert handoff.reason == "the handoff's time is over" and box.outgoing.next_deadline_s() == float("inf")


def test_what_has_no_time_left_is_not_offered_again() -> None:
    box = Box()
    handoff = box.offer("r")
    box.clock.advance(60)
    box.outgoing.expire()
    assert handoff.status is SendStatus.FAILED
    assert box.outgoing.take_failures() == [] and handoff.num_failures == 0


def test_a_lost_link_fails_what_was_on_it_and_sends_its_commits_again() -> None:
    box = Box()
    lost, committed = box.offer("lost"), box.offer("committed")
    for handoff in (lost, committed):
        box.accept(handoff)
        box.compute(handoff)
    box.outgoing.commit(committed, (FIRST,))
    (commit,) = [due for _, due in box.send_due() if isinstance(due, KVCommit)]
    committed.attempt.commit_on_link = commit
    box.peers.take()
    box.outgoing.on_link_lost(LinkLost("decode-0", "broken", frozenset({lost.transfer_id, "unknown"})))
    assert box.peers.take() == [KVAbort(lost.transfer_id, "the link to decode-0 broke: broken"), commit]
    box.outgoing.on_link_lost(LinkLost("decode-0", "broken", frozenset()))
    assert box.peers.take() == [], "once"


def test_a_lost_peer_fails_its_handoffs_alone_and_without_a_word() -> None:
    box = Box()
    here, there = box.offer("here", peer="decode-0"), box.offer("there", peer="decode-1")
    box.peers.take()
    box.outgoing.on_peer_lost("decode-0")
    assert here.status is SendStatus.FAILED and there.status is SendStatus.OFFERED
    assert box.peers.take() == []
