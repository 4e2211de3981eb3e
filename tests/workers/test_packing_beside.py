"""KV that is read and written for parts beside the steps: a device may be delayed, and blocks come free meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kv_transfer.codec import Codec, part_layout
from kv_transfer.incoming import Reservation
from kv_transfer.link import ArrivedPart, WriteOutcome
from kv_transfer.plan import PartSpan
from kv_transfer.staging import is_intact
from phasewise.core.messages import AbortRequest, KVAbort, KVAccepted, KVPart, KVPartAck
from phasewise.core.placement import WorkerId
from tests.support.delayed_writes import DelayedWrites
from tests.support.scripted_engine import SPEC, expected_tokens
from tests.support.worker_box import WorkerBox
from tests.workers.test_interleavings import hold_first
from tests.workers.test_links import LAYERWISE, LinkedBox
from tests.workers.test_request_life import PAIR, prompt_of


class LateDevice:
    """What was put on the other stream, not done yet."""

    def __init__(self, box: WorkerBox, worker_id: WorkerId) -> None:
        self._work: list[Callable[[], None]] = []
        port: Any = box.cache_ports[worker_id]
        self._pack = port.pack
        port.pack = self._pack_later
        port.rejoin = self.finish
        link: Any = box.links[worker_id]
        self._mailboxes = link.mailboxes
        link.send_part = self._send_later
        self._worker_id = worker_id

    def finish(self) -> None:
        work, self._work = self._work, []
        for done in work:
            done()

    def _pack_later(self, *arguments: Any) -> None:
        self._work.append(lambda: self._pack(*arguments))

    def _send_later(self, peer: WorkerId, part: KVPart, wire: torch.Tensor) -> None:
        def arrive() -> None:
            acknowledge = self._mailboxes[self._worker_id]
            came = ArrivedPart(
                wire if is_intact(wire) else None,
                lambda: acknowledge(KVPartAck(part.transfer_id, part.part_index)),
            )
            self._mailboxes[peer](part, came)

        self._work.append(arrive)


def test_no_block_is_written_again_before_it_was_read_for_a_part() -> None:
    box = WorkerBox(PAIR, num_blocks=8)
    kept, deliver = hold_first(box, KVAbort)
    device = LateDevice(box, "prefill-0")
    box.submit("cancelled", prompt_of(100), "prefill-0", "decode-0", max_tokens=8)
    for _ in range(4):
        box.round()
    box.workers["prefill-0"].post(AbortRequest("cancelled"))  # the other worker hears of it later
    box.submit("next", prompt_of(100, 1), "prefill-0", "decode-0", max_tokens=1)
    box.run_until(lambda: ("next", 0) in box.finish)
    device.finish()
    box.round()
    deliver(*kept[0])
    box.abort("cancelled")
    for _ in range(3):
        box.round()
    box.submit("same", prompt_of(100), "prefill-0", "decode-0", max_tokens=8)
    for _ in range(30):
        box.round()
        device.finish()
    assert box.output("same") == expected_tokens(prompt_of(100), 8)
    box.assert_empty()


@pytest.fixture
def links_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerBox, "links_write", True)


@pytest.mark.usefixtures("links_write")
def test_no_step_reads_a_handoff_before_all_of_it_is_in_the_cache() -> None:
    box = WorkerBox(PAIR, transfer=LAYERWISE)
    delayed = DelayedWrites(box, "decode-0")
    for i in range(4):
        box.submit(f"r{i}", prompt_of(90, i), "prefill-0", "decode-0", max_tokens=8)
    while len(box.finish) < 4:
        box.run_until(lambda: delayed.num_parts > 0 or len(box.finish) == 4)
        for _ in range(5):
            box.round()
        delayed.finish()
    box.run()
    for i in range(4):
        assert box.output(f"r{i}") == expected_tokens(prompt_of(90, i), 8)
    box.assert_empty()


@pytest.mark.usefixtures("links_write")
@pytest.mark.parametrize("outcome", WriteOutcome)
def test_the_blocks_of_a_handoff_that_failed_are_nobody_elses_while_a_link_writes_there(outcome: WriteOutcome) -> None:
    box = LinkedBox(num_blocks=12, transfer=LAYERWISE, cache={"prefix_caching": False})
    box.submit("grows", prompt_of(40), "prefill-0", "decode-0", max_tokens=120)
    box.run_until(lambda: len(box.tokens[("grows", 0)]) > 3)
    delayed = DelayedWrites(box, "decode-0", box.direct)
    box.submit("cancelled", prompt_of(112), "prefill-0", "decode-0", max_tokens=8)
    box.run_until(lambda: delayed.num_parts > 0)
    box.abort("cancelled")
    for _ in range(150):  # "grows" needs blocks that the other one had
        box.round()
    assert box.workers["decode-0"].load().num_reservations == 1
    delayed.finish(outcome)
    box.run()
    assert box.output("grows") == expected_tokens(prompt_of(40), 120)
    incoming = box.incoming("decode-0")
    assert incoming.counters.checksum_failures == 0, "nobody waited for it"
    assert (incoming.counters.late_parts > 0) == (outcome is not WriteOutcome.LOST)
    box.assert_empty()


def box_with_delayed_writes() -> tuple[LinkedBox, DelayedWrites]:
    """Request "r", some of whose parts a link is writing."""
    box = LinkedBox(transfer=LAYERWISE)
    delayed = DelayedWrites(box, "decode-0", box.direct)
    box.submit("r", prompt_of(100), "prefill-0", "decode-0", max_tokens=8)
    box.run_until(lambda: delayed.num_parts > 0)
    return box, delayed


@pytest.mark.usefixtures("links_write")
def test_a_part_that_was_lost_while_it_was_written_ends_its_handoff_with_its_link() -> None:
    box, delayed = box_with_delayed_writes()
    (reservation,) = box.incoming("decode-0").reservations
    delayed.finish(WriteOutcome.LOST)
    box.round()
    assert not reservation.writing and not reservation.parts
    box.direct.kept.add(reservation.offer.transfer_id)
    box.break_link("prefill-0", "decode-0")
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(100), 8)
    box.assert_empty()


@pytest.mark.usefixtures("links_write")
def test_a_part_with_a_wrong_sum_fails_its_handoff_though_it_was_written() -> None:
    box, delayed = box_with_delayed_writes()
    delayed.finish(WriteOutcome.WRONG)
    box.direct.up = False
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(100), 8)
    assert box.incoming("decode-0").counters.checksum_failures == 1
    box.assert_empty()


@pytest.mark.usefixtures("links_write")
def test_a_link_may_write_from_the_moment_on_that_the_sender_hears_of_the_blocks() -> None:
    """What writing needs is there before: another thread does it."""
    box = WorkerBox(PAIR)
    incoming = box.incoming("decode-0")
    send, seen = box.send, []

    def watched(worker_id: WorkerId, message: Any) -> None:
        if isinstance(message, KVAccepted):
            seen.append(incoming.find(message.transfer_id).place.slots is not None)
        send(worker_id, message)

    box.send = watched  # type: ignore[method-assign]
    box.submit("r", prompt_of(60), "prefill-0", "decode-0", max_tokens=5)
    box.run()
    assert seen == [True]


def reserved_part(box: WorkerBox) -> tuple[Reservation, KVPart, torch.Tensor]:
    """Blocks set aside for request "r", and a part that fits them, of zeros."""
    box.submit("r", prompt_of(60), "prefill-0", "decode-0", max_tokens=5)
    incoming = box.incoming("decode-0")
    box.run_until(lambda: bool(incoming.reservations))
    (reservation,) = incoming.reservations
    layout = part_layout(SPEC, PartSpan(0, 2, 0, 60), "float32", Codec.NONE)
    part = KVPart(reservation.offer.transfer_id, 7, 0, 2, 0, 60, layout.num_bytes, "float32", "none")
    return reservation, part, torch.zeros(layout.num_bytes, dtype=torch.uint8)


@pytest.mark.usefixtures("links_write")
def test_what_no_reservation_waits_for_is_not_written() -> None:
    box = WorkerBox(PAIR)
    worker = box.workers["decode-0"]
    reservation, good, wire = reserved_part(box)
    for bad in ({"transfer_id": "x"}, {"num_layers": 9}, {"first_token": 1}, {"dtype": "bfloat16"}, {"num_bytes": 8}):
        assert not worker.prepare_write(replace(good, **bad), wire)()
    reservation.num_cached_tokens = 16
    assert not worker.prepare_write(good, wire)(), "it has those tokens"
    reservation.num_cached_tokens = 0
    cache: Any = box.cache_ports["decode-0"]
    cache.can_write_beside = lambda place: place is not reservation.place
    assert not worker.prepare_write(good, wire)(), "several ranks must write it, or a step has its blocks"
    del cache.can_write_beside
    assert not reservation.writing
    unpacking, writing = cache.unpacking, []

    def watched(*arguments: Any) -> Any:
        def write() -> None:
            writing.append(set(reservation.writing))
            unpacking(*arguments)()

        return write

    cache.unpacking = watched
    assert worker.prepare_write(good, wire)() and writing == [reservation.writing] == [{7}]
    assert not worker.prepare_write(good, wire)(), "it is being written already"


@pytest.mark.parametrize("ends_first", [False, True])
def test_a_write_takes_what_came_since_it_was_made_ready_unless_its_handoff_is_over(ends_first: bool) -> None:
    box = WorkerBox(PAIR)
    worker, storage = box.workers["decode-0"], box.caches["decode-0"].storage
    reservation, part, wire = reserved_part(box)
    write = worker.prepare_write(part, wire)
    if ends_first:  # its blocks may be somebody else's now
        box.abort("r")
        box.run()
    before = storage.nan_to_num(-1.0).clone()
    wire.view(torch.float32).fill_(5.0)
    assert write() == bool(reservation.writing) == (not ends_first)
    if ends_first:
        assert torch.equal(storage.nan_to_num(-1.0), before)
    else:
        assert (storage[:2, :, reservation.place.slots[:60]] == 5.0).all()


@pytest.mark.usefixtures("links_write")
def test_a_write_that_fails_leaves_the_blocks_to_the_handoffs_end() -> None:
    box = WorkerBox(PAIR)
    cache: Any = box.cache_ports["decode-0"]

    def write() -> None:
        raise RuntimeError("no memory")

    cache.unpacking = lambda *_: write
    box.submit("r", prompt_of(60), "prefill-0", "decode-0", max_tokens=5)
    with pytest.raises(RuntimeError, match="no memory"):
        box.run()
    box.abort("r")
    box.run()
    box.assert_empty()
