"""A worker's paged KV cache as handoffs see it: parts out of it, parts into it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from kv_transfer.cache_protocol import KVPlace
from kv_transfer.codec import Codec, WireLayout, part_layout, wire_dtype
from kv_transfer.plan import PartSpan
from kv_transfer.staging import is_intact, pack, slots_of, unpacking
from phasewise.core.kv_spec import FP8, KVCacheSpec


class Cache(Protocol):
    """What is known of engine/kv_cache.py here: `storage` is [num_layers, 2, num_slots, num_kv_heads, head_dim]."""

    storage: torch.Tensor
    swap: Any

    def copy_block(self, source: int, target: int) -> None: ...

    def copy_out(self, blocks: Sequence[int]) -> list[int]: ...

    def copy_in(self, places: Sequence[int], blocks: Sequence[int]) -> None: ...


class CachePort:
    """A worker's cache. `spec` is that of the whole worker.

    What goes out is read on a stream of its own, as soon as it is written (`mark`, `beside`), and what comes in may be
    written on any (`prepare`, `unpack`): steps under way, or enqueued already, hold nothing up.
    """

    packs_inside_steps = True

    def __init__(self, cache: Cache, spec: KVCacheSpec) -> None:
        self.cache = cache
        self.spec = spec
        self.device = cache.storage.device
        self._storage = cache.storage
        has_streams = self.device.type == "cuda"
        # Of another priority than those of wires: torch hands out 32 of each again and again, and steps wait for this.
        self._side = torch.cuda.Stream(self.device, priority=-2) if has_streams else None

    def mark(self) -> torch.cuda.Event | None:
        """The end of what is on the current stream now; None where that is over already."""
        if self._side is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    @contextlib.contextmanager
    def beside(self, mark: torch.cuda.Event | None) -> Iterator[None]:
        """Within it the current stream is another one, which waits for `mark` and for nothing else."""
        if self._side is None or mark is None:
            yield
            return
        with self.aside():
            self._side.wait_event(mark)
            yield

    def aside(self) -> AbstractContextManager[object]:
        """As `beside`, waiting for nothing: all that is put into a link's buffers is put there in one order."""
        return contextlib.nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def rejoin(self) -> None:
        """What the current stream gets from now on waits for what is on the other: it may write where that reads."""
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    def prepare(self, place: KVPlace) -> None:
        """Puts on the device what `unpack` needs, ahead of it.

        What is on the current stream now may use the blocks yet; what comes later must not, until all is unpacked.
        """
        self._slots(place)
        place.vacated = self.mark()

    def can_write_beside(self, place: KVPlace) -> bool:
        """Whether another thread may unpack there now, on a stream that no step waits for and that waits for none."""
        if place.vacated is not None and place.vacated.query():
            place.vacated = None
        return place.vacated is None

    def pack(self, place: KVPlace, span: PartSpan, layout: WireLayout, wire: torch.Tensor) -> None:
        """Fills a wire buffer with KV of a sequence, its checksum included."""
        pack(self._storage, self._slots_of_part(place, span), span.first_layer, layout, wire)

    def unpack(self, place: KVPlace, span: PartSpan, layout: WireLayout, wire: torch.Tensor) -> None:
        """Writes what came into a sequence's blocks."""
        self.unpacking(place, span, layout, wire)()

    def unpacking(self, place: KVPlace, span: PartSpan, layout: WireLayout, wire: torch.Tensor) -> Callable[[], None]:
        """`unpack`, made ready: little is left to do when the bytes are there."""
        write = unpacking(self._storage, self._slots_of_part(place, span), span.first_layer, layout, wire)

        def write_when_vacated() -> None:
            vacated = place.vacated
            if vacated is not None:
                torch.cuda.current_stream(self.device).wait_event(vacated)
            write()

        return write_when_vacated

    def warm_up(self, dtypes: Iterable[str], codec: Codec) -> None:
        """Packs and unpacks for peers with caches of these dtypes: what that compiles must not hold up a step.

        Overwrites the first block, which must not be in use.
        """
        span = PartSpan(0, self.spec.num_layers, 0, 1)
        for dtype in {wire_dtype(self.spec.dtype, other) for other in dtypes}:
            for used in {Codec.NONE, codec if dtype != FP8 else Codec.NONE}:
                layout = part_layout(self.spec, span, dtype, used)
                wire = torch.empty(layout.num_bytes, dtype=torch.uint8, device=self.device)
                self.pack(KVPlace([0]), span, layout, wire)
                assert is_intact(wire), "the checksum of what was packed a moment ago"
                self.unpack(KVPlace([0]), span, layout, wire)

    def _slots(self, place: KVPlace) -> torch.Tensor:
        if place.slots is None:
            size = self.spec.block_size
            place.slots = slots_of(place.block_table, size, 0, len(place.block_table) * size, self.device)
        return place.slots

    def _slots_of_part(self, place: KVPlace, span: PartSpan) -> torch.Tensor:
        return self._slots(place)[span.first_token : span.first_token + span.num_tokens]
