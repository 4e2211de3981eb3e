"""A device that writes what links give it for a worker's cache when the test says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from kv_transfer.link import ArrivedPart, Post, PrepareWrite, WriteOutcome, WriteReceived
from kv_transfer.loopback_link import LoopbackLink
from phasewise.core.messages import KVPart
from phasewise.core.placement import WorkerId
from tests.support.worker_box import WorkerBox


class DelayedWrites:
    """What links brought for a worker: in its cache, and known to its loop, from `finish` on."""

    def __init__(self, box: WorkerBox, worker_id: WorkerId, link: Any = None) -> None:
        """`link`: of the senders; that of a box's own workers, if none is given."""
        link = link or box.links[worker_id]
        assert isinstance(link, LoopbackLink) and link.writers, "a box whose links write parts"
        self._work: list[Callable[[], None]] = []
        link.writers[worker_id] = delayed_write(box, worker_id, link.writers[worker_id], self._work.append)
        link.mailboxes[worker_id] = self._delayed_post(link.mailboxes[worker_id])

    @property
    def num_parts(self) -> int:
        """Which are not in the cache."""
        return len(self._work) // 2

    def finish(self, outcome: WriteOutcome | None = None) -> None:
        """`outcome`: what became of the parts, if not what their sums say."""
        self._outcome = outcome
        work, self._work[:] = list(self._work), []
        for done in work:
            done()

    def _delayed_post(self, post: Post) -> Post:
        def put(message: Any, arrived: ArrivedPart | None = None) -> None:
            if arrived is None or arrived.written is None:
                post(message, arrived)
            else:
                self._work.append(lambda: post(message, replace(arrived, written=self._outcome or arrived.written)))

        return put


def delayed_write(
    box: WorkerBox, worker_id: WorkerId, prepare_write: PrepareWrite, do_later: Callable[[Callable[[], None]], None]
) -> PrepareWrite:
    """`prepare_write`, but what it would write is given to `do_later`."""
    cache: Any = box.cache_ports[worker_id]
    unpacking = cache.unpacking

    def prepare_delayed(part: KVPart, wire: torch.Tensor) -> WriteReceived:
        cache.unpacking = lambda *arguments: partial(do_later, unpacking(*arguments))
        try:
            return prepare_write(part, wire)
        finally:
            cache.unpacking = unpacking

    return prepare_delayed
