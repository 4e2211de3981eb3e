"""Calls between actors: messages to them by their identities, and errors that come back as values.

All that is known here of an actor's handle is that `handle.method.remote(…)` sends a call and returns at once.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from phasewise.core.clock import Clock, MonotonicClock
from phasewise.core.errors import ServingError
from phasewise.core.identity import MemberId
from phasewise.core.messages import WorkerMessage
from phasewise.core.placement import WorkerId
from phasewise.core.recent import RecentNames

logger = logging.getLogger(__name__)

ActorHandle = Any

Find = Callable[[MemberId], ActorHandle | None]
"""Gives the handle of the actor of that name; None when there is none, or nobody can say. It may take a while."""

Call = Callable[[ActorHandle], object]
"""Calls an actor and returns at once."""

_PAUSE_S = 0.2
_PATIENCE_S = 60.0  # a member that is not found for so long is not there

_T = TypeVar("_T")


def find_nobody(member_id: MemberId) -> ActorHandle | None:
    """For a directory that is told of every handle."""
    return None


class Directory:
    """Handles of members by their identities, each found when it is first needed, by a thread of its own.

    What is to be said to a member that is not found yet waits for it, in order. What is said to one that was forgotten,
    or that is not found for a minute, is dropped. Any thread may call; none waits.
    """

    def __init__(self, find: Find = find_nobody, clock: Clock | None = None) -> None:
        self._find = find
        self._clock = clock or MonotonicClock()
        self._lock = threading.Lock()
        self._handles: dict[MemberId, ActorHandle] = {}
        self._waiting: dict[MemberId, list[Call]] = {}
        self._wanted_s: dict[MemberId, float] = {}  # since when, of those that are looked for
        self._forgotten = RecentNames()
        self._is_looking = False

    def connect(self, handles: Mapping[MemberId, ActorHandle]) -> None:
        """Adds members whose handles are known."""
        for member_id, handle in handles.items():
            self._found(member_id, handle)

    def expect(self, member_id: MemberId) -> None:
        """Begins to look for a member, so that it is found when something is to be said to it."""
        if member_id not in self._handles:
            self._look_for(member_id)

    def forget(self, member_id: MemberId) -> None:
        """Drops what waits for this member, and what is said to it from now on."""
        with self._lock:
            self._forgotten.add(member_id)
            for entries in (self._handles, self._waiting, self._wanted_s):
                entries.pop(member_id, None)

    def get(self, member_id: MemberId) -> ActorHandle | None:
        """The member's handle; None while it is not found."""
        return self._handles.get(member_id)

    def known(self) -> list[ActorHandle]:
        """The handles of all that were found."""
        return list(self._handles.values())

    def call(self, member_id: MemberId, call: Call) -> None:
        """Calls the member now, or when it is found."""
        handle = self._handles.get(member_id)
        if handle is None:
            handle = self._look_for(member_id, call)
        if handle is not None:
            call(handle)

    # ---- inside

    def _look_for(self, member_id: MemberId, call: Call | None = None) -> ActorHandle | None:
        """Gives the handle where it has been found meanwhile; else `call` waits for it."""
        with self._lock:
            if member_id in self._handles or member_id in self._forgotten:
                return self._handles.get(member_id)
            self._wanted_s.setdefault(member_id, self._clock.now_s())
            if call is not None:
                self._waiting.setdefault(member_id, []).append(call)
            if not self._is_looking:
                self._is_looking = True
                threading.Thread(target=self._look, name="find-members", daemon=True).start()
        return None

    def _look(self) -> None:
        """Until nobody is looked for any more."""
        pause = threading.Event()  # never set: another one is looked for a pause later at most
        while wanted := self._still_wanted():
            for member_id in wanted:
                if (handle := self._find(member_id)) is not None:
                    self._found(member_id, handle)
            if self._wanted_s:
                pause.wait(_PAUSE_S)

    def _still_wanted(self) -> list[MemberId]:
        with self._lock:
            oldest_s = self._clock.now_s() - _PATIENCE_S
            for member_id in [m for m, since_s in self._wanted_s.items() if since_s < oldest_s]:
                logger.warning("member %s is not found: what was to be said to it is dropped", member_id)
                self._wanted_s.pop(member_id)
                self._waiting.pop(member_id, None)
            self._is_looking = bool(self._wanted_s)
            return list(self._wanted_s)

    def _found(self, member_id: MemberId, handle: ActorHandle) -> None:
        with self._lock:
            if member_id in self._forgotten:
                return
            self._wanted_s.pop(member_id, None)
            for call in self._waiting.pop(member_id, ()):
                call(handle)
            self._handles[member_id] = handle  # last: who finds it comes behind those that have waited


class WorkerHandles(Directory):
    """PeerPort (ports.py) over the handles of worker actors."""

    def send(self, worker_id: WorkerId, message: WorkerMessage) -> None:
        self.call(worker_id, lambda handle: handle.post.remote(message))


async def as_value(answer: Awaitable[_T]) -> _T | ServingError:
    """What an actor's method answers with: the result, or the ServingError as a value. Ray would wrap an exception."""
    try:
        return await answer
    except ServingError as error:
        return error


def value_of(answer: _T | ServingError) -> _T:
    """The caller's side of `as_value`. Raises the ServingError that came as a value."""
    if isinstance(answer, ServingError):
        raise answer
    return answer


async def answer_of(call: Any, timeout_s: float) -> Any:
    """What an actor's call returns.

    Raises:
        ServingError: the actor answered with this error.
        TimeoutError: it did not answer.
        Exception: of the actors' own kind, when it is gone or is being started again.
    """
    async with asyncio.timeout(timeout_s):
        return value_of(await asyncio.wrap_future(call.future()))
