"""A KV cache without tensors: of each block it knows whose KV it holds, and how much of it.

A block's content is a place (block `index` of a client's request) and a number of cells (layers times tokens) that are
written. All attempts at one request have the same KV, because they have the same tokens; requests have one sample.
What a step or a part reads is looked up: a block that was lost, mixed up, not sent, or given away too early raises
AssertionError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from operator import eq
from zlib import crc32

from kv_transfer.cache_protocol import KVPlace
from kv_transfer.codec import WireLayout
from kv_transfer.plan import PartSpan
from phasewise.core.kv_spec import KVCacheSpec

_MAX_BLOCKS = 2**20


@dataclass(slots=True)
class VirtualWire:
    """The buffer of a part. `origin` is the place of the first block of the sequence that was packed."""

    num_bytes: int
    origin: int = -1


class VirtualSwap:
    """Room in host memory. Implements SwapSpace (decode_workers/phase.py)."""

    def __init__(self, num_places: int) -> None:
        self._free = list(range(num_places))
        self.contents: dict[int, tuple[int, int]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, contents: Iterable[tuple[int, int]]) -> list[int]:
        taken = {self._free.pop(): content for content in contents}
        self.contents |= taken
        return list(taken)

    def give_back(self, places: Iterable[int]) -> None:
        for place in places:
            del self.contents[place]
            self._free.append(place)


class VirtualCache:
    """The cache of one worker. Implements WorkerCache (workers/assemble.py), and Cache for the decode phase."""

    packs_inside_steps = True

    def __init__(self, spec: KVCacheSpec, num_blocks: int, num_swap_blocks: int) -> None:
        self.cache = self
        self.spec = spec
        self.swap = VirtualSwap(num_swap_blocks)
        self._places = [-1] * num_blocks
        self._num_cells = [0] * num_blocks
        self._writers: list[KVPlace | None] = [None] * num_blocks  # the handoff that began to write a block

    # ---- the engine

    def write(self, name: str, blocks: Sequence[int], first: int, num_tokens: int) -> None:
        """All layers of some tokens are computed."""
        origin, size = _origin(name), self.spec.block_size
        end, rest = first + num_tokens, first % size
        if rest:
            self._check_block(blocks, first // size, origin, rest)
        for index in range(first // size, -(-end // size)):
            num_cells = min(end - index * size, size) * self.spec.num_layers
            self._set(blocks[index], (origin + index, num_cells))

    def check(self, name: str, blocks: Sequence[int], num_tokens: int) -> None:
        """That the first `num_tokens` tokens of a request are there."""
        self._check(blocks, _origin(name), num_tokens)

    def check_last(self, name: str, blocks: Sequence[int], num_tokens: int) -> None:
        """The same of the last block alone."""
        index, rest = divmod(num_tokens - 1, self.spec.block_size)
        self._check_block(blocks, index, _origin(name), rest + 1)

    # ---- the decode phase

    def copy_block(self, source: int, target: int) -> None:
        self._set(target, (self._places[source], self._num_cells[source]))

    def copy_out(self, blocks: list[int]) -> list[int]:
        return self.swap.take((self._places[block], self._num_cells[block]) for block in blocks)

    def copy_in(self, places: list[int], blocks: list[int]) -> None:
        for place, block in zip(places, blocks, strict=True):
            self._set(block, self.swap.contents[place])
        self.swap.give_back(places)

    # ---- the sending half

    def mark(self) -> None:
        """Nothing is enqueued here: what is announced as computed is computed."""

    def beside(self, mark: None) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def aside(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def rejoin(self) -> None: ...

    def pack(self, place: KVPlace, span: PartSpan, layout: WireLayout, wire: VirtualWire) -> None:
        wire.origin = self._places[place.block_table[0]]
        self._check(place.block_table, wire.origin, span.first_token + span.num_tokens)

    # ---- the receiving half

    def prepare(self, place: KVPlace) -> None: ...

    def can_write_beside(self, place: KVPlace) -> bool:
        return False  # the virtual links leave the writing to the receiving worker's round

    def unpacking(self, place: KVPlace, span: PartSpan, layout: WireLayout, wire: VirtualWire) -> Callable[[], None]:
        size = self.spec.block_size

        def write() -> None:
            blocks, first, end = place.block_table, span.first_token, span.first_token + span.num_tokens
            for index in range(first // size, -(-end // size)):
                block = blocks[index]
                if self._writers[block] is not place:
                    self._set(block, (wire.origin + index, 0))
                    self._writers[block] = place
                num_tokens = min(end, (index + 1) * size) - max(first, index * size)
                self._num_cells[block] += span.num_layers * num_tokens

        return write

    # ---- inside

    def _set(self, block: int, content: tuple[int, int]) -> None:
        self._places[block], self._num_cells[block] = content
        self._writers[block] = None

    def _check(self, blocks: Sequence[int], origin: int, num_tokens: int) -> None:
        num_full, rest = divmod(num_tokens, self.spec.block_size)
        full, num_cells = blocks[:num_full], self.spec.num_layers * self.spec.block_size
        is_right = all(map(eq, map(self._places.__getitem__, full), count(origin)))
        is_whole = min(map(self._num_cells.__getitem__, full), default=num_cells) == num_cells
        assert is_right and is_whole, f"{full} hold {[self._places[b] - origin for b in full]}, not all of them whole"
        if rest:
            self._check_block(blocks, num_full, origin, rest)

    def _check_block(self, blocks: Sequence[int], index: int, origin: int, num_tokens: int) -> None:
        block, num_cells = blocks[index], num_tokens * self.spec.num_layers
        is_right = self._places[block] == origin + index and self._num_cells[block] >= num_cells
        assert is_right, f"block {index} is of {self._places[block] - origin} with {self._num_cells[block]} cells"


def _origin(name: str) -> int:
    """The place of the first block of a request: the others follow."""
    return crc32(name.encode()) * _MAX_BLOCKS
