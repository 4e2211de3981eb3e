"""Logs frequent lines through `LineSums`: one per second and kind.

A timer runs on the event loop while a kind is counted. Faults of the server (`internal`) do not belong here: each is
logged when it happens.
"""

from __future__ import annotations

import asyncio
import logging
import math

from control_plane.gateway.line_sums import PERIOD_S, LineSum, LineSums
from phasewise.core.clock import Clock


class SummedLog:
    """Used on one event loop; `flush` is to be called before that ends."""

    def __init__(self, clock: Clock, period_s: float = PERIOD_S) -> None:
        self._clock = clock
        self._sums = LineSums(clock, period_s)
        self._timer: asyncio.TimerHandle | None = None

    def log(self, logger: logging.Logger, level: int, kind: str, message: str, request_id: str) -> None:
        if not logger.isEnabledFor(level):
            return
        if self._sums.is_first((logger.name, level, kind), message, request_id):
            logger.log(level, "%s", message, extra={"request_id": request_id})
        if self._timer is None:
            self._set_timer()

    def flush(self) -> None:
        """Logs what was counted and not logged yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._tell(self._sums.rest())

    def _set_timer(self) -> None:
        delay_s = self._sums.next_due_s() - self._clock.now_s()
        self._timer = asyncio.get_running_loop().call_later(max(delay_s, 0.0), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._tell(self._sums.due())
        if self._sums.next_due_s() < math.inf:
            self._set_timer()

    @staticmethod
    def _tell(sums: list[LineSum]) -> None:
        for each in sums:
            name, level, _ = each.kind
            more = f" (one of {each.count} such lines in {each.seconds:.1f} s)" if each.count > 1 else ""
            logging.getLogger(name).log(level, "%s%s", each.message, more, extra={"request_id": each.request_id})
