"""Triton kernels of products with bf16 weights, where they beat cuBLAS: for one token and for a few, which read faster,
and for prompts the first product of the MLP, which ends in its activation."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

_MLP_TOKENS, _MLP_COLUMNS, _MLP_DEPTH = 128, 128, 64  # of a tile: rows of x, columns of gate and as many of up
_MLP_GROUP = tl.constexpr(16)  # tiles of so many rows of x follow each other: they share columns of the weight in L2


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
    """x Wᵀ for few tokens: the weight is the large operand, so its rows are the tiles, with all tokens in each."""
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


@triton.jit
def _mlp_tile(index, num_row_tiles, num_column_tiles):
    """Where the tile of a number lies: down a group of row tiles first, then on to the next columns."""
    per_group = _MLP_GROUP * num_column_tiles
    first = (index // per_group) * _MLP_GROUP
    size = tl.minimum(num_row_tiles - first, _MLP_GROUP)
    inside = index % per_group
    return first + inside % size, inside // size


@triton.jit(do_not_specialize=["num_tokens"])
def _gate_up_silu_kernel(
    x_desc,
    weight_desc,
    scales_ptr,
    out_desc,
    num_tokens,
    size: tl.constexpr,
    columns: tl.constexpr,
    tile_tokens: tl.constexpr,
    tile_size: tl.constexpr,
    tile_depth: tl.constexpr,
    num_programs: tl.constexpr,
):
    """A program computes every num_programs-th tile; the next one's operands are loaded while this one is stored.

    The weight is seen as [2, size, columns], so that the rows of gate and of up that belong together are one operand.
    """
    num_row_tiles = tl.cdiv(num_tokens, tile_tokens)
    num_column_tiles = size // tile_size
    stored = tl.program_id(0) - num_programs  # not the loop's own number: what the flattened loop carries is expensive
    for index in tl.range(tl.program_id(0), num_row_tiles * num_column_tiles, num_programs, flatten=True):
        row, column = _mlp_tile(index, num_row_tiles, num_column_tiles)
        acc = tl.zeros((tile_tokens, 2 * tile_size), tl.float32)
        for start in range(0, columns, tile_depth):
            x = x_desc.load([row * tile_tokens, start])
            weight = tl.reshape(weight_desc.load([0, column * tile_size, start]), (2 * tile_size, tile_depth))
            acc = tl.dot(x, weight.T, acc)
        stored += num_programs
        row, column = _mlp_tile(stored, num_row_tiles, num_column_tiles)
        gate, up = tl.split(tl.permute(tl.reshape(acc, (tile_tokens, 2, tile_size)), (0, 2, 1)))
        token = row * tile_tokens + tl.arange(0, tile_tokens)
        scale = tl.load(scales_ptr + token, mask=token < num_tokens, other=0.0)[:, None]
        gate *= scale
        value = gate / (1.0 + tl.exp(-gate)) * (up * scale)
        out_desc.store([row * tile_tokens, column * tile_size], value.to(out_desc.dtype))


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    """0 where `gate_up_silu` was not measured: it needs Hopper's copies of tiles."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count if properties.major == 9 else 0


def _num_mlp_tiles(num_tokens: int, size: int) -> int:
    return triton.cdiv(num_tokens, _MLP_TOKENS) * (size // _MLP_COLUMNS)


def has_gate_up_silu(num_tokens: int, weight: torch.Tensor) -> bool:
    """Whether `gate_up_silu` can do it, and has so many tiles that a last round of few does not matter.

    weight: [2 * size, columns].
    """
    rows, columns = weight.shape
    size = rows // 2
    if weight.dtype != torch.bfloat16 or size % _MLP_COLUMNS or columns % _MLP_DEPTH:
        return False
    num_programs = _num_multiprocessors(weight.device)
    return bool(num_programs) and _num_mlp_tiles(num_tokens, size) > 6 * num_programs


def gate_up_silu(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """silu(scale · gate) · (scale · up), where (gate, up) = x Wᵀ: the product and `silu_mul` in one kernel.

    x [num_tokens, columns], weight [2 * size, columns], scales [num_tokens] float32, out [num_tokens, size].

    cuBLAS and `silu_mul` take 5 % longer at 2,048, 8,192 and 16,384 tokens of Llama-3.1-8B, under a load that lasts
    (0.73, 2.91 and 5.85 ms on an H200): as a product alone it is 2 % slower than cuBLAS, which then stores and loads
    twice the result. The best of 28 kernels: rows of gate and up that alternate, in the weight or by 128, and a
    specialised producer of operands were 1 to 2 % faster, and need another layout of the weight or of the kernel.
    """
    rows, columns = weight.shape
    size, num_tokens = rows // 2, len(x)
    num_programs = min(_num_multiprocessors(weight.device), _num_mlp_tiles(num_tokens, size))
    _gate_up_silu_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(x, [_MLP_TOKENS, _MLP_DEPTH]),
        TensorDescriptor.from_tensor(weight.view(2, size, columns), [2, _MLP_COLUMNS, _MLP_DEPTH]),
        scales,
        TensorDescriptor.from_tensor(out, [_MLP_TOKENS, _MLP_COLUMNS]),
        num_tokens,
        size,
        columns,
        _MLP_TOKENS,
        _MLP_COLUMNS,
        _MLP_DEPTH,
        num_programs,
        num_warps=8,
        num_stages=4,
    )
    return out
