"""Where texts are tokenised: short ones on the loop, long ones on a thread, and of large ones one at a time.

A large text takes a second of a core and a hundred megabytes; one that waits for its turn takes nothing more. A
cancelled waiter leaves the queue. If its work has begun, the waiter leaves at once, but the work keeps its turn until
it has ended: a thread cannot be stopped.

The C library keeps freed memory in pieces that it does not use again. After a large text it is told to return them to
the system.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from control_plane.gateway.memory_return import MemoryReturn
from phasewise.core.errors import Overloaded

SHORT_TEXT = 6_000
"""Characters; up to here a text is tokenised on the loop, in 3 to 4 ms."""

LARGE_TEXT = 1_000_000
"""Characters; beyond, one at a time."""

_MESSAGE, _VALUE = 60, 20
"""Characters that a message and each of its values or text parts count beside their own.

An empty message takes as long as 80 characters: it is checked, and a template renders it twice (35 to 50 µs). A part
takes less, but a list of very many must soon be known to be large.
"""

_TURN_TIMEOUT_S = 30.0
_T = TypeVar("_T")


class TextThreads:
    """Runs work that tokenises; the size of the text decides where and when."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        # One thread: each further one would take its share of the interpreter from the event loop.
        self._medium = ThreadPoolExecutor(1, thread_name_prefix="text")
        self._memory = MemoryReturn()

    async def run(self, num_characters: int, work: Callable[[], _T]) -> _T:
        """What `work` returns or raises.

        Raises:
            Overloaded: other large texts took too long.
        """
        if num_characters <= SHORT_TEXT:
            return work()
        if num_characters <= LARGE_TEXT:
            return await asyncio.get_running_loop().run_in_executor(self._medium, _ending, work)
        return await self._run_in_turn(work)

    async def _run_in_turn(self, work: Callable[[], _T]) -> _T:
        try:
            async with asyncio.timeout(_TURN_TIMEOUT_S):
                await self._turn.acquire()
        except TimeoutError:
            raise Overloaded("other large texts are being tokenised; try again", retry_after_s=5.0) from None
        loop = asyncio.get_running_loop()
        try:
            task = loop.run_in_executor(None, partial(self._in_turn, loop, work))
        except RuntimeError:  # no thread can be started
            self._turn.release()
            raise
        task.add_done_callback(_mark_seen)
        return await asyncio.shield(task)

    def _in_turn(self, loop: asyncio.AbstractEventLoop, work: Callable[[], _T]) -> _T:
        """Runs on the thread. The turn ends with the work itself, whatever becomes of its result."""
        try:
            return _ending(work)
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for a turn
                loop.call_soon_threadsafe(self._ended)

    def _ended(self) -> None:
        self._turn.release()
        self._memory.soon()


def _ending(work: Callable[[], _T]) -> _T:
    """What `work` returns or raises. asyncio's futures refuse a StopIteration, so its caller would wait for ever."""
    try:
        return work()
    except StopIteration as error:
        raise RuntimeError("tokenising raised StopIteration") from error


def _mark_seen(task: asyncio.Future[Any]) -> None:
    """Marks an error as seen, also when nobody waits any more."""
    if not task.cancelled():
        task.exception()


def num_text_characters(text: str | None, messages: Iterable[Mapping[str, Any]] | None) -> int:
    """Characters that take as long to tokenise as the request, counted until they are more than a large text's."""
    if text is not None or messages is None:
        return len(text or "")
    count = 0
    for message in messages:
        count += _MESSAGE + (_num_characters(message) if isinstance(message, Mapping) else 0)
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
            count += _VALUE + (len(text) if isinstance(text, str) else 0)
            if count > LARGE_TEXT:
                return count
    return count
