"""A device that is late with what links write into a worker's cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from kv_transfer.link import ArrivedPart, Land, Landed, Landing, Post
from kv_transfer.loopback_link import LoopbackLink
from phasewise.core.messages import KVPart
from phasewise.core.placement import WorkerId
from tests.support.worker_box import WorkerBox


class LateLanding:
    """What links brought for a worker: in its cache, and known to its loop, from `finish` on."""

    def __init__(self, box: WorkerBox, worker_id: WorkerId, link: Any = None) -> None:
        """`link`: of the senders; that of a box's own workers, if none is given."""
        link = link or box.links[worker_id]
        assert isinstance(link, LoopbackLink) and link.lands, "a box whose parts land"
        self._work: list[Callable[[], None]] = []
        link.lands[worker_id] = late_land(box, worker_id, link.lands[worker_id], self._work.append)
        link.mailboxes[worker_id] = self._late_post(link.mailboxes[worker_id])

    @property
    def num_parts(self) -> int:
        """Which are not in the cache."""
        return len(self._work) // 2

    def finish(self, landed: Landed | None = None) -> None:
        """`landed`: what became of the parts, if not what their sums say."""
        self._landed = landed
        work, self._work[:] = list(self._work), []
        for done in work:
            done()

    def _late_post(self, post: Post) -> Post:
        def put(message: Any, arrived: ArrivedPart | None = None) -> None:
            if arrived is None or arrived.landed is None:
                post(message, arrived)
            else:
                self._work.append(lambda: post(message, replace(arrived, landed=self._landed or arrived.landed)))

        return put


def late_land(box: WorkerBox, worker_id: WorkerId, land: Land, do_later: Callable[[Callable[[], None]], None]) -> Land:
    """`land`, but what it would write is given to `do_later`."""
    cache: Any = box.workers[worker_id].rounds.parts.receiver._cache
    unpacking = cache.unpacking

    def late(part: KVPart, wire: torch.Tensor) -> Landing:
        cache.unpacking = lambda *arguments: partial(do_later, unpacking(*arguments))
        try:
            return land(part, wire)
        finally:
            cache.unpacking = unpacking

    return late
