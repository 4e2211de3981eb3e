"""A link inside one process: for tests, fault injection, and clusters whose workers are threads."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kv_transfer.link import ArrivedPart, Land, Landed, Post
from kv_transfer.staging import is_intact
from phasewise.core.messages import KVCommit, KVPart, KVPartAck
from phasewise.core.placement import WorkerId

Fault = Callable[[KVPart, torch.Tensor], torch.Tensor | None]


class LoopbackLink:
    """Puts parts of one worker straight into its peers' mailboxes.

    `fault` sees every part and returns what arrives: the buffer, another one (corruption), or None (loss).
    With `brings_commits` commits come this way; the workers of `lands` take parts as direct links bring them.
    """

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
        self._fault: Fault = fault or (lambda part, wire: wire)
        self._max_part_bytes = max_part_bytes
        self._rate = rate
        self._part_s = part_s
        self.brings_commits = False
        self.lands: dict[WorkerId, Land] = {}

    def name(self, peer: WorkerId) -> str:
        return "loopback"

    def part_s(self, peer: WorkerId) -> float:
        return self._part_s

    def max_part_bytes(self, peer: WorkerId) -> int:
        return self._max_part_bytes

    def bytes_per_s(self, peer: WorkerId) -> float:
        return self._rate

    def buffer(self, peer: WorkerId, num_bytes: int) -> torch.Tensor | None:
        return torch.empty(num_bytes, dtype=torch.uint8)

    @property
    def is_full(self) -> bool:
        return False

    @property
    def uses_store(self) -> bool:
        return False

    def give_back(self, wire: torch.Tensor) -> None:
        pass

    def send_part(self, peer: WorkerId, part: KVPart, wire: torch.Tensor) -> None:
        came = self._fault(part, wire)
        mailbox = self.mailboxes.get(peer)
        if came is None or mailbox is None:
            return

        def release() -> None:
            ours = self.mailboxes.get(self._worker_id)
            if ours is not None:
                ours(KVPartAck(part.transfer_id, part.part_index))

        land = self.lands.get(peer)
        if land is not None and land(part, came)():
            mailbox(part, ArrivedPart(None, release, Landed.RIGHT if is_intact(came) else Landed.WRONG))
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
