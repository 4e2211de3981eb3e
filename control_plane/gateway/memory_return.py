"""Gives memory back to the system after something large.

The C library keeps what was freed for later, in pieces that it does not use again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes

_DELAY_S = 2.0  # a text and its body are let go of after their tokens


class MemoryReturn:
    """Asked as often as something large is over, it acts once, a little later, on a thread."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    def soon(self) -> None:
        """Memory was used that is free now, or will be at once."""
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_DELAY_S, loop.run_in_executor, None, give_memory_back)


def give_memory_back() -> None:
    """Returns freed memory to the system, where the C library can (glibc)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
