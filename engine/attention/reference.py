"""Attention over the paged cache written for reading: the oracle of every other backend, on any device."""

from __future__ import annotations

import torch

from engine.forward_inputs import ForwardInputs
from engine.kv_cache import PagedKVCache, as_words
from engine.layers.fp8 import saturate


class ReferenceAttention:
    """One sequence after the other, scores in full, in float32. See AttentionBackend."""

    def __init__(self, kv_cache: PagedKVCache, windows: tuple[int | None, ...]) -> None:
        self._storage = kv_cache.storage
        self._block_size = kv_cache.block_size
        self._windows = windows
        self._slots: list[torch.Tensor] = []

    def plan(self, inputs: ForwardInputs) -> None:
        self._inputs = inputs
        self._slots = [
            self._context_slots(table, length)
            for table, length in zip(inputs.block_tables, inputs.context_lens, strict=True)
        ]

    def run(self, layer: int, queries: torch.Tensor, keys_values: torch.Tensor) -> torch.Tensor:
        return self.run_with_lse(layer, queries, keys_values)[0]

    def run_with_lse(
        self, layer: int, queries: torch.Tensor, keys_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype, words = self._storage.dtype, as_words(self._storage[layer])
        stored = saturate(keys_values.transpose(0, 1), dtype)
        words.index_copy_(1, self._inputs.slot_mapping, as_words(stored))
        outputs, lses = [], []
        for item, slots in enumerate(self._slots):
            first, last = self._inputs.query_starts[item : item + 2]
            keys, values = words.index_select(1, slots).view(dtype).float()
            output, lse = _attend(queries[first:last].float(), keys, values, self._windows[layer])
            outputs.append(output)
            lses.append(lse)
        return torch.cat(outputs).to(queries.dtype), torch.cat(lses)

    def _context_slots(self, table: tuple[int, ...], length: int) -> torch.Tensor:
        position = torch.arange(length)
        blocks = torch.tensor(table)[position // self._block_size]
        return (blocks * self._block_size + position % self._block_size).to(self._storage.device)


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last queries of one sequence against all its tokens.

    queries: [num_queries, num_heads, head_dim]; keys, values: [num_tokens, num_kv_heads, head_dim].
    """
    num_queries, num_heads, head_dim = queries.shape
    num_tokens, num_kv_heads, _ = keys.shape
    keys = keys.repeat_interleave(num_heads // num_kv_heads, dim=1)
    values = values.repeat_interleave(num_heads // num_kv_heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * head_dim**-0.5
    query_position = torch.arange(num_tokens - num_queries, num_tokens, device=keys.device).unsqueeze(1)
    key_position = torch.arange(num_tokens, device=keys.device)
    visible = key_position <= query_position
    if window is not None:
        visible &= key_position > query_position - window
    scores = scores.masked_fill(~visible, -torch.inf)
    output = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values)
    return output, scores.logsumexp(dim=-1).T
