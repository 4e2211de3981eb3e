"""A link inside one process: for tests, fault injection, and clusters whose workers are threads."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kv_transfer.link import ArrivedPart, Post, PrepareWrite, WriteOutcome
from kv_transfer.staging import is_intact
from phasewise.core.messages import KVCommit, KVPart, KVPartAck
from phasewise.core.placement import WorkerId

Fault = Callable[[KVPart, torch.Tensor], torch.Tensor | None]


class LoopbackLink:
    """Puts parts of one worker straight into its peers' mailboxes.

    `fault` sees every part and returns what arrives: the buffer, another one (corruption), or None (loss).
    With `brings_commits` commits come this way; with a peer among `writers` parts are written into its cache as direct
    links do it.
    """

    is_full = False
    uses_store = False

    def __init__(
        self,
        worker_id: WorkerId,
        mailboxes: dict[WorkerId, Post],
        fault: Fault | None = None,
        *,
        max_part_bytes: int = 2**62,
        rate: float = 0.0,
        part_s: float = 0.0,
    ) -> None:
        self._worker_id = worker_id
        self.mailboxes = mailboxes
        self.fault: Fault = fault or (lambda part, wire: wire)
        self.largest_part_bytes = max_part_bytes
        self.rate = rate
        self.seconds_per_part = part_s
        self.brings_commits = False
        self.writers: dict[WorkerId, PrepareWrite] = {}

    def name(self, peer: WorkerId) -> str:
        return "loopback"

    def part_s(self, peer: WorkerId) -> float:
        return self.seconds_per_part

    def max_part_bytes(self, peer: WorkerId) -> int:
        return self.largest_part_bytes

    def bytes_per_s(self, peer: WorkerId) -> float:
        return self.rate

    def buffer(self, peer: WorkerId, num_bytes: int) -> torch.Tensor | None:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def give_back(self, wire: torch.Tensor) -> None:
        pass

    def send_part(self, peer: WorkerId, part: KVPart, wire: torch.Tensor) -> None:
        came = self.fault(part, wire)
        mailbox = self.mailboxes.get(peer)
        if came is None or mailbox is None:
            return

        def release() -> None:
            ours = self.mailboxes.get(self._worker_id)
            if ours is not None:
                ours(KVPartAck(part.transfer_id, part.part_index))

        prepare_write = self.writers.get(peer)
        if prepare_write is not None and prepare_write(part, came)():
            mailbox(part, ArrivedPart(None, release, WriteOutcome.RIGHT if is_intact(came) else WriteOutcome.WRONG))
        else:
            mailbox(part, ArrivedPart(came if is_intact(came) else None, release))

    def send_commit(self, peer: WorkerId, commit: KVCommit) -> bool:
        if self.brings_commits:
            self.mailboxes[peer](commit)
        return self.brings_commits

    def forget(self, peer: WorkerId) -> None:
        pass

    def close(self) -> None:
        pass
