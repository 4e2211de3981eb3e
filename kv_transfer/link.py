"""The road on which a part travels from one worker to another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from phasewise.core.messages import KVPart
from phasewise.core.placement import WorkerId


@dataclass(frozen=True, slots=True)
class ArrivedPart:
    """What came for a header.

    `wire`: uint8 [header.num_bytes], on the receiver's device or its host; None: its checksum was wrong. `release()` is
    called once by the step loop, when the last use of `wire` is enqueued on the current stream.
    """

    wire: torch.Tensor | None
    release: Callable[[], None]


class Link(Protocol):
    """Sends parts. The receiving worker finds header and payload in its mailbox.

    A part may be lost when the peer dies, and may overtake another; it is never silently altered without the
    checksum noticing. Control messages (offer, commit, …) do not go this way.
    """

    def send_part(self, peer: WorkerId, part: KVPart, payload: torch.Tensor) -> None:
        """Starts sending and returns. `payload` must not be written to afterwards."""
