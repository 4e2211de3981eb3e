"""Triton kernels of the CUDA decoder: what stands between two matrix products, and decode attention.

The norms are folded into the products around them (engine/cuda/decoder.py): a product runs on the raw residual stream,
and the kernel behind it multiplies by each row's 1 / rms. So a layer is four products and three kernels.

Shapes: x [num_tokens, hidden]; qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; the cache's K and V of a
layer [num_slots, num_kv_heads, head_dim], in x's dtype or fp8. Strides are those of contiguous tensors. Head dims are
powers of two.
"""

# ruff: noqa: SIM108 (a branch on a constant is decided when the kernel is compiled; a ternary would not be)

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from engine.layers.fp8 import FP8_DTYPE


@triton.jit
def _prepare_step_kernel(
    sources_ptr,
    positions_ptr,
    slots_ptr,
    newest_ptr,
    ids_ptr,
    tables_ptr,
    num_tokens,
    num_decodes,
    max_blocks,
    block_size: tl.constexpr,
    tokens: tl.constexpr,
):
    token = tl.program_id(0) * tokens + tl.arange(0, tokens)
    exists = token < num_tokens
    source = tl.load(sources_ptr + token, mask=exists, other=0)
    newest = tl.load(newest_ptr - 1 - source, mask=source < 0, other=0)
    # A row that computed NaN has no token; its step is dropped, but must not read outside of the embedding.
    tl.store(ids_ptr + token, tl.where(source < 0, tl.maximum(newest, 0), source), mask=exists)
    position = tl.load(positions_ptr + token, mask=exists, other=0)
    slot = tl.load(slots_ptr + token, mask=exists, other=-1)
    place = tables_ptr + token.to(tl.int64) * max_blocks + position // block_size
    tl.store(place, (slot // block_size).to(tl.int32), mask=(token < num_decodes) & (slot >= 0))


def prepare_step(
    sources: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    newest: torch.Tensor,
    tables: torch.Tensor,
    num_decodes: int,
    block_size: int,
) -> torch.Tensor:
    """Input ids of a step, [num_tokens] int64; writes the current block of the first `num_decodes` rows to `tables`.

    sources, positions, slots: [num_tokens] int64 (engine/cuda/step_inputs.py); newest: [max_rows] int64;
    tables: [max_rows, max_blocks] int32.
    """
    ids = torch.empty_like(sources)
    num_tokens = len(sources)
    _prepare_step_kernel[(triton.cdiv(num_tokens, 128),)](
        sources,
        positions,
        slots,
        newest,
        ids,
        tables,
        num_tokens,
        num_decodes,
        tables.shape[1],
        block_size,
        128,
        num_warps=4,
    )
    return ids


@triton.jit
def _row_scale(x_ptr, row, hidden: tl.constexpr, hidden_padded: tl.constexpr, eps):
    """1 / rms of one row of the residual stream."""
    offsets = tl.arange(0, hidden_padded)
    x = tl.load(x_ptr + row.to(tl.int64) * hidden + offsets, mask=offsets < hidden, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x) / hidden + eps)


@triton.jit
def _row_scales_kernel(x_ptr, out_ptr, eps, hidden: tl.constexpr, hidden_padded: tl.constexpr):
    row = tl.program_id(0)
    tl.store(out_ptr + row, _row_scale(x_ptr, row, hidden, hidden_padded, eps))


@triton.jit
def _rope_and_cache_kernel(
    qkv_ptr,
    x_ptr,
    scales_ptr,
    bias_ptr,
    query_norm_ptr,
    key_norm_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    keys_ptr,
    values_ptr,
    eps,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    half_padded: tl.constexpr,
    heads_per_program: tl.constexpr,
    hidden: tl.constexpr,
    hidden_padded: tl.constexpr,
    has_scales: tl.constexpr,
    has_bias: tl.constexpr,
    has_head_norm: tl.constexpr,
):
    """Scales, adds the bias, norms heads, rotates queries in place and keys into the cache; values go to the cache."""
    token = tl.program_id(0)
    heads = tl.program_id(1) * heads_per_program + tl.arange(0, heads_per_program)
    half = head_dim // 2
    lane = tl.arange(0, half_padded)
    total_heads: tl.constexpr = num_heads + 2 * num_kv_heads
    mask = (heads < total_heads)[:, None] & (lane < half)[None, :]
    place = token.to(tl.int64) * total_heads * head_dim + heads[:, None] * head_dim + lane[None, :]
    first = tl.load(qkv_ptr + place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(qkv_ptr + place + half, mask=mask, other=0.0).to(tl.float32)
    if has_scales:
        scale = tl.load(scales_ptr + token)
    else:
        scale = _row_scale(x_ptr, token, hidden, hidden_padded, eps)
    first *= scale
    second *= scale
    if has_bias:
        bias = heads[:, None] * head_dim + lane[None, :]
        first += tl.load(bias_ptr + bias, mask=mask, other=0.0).to(tl.float32)
        second += tl.load(bias_ptr + bias + half, mask=mask, other=0.0).to(tl.float32)
    is_query = heads < num_heads
    is_value = heads >= num_heads + num_kv_heads
    if has_head_norm:
        square = tl.sum(first * first + second * second, axis=1) / head_dim
        inverse = tl.rsqrt(square + eps)[:, None]
        in_head = (lane < half)[None, :]
        q1 = tl.load(query_norm_ptr + lane, mask=lane < half, other=0.0)[None, :]
        q2 = tl.load(query_norm_ptr + half + lane, mask=lane < half, other=0.0)[None, :]
        k1 = tl.load(key_norm_ptr + lane, mask=lane < half, other=0.0)[None, :]
        k2 = tl.load(key_norm_ptr + half + lane, mask=lane < half, other=0.0)[None, :]
        weight1 = tl.where(is_query[:, None], q1, k1)
        weight2 = tl.where(is_query[:, None], q2, k2)
        normed = (~is_value)[:, None] & in_head
        first = tl.where(normed, first * inverse * weight1, first)
        second = tl.where(normed, second * inverse * weight2, second)
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_ptr + position * half + lane, mask=lane < half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * half + lane, mask=lane < half, other=0.0)[None, :]
    rotated_first = tl.where(is_value[:, None], first, first * cos - second * sin)
    rotated_second = tl.where(is_value[:, None], second, second * cos + first * sin)
    cache_dtype = keys_ptr.dtype.element_ty
    if cache_dtype == tl.float8e4nv:
        # Rounded here, so that prompts attend in this step to what later steps will read: it does not matter then where
        # a prompt is cut. Clamped, because fp8 has NaN beyond its largest number.
        stored_first = tl.clamp(rotated_first, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(cache_dtype)
        stored_second = tl.clamp(rotated_second, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(cache_dtype)
        rotated_first = tl.where(is_query[:, None], rotated_first, stored_first.to(tl.float32))
        rotated_second = tl.where(is_query[:, None], rotated_second, stored_second.to(tl.float32))
    dtype = qkv_ptr.dtype.element_ty
    tl.store(qkv_ptr + place, rotated_first.to(dtype), mask=mask & ~is_value[:, None])
    tl.store(qkv_ptr + place + half, rotated_second.to(dtype), mask=mask & ~is_value[:, None])
    # The values too: prompts attend to the rows of this step without a detour through the cache.
    tl.store(qkv_ptr + place, rotated_first.to(dtype), mask=mask & is_value[:, None])
    tl.store(qkv_ptr + place + half, rotated_second.to(dtype), mask=mask & is_value[:, None])
    slot = tl.load(slots_ptr + token)
    kv_head = heads - num_heads - tl.where(is_value, num_kv_heads, 0)
    cache_place = slot * num_kv_heads * head_dim + kv_head[:, None] * head_dim + lane[None, :]
    # A negative slot belongs to a padding row of a captured graph: it writes nothing.
    key_mask = mask & (~is_query & ~is_value)[:, None] & (slot >= 0)
    value_mask = mask & is_value[:, None] & (slot >= 0)
    tl.store(keys_ptr + cache_place, rotated_first.to(cache_dtype), mask=key_mask)
    tl.store(keys_ptr + cache_place + half, rotated_second.to(cache_dtype), mask=key_mask)
    tl.store(values_ptr + cache_place, rotated_first.to(cache_dtype), mask=value_mask)
    tl.store(values_ptr + cache_place + half, rotated_second.to(cache_dtype), mask=value_mask)


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr,
    x_ptr,
    scales_ptr,
    out_ptr,
    eps,
    size: tl.constexpr,
    columns: tl.constexpr,
    hidden: tl.constexpr,
    hidden_padded: tl.constexpr,
    has_scales: tl.constexpr,
):
    """silu(gate) * up, both scaled by 1 / rms of the row."""
    row = tl.program_id(0)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    mask = column < size
    base = gate_up_ptr + row.to(tl.int64) * 2 * size
    gate = tl.load(base + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(base + size + column, mask=mask, other=0.0).to(tl.float32)
    if has_scales:
        scale = tl.load(scales_ptr + row)
    else:
        scale = _row_scale(x_ptr, row, hidden, hidden_padded, eps)
    gate *= scale
    value = gate / (1.0 + tl.exp(-gate)) * up * scale
    tl.store(out_ptr + row.to(tl.int64) * size + column, value.to(out_ptr.dtype.element_ty), mask=mask)


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


def row_scales(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / rms of each row.  # [num_tokens] float32"""
    num_tokens, hidden = x.shape
    out = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    _row_scales_kernel[(num_tokens,)](x, out, eps, hidden, triton.next_power_of_2(hidden))
    return out


def rope_and_cache(
    qkv: torch.Tensor,
    x: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    head_norms: tuple[torch.Tensor, torch.Tensor] | None,
    rope: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    slots: torch.Tensor,
    cache: torch.Tensor,
    eps: float,
    num_heads: int,
) -> None:
    """Finishes queries, keys and values of one layer in place, and writes keys and values to `cache`.

    qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim], the product of the raw x; scales: 1 / rms of each row
    or None (computed here: better for few tokens); rope: (cos, sin), each [max_len, head_dim / 2] float32;
    cache: [2, num_slots, num_kv_heads, head_dim]. A negative slot writes nothing.
    """
    num_tokens, total_heads, head_dim = qkv.shape
    num_kv_heads = cache.shape[2]
    heads_per_program = 4
    query_norm, key_norm = head_norms if head_norms is not None else (x, x)
    _rope_and_cache_kernel[(num_tokens, triton.cdiv(total_heads, heads_per_program))](
        qkv,
        x,
        scales if scales is not None else x,
        bias if bias is not None else x,
        query_norm,
        key_norm,
        rope[0],
        rope[1],
        positions,
        slots,
        cache[0],
        cache[1],
        eps,
        num_heads,
        num_kv_heads,
        head_dim,
        triton.next_power_of_2(head_dim // 2),
        heads_per_program,
        x.shape[1],
        triton.next_power_of_2(x.shape[1]),
        scales is not None,
        bias is not None,
        head_norms is not None,
        num_warps=4,
    )


def silu_mul(
    gate_up: torch.Tensor, x: torch.Tensor, scales: torch.Tensor | None, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """silu(gate) * up of a product of the raw x.  # [num_tokens, 2 * size] → `out` [num_tokens, size]"""
    num_tokens, size = out.shape
    columns = 2048 if num_tokens > 32 else 1024
    _silu_mul_kernel[(num_tokens, triton.cdiv(size, columns))](
        gate_up,
        x,
        scales if scales is not None else x,
        out,
        eps,
        size,
        columns,
        x.shape[1],
        triton.next_power_of_2(x.shape[1]),
        scales is not None,
        num_warps=4,
    )
    return out


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
    """Decode attention over one paged cache, with its workspace for up to `max_batch` sequences."""

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
        self._num_heads, self._num_kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        self._block_size = block_size
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
        group = self._num_heads // self._num_kv_heads
        tile = decode_tile(batch, qkv.dtype, self._num_splits, cache.dtype)
        pairs = cache.dtype == FP8_DTYPE
        _decode_attention_kernel[(batch, self._num_kv_heads, tile.num_splits)](
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
            self._num_heads,
            self._num_kv_heads,
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


@triton.jit
def _gemv_kernel(
    x_ptr, weight_ptr, out_ptr, columns: tl.constexpr, chunk: tl.constexpr, adds: tl.constexpr, even: tl.constexpr
):
    """One output of one token: a row of the weight times x. With `adds` the output is added to what is there."""
    row = tl.program_id(0)
    lane = tl.arange(0, chunk)
    acc = tl.zeros((chunk,), tl.float32)
    base = weight_ptr + row.to(tl.int64) * columns
    for start in range(0, columns, chunk):
        if even:
            weight = tl.load(base + start + lane, cache_modifier=".cg").to(tl.float32)
            x = tl.load(x_ptr + start + lane).to(tl.float32)
        else:
            mask = start + lane < columns
            weight = tl.load(base + start + lane, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
            x = tl.load(x_ptr + start + lane, mask=mask, other=0.0).to(tl.float32)
        acc += weight * x
    result = tl.sum(acc)
    if adds:
        result += tl.load(out_ptr + row).to(tl.float32)
    tl.store(out_ptr + row, result.to(out_ptr.dtype.element_ty))


def gemv(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, adds: bool) -> torch.Tensor:
    """out = x Wᵀ, or out += x Wᵀ, for one token: x [1, columns], weight [rows, columns], out [1, rows].

    Reads the weight at 2.7 to 3.2 TB/s of an H100's 3.0 copied, where cuBLAS reaches 2.0 to 2.9 (Llama-3.1-8B shapes).
    """
    rows, columns = weight.shape
    _gemv_kernel[(rows,)](x, weight, out, columns, 1024, adds, columns % 1024 == 0, num_warps=8, num_stages=3)
    return out


@triton.jit
def _skinny_product_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_tokens,
    rows: tl.constexpr,
    columns: tl.constexpr,
    tokens_padded: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    adds: tl.constexpr,
):
    """x Wᵀ for few tokens: the weight is the large operand, so its rows are the tiles, and all tokens ride along."""
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    token = tl.arange(0, tokens_padded)
    column = tl.arange(0, tile_columns)
    is_token = (token < num_tokens)[None, :]
    acc = tl.zeros((tile_rows, tokens_padded), tl.float32)
    weight_place = weight_ptr + row[:, None].to(tl.int64) * columns + column[None, :]
    x_place = x_ptr + token[None, :] * columns + column[:, None]
    for start in range(0, columns, tile_columns):
        acc = tl.dot(tl.load(weight_place + start), tl.load(x_place + start, mask=is_token, other=0.0), acc)
    out_place = out_ptr + token[None, :] * rows + row[:, None]
    if adds:
        acc += tl.load(out_place, mask=is_token, other=0.0).to(tl.float32)
    tl.store(out_place, acc.to(out_ptr.dtype.element_ty), mask=is_token)


def skinny_tile(num_tokens: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[int, int, int] | None:
    """(rows, columns, stages) of a program of `skinny_product`, or None where cuBLAS is at least as good or must do.

    The fastest of some 40 per shape on an H100; at 16 tokens the products of a Llama-3.1-8B layer take 156 us instead
    of 169, at 64 tokens 167 instead of 170.
    """
    if dtype != torch.bfloat16 or not 2 <= num_tokens <= 64 or rows % 128 or columns % 256:
        return None
    if rows >= 16_384:
        return 128, 128, 4
    if columns >= 8192 and num_tokens <= 32:
        return 32, 256, 6
    return (64, 128, 6) if columns >= 8192 or num_tokens <= 32 else None


def skinny_product(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, tile: tuple[int, int, int], *, adds: bool
) -> torch.Tensor:
    """out = x Wᵀ, or out += x Wᵀ: x [num_tokens, columns], weight [rows, columns], out [num_tokens, rows]."""
    rows, columns = weight.shape
    tile_rows, tile_columns, stages = tile
    _skinny_product_kernel[(rows // tile_rows,)](
        x,
        weight,
        out,
        len(x),
        rows,
        columns,
        max(16, triton.next_power_of_2(len(x))),
        tile_rows,
        tile_columns,
        adds,
        num_warps=4,
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
