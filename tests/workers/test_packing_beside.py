"""KV that is read and written for parts beside the steps: a device may be late, and blocks come free meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from kv_transfer.link import ArrivedPart
from kv_transfer.staging import is_intact
from phasewise.core.messages import AbortRequest, KVAbort, KVPart, KVPartAck
from phasewise.core.placement import WorkerId
from tests.support.late_unpacking import LateUnpacking
from tests.support.scripted_engine import expected_tokens
from tests.support.worker_box import WorkerBox
from tests.workers.test_interleavings import hold_first
from tests.workers.test_links import LAYERWISE, LinkedBox
from tests.workers.test_request_life import PAIR, prompt_of


class LateDevice:
    """What was put on the other stream, not done yet."""

    def __init__(self, box: WorkerBox, worker_id: WorkerId) -> None:
        self._work: list[Callable[[], None]] = []
        sender: Any = box.workers[worker_id]._parts.sender
        self._pack = sender._cache.pack
        sender._cache.pack = self._pack_later
        sender._cache.rejoin = self.finish
        self._mailboxes = sender._link._mailboxes
        sender._link.send_part = self._send_later
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


def test_no_step_reads_a_handoff_before_all_of_it_is_in_the_cache() -> None:
    box = WorkerBox(PAIR, transfer=LAYERWISE)
    LateUnpacking(box, "decode-0")
    for i in range(4):
        box.submit(f"r{i}", prompt_of(90, i), "prefill-0", "decode-0", max_tokens=8)
    box.run()
    for i in range(4):
        assert box.output(f"r{i}") == expected_tokens(prompt_of(90, i), 8)
    box.assert_empty()


def test_no_part_of_a_handoff_that_failed_is_written_behind_the_steps_that_got_its_blocks() -> None:
    box = LinkedBox(num_blocks=12, transfer=LAYERWISE, cache={"prefix_caching": False})
    box.submit("grows", prompt_of(40), "prefill-0", "decode-0", max_tokens=120)
    box.run_until(lambda: len(box.tokens[("grows", 0)]) > 3)
    unpacking = LateUnpacking(box, "decode-0")
    box.direct.num_delivered = box.direct.num_sent + 1
    box.submit("cancelled", prompt_of(112), "prefill-0", "decode-0", max_tokens=8)
    box.run_until(lambda: unpacking.num_parts > 0)
    box.abort("cancelled")
    box.run_until(lambda: len(box.tokens[("grows", 0)]) > 105)  # in blocks that the other one had
    unpacking.finish()
    box.direct.num_delivered = 2**31
    box.run()
    assert box.output("grows") == expected_tokens(prompt_of(40), 120)
    box.assert_empty()


def test_what_comes_is_unpacked_and_its_buffer_given_back_on_the_stream_for_it() -> None:
    box = WorkerBox(PAIR)
    cache: Any = box.workers["decode-0"]._parts.receiver._cache
    inside: list[bool] = []
    seen: list[tuple[str, bool]] = []
    unpack, prepare = cache.unpack, cache.prepare

    @contextmanager
    def inward() -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            seen.append((name, bool(inside)))
            return function(*arguments)

        return call

    cache.inward, cache.unpack = inward, watched("unpack", unpack)
    cache.prepare = watched("prepare", prepare)
    mailboxes = box.workers["prefill-0"]._parts.sender._link._mailboxes  # type: ignore[attr-defined]
    post = mailboxes["decode-0"]

    def arrive(part: KVPart, came: ArrivedPart) -> None:
        post(part, ArrivedPart(came.wire, watched("release", came.release)))

    mailboxes["decode-0"] = arrive
    box.submit("r", prompt_of(60), "prefill-0", "decode-0", max_tokens=5)
    box.run()
    assert seen == [("prepare", False), ("unpack", True), ("release", True)]


@pytest.mark.parametrize("is_alone", [True, False])
def test_parts_are_taken_while_a_step_computes(is_alone: bool) -> None:
    """They wait for each other's room: a handoff must not take a step for each. Several ranks are not together then."""
    box = WorkerBox({**PAIR, "prefill-1": "prefill"}, transfer=LAYERWISE)
    decode, runner = box.workers["decode-0"], box.runners["decode-0"]
    decode._settings = replace(decode._settings, is_alone=is_alone)
    receiver, sender = decode._parts.receiver, box.workers["prefill-0"]._parts.sender
    sender._limits = replace(sender._limits, window_bytes=1)  # a part at a time
    box.submit("decodes", prompt_of(40), "prefill-1", "decode-0", max_tokens=60)
    box.run_until(lambda: ("decodes", 0) in box.tokens and len(box.tokens[("decodes", 0)]) > 3)
    box.submit("comes", prompt_of(100, 1), "prefill-0", "decode-0", max_tokens=8)
    seen: dict[int, list[int]] = {}  # by step

    def on_look() -> bool:
        box.workers["prefill-0"].round()
        looks = seen.setdefault(len(runner.batches), [])
        looks.append(sum(len(reservation.parts) for reservation in receiver.reservations))
        return not receiver.is_receiving or looks[-3:] == [looks[-1]] * 3

    runner.on_look = on_look
    box.run()
    assert any(len(set(looks)) > 1 for looks in seen.values()) == is_alone, seen
    assert box.output("comes") == expected_tokens(prompt_of(100, 1), 8)
    assert box.output("decodes") == expected_tokens(prompt_of(40), 60)
    box.assert_empty()


def test_the_first_part_of_a_handoff_is_taken_while_a_step_computes() -> None:
    box = WorkerBox({**PAIR, "prefill-1": "prefill"})
    decode, runner = box.workers["decode-0"], box.runners["decode-0"]
    receiver = decode._parts.receiver
    box.submit("decodes", prompt_of(40), "prefill-1", "decode-0", max_tokens=40)
    box.run_until(lambda: len(box.tokens[("decodes", 0)]) > 3)
    mailboxes = box.workers["prefill-0"]._parts.sender._link._mailboxes  # type: ignore[attr-defined]
    post, held = mailboxes["decode-0"], []
    mailboxes["decode-0"] = lambda *entry: held.append(entry)
    box.submit("comes", prompt_of(60, 1), "prefill-0", "decode-0", max_tokens=8)
    box.run_until(lambda: bool(held))
    before = receiver.counters.num_bytes
    num_looks = 0

    def on_look() -> bool:
        nonlocal num_looks
        num_looks += 1
        if held:
            post(*held.pop())
        return num_looks > 9

    runner.on_look = on_look
    while held:
        assert decode.round()
    assert receiver.counters.num_bytes > before
    mailboxes["decode-0"] = post
    box.run()
    assert box.output("comes") == expected_tokens(prompt_of(60, 1), 8)
    box.assert_empty()


def test_a_handoff_that_became_whole_inside_a_step_is_in_every_load() -> None:
    """Its blocks are in use, and it is not decoded yet: a report goes out between the two."""
    box = WorkerBox({**PAIR, "prefill-1": "prefill"}, transfer=LAYERWISE)
    decode, runner = box.workers["decode-0"], box.runners["decode-0"]
    receiver = decode._parts.receiver
    box.submit("decodes", prompt_of(40), "prefill-1", "decode-0", max_tokens=40)
    box.run_until(lambda: len(box.tokens[("decodes", 0)]) > 3)
    mailboxes = box.workers["prefill-0"]._parts.sender._link._mailboxes  # type: ignore[attr-defined]
    post, held = mailboxes["decode-0"], []

    def hold(part: KVPart, came: ArrivedPart) -> None:
        if part.part_index:
            held.append((part, came))
        else:
            post(part, came)

    mailboxes["decode-0"] = hold
    box.submit("comes", prompt_of(60, 1), "prefill-0", "decode-0", max_tokens=8)
    box.run_until(lambda: any(reservation.commit for reservation in receiver.reservations))

    def on_look() -> bool:
        while held:
            post(*held.pop(0))
        return not receiver.is_receiving

    runner.on_look = on_look
    while ("comes", 0) not in box.finish:
        decode.round()
        load = decode.load()
        assert load.num_reservations + load.num_running == 2 or ("comes", 0) in box.finish, load
