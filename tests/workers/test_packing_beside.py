"""KV that is read for parts beside the steps: a device may be late with it, and its blocks come free meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kv_transfer.link import ArrivedPart
from kv_transfer.staging import is_intact
from phasewise.core.messages import AbortRequest, KVAbort, KVPart, KVPartAck
from phasewise.core.placement import WorkerId
from tests.support.scripted_engine import expected_tokens
from tests.support.worker_box import WorkerBox
from tests.workers.test_interleavings import hold_first
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
