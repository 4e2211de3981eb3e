"""Where texts are tokenised: short ones on the loop, long ones on a thread, and of large ones one at a time.

A large text takes a second of a core and a hundred megabytes; one that waits for its turn takes nothing more. A
cancelled waiter leaves the queue. If its work has begun, the waiter leaves at once, but the work keeps its turn until
it has ended: a thread cannot be stopped.

The C library keeps freed memory in pieces that it does not use again. After a large text it is told to return them to
the system.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from control_plane.gateway.memory_return import MemoryReturn
from phasewise.core.errors import Overloaded

SHORT_TEXT = 10_000
"""Characters; up to here a text is tokenised on the loop, in some 3 ms."""

LARGE_TEXT = 1_000_000
"""Characters; beyond, one at a time."""

_TURN_TIMEOUT_S = 30.0
_T = TypeVar("_T")


class TextThreads:
    """Runs work that tokenises; the size of the text decides where and when."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._memory = MemoryReturn()

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
            task.exception()  # marks the error as seen, also when nobody waits any more
        self._turn.release()
        self._memory.soon()


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
    """Characters of a message's strings and of the text parts of its content. Other values are refused later."""
    count = 0
    for value in message.values():
        parts = value if isinstance(value, list | tuple) else (value,)
        texts = (part.get("text") if isinstance(part, Mapping) else part for part in parts)
        for text in texts:
            count += 1 + (len(text) if isinstance(text, str) else 0)
            if count > LARGE_TEXT:
                return count
    return count
