"""Triton kernels of kv_transfer/staging.py and kv_transfer/checksum.py, the same to the byte but for the bits of a NaN.

A row is one head of one token; a program has a tile of rows of one plane (the keys or the values of one layer). What is
not converted is moved as 64-bit words. Sums are a pass of their own over the finished buffer, whatever it holds: a part
of a few MB is still in the L2 cache then. Enqueued on the current stream; no host waits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from kv_transfer.checksum import GOLDEN, ROW_WORDS
from kv_transfer.codec import CHECKSUM_BYTES, FP8_MAX, SMALLEST_MAGNITUDE, WireLayout

_TILE = 4096  # elements, or words, of a program
_SUM_ROWS = 256
_SUM_PROGRAMS = 1056  # eight for each multiprocessor of an H100
_FP8_MAX = tl.constexpr(FP8_MAX)
_SMALLEST = tl.constexpr(SMALLEST_MAGNITUDE)
_GOLDEN = tl.constexpr(GOLDEN)
_ROUNDER = tl.constexpr(1.5 * 2**23)  # added and taken away: leaves a float32 below 2^22 rounded to the nearest even

_compiled: dict[tuple[Any, ...], Any] = {}  # kernels, by what Triton compiles apart
_scratches: dict[tuple[torch.device, int], torch.Tensor] = {}  # by device and stream


# One compilation for all lengths: none may fall into a running step.
_compiled_once = triton.jit(
    do_not_specialize=["num_rows", "num_slots"], do_not_specialize_on_alignment=["slots_ptr", "scales_ptr"]
)


@triton.jit
def _converted(x, dtype: tl.constexpr):
    if x.dtype != dtype:
        x = x.to(tl.float32)
        if dtype == tl.float8e4nv:
            x = tl.clamp(x, -_FP8_MAX, _FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
        x = x.to(dtype)
    return x


@triton.jit
def _tile_places(slots_ptr, num_rows, num_slots, heads: tl.constexpr, dim: tl.constexpr, rows: tl.constexpr):
    """Of a program's tile: which rows exist, their rows on the wire, and where each begins in the cache."""
    plane = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    exists = row < num_rows
    slot = tl.load(slots_ptr + row // heads, mask=exists, other=0)
    return exists, plane * num_rows + row, ((plane * num_slots + slot) * heads + row % heads) * dim


@_compiled_once
def _pack_kernel(
    storage_ptr,
    slots_ptr,
    values_ptr,
    scales_ptr,
    num_rows,
    num_slots,
    heads: tl.constexpr,
    dim: tl.constexpr,
    dim_padded: tl.constexpr,
    rows: tl.constexpr,
    has_scales: tl.constexpr,
):
    lane = tl.arange(0, dim_padded)
    exists, wire_row, start = _tile_places(slots_ptr, num_rows, num_slots, heads, dim, rows)
    mask = exists[:, None] & (lane < dim)[None, :]
    x = tl.load(storage_ptr + start[:, None] + lane[None, :], mask=mask, other=0.0)
    if has_scales:
        x = x.to(tl.float32)
        magnitude = tl.abs(x)
        finite = tl.min((magnitude < float("inf")).to(tl.int32), axis=1) == 1
        largest = tl.max(tl.where(magnitude < float("inf"), magnitude, 0.0), axis=1)
        usable = finite & (largest >= _SMALLEST)
        scale = tl.where(usable, tl.div_rn(largest, tl.full((rows,), 127.0, tl.float32)), 0.0)
        tl.store(scales_ptr + wire_row, tl.where(finite, scale, float("nan")), mask=exists)
        divisor = tl.broadcast_to(tl.where(usable, scale, 1.0)[:, None], (rows, dim_padded))
        steps = tl.div_rn(tl.where(usable[:, None], x, 0.0), divisor)
        y = ((steps + _ROUNDER) - _ROUNDER).to(tl.int8)
    else:
        y = _converted(x, values_ptr.dtype.element_ty)
    tl.store(values_ptr + wire_row[:, None] * dim + lane[None, :], y, mask=mask)


@_compiled_once
def _unpack_kernel(
    storage_ptr,
    slots_ptr,
    values_ptr,
    scales_ptr,
    num_rows,
    num_slots,
    heads: tl.constexpr,
    dim: tl.constexpr,
    dim_padded: tl.constexpr,
    rows: tl.constexpr,
    has_scales: tl.constexpr,
):
    lane = tl.arange(0, dim_padded)
    exists, wire_row, start = _tile_places(slots_ptr, num_rows, num_slots, heads, dim, rows)
    mask = exists[:, None] & (lane < dim)[None, :]
    x = tl.load(values_ptr + wire_row[:, None] * dim + lane[None, :], mask=mask, other=0.0)
    if has_scales:
        x = x.to(tl.float32) * tl.load(scales_ptr + wire_row, mask=exists, other=0.0)[:, None]
    tl.store(storage_ptr + start[:, None] + lane[None, :], _converted(x, storage_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _place_weight(place):
    spread = (place + 1).to(tl.int64) * _GOLDEN
    return (spread ^ (spread >> 29)) | 1


@triton.jit(do_not_specialize=["num_pairs", "num_rows"], do_not_specialize_on_alignment=["answer_ptr"])
def _sums_kernel(
    words_ptr,
    answer_ptr,
    scratch_ptr,
    num_pairs,
    num_rows,
    row_words: tl.constexpr,
    rows: tl.constexpr,
    seals: tl.constexpr,
):
    """The last program to end finds both sums in the scratch: it writes the trailer or compares, and clears them."""
    column = tl.arange(0, row_words)
    weights = _place_weight(column)
    first = tl.zeros((rows,), tl.int64)
    second = tl.zeros((rows,), tl.int64)
    for start in range(tl.program_id(0) * rows, num_rows, tl.num_programs(0) * rows):
        row = start + tl.arange(0, rows)
        place = row.to(tl.int64)[:, None] * row_words + column[None, :]
        words = tl.load(words_ptr + place, mask=place < num_pairs * 2, other=0)  # known to be even: 16-byte loads
        row_sum = tl.sum(words * weights[None, :], axis=1)
        folded = row_sum ^ ((row_sum >> 32) & 0xFFFFFFFF)
        first += row_sum
        second += folded * _place_weight(row)
    tl.atomic_add(scratch_ptr, tl.sum(first, axis=0), sem="relaxed")
    tl.atomic_add(scratch_ptr + 1, tl.sum(second, axis=0), sem="relaxed")
    num_ended = tl.atomic_add(scratch_ptr + 2, 1, sem="acq_rel")
    if num_ended == tl.num_programs(0) - 1:
        first_sum = tl.atomic_xchg(scratch_ptr, 0)
        second_sum = tl.atomic_xchg(scratch_ptr + 1, 0)
        tl.atomic_xchg(scratch_ptr + 2, 0)
        trailer_ptr = words_ptr + num_pairs.to(tl.int64) * 2
        if seals:
            tl.store(trailer_ptr, first_sum)
            tl.store(trailer_ptr + 1, second_sum)
        else:
            is_right = (tl.load(trailer_ptr) == first_sum) & (tl.load(trailer_ptr + 1) == second_sum)
            tl.store(answer_ptr, is_right)


def pack(
    storage: torch.Tensor,
    slots: torch.Tensor,
    layout: WireLayout,
    values: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    """Writes the slots of the first layers of `storage` to `values` and `scales` (kv_transfer/staging.py)."""
    _moving(_pack_kernel, storage, slots, layout, values, scales)()


def unpacking(
    storage: torch.Tensor,
    slots: torch.Tensor,
    layout: WireLayout,
    values: torch.Tensor,
    scales: torch.Tensor | None,
) -> Callable[[], None]:
    """The way back, made ready: the call writes to these slots of the first layers of `storage`."""
    return _moving(_unpack_kernel, storage, slots, layout, values, scales)


def seal(wire: torch.Tensor) -> None:
    """Writes the sums of uint8 [num_bytes] without its last 16 bytes into those (kv_transfer/checksum.py)."""
    _sum(wire, wire, seals=True)


def check(wire: torch.Tensor, answer: torch.Tensor) -> None:
    """Whether the last 16 bytes are what `seal` would write, into `answer`: bool [1], on the device or pinned."""
    _sum(wire, answer, seals=False)


def _sum(wire: torch.Tensor, answer: torch.Tensor, *, seals: bool) -> None:
    words = wire.view(torch.int64)
    num_words = len(words) - CHECKSUM_BYTES // 8
    num_rows = triton.cdiv(num_words, ROW_WORDS)
    num_programs = max(1, min(triton.cdiv(num_rows, _SUM_ROWS), _SUM_PROGRAMS))
    arguments = words, answer, _scratch(wire), num_words // 2, num_rows, ROW_WORDS, _SUM_ROWS, seals
    key = id(_sums_kernel), wire.device, seals, wire.data_ptr() % 16
    _launch(_sums_kernel, key, (num_programs, 1, 1), arguments)


def _scratch(wire: torch.Tensor) -> torch.Tensor:
    """Two sums and a counter for the kernels of the current stream, zero between them.  # int64 [3]"""
    stream = torch.cuda.current_stream(wire.device).cuda_stream if wire.is_cuda else 0
    key = wire.device, stream
    scratch = _scratches.get(key)
    if scratch is None:
        scratch = _scratches[key] = torch.zeros(3, dtype=torch.int64, device=wire.device)
    return scratch


def _moving(
    kernel,
    storage: torch.Tensor,
    slots: torch.Tensor,
    layout: WireLayout,
    values: torch.Tensor,
    scales: torch.Tensor | None,
) -> Callable[[], None]:
    dim = layout.head_dim
    if values.dtype == storage.dtype and dim * storage.element_size() % 8 == 0:
        storage, values = storage.view(torch.int64), values.view(torch.int64)
        dim = storage.shape[-1]
    dim_padded = triton.next_power_of_2(dim)
    rows = max(1, _TILE // dim_padded)
    num_rows = layout.num_tokens * layout.num_kv_heads
    places = storage, slots, values, values if scales is None else scales
    shape = layout.num_kv_heads, dim, dim_padded, rows, scales is not None
    alignment = storage.data_ptr() % 16, values.data_ptr() % 16
    key = id(kernel), storage.device, storage.dtype, values.dtype, *alignment, *shape
    grid = triton.cdiv(num_rows, rows), 2 * layout.num_layers, 1
    return partial(_launch, kernel, key, grid, (*places, num_rows, storage.shape[2], *shape))


def _launch(kernel, key: tuple[Any, ...], grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
    """`key` tells apart what Triton compiles apart. To find that out itself takes it 36 us a launch, this 8."""
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*arguments, num_warps=8)
    else:
        compiled[grid](*arguments)
