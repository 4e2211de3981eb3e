"""The sum over a part that both sides compute where the data is, so a torn or misplaced part is never decoded.

Two sums over the payload in its logical order: of all 32-bit words, and of the rows (one row is one head of one token)
weighted by their place. The first sees a changed value, the second also exchanged tokens, heads or layers. Everything
wraps in 64 bits, so the order of summation, and with it the device, does not matter.
"""

from __future__ import annotations

import torch

_MIX = 0x9E3779B97F4A7C15  # odd, so multiplication by it loses nothing modulo 2^64
_MASK = (1 << 63) - 1


def checksum(payload: torch.Tensor) -> int:
    """Sum of `payload` [num_layers, 2, num_tokens, num_kv_heads, head_dim], contiguous; a 63-bit integer.

    head_dim times the element size must be a multiple of four bytes.
    """
    words = payload.view(torch.int32)
    rows = words.sum(dim=-1, dtype=torch.int64).flatten()
    places = torch.arange(1, rows.numel() + 1, dtype=torch.int64, device=rows.device)
    total, weighted = torch.stack((rows.sum(), (rows * places).sum())).tolist()
    return (int(total) ^ (int(weighted) * _MIX)) & _MASK
