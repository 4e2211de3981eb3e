"""Between scattered blocks and one contiguous payload: gather on the sending side, scatter on the receiving side.

Both work on a paged cache's storage tensor [num_layers, 2, num_slots, num_kv_heads, head_dim], where slot
`block * block_size + offset` belongs to one token. The two sides may have different block sizes. Bytes are moved, as
64-bit words: torch's index operations do not know fp8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def slots_of(
    block_table: Sequence[int], block_size: int, first_token: int, num_tokens: int, device: torch.device
) -> torch.Tensor:
    """Slots of tokens first_token … first_token + num_tokens - 1 of a sequence.  # int64 [num_tokens]"""
    tokens = torch.arange(first_token, first_token + num_tokens)
    blocks = torch.as_tensor(block_table, dtype=torch.int64)[tokens // block_size]
    return (blocks * block_size + tokens % block_size).to(device)


def gather(storage: torch.Tensor, slots: torch.Tensor, first_layer: int, num_layers: int) -> torch.Tensor:
    """A contiguous copy of those layers and slots.  # [num_layers, 2, num_tokens, num_kv_heads, head_dim]"""
    words = storage[first_layer : first_layer + num_layers].view(torch.int64)
    return words.index_select(2, slots).view(storage.dtype)


def scatter(storage: torch.Tensor, slots: torch.Tensor, first_layer: int, payload: torch.Tensor) -> None:
    """Writes a payload made by `gather`, on any device, into these slots."""
    words = storage[first_layer : first_layer + payload.shape[0]].view(torch.int64)
    words.index_copy_(2, slots, payload.view(torch.int64).to(storage.device))
