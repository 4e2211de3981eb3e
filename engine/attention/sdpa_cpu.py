"""Fast attention on a CPU: torch's fused attention, one call per prompt chunk, one per group of decodes.

Decodes of similar length are gathered block by block into one padded workspace and attended to in one call. The query
heads that share a KV head become rows of one query, so that KV is read once for all of them. Prompts without earlier
context need no gathering: their keys and values are those of this step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.forward_inputs import ForwardInputs
from engine.kv_cache import PagedKVCache

# The kernel behind scaled_dot_product_attention on a CPU; called directly because only it returns the log-sum-exp.
_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

# A group may be padded up to 4/3 of its shortest member: beyond, copying padding costs more than another call.
_SHORTEST_TO_LONGEST = 0.75


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """One-token items of similar context length. `rows` is None when the group is the whole batch, in order."""

    size: int
    rows: torch.Tensor | None
    blocks: torch.Tensor  # [size * blocks per item]
    unused_slots: torch.Tensor  # positions in the gathered copy that hold no visible token
    mask: torch.Tensor | None  # [size, 1, 1, gathered tokens per item], 0 or -inf


@dataclass(frozen=True, slots=True)
class _PromptChunk:
    """Rows `first` to `last`. `blocks` is None when nothing precedes the chunk; then its own KV is all there is."""

    first: int
    last: int
    blocks: torch.Tensor | None
    visible: slice  # of the gathered tokens
    mask: torch.Tensor | None  # [num_queries, num_tokens], 0 or -inf; None: plain causal


@dataclass(frozen=True, slots=True)
class _Plan:
    groups: tuple[_DecodeGroup, ...]
    chunks: tuple[_PromptChunk, ...]


class SdpaCpuAttention:
    """See AttentionBackend. `windows` has one entry per layer."""

    def __init__(self, kv_cache: PagedKVCache, windows: tuple[int | None, ...]) -> None:
        self._storage = kv_cache.storage
        self._blocks = kv_cache.blocks_view()
        self._block_size = kv_cache.block_size
        self._windows = windows
        # Reused, because a fresh allocation of this size is mapped and zeroed by the kernel of the system each time.
        self._workspace = torch.empty(0, dtype=kv_cache.storage.dtype)
        self._plans: tuple[_Plan, ...] = ()

    def plan(self, inputs: ForwardInputs) -> None:
        self._slot_mapping = inputs.slot_mapping
        longest = max(inputs.context_lens)
        built: dict[int | None, _Plan] = {}
        plans = []
        for window in self._windows:
            effective = window if window is not None and window < longest else None
            if effective not in built:
                built[effective] = self._build(inputs, effective)
            plans.append(built[effective])
        self._plans = tuple(plans)
        self._reserve(plans)

    def run(self, layer: int, queries: torch.Tensor, keys_values: torch.Tensor) -> torch.Tensor:
        return self._run(layer, queries, keys_values, None)

    def run_with_lse(
        self, layer: int, queries: torch.Tensor, keys_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lse = torch.empty(queries.shape[:2], dtype=torch.float32)
        return self._run(layer, queries, keys_values, lse), lse

    def _run(
        self, layer: int, queries: torch.Tensor, keys_values: torch.Tensor, lse: torch.Tensor | None
    ) -> torch.Tensor:
        self._storage[layer].index_copy_(1, self._slot_mapping, keys_values.transpose(0, 1))
        plan = self._plans[layer]
        if len(plan.groups) == 1 and plan.groups[0].rows is None:
            return self._decode(layer, plan.groups[0], queries, lse)
        output = queries.new_empty(queries.shape)
        for group in plan.groups:
            partial_lse = None if lse is None else lse.new_empty(group.size, lse.shape[1])
            output[group.rows] = self._decode(layer, group, queries[group.rows], partial_lse)
            if lse is not None and partial_lse is not None:
                lse[group.rows] = partial_lse
        for chunk in plan.chunks:
            rows = slice(chunk.first, chunk.last)
            chunk_output, chunk_lse = self._prompt(layer, chunk, queries[rows], keys_values[rows])
            output[rows] = chunk_output
            if lse is not None:
                lse[rows] = chunk_lse
        return output

    def _decode(self, layer: int, group: _DecodeGroup, queries: torch.Tensor, lse: torch.Tensor | None) -> torch.Tensor:
        """queries: [size, num_heads, head_dim] → the same shape; fills `lse` when given."""
        num_kv_heads, head_dim = self._storage.shape[3:]
        gathered = self._gather(layer, group.blocks)  # [2, size * tokens, num_kv_heads, head_dim]
        if group.unused_slots.numel():  # unwritten memory may hold NaN, which no mask removes
            gathered.index_fill_(1, group.unused_slots, 0)
        keys, values = gathered.view(2, group.size, -1, num_kv_heads, head_dim).transpose(2, 3)
        folded = queries.reshape(group.size, num_kv_heads, -1, head_dim)
        output, part_lse = _flash_attention(folded, keys, values, attn_mask=group.mask)
        if lse is not None:
            lse.copy_(part_lse.reshape(lse.shape))
        return output.reshape(queries.shape)

    def _prompt(
        self, layer: int, chunk: _PromptChunk, queries: torch.Tensor, keys_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """queries: [num_queries, num_heads, head_dim] → (the same shape, [num_queries, num_heads])."""
        if chunk.blocks is None:
            keys, values = keys_values.unbind(1)
        else:
            keys, values = self._gather(layer, chunk.blocks)[:, chunk.visible]
        output, lse = _flash_attention(
            queries.transpose(0, 1).unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            is_causal=chunk.mask is None,
            attn_mask=chunk.mask,
        )
        return output[0].transpose(0, 1), lse[0].transpose(0, 1)

    def _gather(self, layer: int, blocks: torch.Tensor) -> torch.Tensor:
        """[2, len(blocks) * block_size, num_kv_heads, head_dim] in the workspace, valid until the next call."""
        row = self._blocks.shape[-1]
        out = self._workspace[: 2 * len(blocks) * row].view(2, len(blocks), row)
        torch.index_select(self._blocks[layer], 1, blocks, out=out)
        return out.view(2, -1, *self._storage.shape[3:])

    def _reserve(self, plans: list[_Plan]) -> None:
        most = 0
        for plan in plans:
            most = max([most, *(len(group.blocks) for group in plan.groups)])
            most = max([most, *(len(chunk.blocks) for chunk in plan.chunks if chunk.blocks is not None)])
        needed = 2 * most * self._blocks.shape[-1]
        if needed > len(self._workspace):
            # Grown by half more, so that a growing batch does not allocate every few steps.
            self._workspace = torch.empty(needed * 3 // 2, dtype=self._storage.dtype)

    def _build(self, inputs: ForwardInputs, window: int | None) -> _Plan:
        decodes, chunks = [], []
        for item in range(inputs.num_items):
            if inputs.num_queries(item) == 1:
                decodes.append(item)
            else:
                chunks.append(self._build_chunk(inputs, item, window))
        decodes.sort(key=lambda item: -_visible(inputs.context_lens[item], window))
        groups: list[list[int]] = []
        for item in decodes:
            blocks = _visible(inputs.context_lens[item], window) // self._block_size + 1
            if groups:
                most = _visible(inputs.context_lens[groups[-1][0]], window) // self._block_size + 1
                if blocks >= most * _SHORTEST_TO_LONGEST or most - blocks <= 2:
                    groups[-1].append(item)
                    continue
            groups.append([item])
        return _Plan(tuple(self._build_group(inputs, sorted(group), window) for group in groups), tuple(chunks))

    def _build_group(self, inputs: ForwardInputs, items: list[int], window: int | None) -> _DecodeGroup:
        size, block_size = len(items), self._block_size
        tables, lengths, firsts = [], [], []
        for item in items:
            context = inputs.context_lens[item]
            start = context - _visible(context, window)
            tables.append(inputs.block_tables[item][start // block_size :])
            lengths.append(context - start // block_size * block_size)
            firsts.append(start % block_size)
        width = max(len(table) for table in tables)
        # Padding repeats a block of the same sequence; what it holds is masked.
        blocks = torch.tensor([table + table[:1] * (width - len(table)) for table in tables]).view(-1)
        position = torch.arange(width * block_size)
        visible = (position < torch.tensor(lengths)[:, None]) & (position >= torch.tensor(firsts)[:, None])
        unused = (~visible).view(-1).nonzero().view(-1)
        mask = None
        if len(unused):
            mask = torch.zeros(visible.shape, dtype=self._storage.dtype).masked_fill_(~visible, -torch.inf)
            mask = mask.view(size, 1, 1, -1)
        whole = size == inputs.num_items
        rows = None if whole else torch.tensor([inputs.query_starts[item] for item in items])
        return _DecodeGroup(size, rows, blocks, unused, mask)

    def _build_chunk(self, inputs: ForwardInputs, item: int, window: int | None) -> _PromptChunk:
        first, last = inputs.query_starts[item : item + 2]
        context, num_queries = inputs.context_lens[item], last - first
        computed = context - num_queries
        start = max(0, computed + 1 - window) if window is not None else 0
        mask = None
        if computed or (window is not None and window < context):
            query = torch.arange(computed, context).unsqueeze(1)
            key = torch.arange(start, context)
            hidden = key > query
            if window is not None:
                hidden |= key <= query - window
            mask = torch.zeros(hidden.shape, dtype=self._storage.dtype).masked_fill_(hidden, -torch.inf)
        if computed == 0:
            return _PromptChunk(first, last, None, slice(None), mask)
        first_block = start // self._block_size
        blocks = torch.tensor(inputs.block_tables[item][first_block:])
        offset = first_block * self._block_size
        return _PromptChunk(first, last, blocks, slice(start - offset, context - offset), mask)


def _visible(context: int, window: int | None) -> int:
    return context if window is None else min(context, window)
