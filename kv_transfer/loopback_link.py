"""A link inside one process: for tests, fault injection, and clusters whose workers are threads."""

from __future__ import annotations

from collections.abc import Callable

import torch

from phasewise.core.messages import KVPart
from phasewise.core.placement import WorkerId

Mailbox = Callable[[KVPart, torch.Tensor], None]
Fault = Callable[[KVPart, torch.Tensor], torch.Tensor | None]


class LoopbackLink:
    """Puts parts straight into the peer's mailbox.

    `fault` sees every part and returns what arrives: the payload, another tensor (corruption), or None (loss).
    """

    def __init__(self, mailboxes: dict[WorkerId, Mailbox], fault: Fault | None = None) -> None:
        self._mailboxes = mailboxes
        self._fault: Fault = fault or (lambda part, payload: payload)

    def send_part(self, peer: WorkerId, part: KVPart, payload: torch.Tensor) -> None:
        arrived = self._fault(part, payload)
        mailbox = self._mailboxes.get(peer)
        if arrived is not None and mailbox is not None:
            mailbox(part, arrived)
