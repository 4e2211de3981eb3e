"""Sums over the GPUs of one host that are short enough for a decode step: x += the partial products, in one kernel.

Every rank writes its partial product into memory that the others have mapped, tells them, waits for theirs, and adds
all of them up itself, in the order of the ranks, so that every rank gets the same bits. The sum goes into the residual
stream at once, and the row's 1 / rms, which the next kernel needs, comes with it. The plain twin is
Group.all_reduce (engine/tensor_parallel.py).

Such a kernel waits once, at its start, because partial products go to two slots in turn. A rank that has passed the
wait of one sum knows that the others have ended the sum before it, whose slot is the one that is written next.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from engine.tensor_parallel import Group

_PROGRAMS = 128  # all of them run at once on any GPU that this is for: they wait for each other
_MAX_ROWS = 1024
_SLOT_BYTES = 8 << 20
_KEYS_AT = 16 << 10
_SLOTS_AT = 64 << 10


@triton.jit
def _meet(signals, counts_ptr, program, rank: tl.constexpr, size: tl.constexpr, programs: tl.constexpr):
    """Returns when this program has been reached on every rank; what they wrote before is visible then.

    A signal is a number that grows with every meeting, so that none has to be reset.
    """
    count = tl.load(counts_ptr + program) + 1
    for other in tl.static_range(size):
        if other != rank:
            tl.atomic_xchg(signals[other] + rank * programs + program, count, sem="release", scope="sys")
    for other in tl.static_range(size):
        if other != rank:
            place = signals[rank] + other * programs + program
            while tl.atomic_cas(place, 0, 0, sem="acquire", scope="sys") - count < 0:
                pass
    tl.store(counts_ptr + program, count)
    tl.debug_barrier()


@triton.jit
def _add_sum_kernel(
    x_ptr,
    scales_ptr,
    partials,
    signals,
    counts_ptr,
    eps,
    num_rows,
    hidden: tl.constexpr,
    hidden_padded: tl.constexpr,
    rank: tl.constexpr,
    size: tl.constexpr,
    programs: tl.constexpr,
):
    """x += the sum of `size` partial products, and 1 / rms of each new row."""
    program = tl.program_id(0)
    if size > 1:
        _meet(signals, counts_ptr, program, rank, size, programs)
    lane = tl.arange(0, hidden_padded)
    mask = lane < hidden
    for row in range(program, num_rows, tl.num_programs(0)):
        place = row * hidden + lane  # in 32 bits: a step has far less than 2^31 hidden values
        total = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        for other in tl.static_range(size):
            total += tl.load(partials[other] + place, mask=mask, other=0.0).to(tl.float32)
        rounded = total.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + place, rounded, mask=mask)
        value = rounded.to(tl.float32)
        tl.store(scales_ptr + row, tl.rsqrt(tl.sum(value * value) / hidden + eps))


@triton.jit
def _max_kernel(
    out_ptr,
    keys,
    signals,
    counts_ptr,
    num_rows,
    rows_padded: tl.constexpr,
    rank: tl.constexpr,
    size: tl.constexpr,
    programs: tl.constexpr,
):
    """The largest of every rank's keys. One program; it waits at its end too, so that `keys` may be written again."""
    program = tl.program_id(0)
    _meet(signals, counts_ptr, program, rank, size, programs)
    row = tl.arange(0, rows_padded)
    mask = row < num_rows
    best = tl.load(keys[0] + row, mask=mask, other=0)
    for other in tl.static_range(1, size):
        best = tl.maximum(best, tl.load(keys[other] + row, mask=mask, other=0))
    tl.store(out_ptr + row, best, mask=mask)
    tl.debug_barrier()
    _meet(signals, counts_ptr, program, rank, size, programs)


class FastReduce:
    """The sums of one group. Ranks call the same methods in the same order; all of them may be captured in a graph.

    `buffers[r]`: BUFFER_BYTES of rank r that this process can read and write, zeros at first.
    """

    BUFFER_BYTES = _SLOTS_AT + 2 * _SLOT_BYTES

    def __init__(self, group: Group, buffers: list[torch.Tensor], mapping: object = None) -> None:
        """`mapping`: what keeps `buffers` mapped for as long as it lives."""
        self._group = group
        self._buffers = buffers
        self._mapping = mapping
        self._signals = tuple(b[:_KEYS_AT].view(torch.int32) for b in buffers)
        self._keys = tuple(b[_KEYS_AT : _KEYS_AT + 8 * _MAX_ROWS].view(torch.int64) for b in buffers)
        self._counts = torch.zeros(_PROGRAMS, dtype=torch.int32, device=buffers[group.rank].device)
        assert 4 * _PROGRAMS * group.size <= _KEYS_AT, f"{group.size} ranks are too many for one host"

    @staticmethod
    def connect(group: Group, device: torch.device) -> FastReduce:
        """Maps every rank's memory into every other's. All ranks call it together.

        Raises:
            RuntimeError: the GPUs cannot reach each other's memory.
        """
        from torch.distributed import _symmetric_memory as symmetric_memory

        own = symmetric_memory.empty(FastReduce.BUFFER_BYTES, dtype=torch.uint8, device=device)
        own.zero_()
        torch.cuda.synchronize(device)
        handle = symmetric_memory.rendezvous(own, group.process_group)
        buffers = [
            own if rank == group.rank else handle.get_buffer(rank, (FastReduce.BUFFER_BYTES,), torch.uint8)
            for rank in range(group.size)
        ]
        return FastReduce(group, buffers, handle)

    def method(self, num_bytes: int) -> str:
        """How a sum of so many bytes a rank is made: one_shot, two_shot or nccl.

        One shot reads every other rank's partial whole, two shots and NCCL about twice one partial, whatever the number
        of ranks, but with more waiting. So two ranks never need two shots.
        """
        if num_bytes > _SLOT_BYTES:
            return "nccl"
        one_shot_bytes = _SLOT_BYTES if self._group.size == 2 else (2 << 20) // self._group.size
        return "one_shot" if num_bytes <= one_shot_bytes else "two_shot"

    def partial(self, x: torch.Tensor, turn: int) -> torch.Tensor:
        """Where this rank's partial product for `add` goes: [num_rows, hidden] like x, unset.

        `turn` is 0 and 1 alternately.
        """
        if self.method(x.numel() * x.element_size()) == "nccl":
            return torch.empty_like(x)
        return self._slot(x, self._group.rank, turn)

    def add(self, x: torch.Tensor, partial: torch.Tensor, turn: int, eps: float) -> torch.Tensor:
        """x += the sum of all ranks' partials.  # [num_rows, hidden], equal on all ranks → 1 / rms, [num_rows] float32

        `partial` is what `partial(x, turn)` gave, filled; its values are not used after this call.
        """
        method = self.method(x.numel() * x.element_size())
        if method == "one_shot":
            partials = tuple(self._slot(x, rank, turn) for rank in range(self._group.size))
            return self._add_sum(x, partials, eps)
        if method == "two_shot":
            torch.ops.symm_mem.two_shot_all_reduce_(partial, "sum", self._group.process_group.group_name)
        else:
            dist.all_reduce(partial)
        return self._add_sum(x, (partial,), eps)

    def max_(self, keys: torch.Tensor) -> torch.Tensor:
        """The largest of all ranks' numbers, in place.  # [num_rows] int64; returned too"""
        (num_rows,) = keys.shape
        if num_rows > _MAX_ROWS:
            return self._group.all_max(keys)
        rank, size = self._group.rank, self._group.size
        self._keys[rank][:num_rows].copy_(keys)
        _max_kernel[(1,)](
            keys,
            self._keys,
            self._signals,
            self._counts,
            num_rows,
            triton.next_power_of_2(num_rows),
            rank,
            size,
            _PROGRAMS,
        )
        return keys

    def _add_sum(self, x: torch.Tensor, partials: tuple[torch.Tensor, ...], eps: float) -> torch.Tensor:
        num_rows, hidden = x.shape
        scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        _add_sum_kernel[(min(num_rows, _PROGRAMS),)](
            x,
            scales,
            partials,
            self._signals,
            self._counts,
            eps,
            num_rows,
            hidden,
            triton.next_power_of_2(hidden),
            self._group.rank,
            len(partials),
            _PROGRAMS,
            num_warps=8 if hidden <= 4096 else 16,
        )
        return scales

    def _slot(self, x: torch.Tensor, rank: int, turn: int) -> torch.Tensor:
        first = _SLOTS_AT + turn * _SLOT_BYTES
        return self._buffers[rank][first : first + x.numel() * x.element_size()].view(x.dtype).view(x.shape)
