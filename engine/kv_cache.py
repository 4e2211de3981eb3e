"""The tensors behind block ids: keys and values of all layers, in blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import numpy as np
import torch

from engine.layers.fp8 import FP8_DTYPE
from phasewise.core.kv_spec import FP8, KVCacheSpec

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, FP8: FP8_DTYPE}


class PagedKVCache:
    """KV of `num_blocks` blocks on one device.

    Attributes:
        storage: [num_layers, 2 (K, V), num_blocks * block_size, num_kv_heads, head_dim]. Token t of block b is at
            slot b * block_size + t. Starts as zeros, so that no stray NaN can be read before the first write.
    """

    def __init__(self, spec: KVCacheSpec, num_blocks: int, device: str | torch.device) -> None:
        if num_blocks <= 0:
            raise ValueError(f"a KV cache needs at least one block, not {num_blocks}")
        self.spec = spec
        self.num_blocks = num_blocks
        self.block_size = spec.block_size
        self.device = torch.device(device)
        shape = (spec.num_layers, 2, num_blocks * spec.block_size, spec.num_kv_heads, spec.head_dim)
        self.storage = _zeros(shape, TORCH_DTYPES[spec.dtype], self.device)

    def blocks_view(self) -> torch.Tensor:
        """The same memory as [num_layers, 2, num_blocks, block_size * num_kv_heads * head_dim]."""
        return self.storage.view(self.spec.num_layers, 2, self.num_blocks, -1)

    def copy_block(self, source: int, target: int) -> None:
        """Copies a block, all layers: what a writer does before it writes to a shared block."""
        blocks = as_words(self.blocks_view())
        blocks[:, :, target].copy_(blocks[:, :, source])

    def copy_out(self, blocks: Seq[int]) -> torch.Tensor:
        """The blocks' content on the host: [num_layers, 2, len(blocks) * block_size, num_kv_heads, head_dim]."""
        picked = as_words(self.blocks_view()).index_select(2, self._index(blocks)).view(self.storage.dtype)
        picked = picked.view(*self.storage.shape[:2], -1, *self.storage.shape[3:])
        if picked.device.type == "cpu":
            return picked
        # Pinned: into other memory the copy took 1.1 GB/s on an H100's host, while every sequence waited.
        return torch.empty(picked.shape, dtype=picked.dtype, pin_memory=True).copy_(picked)

    def copy_in(self, content: torch.Tensor, blocks: Seq[int]) -> None:
        """Puts what `copy_out` gave into (other) blocks. Raises ValueError when shape or dtype do not fit."""
        num_slots = len(blocks) * self.block_size
        expected = (*self.storage.shape[:2], num_slots, *self.storage.shape[3:])
        if tuple(content.shape) != expected or content.dtype != self.storage.dtype:
            raise ValueError(
                f"KV content is {tuple(content.shape)} {content.dtype}, expected {expected} {self.storage.dtype}"
            )
        rows = content.to(self.device).reshape(*expected[:2], len(blocks), -1)
        as_words(self.blocks_view()).index_copy_(2, self._index(blocks), as_words(rows))

    def _index(self, blocks: Seq[int]) -> torch.Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self.device)


def as_words(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as 64-bit words: torch's index operations do not know fp8. Rows must be whole words."""
    return tensor.view(torch.int64)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy takes pages that the system hands out as zeros when they are first used; torch would write them all now, and
    # a cache that is mostly empty would cost its full size in memory.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
