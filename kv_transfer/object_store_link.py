"""Parts through Ray's shared memory: for CPU workers, and for pairs without a NCCL path.

A large argument of an actor call is put into the object store by the caller (one copy) and read in place by the
callee on the same host, or fetched once by the callee's host. The store frees it when the callee has let go of it.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from phasewise.core.mailboxes import WorkerMailboxes
from phasewise.core.messages import KVPart
from phasewise.core.placement import WorkerId


class ObjectStoreLink:
    """Sends parts as arguments of calls to the peer's actor (`post_part`)."""

    def __init__(self, workers: WorkerMailboxes) -> None:
        self._workers = workers

    def send_part(self, peer: WorkerId, part: KVPart, payload: torch.Tensor) -> None:
        handle = self._workers.get(peer)
        if handle is not None:
            # As bytes: numpy has no bfloat16. A view, so the only copy is the one into shared memory.
            handle.post_part.remote(part, payload.cpu().view(torch.uint8).numpy())


def received_payload(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The tensor that `send_part` was given, in the callee: a view of shared memory that must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).view(dtype)
