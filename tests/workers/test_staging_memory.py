"""Parts that wait for staging memory, whose slabs are as large as their parts."""

from __future__ import annotations

from typing import Any

import torch

from kv_transfer.link import ArrivedPart
from kv_transfer.loopback_link import LoopbackLink
from kv_transfer.slabs import Slab, SlabPool
from kv_transfer.staging import is_intact
from phasewise.core.messages import KVPart, KVPartAck
from phasewise.core.placement import WorkerId
from tests.support.scripted_engine import SPEC
from tests.support.worker_box import WorkerBox
from tests.workers.test_request_life import PAIR, prompt_of


class SlabLink(LoopbackLink):
    """Parts lie in slabs until the test lets the oldest arrive."""

    def __init__(self, worker_id: WorkerId, link: LoopbackLink, num_bytes: int) -> None:
        super().__init__(worker_id, link.mailboxes)
        self.pool = SlabPool(torch.zeros(num_bytes, dtype=torch.uint8), num_bytes)
        self.under_way: list[tuple[WorkerId, KVPart, Slab]] = []
        self._slab: Slab | None = None

    def buffer(self, peer: WorkerId, num_bytes: int) -> torch.Tensor | None:
        self._slab = self.pool.try_take(num_bytes)
        return None if self._slab is None else self._slab.buffer

    @property
    def is_full(self) -> bool:
        return self._slab is None

    def send_part(self, peer: WorkerId, part: KVPart, wire: torch.Tensor) -> None:
        assert self._slab is not None
        self.under_way.append((peer, part, self._slab))

    def arrive(self) -> None:
        peer, part, slab = self.under_way.pop(0)
        wire = slab.buffer.clone()
        self.mailboxes[peer](part, ArrivedPart(wire if is_intact(wire) else None, lambda: None))
        self.pool.give_back(slab)
        self.mailboxes[self._worker_id](KVPartAck(part.transfer_id, part.part_index))


class SlabBox(WorkerBox):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.slab_links: dict[WorkerId, SlabLink] = {}
        super().__init__(*arguments, **named)

    def link_of(self, worker_id: WorkerId, link: LoopbackLink) -> SlabLink:
        self.slab_links[worker_id] = SlabLink(worker_id, link, 130 * SPEC.bytes_per_token)
        return self.slab_links[worker_id]


def test_small_parts_do_not_keep_a_large_one_out_for_ever() -> None:
    box = SlabBox(PAIR, num_blocks=1000)
    link = box.slab_links["prefill-0"]
    for i in range(2):
        box.submit(f"before-{i}", prompt_of(50, i), "prefill-0", "decode-0", max_tokens=2)
    box.submit("large", prompt_of(120), "prefill-0", "decode-0", max_tokens=2)
    for _ in range(8):
        box.round()
    for i in range(30):
        box.submit(f"small-{i}", prompt_of(50, 2 + i), "prefill-0", "decode-0", max_tokens=2)
        for _ in range(3):
            box.round()
        if any(part.transfer_id.startswith("large") for _, part, _ in link.under_way):
            return
        link.arrive()
    raise AssertionError("30 small parts have passed the large one")
