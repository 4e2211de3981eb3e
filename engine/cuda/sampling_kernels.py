"""Triton kernel that draws tokens: top-k, top-p, min-p and inverse transform sampling, a program per row, no sort.

A threshold is found by counting, or adding up, what lies above eight candidates at once: a ninth of the range is left
after each pass over the row. Most passes see few values, because the row is thinned out first: what a cheap bound
shows to lie below the threshold is dropped.
"""

# ruff: noqa: SIM108 (a branch on a constant is decided when the kernel is compiled; a ternary would not be)

from __future__ import annotations

import torch
import triton
import triton.language as tl

NUM_PARAMS = 8  # columns of `params`
_CHUNK = 4096  # values looked at together, one in each lane
_DEPTH = 4  # values that a lane of a thinned-out row has room for
_THRESHOLDS = tl.constexpr(8)


@triton.jit
def _order_of(value):
    """float32 → int64 that compares like it: equal steps are neighbouring floats."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _value_of(order):
    """The inverse of `_order_of`."""
    bits = order.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _load(values_ptr, offsets, size):
    return tl.load(values_ptr + offsets, mask=offsets < size, other=-float("inf")).to(tl.float32)


@triton.jit
def _search(values_ptr, size, low, high, goal, peak, scale, by_mass: tl.constexpr, chunk: tl.constexpr):
    """The largest threshold of low to high that as many values as `goal` reach, or else low.

    by_mass: values count with their weight, else each as 1.
    """
    lane = tl.arange(0, chunk)[None, :]
    nth = (tl.arange(0, _THRESHOLDS) + 1)[:, None]
    low_order = _order_of(low)
    high_order = _order_of(high)
    while low_order < high_order:
        step = (high_order - low_order) // (_THRESHOLDS + 1) + 1
        threshold = _value_of(low_order + nth * step)
        above = tl.zeros((_THRESHOLDS, chunk), tl.float32)
        for start in range(0, size, chunk):
            x = _load(values_ptr, start + lane, size)
            if by_mass:
                weight = tl.exp2((x - peak) * scale)
            else:
                weight = tl.full((1, chunk), 1.0, tl.float32)
            above += tl.where(x >= threshold, weight, 0.0)
        reached = tl.sum((tl.sum(above, axis=1) >= goal).to(tl.int32), axis=0)
        low_order += reached * step
        high_order = tl.minimum(high_order, low_order + step - 1)
    return _value_of(low_order)


@triton.jit
def _mass(values_ptr, size, cutoff, peak, scale, chunk: tl.constexpr):
    """(weight of all values from `cutoff` on, in float64; the last place that has any)."""
    lane = tl.arange(0, chunk)
    total = tl.zeros((chunk,), tl.float64)
    last = tl.zeros((chunk,), tl.int32)
    for start in range(0, size, chunk):
        x = _load(values_ptr, start + lane, size)
        weight = tl.where(x >= cutoff, tl.exp2((x - peak) * scale), 0.0)
        total += weight.to(tl.float64)
        last = tl.where(weight > 0, start + lane, last)
    return tl.sum(total, axis=0), tl.max(last, axis=0)


@triton.jit
def _thin_out(logits_ptr, size, floor, values_ptr, chunk: tl.constexpr, depth: tl.constexpr):
    """Copies the values from `floor` on, each into its lane, over -inf; the most of a lane, even if above `depth`."""
    lane = tl.arange(0, chunk)
    for layer in range(depth):
        tl.store(values_ptr + layer * chunk + lane, tl.full((chunk,), -float("inf"), tl.float32))
    tl.debug_barrier()
    count = tl.zeros((chunk,), tl.int32)
    for start in range(0, size, chunk):
        x = _load(logits_ptr, start + lane, size)
        is_kept = x >= floor
        tl.store(values_ptr + count * chunk + lane, x, mask=is_kept & (count < depth))
        count += is_kept.to(tl.int32)
    tl.debug_barrier()
    return tl.max(count, axis=0)


@triton.jit
def _cutoff(values_ptr, size, floor, peak, scale, top_k, top_p, mass, chunk: tl.constexpr):
    """The least value that top-k and top-p leave, at least `floor`. mass: that of all, needed for top-p alone."""
    cutoff = floor
    if top_k > 0:
        cutoff = _search(values_ptr, size, floor, peak, top_k.to(tl.float32), peak, scale, False, chunk)
    if top_p < 1:
        if top_k > 0:
            mass, _ = _mass(values_ptr, size, cutoff, peak, scale, chunk)
        # The largest value is kept whatever top-p is, 0 included: its weight is 1.
        goal = tl.maximum(top_p * mass, 1e-30).to(tl.float32)
        cutoff = _search(values_ptr, size, cutoff, peak, goal, peak, scale, True, chunk)
    return cutoff


@triton.jit
def _pick(logits_ptr, size, cutoff, peak, scale, uniform, chunk: tl.constexpr):
    """The place where the cumulative weight of the values from `cutoff` on passes the share `uniform` of all."""
    total, last = _mass(logits_ptr, size, cutoff, peak, scale, chunk)
    target = uniform * total
    lane = tl.arange(0, chunk)
    running = 0.0 * total
    found = -1
    start = 0
    while (found < 0) & (start < size):
        x = _load(logits_ptr, start + lane, size)
        weight = tl.where(x >= cutoff, tl.exp2((x - peak) * scale), 0.0).to(tl.float64)
        added = tl.sum(weight, axis=0)
        if running + added > target:
            is_past = (running + tl.cumsum(weight, axis=0) > target) & (weight > 0)
            first = tl.min(tl.where(is_past, start + lane, size), axis=0)
            found = tl.where(first < size, first, -1)
        running += added
        start += chunk
    # Rounding may put a target on the total itself; the last token with any probability is then the one.
    return tl.where(found < 0, last, found)


@triton.jit
def _draw_kernel(
    logits_ptr,
    params_ptr,
    values_ptr,
    tokens_ptr,
    row_stride,
    vocab_size,
    chunk: tl.constexpr,
    depth: tl.constexpr,
    num_params: tl.constexpr,
):
    """See `draw_tokens`."""
    row = tl.program_id(0).to(tl.int64)
    params = params_ptr + row * num_params
    logits = logits_ptr + tl.load(params).to(tl.int64) * row_stride
    token_place = tl.load(params + 1).to(tl.int64)
    temperature = tl.load(params + 2).to(tl.float32)
    values = values_ptr + row * depth * chunk
    lane = tl.arange(0, chunk)
    # The largest value of each lane, where it was first, and whether the lane saw a NaN.
    best = tl.full((chunk,), -float("inf"), tl.float32)
    at = tl.zeros((chunk,), tl.int32)
    is_nan = tl.zeros((chunk,), tl.int32)
    for start in range(0, vocab_size, chunk):
        x = _load(logits, start + lane, vocab_size)
        is_nan |= (x != x).to(tl.int32)
        at = tl.where(x > best, start + lane, at)
        best = tl.maximum(best, x)
    peak = tl.max(best, axis=0)
    token = tl.min(tl.where(best == peak, at, vocab_size), axis=0)
    is_unusable = (tl.max(is_nan, axis=0) > 0) | (tl.abs(peak) == float("inf"))
    if is_unusable:
        token = -1
    elif temperature > 0:
        top_k = tl.load(params + 3).to(tl.int32)
        top_p = tl.load(params + 4)
        min_p_cutoff = peak + tl.load(params + 5).to(tl.float32) * temperature
        uniform = tl.load(params + 6)
        scale = tl.load(params + 7).to(tl.float32)
        floor = -float("inf") + 0.0 * peak
        mass = 0.0 * uniform
        if top_k > 0:
            if top_k <= chunk:
                # k lanes whose largest value is at least this show k values that are.
                tl.store(values + lane, best)
                tl.debug_barrier()
                floor = _search(values, chunk, floor, peak, top_k.to(tl.float32), peak, scale, False, chunk)
                tl.debug_barrier()
        elif top_p < 1:
            mass, _ = _mass(logits, vocab_size, floor, peak, scale, chunk)
            # All tokens below this together weigh less than what top-p may leave out.
            reach = tl.log(vocab_size / ((1.0 - top_p) * mass)) + 1.0
            floor = peak - reach.to(tl.float32) * temperature
        cutoff = floor
        if (top_k > 0) | (top_p < 1):
            most = depth + 1
            if floor > -float("inf"):
                most = _thin_out(logits, vocab_size, floor, values, chunk, depth)
            if most <= depth:
                cutoff = _cutoff(values, most * chunk, floor, peak, scale, top_k, top_p, mass, chunk)
            else:
                cutoff = _cutoff(logits, vocab_size, floor, peak, scale, top_k, top_p, mass, chunk)
        token = _pick(logits, vocab_size, tl.maximum(cutoff, min_p_cutoff), peak, scale, uniform, chunk)
    tl.store(tokens_ptr + token_place, token.to(tl.int64))


def draw_tokens(logits: torch.Tensor, params: torch.Tensor, tokens: torch.Tensor) -> None:
    """Draws a token per row of `params`; writes -1 for a row whose logits hold a NaN, or infinity where
    the largest should be.

    logits: [n, vocab_size] with rows in one piece; params: [num_rows, NUM_PARAMS] float64 with the columns row of
    `logits`, place in `tokens`, temperature (0: the first of the largest logits), top_k (0: off; below vocab_size),
    top_p, ln(min_p), uniform number, log2(e) / temperature; tokens: int64.
    """
    num_rows = params.shape[0]
    if num_rows == 0:
        return
    values = torch.empty(num_rows, _DEPTH * _CHUNK, dtype=torch.float32, device=logits.device)
    _draw_kernel[(num_rows,)](
        logits,
        params,
        values,
        tokens,
        logits.stride(0),
        logits.shape[1],
        _CHUNK,
        _DEPTH,
        NUM_PARAMS,
        num_warps=16,
    )
