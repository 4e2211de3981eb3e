"""Joins partial attention over disjoint sets of tokens: shared prefixes, split KV, offloaded heads are this merge."""

from __future__ import annotations

import torch


def merge_partials(outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of the parts' tokens.

    outputs: [num_parts, num_tokens, num_heads, head_dim], each part normalised by itself.
    lses: [num_parts, num_tokens, num_heads] natural log-sum-exp of each part's scores; -inf for an empty part, whose
    output is then ignored. Returns (output in the dtype of `outputs`, float32 log-sum-exp).
    Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
    """
    lse = torch.logsumexp(lses.float(), dim=0)
    weights = torch.exp(lses.float() - lse)
    weights = torch.where(torch.isneginf(lses), 0.0, weights)  # all parts empty: -inf - -inf is NaN
    parts = torch.where(torch.isneginf(lses).unsqueeze(-1), 0.0, outputs.float())
    return (parts * weights.unsqueeze(-1)).sum(dim=0).to(outputs.dtype), lse
