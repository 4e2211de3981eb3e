"""Attention of decodes over the paged cache: a Triton kernel, and its choice of tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from engine.layers.fp8 import FP8_DTYPE


@triton.jit
def comparable(query, keys_ptr):
    """The query in the dtype that keys, values and weights are multiplied in.

    fp8 becomes float16 exactly, two numbers per instruction; to bfloat16 it takes some eight times as long, and the
    weights lose three bits. A query beyond float16 would give NaN, which the sampler reports.
    """
    if keys_ptr.dtype.element_ty == tl.float8e4nv and query.dtype == tl.bfloat16:
        query = query.to(tl.float16)
    return query


@triton.jit
def _decode_attention_kernel(
    qkv_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    context_ptr,
    out_ptr,
    partial_ptr,
    partial_lse_ptr,
    lse_ptr,
    arrivals_ptr,
    scale_log2,
    window,
    max_blocks,
    row_stride,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    group_padded: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    tile: tl.constexpr,
    num_splits: tl.constexpr,
    has_lse: tl.constexpr,
    precision: tl.constexpr,
    pairs: tl.constexpr,
):
    """One query per sequence against its paged KV (flash decoding): a program has one KV head, a share of the context.

    The last share to arrive joins the partial results, so no second launch is needed. With `pairs` the values are fp8,
    read two lanes at a time as int16: single bytes cannot be transposed on their way to the tensor cores.
    """
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(context_ptr + sequence)
    begin = tl.maximum(context - window, 0)
    length = context - begin // tile * tile
    share = tl.cdiv(tl.cdiv(length, tile), num_splits) * tile
    low = begin // tile * tile + split * share
    high = tl.minimum(low + share, context)
    row = tl.arange(0, group_padded)
    lane = tl.arange(0, head_dim)
    in_group = row < group
    query_place = sequence.to(tl.int64) * row_stride + (kv_head * group + row)[:, None] * head_dim + lane[None, :]
    query = comparable(tl.load(qkv_ptr + query_place, mask=in_group[:, None], other=0.0), keys_ptr)
    top = tl.full((group_padded,), -float("inf"), tl.float32)
    total = tl.zeros((group_padded,), tl.float32)
    acc_lanes: tl.constexpr = head_dim // 2 if pairs else head_dim
    acc = tl.zeros((group_padded, acc_lanes), tl.float32)
    acc_odd = tl.zeros((group_padded, acc_lanes), tl.float32)
    value_lane = tl.arange(0, acc_lanes)
    table = tables_ptr + sequence.to(tl.int64) * max_blocks
    for start in range(low, high, tile):
        position = start + tl.arange(0, tile)
        valid = (position < high) & (position >= begin)
        block = tl.load(table + position // block_size, mask=position < high, other=0).to(tl.int64)
        slot = block * block_size + position % block_size
        place = slot[:, None] * (num_kv_heads * head_dim) + kv_head * head_dim + lane[None, :]
        keys = tl.load(keys_ptr + place, mask=valid[:, None], other=0.0).to(query.dtype)
        scores = tl.dot(query, tl.trans(keys), input_precision=precision) * scale_log2
        scores = tl.where(valid[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(scores - safe_top[:, None])
        shrink = tl.exp2(top - safe_top)
        total = total * shrink + tl.sum(weights, axis=1)
        value_place = slot[:, None] * (num_kv_heads * acc_lanes) + kv_head * acc_lanes + value_lane[None, :]
        values = tl.load(values_ptr + value_place, mask=valid[:, None], other=0)
        weights = weights.to(query.dtype)
        if pairs:
            odd = (values >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(query.dtype)
            values = (values & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
            acc_odd = acc_odd * shrink[:, None] + tl.dot(weights, odd, input_precision=precision)
        acc = acc * shrink[:, None] + tl.dot(weights, values.to(query.dtype), input_precision=precision)
        top = new_top
    if pairs:
        acc = tl.interleave(acc, acc_odd)
    head = kv_head * group + row
    if num_splits == 1:
        safe_total = tl.where(total > 0, total, 1.0)
        out_place = (sequence.to(tl.int64) * num_heads + head)[:, None] * head_dim + lane[None, :]
        result = acc / safe_total[:, None]
        tl.store(out_ptr + out_place, result.to(out_ptr.dtype.element_ty), mask=in_group[:, None])
        if has_lse:
            lse = (top + tl.log2(safe_total)) * 0.6931471805599453
            tl.store(lse_ptr + sequence * num_heads + head, lse, mask=in_group)
        return
    cell = (sequence.to(tl.int64) * num_heads + head) * num_splits + split
    safe_total = tl.where(total > 0, total, 1.0)
    tl.store(partial_ptr + cell[:, None] * head_dim + lane[None, :], acc / safe_total[:, None], mask=in_group[:, None])
    share_lse = tl.where(total > 0, top + tl.log2(safe_total), -float("inf"))
    tl.store(partial_lse_ptr + cell, share_lse, mask=in_group)
    tl.debug_barrier()
    arrival = tl.atomic_add(arrivals_ptr + sequence * num_kv_heads + kv_head, 1, sem="acq_rel")
    if arrival == num_splits - 1:
        tl.store(arrivals_ptr + sequence * num_kv_heads + kv_head, 0)  # ready for the next step
        best = tl.full((group_padded,), -float("inf"), tl.float32)
        sums = tl.zeros((group_padded,), tl.float32)
        joined = tl.zeros((group_padded, head_dim), tl.float32)
        first_cell = (sequence.to(tl.int64) * num_heads + head) * num_splits
        for other in range(num_splits):
            other_lse = tl.load(
                partial_lse_ptr + first_cell + other, mask=in_group, other=-float("inf"), cache_modifier=".cg"
            )
            other_out = tl.load(
                partial_ptr + (first_cell + other)[:, None] * head_dim + lane[None, :],
                mask=in_group[:, None],
                other=0.0,
                cache_modifier=".cg",
            )
            new_best = tl.maximum(best, other_lse)
            safe_best = tl.where(new_best == -float("inf"), 0.0, new_best)
            weight = tl.exp2(other_lse - safe_best)
            shrink = tl.exp2(best - safe_best)
            sums = sums * shrink + weight
            joined = joined * shrink[:, None] + other_out * weight[:, None]
            best = new_best
        safe_sums = tl.where(sums > 0, sums, 1.0)
        out_place = (sequence.to(tl.int64) * num_heads + head)[:, None] * head_dim + lane[None, :]
        result = joined / safe_sums[:, None]
        tl.store(out_ptr + out_place, result.to(out_ptr.dtype.element_ty), mask=in_group[:, None])
        if has_lse:
            lse = (best + tl.log2(safe_sums)) * 0.6931471805599453
            tl.store(lse_ptr + sequence * num_heads + head, lse, mask=in_group)


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """How a decode attention program works. The fastest of some 20 per batch size tried on an H100."""

    keys: int
    num_splits: int
    num_warps: int
    num_stages: int


def decode_tile(
    batch: int, dtype: torch.dtype, num_splits: int | None = None, cache_dtype: torch.dtype | None = None
) -> DecodeTile:
    """Depends on the batch size alone, so that a captured graph holds for every context."""
    if cache_dtype == FP8_DTYPE and dtype != torch.float32:  # as many bytes at a time as bf16 takes
        tile = decode_tile(batch, dtype, num_splits)
        return replace(tile, keys=min(2 * tile.keys, 32 * tile.num_warps))
    if dtype == torch.float32:
        return DecodeTile(32, num_splits or max(1, 64 // batch), 4, 2)
    if batch <= 8:
        return DecodeTile(64, num_splits or max(2, 16 // batch), 4, 3)
    if batch <= 32:
        return DecodeTile(128, num_splits or 2, 4, 4)
    if batch <= 96:
        return DecodeTile(32, num_splits or 1, 4, 4)
    if batch <= 192:
        return DecodeTile(64, num_splits or 1, 4, 4)
    return DecodeTile(64, num_splits or 1, 2, 3)


class DecodeAttention:
    """Decode attention over one paged cache, with its workspace for up to `max_batch` sequences.

    Attributes:
        num_heads, num_kv_heads, dtype: those of the queries and of the cache that it was made for.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        max_batch: int,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        num_splits: int | None = None,
    ) -> None:
        self.num_heads, self.num_kv_heads, self.dtype = num_heads, num_kv_heads, dtype
        self._head_dim, self._block_size = head_dim, block_size
        self._num_splits = num_splits
        most = max(decode_tile(batch, dtype, num_splits).num_splits * batch for batch in range(1, max_batch + 1))
        self._partial = torch.empty(most * num_heads * head_dim, dtype=torch.float32, device=device)
        self._partial_lse = torch.empty(most * num_heads, dtype=torch.float32, device=device)
        self._arrivals = torch.zeros(max_batch * num_kv_heads, dtype=torch.int32, device=device)

    def __call__(
        self,
        qkv: torch.Tensor,
        cache: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        out: torch.Tensor,
        *,
        window: int | None = None,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """qkv: rows as in `rope_and_cache`, whose queries are read; cache: [2, num_slots, num_kv_heads, head_dim].

        block_tables: [batch, max_blocks] int32; context_lens: [batch] int32, the new token included; a sequence of
        context 0 is padding and gives zeros. out: [batch, num_heads, head_dim].
        """
        batch = context_lens.shape[0]
        group = self.num_heads // self.num_kv_heads
        tile = decode_tile(batch, qkv.dtype, self._num_splits, cache.dtype)
        pairs = cache.dtype == FP8_DTYPE
        _decode_attention_kernel[(batch, self.num_kv_heads, tile.num_splits)](
            qkv,
            cache[0],
            cache[1].view(torch.int16) if pairs else cache[1],
            block_tables,
            context_lens,
            out,
            self._partial,
            self._partial_lse,
            lse if lse is not None else self._partial_lse,
            self._arrivals,
            self._head_dim**-0.5 * 1.4426950408889634,
            window if window is not None else 2**30,
            block_tables.shape[1],
            qkv.stride(0),
            self.num_heads,
            self.num_kv_heads,
            group,
            max(16, triton.next_power_of_2(group)),
            self._head_dim,
            self._block_size,
            tile.keys,
            tile.num_splits,
            lse is not None,
            "ieee" if qkv.dtype == torch.float32 else "tf32",
            pairs,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        return out
