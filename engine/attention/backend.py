"""What every attention implementation promises: plan once a step on the host, run once a layer on the device."""

from __future__ import annotations

from typing import Protocol

import torch

from engine.forward_inputs import ForwardInputs


class AttentionBackend(Protocol):
    """Causal attention over a paged KV cache, for a ragged batch of prompt chunks and decodes.

    Scores are scaled by head_dim ** -0.5. A token sees itself and all tokens before it in its own sequence, or the
    last `window` of them in a layer with a sliding window. Grouped-query heads: query head h reads KV head
    h // (num_heads / num_kv_heads).
    """

    def plan(self, inputs: ForwardInputs) -> None:
        """Builds the index tensors and masks of one step; holds for every layer until the next `plan`."""

    def run(self, layer: int, queries: torch.Tensor, keys_values: torch.Tensor) -> torch.Tensor:
        """Stores the new keys and values in the cache, then attends.

        queries: [num_tokens, num_heads, head_dim]; keys_values: [num_tokens, 2 (K, V), num_kv_heads, head_dim].
        Returns [num_tokens, num_heads, head_dim], contiguous, in the dtype of the queries.
        """

    def run_with_lse(
        self, layer: int, queries: torch.Tensor, keys_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `run`, and the natural log-sum-exp of each query's scaled scores: [num_tokens, num_heads] float32."""
