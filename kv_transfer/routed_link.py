"""Chooses each part's link: the direct one to its peer while that is up, else the object store."""

from __future__ import annotations

from typing import Protocol

import torch

from kv_transfer.link import Link
from phasewise.core.messages import KVCommit, KVPart
from phasewise.core.placement import WorkerId


class DirectLink(Link, Protocol):
    """A link that may be down for a peer."""

    def is_up(self, peer: WorkerId) -> bool:
        """False before it is open, and from before its LinkLost is posted until it is open again."""


class RoutedLink:
    """One link out of two. Used by the step loop's thread alone, except `close` and what only looks."""

    def __init__(self, direct: DirectLink, other: Link) -> None:
        self._direct = direct
        self._other = other
        self._given_out: Link = other  # for the buffer that is being filled

    def name(self, peer: WorkerId) -> str:
        return self._route(peer).name(peer)

    def part_s(self, peer: WorkerId) -> float:
        return self._route(peer).part_s(peer)

    def max_part_bytes(self, peer: WorkerId) -> int:
        """Of both: a part that was cut for one may go over the other."""
        return min(self._direct.max_part_bytes(peer), self._other.max_part_bytes(peer))

    def bytes_per_s(self, peer: WorkerId) -> float:
        return self._route(peer).bytes_per_s(peer)

    def buffer(self, peer: WorkerId, num_bytes: int) -> torch.Tensor | None:
        self._given_out = self._route(peer)
        return self._given_out.buffer(peer, num_bytes)

    @property
    def is_full(self) -> bool:
        return self._given_out.is_full

    @property
    def uses_store(self) -> bool:
        return self._given_out.uses_store

    def give_back(self, wire: torch.Tensor) -> None:
        self._given_out.give_back(wire)

    def send_part(self, peer: WorkerId, part: KVPart, wire: torch.Tensor) -> None:
        self._given_out.send_part(peer, part, wire)

    def send_commit(self, peer: WorkerId, commit: KVCommit) -> bool:
        return self._route(peer).send_commit(peer, commit)

    def forget(self, peer: WorkerId) -> None:
        self._direct.forget(peer)
        self._other.forget(peer)

    def close(self) -> None:
        self._direct.close()
        self._other.close()

    def _route(self, peer: WorkerId) -> Link:
        return self._direct if self._direct.is_up(peer) else self._other
