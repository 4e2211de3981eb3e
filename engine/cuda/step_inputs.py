"""What a step reads, on its way to the device: one pinned buffer, one copy, and rows that stay from step to step."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from engine.batch import ScheduledSequence
from engine.sequence import Sequence

PROMPT_CHUNKS = 8  # most chunks of prompts in a step that a captured graph computes

_ALIGNMENT = 16  # bytes; Triton compiles faster loads for aligned pointers


class Upload:
    """Collects arrays and sends them in one copy that the host does not wait for.

    `target` [num_bytes] uint8 is the buffer on the device that they go to: a new one, or a graph's static one. The
    pinned memory is new each time, because the last step's copy may still be under way. torch's allocator uses it again
    when that copy has ended.
    """

    def __init__(self, target: torch.Tensor) -> None:
        self._target = target
        self._pinned = torch.empty(len(target), dtype=torch.uint8, pin_memory=True)
        self._host = self._pinned.numpy()
        self._end = 0

    @staticmethod
    def of_size(num_bytes: int, device: torch.device) -> Upload:
        return Upload(torch.empty(num_bytes, dtype=torch.uint8, device=device))

    def put(self, array: np.ndarray) -> int:
        """Returns the byte of `target` at which the array begins. The device has it once `send` was called.

        array: int64 or int32, of any shape.
        """
        first, end = self._end, self._end + array.nbytes
        self._host[first:end].view(array.dtype)[:] = array.reshape(-1)
        self._end = -(-end // _ALIGNMENT) * _ALIGNMENT
        return first

    def add(self, array: np.ndarray) -> torch.Tensor:
        """As `put`; returns the array's place on the device as a tensor of its shape and dtype."""
        first = self.put(array)
        return self._target[first : first + array.nbytes].view(_TORCH_DTYPES[array.dtype.name]).view(array.shape)

    def send(self) -> None:
        """Begins the copy of all that was put."""
        self._target[: self._end].copy_(self._pinned[: self._end], non_blocking=True)


_TORCH_DTYPES = {"int64": torch.int64, "int32": torch.int32}


def aligned(num_bytes: int) -> int:
    """Bytes that an array of this size takes of an Upload."""
    return num_bytes + _ALIGNMENT


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Rows of tokens. A source that is not negative is a token id; -1 - r is the newest token of decode row r."""

    sources: np.ndarray  # [num_tokens] int64
    positions: np.ndarray  # [num_tokens] int64
    slots: np.ndarray  # [num_tokens] int64; negative: a padding row, writes no KV

    @staticmethod
    def padding(num_tokens: int) -> TokenRows:
        zeros = np.zeros((2, num_tokens), dtype=np.int64)
        return TokenRows(zeros[0], zeros[1], np.full(num_tokens, -1, dtype=np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class DecodeInputs:
    """The decodes of a step: item i is in row `rows[i]` of tokens and contexts, the other rows are padding.

    `changed` rows have new block tables, `tables`; those of the others are on the device already.
    """

    rows: np.ndarray  # [num_items] int64
    tokens: TokenRows
    contexts: np.ndarray  # [num_rows] int32; padding: 0
    changed: np.ndarray  # [num_changed] int64
    tables: np.ndarray  # [num_changed, width] int32

    @staticmethod
    def none() -> DecodeInputs:
        nothing = np.zeros(0, dtype=np.int64)
        contexts, tables = np.zeros(0, dtype=np.int32), np.zeros((0, 0), dtype=np.int32)
        return DecodeInputs(nothing, TokenRows.padding(0), contexts, nothing, tables)


class RowAssignment:
    """Which decoding sequence has which row of the device's buffers.

    A sequence keeps its row from step to step, so that its block table and its newest token stay where they are and the
    host needs to send neither.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._row_of: dict[Sequence, int] = {}
        self._table_of: dict[int, tuple[list[int], int]] = {}  # row: the table that the device has, blocks of it

    def forget(self) -> None:
        """What the device has of the rows is not known any more: the next step sends everything."""
        self._row_of.clear()
        self._table_of.clear()

    def assign(self, items: Seq[ScheduledSequence], num_rows: int) -> DecodeInputs:
        """Gives each item one of the first `num_rows` rows.

        Raises:
            ValueError: an item's token is neither on the host nor on the device, or it has too few blocks: a bug of
                the scheduler.
        """
        before = self._row_of
        rows = [before.get(item.sequence, num_rows) for item in items]
        taken = set(rows)
        free = iter([row for row in range(num_rows) if row not in taken])
        rows = [row if row < num_rows else next(free) for row in rows]
        size = self._block_size
        columns: list[tuple[int, int, int]] = []
        changed: list[tuple[int, list[int]]] = []
        for row, item in zip(rows, items, strict=True):
            sequence, position = item.sequence, item.start
            table, count = sequence.block_table, position // size + 1
            if count > len(table):
                raise ValueError(f"request {sequence.request_id} has {len(table)} blocks, needs {count}")
            if position < len(sequence.token_ids):
                source = sequence.token_ids[position]
            elif sequence in before and position == len(sequence.token_ids):
                source = -1 - before[sequence]
            else:
                raise ValueError(f"request {sequence.request_id}: token {position} is neither here nor on the device")
            columns.append((source, position, table[count - 1] * size + position % size))
            # A table only grows at its end, or has its last block replaced; another list is another history.
            known = self._table_of.get(row)
            if known is None or known[0] is not table or known[1] + 1 < count:
                changed.append((row, table[:count]))
            self._table_of[row] = (table, count)
        self._row_of = {item.sequence: row for row, item in zip(rows, items, strict=True)}
        tokens, contexts = TokenRows.padding(num_rows), np.zeros(num_rows, dtype=np.int32)
        index = np.asarray(rows)
        tokens.sources[index], tokens.positions[index], tokens.slots[index] = np.asarray(columns, dtype=np.int64).T
        contexts[index] = tokens.positions[index] + 1
        tables = np.zeros((len(changed), max((len(table) for _, table in changed), default=0)), dtype=np.int32)
        for i, (_, table) in enumerate(changed):
            tables[i, : len(table)] = table
        return DecodeInputs(index, tokens, contexts, np.asarray([row for row, _ in changed], dtype=np.int64), tables)


class DecodeRows:
    """The device's buffers of the rows of decoding sequences.

    Attributes:
        tables: [max_rows, max_blocks] int32. Kept up to date by `prepare_step` (engine/cuda/elementwise.py) block by
            block; rows given to another sequence are written whole by `write_tables`.
        newest: [max_rows] int64, the token that each row sampled last.
    """

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device) -> None:
        self.tables = torch.zeros(max_rows, max_blocks, dtype=torch.int32, device=device)
        self.newest = torch.zeros(max_rows, dtype=torch.int64, device=device)

    def write_tables(self, inputs: DecodeInputs) -> None:
        """Sends the tables of the changed rows, a copy for each run of neighbouring ones: few rows change at a time."""
        if not len(inputs.changed):
            return
        tables = torch.empty(inputs.tables.shape, dtype=torch.int32, pin_memory=self.tables.is_cuda)
        tables.numpy()[:] = inputs.tables
        width, first = tables.shape[1], 0
        ends = [*np.flatnonzero(np.diff(inputs.changed) != 1) + 1, len(inputs.changed)]
        for end in ends:
            row = int(inputs.changed[first])
            self.tables[row : row + end - first, :width].copy_(tables[first:end], non_blocking=True)
            first = end

    def write_newest(self, inputs: DecodeInputs, tokens: torch.Tensor) -> None:
        """tokens: [num_items] int64, of the items in order."""
        if len(inputs.rows):
            upload = Upload.of_size(aligned(inputs.rows.nbytes), self.newest.device)
            index = upload.add(inputs.rows)
            upload.send()
            self.newest.index_copy_(0, index, tokens)


@dataclass(frozen=True, slots=True, eq=False)
class PromptChunk:
    """Rows `first` to `first + num_queries` of a step: the last so many tokens of a context of `context` tokens."""

    first: int
    num_queries: int
    context: int
    table: np.ndarray  # block ids, int32, just enough for the context

    @property
    def num_earlier(self) -> int:
        return self.context - self.num_queries


def prompt_rows(items: Seq[ScheduledSequence], first: int, block_size: int) -> tuple[list[PromptChunk], TokenRows]:
    """Chunks of prompts, one below the other from row `first` on.

    Raises:
        ValueError: an item has too few tokens or blocks: a bug of the scheduler.
    """
    chunks, ids, positions, slots = [], [], [], []
    for item in items:
        sequence, end = item.sequence, item.start + item.num_tokens
        num_blocks = -(-end // block_size)
        if not 0 < item.num_tokens <= len(sequence.token_ids) - item.start or num_blocks > len(sequence.block_table):
            raise ValueError(
                f"request {sequence.request_id} has {len(sequence.token_ids)} tokens, {item.start} computed, and "
                f"{len(sequence.block_table)} blocks; cannot compute {item.num_tokens} tokens more"
            )
        table = np.asarray(sequence.block_table[:num_blocks], dtype=np.int32)
        span = np.arange(item.start, end, dtype=np.int64)
        chunks.append(PromptChunk(first, item.num_tokens, end, table))
        ids.append(np.asarray(sequence.token_ids[item.start : end], dtype=np.int64))
        positions.append(span)
        slots.append(table[span // block_size].astype(np.int64) * block_size + span % block_size)
        first += item.num_tokens
    return chunks, TokenRows(np.concatenate(ids), np.concatenate(positions), np.concatenate(slots))
