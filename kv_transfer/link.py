"""Links: how parts travel from one worker to another.

A part is one buffer of bytes (kv_transfer/codec.py). The sender asks the link for a buffer, fills it by work on its
current stream, and gives it back; the receiving worker's mailbox gets the header and the buffer. Links tell their
worker what happened through its mailbox, too:

    KVPart, with an ArrivedPart    a part has come in
    KVPartAck                      a part that was sent has arrived, or was given up there
    LinkLost                       the link to a worker broke; parts of these transfers will not arrive

Control messages (offer, …) go from mailbox to mailbox; a commit may go over the link, which is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from kv_transfer.cache_protocol import WireBuffer
from phasewise.core.messages import KVCommit, KVPart, KVPartAck, LinkLost
from phasewise.core.placement import WorkerId


class DeviceFull(Exception):
    """The device has no memory left for a part's buffer."""


class WriteOutcome(Enum):
    """What became of a part that its link wrote into the cache. The device is done with its blocks."""

    RIGHT = "right"
    WRONG = "wrong"  # its checksum
    LOST = "lost"  # the link broke: LinkLost follows


@dataclass(frozen=True, slots=True)
class ArrivedPart:
    """What came for a header.

    Attributes:
        wire: uint8 [header.num_bytes], on the receiver's device or its host; None when its checksum was wrong, or when
            the link wrote it into its blocks.
        release: called once, when the last use of `wire` is on the current stream.
        written: None where the link has written nothing.
    """

    wire: WireBuffer | None
    release: Callable[[], None]
    written: WriteOutcome | None = None


WriteReceived = Callable[[], bool]
"""Puts the writing of a part on the current stream, once, from any thread.

Every part that it writes comes to the mailbox later, as an ArrivedPart with `written`. False when it writes nothing:
then the loop is to write the part."""


class PrepareWrite(Protocol):
    """Makes ready what writes a part into its blocks as soon as its bytes are in, before anybody knows whether they are
    right."""

    def __call__(self, part: KVPart, wire: WireBuffer) -> WriteReceived:
        """What will write from `wire`. From any thread: nothing has come into the buffer yet."""


def write_nothing() -> bool:
    """The WriteReceived of a part that the loop writes."""
    return False


class Post(Protocol):
    """A worker's mailbox, from any thread (workers/driver.py)."""

    def __call__(
        self, message: KVPart | KVPartAck | KVCommit | LinkLost, arrived: ArrivedPart | None = None
    ) -> None: ...


class Link(Protocol):
    """Sends parts to other workers. Nothing here waits for a device or for a peer.

    A part may be lost when the link breaks, and may overtake another; it is never silently altered. The first four
    methods may be called from any thread, to look.
    """

    def name(self, peer: WorkerId) -> str:
        """Where a part would go now: `nccl`, `object_store`, `loopback`."""

    def part_s(self, peer: WorkerId) -> float:
        """What each part costs its sender besides the time of its bytes, in seconds."""

    def max_part_bytes(self, peer: WorkerId) -> int:
        """The largest buffer that `buffer` gives out; the sender cuts parts to it."""

    def bytes_per_s(self, peer: WorkerId) -> float:
        """The measured rate; 0.0 when it is not known."""

    def buffer(self, peer: WorkerId, num_bytes: int) -> WireBuffer | None:
        """uint8 [num_bytes] to pack the next part for `peer` into; None when all are in use.

        Ask again after the next KVPartAck. What is given out goes to `send_part` at once. Raises DeviceFull.
        """

    @property
    def is_full(self) -> bool:
        """Whether `buffer` gave none last because all room is in use: smaller parts must not take what comes free."""

    @property
    def uses_store(self) -> bool:
        """Whether the buffer that was given out last goes through the object store."""

    def give_back(self, wire: WireBuffer) -> None:
        """Takes a buffer back that could not be filled."""

    def send_part(self, peer: WorkerId, part: KVPart, wire: WireBuffer) -> None:
        """Takes over a buffer that work on the current stream fills, and returns at once."""

    def send_commit(self, peer: WorkerId, commit: KVCommit) -> bool:
        """Brings a commit, sooner than the workers' own way, or says that it does not.

        Like a part it may be lost when the link breaks: LinkLost comes, which does not name its transfer.
        """

    def forget(self, peer: WorkerId) -> None:
        """The peer is gone for good."""

    def close(self) -> None:
        """Ends what runs for the link; nothing is sent or posted afterwards."""
