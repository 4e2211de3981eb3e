"""Products with fp8 weights on CUDA. The plain twin is Linear with an Fp8Weight (engine/layers).

Few rows are bound by reading the weight: two kernels read it as fp8, multiply it as bf16 with the bf16 activations, and
scale the sums. Many rows are bound by arithmetic: the activations are quantised too, each token with a scale of its
own, and torch's scaled product multiplies fp8 by fp8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.layers.fp8 import FP8_DTYPE, FP8_MAX, Fp8Weight

# From this many rows on the activations are quantised; fewer are multiplied as they are.
ROWS_FOR_FP8_ACTIVATIONS = 65
# The tensor cores of Hopper add fp8 products with 14 bits; without this, cuBLAS adds partial sums in float32.
_FAST_ACCUMULATION = False


class Fp8Product:
    """x Wᵀ with one fp8 weight."""

    def __init__(self, weight: Fp8Weight) -> None:
        self._weight = weight
        # By stream: a step's prompts may be multiplied beside its decodes (StepExecutor._replay).
        self._arrivals: dict[int, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, columns] bf16 → [num_tokens, rows] bf16"""
        if len(x) >= ROWS_FOR_FP8_ACTIVATIONS:
            return self._scaled(x)
        return self._few(x, x.new_empty(len(x), len(self._weight.scales)), adds=False)

    def add_to(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """out [num_tokens, rows] += x [num_tokens, columns] Wᵀ"""
        if len(x) >= ROWS_FOR_FP8_ACTIVATIONS:
            out += self._scaled(x)
        else:
            self._few(x, out, adds=True)

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        """As `__call__`, for many rows: with quantised activations."""
        values, scales = quantize_rows(x)
        return torch._scaled_mm(
            values,
            self._weight.values.t(),
            scale_a=scales.unsqueeze(1),
            scale_b=self._weight.scales.unsqueeze(0),
            out_dtype=x.dtype,
            use_fast_accum=_FAST_ACCUMULATION,
        )

    def _few(self, x: torch.Tensor, out: torch.Tensor, *, adds: bool) -> torch.Tensor:
        """As `__call__` or `add_to`, for few rows: with activations as they are."""
        if len(x) == 1:
            return gemv_fp8(x, self._weight, out, adds=adds)
        tile = skinny_fp8_tile(*self._weight.values.shape)
        return skinny_product_fp8(x, self._weight, out, tile, self._arrivals_of_stream(), adds=adds)

    def _arrivals_of_stream(self) -> torch.Tensor:
        """How many shares of a tile are done: zeros before and after every product.  # [at least tiles] int32

        Made at a stream's first product, which must not be captured: a graph could not rely on the zeros.
        """
        scales = self._weight.scales
        stream = torch.cuda.current_stream(scales.device).cuda_stream
        if stream not in self._arrivals:
            self._arrivals[stream] = torch.zeros(triton.cdiv(len(scales), 16), dtype=torch.int32, device=scales.device)
        return self._arrivals[stream]


@triton.jit
def _quantize_rows_kernel(
    x_ptr, values_ptr, scales_ptr, largest: tl.constexpr, columns: tl.constexpr, columns_padded: tl.constexpr
):
    """One row: its largest magnitude becomes the largest fp8 number."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, columns_padded)
    mask = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x)), 1e-12) / largest
    # A quotient may round to a little more than the largest number, and that would become NaN.
    value = tl.clamp(x / scale, -largest, largest, propagate_nan=tl.PropagateNan.ALL)
    tl.store(values_ptr + row * columns + column, value.to(values_ptr.dtype.element_ty), mask=mask)
    tl.store(scales_ptr + row, scale)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [num_tokens, columns] → (values e4m3 of the same shape, scales [num_tokens] float32)."""
    num_tokens, columns = x.shape
    values = torch.empty(x.shape, dtype=FP8_DTYPE, device=x.device)
    scales = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    _quantize_rows_kernel[(num_tokens,)](
        x, values, scales, FP8_MAX, columns, triton.next_power_of_2(columns), num_warps=8
    )
    return values, scales


@triton.jit
def _gemv_fp8_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    out_ptr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    tile_rows: tl.constexpr,
    chunk: tl.constexpr,
    adds: tl.constexpr,
    even: tl.constexpr,
):
    """Some outputs of one token: rows of the weight times x. With `adds` they are added to what is there."""
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    lane = tl.arange(0, chunk)
    is_row = row < rows
    acc = tl.zeros((tile_rows, chunk), tl.float32)
    base = weight_ptr + row[:, None].to(tl.int64) * columns + lane[None, :]
    for start in range(0, columns, chunk):
        if even:
            weight = tl.load(base + start, cache_modifier=".cg").to(tl.float32)
            x = tl.load(x_ptr + start + lane).to(tl.float32)
        else:
            mask = start + lane < columns
            weight = tl.load(base + start, mask=is_row[:, None] & mask[None, :], other=0.0).to(tl.float32)
            x = tl.load(x_ptr + start + lane, mask=mask, other=0.0).to(tl.float32)
        acc += weight * x[None, :]
    result = tl.sum(acc, axis=1) * tl.load(scales_ptr + row, mask=is_row, other=0.0)
    if adds:
        result += tl.load(out_ptr + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, result.to(out_ptr.dtype.element_ty), mask=is_row)


# (rows, columns, warps) of a program. A thread then loads 16 bytes at a time.
GEMV_TILE = (4, 1024, 4)


def gemv_fp8(
    x: torch.Tensor,
    weight: Fp8Weight,
    out: torch.Tensor,
    *,
    adds: bool,
    tile: tuple[int, int, int] = GEMV_TILE,
) -> torch.Tensor:
    """out = x Wᵀ, or out += x Wᵀ, for one token: x [1, columns], out [1, rows]."""
    rows, columns = weight.values.shape
    tile_rows, chunk, warps = tile
    even = rows % tile_rows == 0 and columns % chunk == 0
    _gemv_fp8_kernel[(triton.cdiv(rows, tile_rows),)](
        x, weight.values, weight.scales, out, rows, columns, tile_rows, chunk, adds, even, num_warps=warps
    )
    return out


@triton.jit
def _store_scaled(sums, scale, out_ptr, place, mask, adds: tl.constexpr):
    result = sums * scale
    if adds:
        result += tl.load(out_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _skinny_fp8_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    num_tokens,
    rows: tl.constexpr,
    columns: tl.constexpr,
    tokens_padded: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    num_splits: tl.constexpr,
    share: tl.constexpr,
    adds: tl.constexpr,
    even: tl.constexpr,
    precision: tl.constexpr,
):
    """x Wᵀ for few tokens: the weight's rows are the tiles, each program has a share of the columns.

    The last share to arrive adds all of them in order, so that the sum does not depend on who was last.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    row = tile * tile_rows + tl.arange(0, tile_rows)
    token = tl.arange(0, tokens_padded)
    column = tl.arange(0, tile_columns)
    is_row = (row < rows)[:, None]
    is_token = (token < num_tokens)[None, :]
    acc = tl.zeros((tile_rows, tokens_padded), tl.float32)
    weight_place = weight_ptr + row[:, None].to(tl.int64) * columns + column[None, :]
    x_place = x_ptr + token[None, :] * columns + column[:, None]
    first = split * share
    for start in range(first, tl.minimum(first + share, columns), tile_columns):
        if even:
            weight = tl.load(weight_place + start)
            x = tl.load(x_place + start, mask=is_token, other=0.0)
        else:
            is_column = start + column < columns
            weight = tl.load(weight_place + start, mask=is_row & is_column[None, :], other=0.0)
            x = tl.load(x_place + start, mask=is_token & is_column[:, None], other=0.0)
        # By way of float32: the one conversion straight to bf16 that there is has a quarter of the throughput.
        acc = tl.dot(weight.to(tl.float32).to(x.dtype), x, acc, input_precision=precision)
    is_out = is_row & is_token
    place = token[None, :] * rows + row[:, None]
    scale = tl.load(scales_ptr + row, mask=row < rows, other=0.0)[:, None]
    if num_splits == 1:
        _store_scaled(acc, scale, out_ptr, place, is_out, adds)
        return
    tl.store(partial_ptr + split * num_tokens * rows + place, acc, mask=is_out)
    tl.debug_barrier()
    arrival = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel")
    if arrival == num_splits - 1:
        tl.store(arrivals_ptr + tile, 0)  # ready for the next product
        total = tl.zeros((tile_rows, tokens_padded), tl.float32)
        for other in range(num_splits):
            part = partial_ptr + other * num_tokens * rows + place
            total += tl.load(part, mask=is_out, other=0.0, cache_modifier=".cg")
        _store_scaled(total, scale, out_ptr, place, is_out, adds)


@dataclass(frozen=True, slots=True)
class SkinnyTile:
    """How a program of `skinny_product_fp8` works: weight rows and columns at a time, shares of the columns."""

    rows: int
    columns: int
    num_splits: int
    num_warps: int
    num_stages: int


def skinny_fp8_tile(rows: int, columns: int) -> SkinnyTile:
    """Enough programs for the 132 multiprocessors of an H100; the fastest of some 40 per shape at 64 tokens there."""
    if rows > 4096:
        return SkinnyTile(64, 128, 1, 4, 4)
    return SkinnyTile(64, 256, 2 if columns >= 2048 else 1, 4, 4)


def skinny_product_fp8(
    x: torch.Tensor,
    weight: Fp8Weight,
    out: torch.Tensor,
    tile: SkinnyTile,
    arrivals: torch.Tensor,
    *,
    adds: bool,
) -> torch.Tensor:
    """out = x Wᵀ, or out += x Wᵀ: x [num_tokens, columns], out [num_tokens, rows].

    arrivals: [at least rows / tile.rows] int32 zeros, which are zeros again afterwards.
    """
    rows, columns = weight.values.shape
    num_tokens = len(x)
    partial = x.new_empty(tile.num_splits * num_tokens * rows if tile.num_splits > 1 else 0, dtype=torch.float32)
    _skinny_fp8_kernel[(triton.cdiv(rows, tile.rows), tile.num_splits)](
        x,
        weight.values,
        weight.scales,
        out,
        partial,
        arrivals,
        num_tokens,
        rows,
        columns,
        max(16, triton.next_power_of_2(num_tokens)),
        tile.rows,
        tile.columns,
        tile.num_splits,
        triton.cdiv(triton.cdiv(columns, tile.columns), tile.num_splits) * tile.columns,
        adds,
        rows % tile.rows == 0 and columns % tile.columns == 0,
        "ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
