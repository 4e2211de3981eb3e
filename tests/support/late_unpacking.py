"""A device that is late with what comes into a worker's cache."""

from __future__ import annotations

from typing import Any

import torch

from phasewise.core.placement import WorkerId
from tests.support.worker_box import WorkerBox


class LateUnpacking:
    """What came in and is not in the cache: it never is before somebody waits for it."""

    def __init__(self, box: WorkerBox, worker_id: WorkerId) -> None:
        self._work: list[tuple[Any, ...]] = []
        cache: Any = box.workers[worker_id]._parts.receiver._cache
        self._unpack = cache.unpack
        cache.unpack = self._unpack_later
        cache.join = self.finish

    @property
    def num_parts(self) -> int:
        return len(self._work)

    def finish(self) -> None:
        work, self._work = self._work, []
        for arguments in work:
            self._unpack(*arguments)

    def _unpack_later(self, place: Any, span: Any, layout: Any, wire: torch.Tensor) -> None:
        self._work.append((place, span, layout, wire.clone()))
