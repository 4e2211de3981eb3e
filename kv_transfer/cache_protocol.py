"""What the two halves of a handoff need of a worker's cache, without torch.

Buffers and marks pass through them and are never looked into: a real cache has tensors and events there
(kv_transfer/cache_port.py), a virtual one may have numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from kv_transfer.codec import WireLayout
from kv_transfer.plan import PartSpan
from phasewise.core.kv_spec import KVCacheSpec

WireBuffer = Any
"""The bytes of one part.  # uint8 [num_bytes], a torch.Tensor of a real link"""

StreamMark = Any
"""A place in the stream of a device's work; None where all before it is done already."""


@dataclass(slots=True, eq=False)
class KVPlace:
    """Where a sequence's KV lies: its blocks, and what its cache keeps for them.

    Attributes:
        slots: the blocks' slots on the device, from their first use on.  # int64 [num_blocks * block_size]
        vacated: behind it nobody uses the blocks but this handoff.
    """

    block_table: Sequence[int]
    slots: Any = None
    vacated: StreamMark = None


class SendingCache(Protocol):
    """The cache of a worker that hands sequences off. `spec` is that of the whole worker."""

    @property
    def spec(self) -> KVCacheSpec: ...

    def mark(self) -> StreamMark:
        """The end of what is on the current stream now."""

    def beside(self, mark: StreamMark) -> AbstractContextManager[object]:
        """Within it the current stream is another one, which waits for `mark` and for nothing else."""

    def rejoin(self) -> None:
        """What the current stream gets from now on waits for what `beside` enqueued."""

    def pack(self, place: KVPlace, span: PartSpan, layout: WireLayout, wire: WireBuffer) -> None:
        """Fills a buffer with KV of a sequence, its checksum included."""


class ReceivingCache(Protocol):
    """The cache of a worker that sequences are handed to. `spec` is that of the whole worker."""

    @property
    def spec(self) -> KVCacheSpec: ...

    def prepare(self, place: KVPlace) -> None:
        """Puts on the device what `unpacking` needs, ahead of it."""

    def can_write_beside(self, place: KVPlace) -> bool:
        """Whether a link may write into the place now, on a stream that no step waits for and that waits for none."""

    def unpacking(self, place: KVPlace, span: PartSpan, layout: WireLayout, wire: WireBuffer) -> Callable[[], None]:
        """Makes ready what writes a received part into the place."""
