"""Triton kernels of what stands between two matrix products: norms, rotary embedding, cache, activation.

The norms are folded into the products around them (engine/cuda/decoder.py): a product runs on the raw residual stream,
and the kernel behind it multiplies by each row's 1 / rms. So a layer is four products and three kernels.

Shapes: x [num_tokens, hidden]; qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; the cache's K and V of a
layer [num_slots, num_kv_heads, head_dim], in x's dtype or fp8. Strides are those of contiguous tensors. Head dims are
powers of two.
"""

# ruff: noqa: SIM108 (a branch on a constant is decided when the kernel is compiled; a ternary would not be)

from __future__ import annotations

import torch
import triton
import triton.language as tl


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
