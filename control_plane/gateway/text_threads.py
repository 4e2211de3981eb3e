"""Where texts are tokenised: short ones on the loop, long ones on a thread, and of large ones one at a time.

A large text takes a second of a core and a hundred megabytes, however it is encoded; what waits for its turn takes
nothing more. A waiter that is cancelled leaves the queue. One whose work has begun leaves at once as well, and the work
keeps its turn until it has ended: a thread cannot be stopped.

The C library keeps what was freed for later, in pieces that it does not use again: afterwards it is told to give it
back to the system.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from phasewise.core.errors import Overloaded

SHORT_TEXT = 10_000
"""Characters; up to here a text is tokenised on the loop, in some 3 ms."""

LARGE_TEXT = 1_000_000
"""Characters; beyond, one at a time."""

_GIVE_BACK_AFTER_S = 2.0  # the text itself and its body are let go of after their tokens
_TURN_TIMEOUT_S = 30.0
_T = TypeVar("_T")


class TextThreads:
    """Runs what tokenises, by the size of its text."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._trim: asyncio.TimerHandle | None = None

    async def run(self, num_characters: int, work: Callable[[], _T]) -> _T:
        """What `work` returns or raises.

        Raises:
            Overloaded: other large texts took too long.
        """
        if num_characters <= SHORT_TEXT:
            return work()
        if num_characters <= LARGE_TEXT:
            return await asyncio.to_thread(work)
        try:
            async with asyncio.timeout(_TURN_TIMEOUT_S):
                await self._turn.acquire()
        except TimeoutError:
            raise Overloaded("other large texts are being tokenised; try again", retry_after_s=5.0) from None
        task = asyncio.get_running_loop().run_in_executor(None, work)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Future[Any]) -> None:
        if not task.cancelled():
            task.exception()  # it has been looked at, also where nobody waits any more
        self._turn.release()
        if self._trim is not None:
            self._trim.cancel()
        loop = asyncio.get_running_loop()
        self._trim = loop.call_later(_GIVE_BACK_AFTER_S, loop.run_in_executor, None, give_memory_back)


def num_text_characters(text: str | None, messages: Iterable[Mapping[str, Any]] | None) -> int:
    """Characters that a request would have tokenised, counted until they are more than a large text's."""
    if text is not None or messages is None:
        return len(text or "")
    count = 0
    for message in messages:
        count += 1 + (_num_characters(message) if isinstance(message, Mapping) else 0)
        if count > LARGE_TEXT:
            break
    return count


def _num_characters(message: Mapping[str, Any]) -> int:
    """Of the strings of a message and of the text parts of its content. What else stands there is refused."""
    count = 0
    for value in message.values():
        parts = value if isinstance(value, list | tuple) else (value,)
        texts = (part.get("text") if isinstance(part, Mapping) else part for part in parts)
        for text in texts:
            count += 1 + (len(text) if isinstance(text, str) else 0)
            if count > LARGE_TEXT:
                return count
    return count


def give_memory_back() -> None:
    """Returns freed memory to the system, where the C library can (glibc)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
