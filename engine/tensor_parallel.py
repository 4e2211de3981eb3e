"""The ranks of one host that compute a model together, and what they tell each other meanwhile.

Every rank calls the same methods in the same order with tensors of the same shape: each call waits for the others.
This is the plain form, on torch.distributed: gloo on CPUs, NCCL on GPUs. What a decode step needs 64 times is in
engine/cuda/all_reduce.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from engine.sharding import Shard

logger = logging.getLogger(__name__)

_LOW_32 = 2**32 - 1
_NAN = 2**63 - 1

Command = tuple[Any, ...]
"""What rank 0 tells the other ranks: a name, then values that can be pickled (ModelRunner.carry_out)."""


class OtherRanks(Protocol):
    """How rank 0 reaches the others (workers/ranks.py)."""

    def tell(self, command: Command) -> None:
        """Makes the other ranks compute what this one computes next."""

    def broken(self, reason: str) -> None:
        """This rank failed at what it told: the others wait for it in vain, and the group cannot go on."""


@contextlib.contextmanager
def together(others: OtherRanks | None, command: Command, work: str) -> Iterator[None]:
    """Around what all ranks compute at `command`, which it tells the others first; does nothing on a single rank.

    When this rank fails inside, the others wait for it in vain, and what they wait for would be taken from the next
    command: the group is reported as broken, and the exception goes on. `work` names the work in that report.
    """
    if others is None:
        yield
        return
    others.tell(command)
    try:
        yield
    except Exception as error:
        logger.exception("%s failed on one rank of several", work)
        others.broken(f"{type(error).__name__} in {work}: {error}")
        raise


class Group:
    """Rank `shard.rank` of `shard.size`. Usable once `connect` has returned; a group of one needs no connection."""

    def __init__(self, shard: Shard = Shard()) -> None:  # noqa: B008 (frozen)
        self.shard = shard

    @property
    def rank(self) -> int:
        return self.shard.rank

    @property
    def size(self) -> int:
        return self.shard.size

    def connect(self, store_path: str, device: torch.device, timeout_s: float = 120.0) -> None:
        """Meets the other ranks through a file, which must be new. GPUs: rank r must be on device `cuda:r`.

        Raises:
            RuntimeError: a rank did not come within the time-out (torch.distributed.DistError).
        """
        # Multicast over NVLink gains nothing on small groups, and a program that misuses it takes its GPUs down.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        is_cuda = device.type == "cuda"
        if is_cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=dist.FileStore(store_path, self.size),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if is_cuda else None,
        )

    def close(self) -> None:
        """Leaves the group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def process_group(self) -> dist.ProcessGroup:
        """torch's form of it."""
        assert dist.group.WORLD is not None, "connect first"
        return dist.group.WORLD

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x, of any shape, over all ranks, in place; returned too."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_max(self, x: torch.Tensor) -> torch.Tensor:
        """The largest x, of any shape, over all ranks, element by element, in place; returned too."""
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x

    def gather(self, part: torch.Tensor) -> list[torch.Tensor] | None:
        """Every rank's `part`, by rank, on rank 0; None on the others. All parts have one shape, whichever."""
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(part.view(torch.uint8), [p.view(torch.uint8) for p in parts] if parts else None, dst=0)
        return parts

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x`, of any shape, in place on the others, which give a tensor of that shape; returned too."""
        dist.broadcast(x.view(torch.uint8), src=0)
        return x

    def gather_vocab(self, part: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Logits of this rank's rows of the head, [num_rows, its ids] → of all, [num_rows, vocab_size]."""
        if self.size == 1:
            return part
        step, num_rows = self.shard.vocab_step(vocab_size), len(part)
        part = F.pad(part, (0, step - part.shape[1]))
        gathered = part.new_empty(self.size, num_rows, step)
        dist.all_gather(list(gathered), part.contiguous())
        return gathered.transpose(0, 1).reshape(num_rows, -1)[:, :vocab_size]

    def largest(self, part: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Like gather_vocab(...).argmax(-1) with the lowest id at ties, for 8 bytes a row.  # [num_rows] int64"""
        if self.size == 1:
            return part.argmax(dim=-1)
        return ids_of(self.all_max(sortable(part, self.shard.vocab(vocab_size)[0])))


def sortable(part: torch.Tensor, first_id: int) -> torch.Tensor:
    """Each row's largest logit and its id as one number: the larger logit is the larger number, then the lower id.

    part: [num_rows, n] of ids from `first_id`; a row with a NaN, or infinity as its largest, gives the largest number
    of all. Returns [num_rows] int64.
    """
    best = part.float().max(dim=-1)  # a NaN anywhere in a row is its maximum
    bits = best.values.contiguous().view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)  # negative floats grow downwards
    keys = ordered * 2**32 + (_LOW_32 - first_id - best.indices)
    return keys.masked_fill_((best.values - best.values).isnan() & (best.values != -torch.inf), _NAN)


def ids_of(keys: torch.Tensor) -> torch.Tensor:
    """The ids in what `sortable` gives, [num_rows] int64; -1 for a row without a choice."""
    return (_LOW_32 - (keys & _LOW_32)).masked_fill_(keys == _NAN, -1)
