"""What Ray makes of a call to an actor: an answer, or an error of Ray's own, translated into ours."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.exceptions import RayError

from phasewise.core.errors import Unavailable
from phasewise.core.handles import ActorHandle, value_of


async def answer(call: Any, who: str, timeout_s: float) -> Any:
    """What an actor's call returns.

    Raises:
        Unavailable: `who` is gone or silent for `timeout_s`.
        ServingError: the actor answered with this error.
    """
    try:
        async with asyncio.timeout(timeout_s):
            value = await asyncio.wrap_future(call.future())
    except (RayError, TimeoutError):
        raise Unavailable(f"{who} does not answer", retry_after_s=2.0) from None
    return value_of(value)


def find_actor(name: str) -> ActorHandle | None:
    """`Find` (phasewise/core/handles.py): the handle of the actor of that name in this cluster's namespace."""
    try:
        return ray.get_actor(name)
    except (ValueError, RayError):  # there is none; or Ray's own control does not answer
        return None
