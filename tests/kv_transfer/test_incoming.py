"""Which parts belong to a handoff, when it is whole and how it ends: without links, caches and threads."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest

from kv_transfer.codec import Codec, part_layout
from kv_transfer.incoming import IncomingHandoffs, Reservation, refusal
from kv_transfer.plan import WIRE_VERSION, PartSpan
from kv_transfer.state import ReceiveStatus
from phasewise.core.clock import ManualClock
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import KVAccepted, KVCommit, KVDone, KVFailed, KVOffer, KVPart, LinkLost, WorkerMessage
from phasewise.core.request import Request, SampledToken, SamplingParams

SPEC = KVCacheSpec(num_layers=4, num_kv_heads=1, head_dim=2, block_size=16, dtype="float32", model_fingerprint="m")
NUM_TOKENS = 20
FIRST = SampledToken(7)


class Box:
    def __init__(self) -> None:
        self.clock = ManualClock(100.0)
        self.sent: list[tuple[str, WorkerMessage]] = []
        self.incoming = IncomingHandoffs(SPEC, self, self.clock, contextlib.nullcontext())

    def send(self, worker_id: str, message: WorkerMessage) -> None:
        self.sent.append((worker_id, message))

    def take(self) -> list[WorkerMessage]:
        sent, self.sent = self.sent, []
        return [message for _, message in sent]

    def accept(self, transfer_id: str = "t", num_cached_tokens: int = 0) -> Reservation:
        reservation = Reservation(offer(transfer_id), [3, 1], num_cached_tokens, self.clock.now_s() + 60)
        self.incoming.accept(reservation)
        return reservation

    def arrive(self, part: KVPart, *, is_right: bool = True) -> bool:
        """As the receiver does it; whether the part was to be written."""
        found = self.incoming.check(part, is_right=is_right)
        if found is not None:
            self.incoming.receive(found[0], part)
        return found is not None


def offer(transfer_id: str = "t") -> KVOffer:
    request = Request("r", tuple(range(NUM_TOKENS)), SamplingParams(max_tokens=5))
    return KVOffer(transfer_id, WIRE_VERSION, "prefill-0", SPEC, request, "gateway-0", 60.0)


def part(index: int, span: PartSpan, transfer_id: str = "t") -> KVPart:
    num_bytes = part_layout(SPEC, span, "float32", Codec.NONE).num_bytes
    fields = (span.first_layer, span.num_layers, span.first_token, span.num_tokens)
    return KVPart(transfer_id, index, *fields, num_bytes, "float32", "none")


UPPER, LOWER = part(0, PartSpan(0, 2, 0, NUM_TOKENS)), part(1, PartSpan(2, 2, 0, NUM_TOKENS))


def commit(num_parts: int = 2, num_tokens: int = NUM_TOKENS, num_samples: int = 1) -> KVCommit:
    return KVCommit("t", num_parts, num_tokens, (FIRST,) * num_samples, 0.0)


@pytest.mark.parametrize(
    "order", [("upper", "commit", "lower"), ("commit", "lower", "upper"), ("lower", "upper", "commit")]
)
def test_a_handoff_is_done_when_all_parts_and_the_commit_are_here(order: tuple[str, ...]) -> None:
    box = Box()
    reservation = box.accept()
    assert box.take() == [KVAccepted("t", 0, "float32")]
    for name in order:
        assert box.incoming.pop_ended() == [] and box.take() == []
        if name == "commit":
            box.incoming.on_commit(commit())
        else:
            assert box.arrive({"upper": UPPER, "lower": LOWER}[name])
            box.arrive({"upper": UPPER, "lower": LOWER}[name])  # twice: the second is ignored
    assert box.take() == [KVDone("t")]
    assert box.incoming.has_ended and box.incoming.num_reservations == 1
    assert box.incoming.pop_ended() == [reservation] and reservation.status is ReceiveStatus.DONE
    assert box.incoming.num_reservations == 0
    assert reservation.num_bytes == box.incoming.counters.num_bytes == UPPER.num_bytes + LOWER.num_bytes


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"first_layer": 3}, "outside the cache"),
        ({"first_token": 2}, "outside the cache"),
        ({"num_tokens": 0}, "outside the cache"),
        ({"num_tokens": NUM_TOKENS + 1}, "beyond the prompt's 20 tokens"),
        ({"dtype": "bfloat16"}, "float32 was agreed on"),
        ({"codec": "zip"}, "codec 'zip'"),
        ({"num_bytes": 8}, "has 8 bytes where"),
    ],
)
def test_a_part_that_cannot_be_one_of_the_handoff_fails_it(bad: dict[str, object], reason: str) -> None:
    box = Box()
    reservation = box.accept(num_cached_tokens=4)
    box.take()
    assert not box.arrive(replace(part(0, PartSpan(0, 4, 4, 16)), **bad))  # type: ignore[arg-type]
    (answer,) = box.take()
    assert isinstance(answer, KVFailed) and reason in answer.reason
    assert reservation.status is ReceiveStatus.FAILED and box.incoming.counters.checksum_failures == 0


def test_a_wrong_checksum_fails_the_handoff_and_what_comes_later_is_only_counted() -> None:
    box = Box()
    box.accept()
    box.take()
    assert not box.arrive(UPPER, is_right=False)
    assert box.take() == [KVFailed("t", "the checksum of part 0 does not match")]
    assert not box.arrive(LOWER)
    counters = box.incoming.counters
    assert (counters.checksum_failures, counters.late_parts) == (1, 1)


def test_blocks_that_a_link_writes_to_stay_with_the_handoff_until_it_is_done() -> None:
    box = Box()
    reservation = box.accept()
    assert box.incoming.begin_write(reservation, 0)
    assert not box.incoming.begin_write(reservation, 0), "it is being written"
    box.incoming.on_abort("t", "cancelled")
    assert not box.incoming.begin_write(reservation, 1), "its blocks may be another's soon"
    assert box.incoming.has_ended and box.incoming.pop_ended() == []
    box.incoming.end_write(UPPER)
    assert box.incoming.pop_ended() == [reservation] and reservation.reason == "cancelled"


def test_what_was_received_is_not_written_again() -> None:
    box = Box()
    reservation = box.accept()
    assert box.arrive(UPPER)
    assert not box.incoming.begin_write(reservation, UPPER.part_index)
    assert box.incoming.begin_write(reservation, LOWER.part_index)


@pytest.mark.parametrize("wrong", [commit(num_tokens=19), commit(num_samples=2)])
def test_a_commit_that_does_not_fit_the_offer_fails_it(wrong: KVCommit) -> None:
    box = Box()
    box.accept()
    box.take()
    box.incoming.on_commit(wrong)
    assert box.take() == [KVFailed("t", "the commit does not fit the offer")]


def test_parts_that_do_not_make_up_the_prompt_fail_it() -> None:
    box = Box()
    box.accept()
    box.take()
    box.arrive(UPPER)
    box.incoming.on_commit(commit(num_parts=1))
    assert box.take() == [KVFailed("t", "40 layer-token cells came, 80 were due")]


def test_leases_end_and_lost_links_and_peers_end_handoffs() -> None:
    box = Box()
    leased, lost = box.accept("leased"), box.accept("lost")
    box.take()
    box.incoming.on_link_lost(LinkLost("prefill-0", "broken", frozenset({"lost", "unknown"})))
    assert box.take() == [KVFailed("lost", "the link from prefill-0 broke: broken")]
    assert box.incoming.next_deadline_s() == 160.0
    box.clock.advance(60)
    box.incoming.expire()
    assert box.take() == [KVFailed("leased", "the reservation's lease is over")]
    assert box.incoming.counters.leases_expired == 1 and box.incoming.next_deadline_s() == float("inf")
    alone = box.accept("alone")
    box.take()
    box.incoming.on_peer_lost("prefill-1")
    assert box.incoming.reservations == [alone]
    box.incoming.on_peer_lost("prefill-0")
    assert box.take() == [], "nobody is there to hear it"
    assert box.incoming.pop_ended() == [lost, leased, alone]


def test_offers_of_other_wires_and_caches_are_refused() -> None:
    assert refusal(offer(), SPEC) == ""
    assert refusal(replace(offer(), wire_version=99), SPEC) == f"wire version 99 there, {WIRE_VERSION} here"
    assert "num_layers" in refusal(offer(), replace(SPEC, num_layers=5))
