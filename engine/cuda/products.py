"""Triton kernels of products with bf16 weights for one token and for a few, where they read faster than cuBLAS."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


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
    of 169, at 64 tokens 167 instead of 170. Those of half a layer (rows from 12,288 on, columns of 7,168) are the
    fastest of as many on an H200: `benchmarks/product_tiles.py`.
    """
    if dtype != torch.bfloat16 or not 2 <= num_tokens <= 64 or rows % 128 or columns % 256:
        return None
    if rows >= 16_384:
        return 128, 128, 4
    if rows >= 12_288:
        return 64, 128, 4 if num_tokens <= 32 else 3
    if columns >= 7168 and num_tokens <= 32:
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
