"""What Ray makes of a call to an actor: an answer, or an error of Ray's own, translated into ours."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.exceptions import RayError

from phasewise.core.errors import Unavailable
from phasewise.core.handles import value_of


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


async def end_of(call: Any) -> str:
    """Waits for a call that is open as long as its actor lives: "" when it returned, else the kind of Ray's error."""
    try:
        await call
    except RayError as error:
        return type(error).__name__
    return ""
