"""ScheduledBatch → flat tensors: what a forward pass reads, built once a step on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.batch import ScheduledBatch, ScheduledSequence


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """A ragged batch as tensors. Rows (tokens) of item i are `query_starts[i]` to `query_starts[i + 1]`.

    Attributes:
        input_ids, positions, slot_mapping: [num_tokens] int64 on the device; a token's KV goes to its slot.
        query_starts: num_items + 1 row numbers.
        context_lens: tokens of each item whose KV is in the cache after this step.
        block_tables: block ids of each item, enough for its context.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    query_starts: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables: tuple[tuple[int, ...], ...]

    @property
    def num_items(self) -> int:
        return len(self.context_lens)

    def num_queries(self, item: int) -> int:
        return self.query_starts[item + 1] - self.query_starts[item]

    def to_host(self) -> tuple[Any, ...]:
        """The same for another process: what `from_host` takes."""
        tensors = (self.input_ids, self.positions, self.slot_mapping)
        return *(t.cpu().numpy() for t in tensors), self.query_starts, self.context_lens, self.block_tables

    @staticmethod
    def from_host(host: tuple[Any, ...], device: torch.device) -> ForwardInputs:
        ids, positions, slots = (torch.from_numpy(array).to(device) for array in host[:3])
        return ForwardInputs(ids, positions, slots, *host[3:])


def build_forward_inputs(
    batch: ScheduledBatch, block_size: int, max_model_len: int, device: torch.device
) -> ForwardInputs:
    """Raises ValueError when a sequence lacks tokens or blocks, or is too long: a bug of the scheduler."""
    ids: list[int] = []
    positions, slots = [], []
    query_starts, context_lens, tables = [0], [], []
    for item in batch.items:
        sequence, start = item.sequence, item.start
        end = start + item.num_tokens
        num_blocks = -(-end // block_size)
        is_inside = 0 < item.num_tokens <= sequence.num_tokens - start and end <= max_model_len
        if not is_inside or num_blocks > len(sequence.block_table):
            raise ValueError(_why_not(item, num_blocks, max_model_len, is_inside=is_inside))
        table = tuple(sequence.block_table[:num_blocks])
        ids += sequence.token_ids[start:end]
        span = np.arange(start, end, dtype=np.int64)
        positions.append(span)
        slots.append(np.asarray(table, dtype=np.int64)[span // block_size] * block_size + span % block_size)
        query_starts.append(query_starts[-1] + item.num_tokens)
        context_lens.append(end)
        tables.append(table)
    return ForwardInputs(
        input_ids=torch.tensor(ids, dtype=torch.int64).to(device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        slot_mapping=torch.from_numpy(np.concatenate(slots)).to(device),
        query_starts=tuple(query_starts),
        context_lens=tuple(context_lens),
        block_tables=tuple(tables),
    )


def _why_not(item: ScheduledSequence, num_blocks: int, max_model_len: int, *, is_inside: bool) -> str:
    sequence = item.sequence
    if is_inside:
        return f"sequence of request {sequence.request_id} has {len(sequence.block_table)} blocks, needs {num_blocks}"
    return (
        f"sequence of request {sequence.request_id} has {sequence.num_tokens} tokens, {item.start} computed; "
        f"cannot compute {item.num_tokens} more within {max_model_len}"
    )
