"""Attention of prompt chunks: one Triton kernel over the paged cache, and one to join results over different keys.

A tile's rows are pairs of a token and one of the query heads that share a KV head, so K and V are read once for all of
them. Where tiles are too few to fill the device, each one's context is cut into shares, a program each; the last share
to arrive joins the partial results. For chunks that need no shares, pairs cost what one head and more tokens would: as
many programs, which read as much.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.cuda.decode_attention import comparable

MAX_SHARES = 132  # a program for each multiprocessor of an H100


@dataclass(frozen=True, slots=True)
class PromptTile:
    """How a program of the prompt kernel works.

    Attributes:
        rows: (token, head of the group) pairs of a program; `tokens` of them are whole.
        keys: of one turn of its loop.
        num_shares: a context is cut where it is longer than its part of so many equal shares of a step's contexts.
        min_share: keys; fewer are not worth a program.
    """

    rows: int
    tokens: int
    keys: int
    num_shares: int
    min_share: int
    num_warps: int
    num_stages: int

    @property
    def max_cells(self) -> int:
        """At least the shares of all tiles that are cut: s shares are more than s - 1 of the equal ones long."""
        return 2 * self.num_shares

    def max_work(self, num_tokens: int, num_chunks: int) -> int:
        """At least the programs of one KV head: a tile has at most one that is not a whole equal share."""
        return num_tokens // self.tokens + num_chunks + self.num_shares


def prompt_tile(dtype: torch.dtype, num_heads: int, num_kv_heads: int) -> PromptTile:
    """For queries of `dtype`. Depends on no step, so that a captured graph holds for every context."""
    group = num_heads // num_kv_heads
    rows, keys, warps, stages = (32, 32, 4, 2) if dtype == torch.float32 else (64, 64, 4, 3)
    rows = max(rows, triton.next_power_of_2(group))
    return PromptTile(rows, rows // group, keys, max(1, MAX_SHARES // num_kv_heads), 4 * keys, warps, stages)


@dataclass(frozen=True, slots=True)
class PromptWorkspace:
    """What the shares of cut tiles leave for the last of them, of one step's layers after each other."""

    partial: torch.Tensor  # [num_cells, num_kv_heads, tile.rows, head_dim] float32
    partial_lse: torch.Tensor  # [num_cells, num_kv_heads, tile.rows] float32, to base 2
    arrivals: torch.Tensor  # [num_cells, num_kv_heads] int32, zero between layers

    @staticmethod
    def of(num_cells: int, tile: PromptTile, storage: torch.Tensor) -> PromptWorkspace:
        """storage: that of the cache, [..., num_kv_heads, head_dim]."""
        num_kv_heads, head_dim = storage.shape[-2:]
        shape, to = (num_cells, num_kv_heads, tile.rows), storage.device
        return PromptWorkspace(
            torch.empty(*shape, head_dim, dtype=torch.float32, device=to),
            torch.empty(shape, dtype=torch.float32, device=to),
            torch.zeros(shape[:2], dtype=torch.int32, device=to),
        )


@triton.jit
def _store_rows(out_ptr, lse_ptr, row, in_chunk, acc, total, top, head_dim: tl.constexpr, has_lse: tl.constexpr):
    """Writes what was attended to; row: number among all tokens' heads; top: to base 2."""
    safe_total = tl.where(total > 0, total, 1.0)
    result = (acc / safe_total[:, None]).to(out_ptr.dtype.element_ty)
    place = row[:, None] * head_dim + tl.arange(0, head_dim)[None, :]
    tl.store(out_ptr + place, result, mask=in_chunk[:, None])
    if has_lse:
        tl.store(lse_ptr + row, (top + tl.log2(safe_total)) * 0.6931471805599453, mask=in_chunk)


# Not specialised in what differs from step to step: a new kernel would be compiled while requests wait.
@triton.jit(do_not_specialize=["window", "max_blocks", "num_items"])
def _prompt_attention_kernel(
    qkv_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    work_ptr,
    spans_ptr,
    out_ptr,
    lse_ptr,
    partial_ptr,
    partial_lse_ptr,
    arrivals_ptr,
    scale_log2,
    window,
    max_blocks,
    row_stride,
    num_items,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    tile_m: tl.constexpr,
    tokens: tl.constexpr,
    tile_n: tl.constexpr,
    has_lse: tl.constexpr,
    precision: tl.constexpr,
):
    """One share of the context of a tile, for one KV head, causal (FlashAttention-2, cut as in flash decoding)."""
    work = tl.program_id(0)
    num_work = tl.num_programs(0)
    kv_head = tl.program_id(1)
    item = tl.load(work_ptr + work)
    if item < 0:
        return
    first_token = tl.load(work_ptr + num_work + work)  # inside the chunk
    share = tl.load(work_ptr + 2 * num_work + work)
    num_shares = tl.load(work_ptr + 3 * num_work + work)
    first_cell = tl.load(work_ptr + 4 * num_work + work)
    start = tl.load(spans_ptr + item)
    num_tokens = tl.load(spans_ptr + num_items + item)
    context = tl.load(spans_ptr + 2 * num_items + item)
    pair = tl.arange(0, tile_m)
    token = first_token + pair // group
    in_chunk = (token < num_tokens) & (pair < tokens * group)
    position = context - num_tokens + token
    lane = tl.arange(0, head_dim)
    head = kv_head * group + pair % group
    place = (start + token).to(tl.int64)[:, None] * row_stride + head[:, None] * head_dim + lane[None, :]
    query = comparable(tl.load(qkv_ptr + place, mask=in_chunk[:, None], other=0.0), keys_ptr)
    top = tl.full((tile_m,), -float("inf"), tl.float32)
    total = tl.zeros((tile_m,), tl.float32)
    acc = tl.zeros((tile_m, head_dim), tl.float32)
    first_position = context - num_tokens + first_token
    begin = tl.maximum(first_position - window + 1, 0) // tile_n * tile_n
    end = tl.minimum(first_position + tokens, context)
    # Of a layer with a window the shares are shorter; there may be none left for the last ones.
    share_keys = tl.cdiv(tl.cdiv(end - begin, tile_n), num_shares) * tile_n
    low = begin + share * share_keys
    high = tl.minimum(low + share_keys, end)
    table = tables_ptr + item.to(tl.int64) * max_blocks
    for key in range(low, high, tile_n):
        key_position = key + tl.arange(0, tile_n)
        exists = key_position < high
        block = tl.load(table + key_position // block_size, mask=exists, other=0).to(tl.int64)
        slot = block * block_size + key_position % block_size
        kv_place = slot[:, None] * (num_kv_heads * head_dim) + kv_head * head_dim + lane[None, :]
        keys = tl.load(keys_ptr + kv_place, mask=exists[:, None], other=0.0).to(query.dtype)
        scores = tl.dot(query, tl.trans(keys), input_precision=precision) * scale_log2
        visible = (key_position[None, :] <= position[:, None]) & (key_position[None, :] > position[:, None] - window)
        scores = tl.where(visible & exists[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(scores - safe_top[:, None])
        shrink = tl.exp2(top - safe_top)
        total = total * shrink + tl.sum(weights, axis=1)
        values = tl.load(values_ptr + kv_place, mask=exists[:, None], other=0.0).to(query.dtype)
        acc = acc * shrink[:, None] + tl.dot(weights.to(query.dtype), values, input_precision=precision)
        top = new_top
    out_row = (start + token).to(tl.int64) * num_heads + head
    if num_shares == 1:
        _store_rows(out_ptr, lse_ptr, out_row, in_chunk, acc, total, top, head_dim, has_lse)
        return
    first_row = (first_cell * num_kv_heads + kv_head) * tile_m + pair
    cell_row = first_row + share * (num_kv_heads * tile_m)
    safe_total = tl.where(total > 0, total, 1.0)
    partial = acc / safe_total[:, None]
    tl.store(partial_ptr + cell_row[:, None] * head_dim + lane[None, :], partial, mask=in_chunk[:, None])
    tl.store(partial_lse_ptr + cell_row, top + tl.log2(safe_total), mask=in_chunk)
    tl.debug_barrier()
    arrivals = arrivals_ptr + first_cell * num_kv_heads + kv_head
    if tl.atomic_add(arrivals, 1, sem="acq_rel") == num_shares - 1:
        tl.store(arrivals, 0)  # ready for the next layer
        best = tl.full((tile_m,), -float("inf"), tl.float32)
        sums = tl.zeros((tile_m,), tl.float32)
        joined = tl.zeros((tile_m, head_dim), tl.float32)
        # One program may have 500 kB to read; the loads of two shares are under way in the memory of the loop above.
        for other in tl.range(0, num_shares, num_stages=3):
            row = first_row + other * (num_kv_heads * tile_m)
            other_lse = tl.load(partial_lse_ptr + row, mask=in_chunk, other=-float("inf"), cache_modifier=".cg")
            other_place = partial_ptr + row[:, None] * head_dim + lane[None, :]
            other_out = tl.load(other_place, mask=in_chunk[:, None], other=0.0, cache_modifier=".cg")
            new_best = tl.maximum(best, other_lse)
            safe_best = tl.where(new_best == -float("inf"), 0.0, new_best)
            weight = tl.exp2(other_lse - safe_best)
            shrink = tl.exp2(best - safe_best)
            sums = sums * shrink + weight
            joined = joined * shrink[:, None] + other_out * weight[:, None]
            best = new_best
        _store_rows(out_ptr, lse_ptr, out_row, in_chunk, joined, sums, best, head_dim, has_lse)


def prompt_attention(
    qkv: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    work: torch.Tensor,
    spans: torch.Tensor,
    workspace: PromptWorkspace,
    tile: PromptTile,
    out: torch.Tensor,
    block_size: int,
    *,
    window: int | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of prompt chunks over the paged cache, which holds the chunks' own keys and values already.

    qkv: [num_tokens, heads, head_dim], of which the queries are read; cache: [2, num_slots, num_kv_heads, head_dim];
    block_tables: [num_items, max_blocks] int32. spans: [3, num_items] int32: first row of the chunk, its rows, and its
    context, the chunk included. work: [5, num_work] int32, in any order: program p computes share work[2, p] of
    work[3, p] of the context of the `tile.tokens` tokens of item work[0, p] that begin with token work[1, p] of the
    chunk; none if the item is negative. Where there are several shares, theirs are as many cells of the workspace, from
    work[4, p] on. out: [num_tokens, num_heads, head_dim]; rows of no item are left alone. lse: [num_tokens, num_heads]
    float32, natural.
    """
    num_heads, head_dim = out.shape[1:]
    num_kv_heads = cache.shape[2]
    _prompt_attention_kernel[(work.shape[1], num_kv_heads)](
        qkv,
        cache[0],
        cache[1],
        block_tables,
        work,
        spans,
        out,
        lse if lse is not None else out,
        workspace.partial,
        workspace.partial_lse,
        workspace.arrivals,
        head_dim**-0.5 * 1.4426950408889634,
        window if window is not None else 2**30,
        block_tables.shape[1],
        qkv.stride(0),
        spans.shape[1],
        num_heads,
        num_kv_heads,
        num_heads // num_kv_heads,
        head_dim,
        block_size,
        tile.rows,
        tile.tokens,
        tile.keys,
        lse is not None,
        "ieee" if qkv.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


@triton.jit
def _merge_kernel(out_ptr, lse_ptr, other_ptr, other_lse_ptr, num_heads, other_row, other_head, head_dim: tl.constexpr):
    row = tl.program_id(0)
    head = tl.program_id(1)
    lane = tl.arange(0, head_dim)
    lse = tl.load(lse_ptr + head * tl.num_programs(0) + row)
    other_lse = tl.load(other_lse_ptr + head * tl.num_programs(0) + row)
    top = tl.maximum(lse, other_lse)
    weight = tl.exp(lse - top)
    other_weight = tl.exp(other_lse - top)
    place = out_ptr + (row.to(tl.int64) * num_heads + head) * head_dim + lane
    other = tl.load(other_ptr + row.to(tl.int64) * other_row + head * other_head + lane).to(tl.float32)
    joined = (tl.load(place).to(tl.float32) * weight + other * other_weight) / (weight + other_weight)
    tl.store(place, joined.to(out_ptr.dtype.element_ty))


def merge_into(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Joins two attention results over different keys, into `out` (engine/attention/merge.py is the plain twin).

    out: [num_rows, num_heads, head_dim], contiguous; other: the same shape with any strides but the last;
    lse, other_lse: [num_heads, num_rows] float32, natural.
    """
    num_rows, num_heads, head_dim = out.shape
    _merge_kernel[(num_rows, num_heads)](
        out, lse, other, other_lse, num_heads, other.stride(0), other.stride(1), head_dim, num_warps=1
    )
