"""Calls between actors: messages to them by their ids, and errors that come back as values.

All that is known here of an actor's handle is that `handle.method.remote(…)` sends a call and returns at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

from phasewise.core.errors import ServingError
from phasewise.core.messages import WorkerMessage
from phasewise.core.placement import WorkerId

ActorHandle = Any

_T = TypeVar("_T")


class WorkerHandles:
    """PeerPort (ports.py) over the handles of worker actors. A message to an unknown worker is dropped: it is gone."""

    def __init__(self) -> None:
        self._handles: dict[WorkerId, ActorHandle] = {}

    def connect(self, handles: Mapping[WorkerId, ActorHandle]) -> None:
        """Adds these workers to those that are known."""
        self._handles.update(handles)

    def forget(self, worker_id: WorkerId) -> None:
        """Drops what is sent to this worker from now on."""
        self._handles.pop(worker_id, None)

    def get(self, worker_id: WorkerId) -> ActorHandle | None:
        """The worker's handle, for calls other than `post`; None when the worker is unknown."""
        return self._handles.get(worker_id)

    def send(self, worker_id: WorkerId, message: WorkerMessage) -> None:
        handle = self._handles.get(worker_id)
        if handle is not None:
            handle.post.remote(message)


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
