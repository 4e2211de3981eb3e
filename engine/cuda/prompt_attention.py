"""Attention of prompt chunks: Triton kernels over the paged cache, and to join results over different keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.cuda.decode_attention import comparable


@triton.jit
def _prompt_attention_kernel(
    qkv_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    tiles_ptr,
    spans_ptr,
    out_ptr,
    lse_ptr,
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
    tile_n: tl.constexpr,
    has_lse: tl.constexpr,
    precision: tl.constexpr,
):
    """A tile of one prompt chunk's queries and one head against the sequence's paged KV, causal (FlashAttention-2)."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // group
    item = tl.load(tiles_ptr + tile)
    if item < 0:
        return
    first_row = tl.load(tiles_ptr + tl.num_programs(0) + tile)  # inside the chunk
    start = tl.load(spans_ptr + item)
    num_rows = tl.load(spans_ptr + num_items + item)
    context = tl.load(spans_ptr + 2 * num_items + item)
    row = first_row + tl.arange(0, tile_m)
    in_chunk = row < num_rows
    position = context - num_rows + row
    lane = tl.arange(0, head_dim)
    place = (start + row).to(tl.int64)[:, None] * row_stride + head * head_dim + lane[None, :]
    query = comparable(tl.load(qkv_ptr + place, mask=in_chunk[:, None], other=0.0), keys_ptr)
    top = tl.full((tile_m,), -float("inf"), tl.float32)
    total = tl.zeros((tile_m,), tl.float32)
    acc = tl.zeros((tile_m, head_dim), tl.float32)
    first_position = context - num_rows + first_row
    low = tl.maximum(first_position - window + 1, 0) // tile_n * tile_n
    high = tl.minimum(first_position + tile_m, context)
    table = tables_ptr + item.to(tl.int64) * max_blocks
    for begin in range(low, high, tile_n):
        key_position = begin + tl.arange(0, tile_n)
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
    safe_total = tl.where(total > 0, total, 1.0)
    out_place = ((start + row).to(tl.int64)[:, None] * num_heads + head) * head_dim + lane[None, :]
    result = acc / safe_total[:, None]
    tl.store(out_ptr + out_place, result.to(out_ptr.dtype.element_ty), mask=in_chunk[:, None])
    if has_lse:
        lse = (top + tl.log2(safe_total)) * 0.6931471805599453
        tl.store(lse_ptr + (start + row) * num_heads + head, lse, mask=in_chunk)


def prompt_tile(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(rows, keys, warps, stages) of a program of the prompt kernel."""
    return (32, 32, 4, 2) if dtype == torch.float32 else (64, 64, 4, 3)


def prompt_attention(
    qkv: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    tiles: torch.Tensor,
    spans: torch.Tensor,
    out: torch.Tensor,
    block_size: int,
    *,
    window: int | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of prompt chunks over the paged cache, which holds the chunks' own keys and values already.

    qkv: [num_tokens, heads, head_dim], of which the queries are read; cache: [2, num_slots, num_kv_heads, head_dim];
    block_tables: [num_items, max_blocks] int32. spans: [3, num_items] int32: first row of the chunk, its rows, and its
    context, the chunk included. tiles: [2, num_tiles] int32: program p computes the `prompt_tile` rows of item
    tiles[0, p] that begin at row tiles[1, p] of the chunk; none if the item is negative.
    out: [num_tokens, num_heads, head_dim]; rows of no item are left alone.
    """
    num_heads, head_dim = out.shape[1:]
    num_kv_heads = cache.shape[2]
    rows, keys, warps, stages = prompt_tile(qkv.dtype)
    _prompt_attention_kernel[(tiles.shape[1], num_heads)](
        qkv,
        cache[0],
        cache[1],
        block_tables,
        tiles,
        spans,
        out,
        lse if lse is not None else out,
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
        rows,
        keys,
        lse is not None,
        "ieee" if qkv.dtype == torch.float32 else "tf32",
        num_warps=warps,
        num_stages=stages,
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
