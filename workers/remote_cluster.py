"""How a worker finds the control plane and the other members: by their names, in Ray's directory of actors."""

from __future__ import annotations

import ray
from ray.exceptions import RayError

from phasewise.core.handles import ActorHandle


def find_actor(name: str) -> ActorHandle | None:
    """`Find` (phasewise/core/handles.py): the handle of the actor of that name in this cluster's namespace."""
    try:
        return ray.get_actor(name)
    except (ValueError, RayError):  # there is none; or Ray's own control does not answer
        return None
