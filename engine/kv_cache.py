"""The tensors behind block ids: keys and values of all layers, in blocks, and room for some of them on the host."""

from __future__ import annotations

import heapq
import math
import os
import weakref
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq

import numpy as np
import torch

from engine.layers.fp8 import FP8_DTYPE
from phasewise.core.errors import ConfigError
from phasewise.core.kv_spec import FP8, KVCacheSpec

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, FP8: FP8_DTYPE}

_BLOCKS_PER_COPY = 32


class PagedKVCache:
    """KV of `num_blocks` blocks on one device, and of `num_swap_blocks` more on the host, for preempted sequences.

    Raises:
        ValueError: there is no block.
        ConfigError: the host cannot give the memory for the swap blocks.

    Attributes:
        storage: [num_layers, 2 (K, V), num_blocks * block_size, num_kv_heads, head_dim]. Token t of block b is at
            slot b * block_size + t. Starts as zeros, so that no stray NaN can be read before the first write.
    """

    def __init__(
        self, spec: KVCacheSpec, num_blocks: int, device: str | torch.device, num_swap_blocks: int = 0
    ) -> None:
        if num_blocks <= 0:
            raise ValueError(f"a KV cache needs at least one block, not {num_blocks}")
        self.spec = spec
        self.num_blocks = num_blocks
        self.block_size = spec.block_size
        self.device = torch.device(device)
        shape = (spec.num_layers, 2, num_blocks * spec.block_size, spec.num_kv_heads, spec.head_dim)
        self.storage = _zeros(shape, TORCH_DTYPES[spec.dtype], self.device)
        self.swap = SwapSpace(self.blocks_view(), num_swap_blocks)

    def blocks_view(self) -> torch.Tensor:
        """The same memory as [num_layers, 2, num_blocks, block_size * num_kv_heads * head_dim]."""
        return self.storage.view(self.spec.num_layers, 2, self.num_blocks, -1)

    def copy_block(self, source: int, target: int) -> None:
        """Copies a block, all layers: what a writer does before it writes to a shared block."""
        blocks = as_words(self.blocks_view())
        blocks[:, :, target].copy_(blocks[:, :, source])

    def copy_out(self, blocks: Seq[int]) -> list[int]:
        """Copies blocks to the host; returns their places there. Raises ValueError when `swap.num_free` are too few."""
        places = self.swap.take(len(blocks))
        self.swap.write(blocks, places)
        return places

    def copy_in(self, places: Seq[int], blocks: Seq[int]) -> None:
        """Copies what `copy_out` took into as many (other) blocks, and frees the places. Raises ValueError."""
        self.swap.read(places, blocks)
        self.swap.give_back(places)


class SwapSpace:
    """Host memory for `num_blocks` blocks of a cache, in places 0, 1, … .

    Allocated once: on a GPU's host it is pinned, which takes long, and memory pinned anew for each preemption
    would grow with every new size. `blocks_view`: that of the cache. Copies are enqueued on the stream of the steps,
    and the host does not wait for them.
    """

    def __init__(self, blocks_view: torch.Tensor, num_blocks: int) -> None:
        self._blocks = as_words(blocks_view).movedim(2, 0)  # [num_blocks, num_layers, 2, words of one block]
        shape = (num_blocks, *self._blocks.shape[1:])
        self._host = _host_memory(shape, pinned=blocks_view.is_cuda)
        self._free = list(range(num_blocks))  # a heap: low places first, so that copies are few

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def is_pinned(self) -> bool:
        """Whether copies between host and device go on without the host."""
        return self._host.is_pinned()

    def take(self, count: int) -> list[int]:
        """That many free places. Raises ValueError when there are fewer."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks are to be swapped out, and {len(self._free)} places are free")
        return [heapq.heappop(self._free) for _ in range(count)]

    def give_back(self, places: Iterable[int]) -> None:
        for place in places:
            heapq.heappush(self._free, place)

    def write(self, blocks: Seq[int], places: Seq[int]) -> None:
        """Block i goes to place i. Raises ValueError when they are not equally many."""
        for first, count in self._runs(blocks, places):
            rows = self._blocks.index_select(0, self._index(blocks[first : first + count]))
            self._host[places[first] : places[first] + count].copy_(rows, non_blocking=True)

    def read(self, places: Seq[int], blocks: Seq[int]) -> None:
        """Place i comes to block i. Raises ValueError when they are not equally many."""
        for first, count in self._runs(blocks, places):
            rows = self._host[places[first] : places[first] + count].to(self._blocks.device, non_blocking=True)
            self._blocks.index_copy_(0, self._index(blocks[first : first + count]), rows)

    def _runs(self, blocks: Seq[int], places: Seq[int]) -> Iterator[tuple[int, int]]:
        """(first, number) of neighbouring places, few enough that the copy on the device stays small.

        Raises ValueError when blocks and places are not equally many.
        """
        if len(blocks) != len(places):
            raise ValueError(f"{len(places)} places were given for {len(blocks)} blocks")
        first = 0
        for i in range(1, len(places) + 1):
            if i == len(places) or places[i] != places[i - 1] + 1 or i - first == _BLOCKS_PER_COPY:
                yield first, i - first
                first = i

    def _index(self, blocks: Seq[int]) -> torch.Tensor:
        """[len(blocks)] int64 on the device."""
        device = self._blocks.device
        # To a GPU from pinned memory: a copy from other memory waits for the steps before it.
        return torch.tensor(blocks, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def as_words(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, [..., n] → [..., n * itemsize / 8] int64: torch's index operations do not know fp8."""
    return tensor.view(torch.int64)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy takes pages that the system hands out as zeros when they are first used; torch would write them all now, and
    # a cache that is mostly empty would cost its full size in memory.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def _host_memory(shape: tuple[int, ...], pinned: bool) -> torch.Tensor:
    """Words of host memory, as zeros. Pinned is exactly so much: torch's own pinned memory comes in powers of two.

    Raises ConfigError when the host has less, or cannot pin it.
    """
    num_bytes = math.prod(shape) * 8
    if num_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise _no_swap_space(num_bytes, "has less memory")
    host = _zeros(shape, torch.int64, torch.device("cpu"))
    if pinned and num_bytes:
        cuda, address = torch.cuda.cudart(), host.data_ptr()
        code = int(cuda.cudaHostRegister(address, num_bytes, 0))
        if code:
            raise _no_swap_space(num_bytes, f"cannot pin it (CUDA error {code})")
        weakref.finalize(host, cuda.cudaHostUnregister, address).atexit = False
    return host


def _no_swap_space(num_bytes: int, reason: str) -> ConfigError:
    return ConfigError(
        f"cache.swap_gib: preempted sequences want {num_bytes / 2**30:.1f} GiB of host memory, and this host {reason}; "
        "lower it",
        field="cache.swap_gib",
    )
