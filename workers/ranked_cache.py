"""The KV cache of a worker of several ranks: each has the KV of its heads, and rank 0 acts for all.

Swaps and copies are told to the other ranks, which do them at the same place between their steps. A handoff's parts
hold all heads, so the two ends may have different numbers of ranks: rank 0 gathers what it sends and distributes what
it received, over the group that computes the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from engine.kv_cache import PagedKVCache
from engine.tensor_parallel import Command, Group, together
from kv_transfer.cache_port import CachePort
from kv_transfer.cache_protocol import KVPlace
from kv_transfer.codec import Codec, WireLayout
from kv_transfer.plan import PartSpan
from kv_transfer.staging import DTYPES, decode, encode, pack, slots_of, unpack, values_of
from phasewise.core.kv_spec import KVCacheSpec
from workers.ranks import Ranks


class LeadingKVCache(PagedKVCache):
    """Rank 0's cache: copies and swaps are done in the other ranks' caches, too (`CacheCommands`)."""

    def __init__(self, spec: KVCacheSpec, num_blocks: int, device: str, num_swap_blocks: int, ranks: Ranks) -> None:
        super().__init__(spec, num_blocks, device, num_swap_blocks)
        self._ranks = ranks

    def copy_block(self, source: int, target: int) -> None:
        self._ranks.tell(("copy_block", source, target))
        super().copy_block(source, target)

    def copy_out(self, blocks: Sequence[int]) -> list[int]:
        places = super().copy_out(blocks)
        self._ranks.tell(("write", list(blocks), places))
        return places

    def copy_in(self, places: Sequence[int], blocks: Sequence[int]) -> None:
        self._ranks.tell(("read", list(places), list(blocks)))
        super().copy_in(places, blocks)


class LeadingCachePort(CachePort):
    """Rank 0's port: parts of all heads. `spec` is that of the whole worker; `cache` has rank 0's heads."""

    packs_inside_steps = False  # all ranks take part, and they are not between two layers together

    def __init__(self, cache: PagedKVCache, spec: KVCacheSpec, group: Group, ranks: Ranks) -> None:
        super().__init__(cache, spec)
        self._side = None  # all ranks take part, on the stream of their steps
        self._heads = RankHeads(cache, group)
        self._num_ranks = group.size
        self._ranks = ranks

    def prepare(self, place: KVPlace) -> None:
        """Does nothing: each rank prepares its own part when it is packed."""

    def can_write_beside(self, place: KVPlace) -> bool:
        return False  # all ranks take part, between their steps

    def pack(self, place: KVPlace, span: PartSpan, layout: WireLayout, wire: torch.Tensor) -> None:
        """wire: [layout.num_bytes] uint8, filled."""
        block_table = list(place.block_table)
        with together(self._ranks, ("pack", block_table, span, layout.dtype), "a handoff"):
            parts = self._heads.gather(block_table, span, layout.dtype)
            assert parts is not None
            step = max(self._num_ranks // layout.num_kv_heads, 1)  # so many ranks have the same head
            values = torch.cat([part.view(torch.uint8) for part in parts[::step]], dim=3)
            encode(values.view(parts[0].dtype), layout, wire)

    def unpacking(self, place: KVPlace, span: PartSpan, layout: WireLayout, wire: torch.Tensor) -> Callable[[], None]:
        return partial(self._unpack, place, span, layout, wire)

    def _unpack(self, place: KVPlace, span: PartSpan, layout: WireLayout, wire: torch.Tensor) -> None:
        """wire: [layout.num_bytes] uint8."""
        block_table = list(place.block_table)
        with together(self._ranks, ("unpack", block_table, span, layout), "a handoff"):
            values = decode(wire.to(self.device), layout, DTYPES[layout.dtype])
            self._heads.scatter(block_table, span, layout, values)


class RankHeads:
    """One rank's part of what LeadingCachePort does: all ranks call the same at the same place."""

    def __init__(self, cache: PagedKVCache, group: Group) -> None:
        self._cache = cache
        self._group = group

    def gather(self, block_table: Sequence[int], span: PartSpan, dtype: str) -> list[torch.Tensor] | None:
        """Every rank's heads of a part, in `dtype`, on rank 0.  # [num_layers, 2, num_tokens, heads, head_dim] each"""
        layout = self._layout(span, dtype)
        wire = torch.empty(layout.num_bytes, dtype=torch.uint8, device=self._cache.device)
        pack(self._cache.storage, self._slots(block_table, span), span.first_layer, layout, wire)
        return self._group.gather(values_of(layout, wire))

    def scatter(
        self, block_table: Sequence[int], span: PartSpan, layout: WireLayout, values: torch.Tensor | None
    ) -> None:
        """Writes this rank's heads of `values`, which rank 0 has and the others get; None on the others.

        values: [num_layers, 2, num_tokens, heads of all ranks, head_dim], in the dtype of `layout`.
        """
        device = self._cache.device
        if values is None:
            values = torch.empty(layout.shape, dtype=DTYPES[layout.dtype], device=device)
        first, count = self._group.shard.kv_heads(layout.num_kv_heads)
        own = self._group.broadcast(values.contiguous())[:, :, :, first : first + count].contiguous()
        part = self._layout(span, layout.dtype)
        wire = torch.empty(part.num_bytes, dtype=torch.uint8, device=device)
        encode(own, part, wire)
        unpack(self._cache.storage, self._slots(block_table, span), span.first_layer, part, wire)

    def _layout(self, span: PartSpan, dtype: str) -> WireLayout:
        spec = self._cache.spec
        return WireLayout(span.num_layers, span.num_tokens, spec.num_kv_heads, spec.head_dim, dtype, Codec.NONE)

    def _slots(self, block_table: Sequence[int], span: PartSpan) -> torch.Tensor:
        """Of the tokens of the span, [num_tokens] int64."""
        cache = self._cache
        return slots_of(block_table, cache.block_size, span.first_token, span.num_tokens, cache.device)


class CacheCommands:
    """Carries out rank 0's commands about the cache, on another rank."""

    def __init__(self, cache: PagedKVCache, group: Group) -> None:
        self._cache = cache
        self._heads = RankHeads(cache, group)

    def carry_out(self, command: Command) -> bool:
        """False when the command is not about the cache."""
        match command:
            case ("copy_block", source, target):
                self._cache.copy_block(source, target)
            case ("write", blocks, places):
                self._cache.swap.write(blocks, places)
            case ("read", places, blocks):
                self._cache.swap.read(places, blocks)
            case ("pack", block_table, span, dtype):
                self._heads.gather(block_table, span, dtype)
            case ("unpack", block_table, span, layout):
                self._heads.scatter(block_table, span, layout, None)
            case _:
                return False
        return True
