"""Computes scheduled batches on a GPU. Steps of decodes alone replay captured graphs; others go kernel by kernel.

A graph is captured per batch bucket over static buffers; a smaller batch is padded with rows that write no KV and
attend to nothing. The host fills one pinned buffer a step and copies it in one go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from engine.batch import ScheduledBatch, ScheduledSequence, StepResult
from engine.cuda.decoder import CudaDecoder
from engine.cuda.kernels import DecodeAttention, merge_into, prompt_attention, prompt_tile
from engine.forward_inputs import ForwardInputs
from engine.kv_cache import PagedKVCache
from engine.loader import LoadedModel
from engine.model_runner import ModelRunner
from engine.tensor_parallel import Command, OtherRanks
from phasewise.core.request import SampledToken, SamplingParams

GRAPH_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
_REGULAR = 256  # chunk and context lengths that are multiples of it have cuDNN's plans made for them


class CudaModelRunner(ModelRunner):
    """One model with one KV cache on one GPU. Sampling and prompt log-probabilities are those of the plain runner."""

    def __init__(
        self,
        loaded: LoadedModel,
        kv_cache: PagedKVCache,
        max_model_len: int,
        *,
        max_batch: int = 256,
        others: OtherRanks | None = None,
    ) -> None:
        super().__init__(loaded, kv_cache, max_model_len, attention="reference", others=others)
        config = loaded.config
        # cuDNN's fused attention took 101 us where flash attention took 189 (one layer, 1 x 2048). A context manager
        # around each call says the same, and costs more than the call.
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.enable_flash_sdp(False)
        self._config = config
        self._block_size = kv_cache.block_size
        self._max_blocks = -(-max_model_len // kv_cache.block_size)
        with torch.inference_mode():
            self._decoder = CudaDecoder(loaded.model, max_model_len)
            self._attention = DecodeAttention(
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                kv_cache.block_size,
                max_batch,
                loaded.model.device,
                loaded.model.dtype,
            )
            self._graphs = _capture_all(self, [b for b in GRAPH_BATCHES if b <= max_batch])

    @torch.inference_mode()
    def run(
        self,
        batch: ScheduledBatch,
        on_layers_done: Callable[[int, int], None] | None = None,
        layers_per_group: int = 0,
    ) -> StepResult:
        """As ModelRunner.run."""
        graph = self._graph_for(batch)
        if graph is None:
            return super().run(batch, on_layers_done, layers_per_group)
        rows = graph.fill(batch.items)
        takes_largest = all(_takes_largest(item.sequence.sampling) for item in batch.items)
        sequences = [item.sequence for item in batch.items]
        with self._together(("graph", graph.batch, rows, takes_largest)):
            graph.replay()
            if on_layers_done is not None:
                on_layers_done(0, self._config.num_layers)
            if takes_largest:
                tokens = graph.next_ids[: len(sequences)].tolist()
                return StepResult(tuple((SampledToken(t),) for t in tokens), ((),) * len(tokens))
            logits = self._decoder.gather(graph.logits[: len(sequences)]).float()
        return StepResult(self._sample_rows(batch, logits), ((),) * len(sequences))

    @torch.inference_mode()
    def follow(self, command: Command) -> None:
        """As ModelRunner.follow; also ("graph", bucket, rows of its host buffer, whether no logits are gathered)."""
        match command:
            case ("graph", bucket, rows, takes_largest):
                graph = next(graph for graph in self._graphs if graph.batch == bucket)
                graph.fill_rows(rows)
                graph.replay()
                if not takes_largest:
                    self._decoder.gather(graph.logits[: len(rows)])
            case _:
                super().follow(command)

    # ---- inside

    def _graph_for(self, batch: ScheduledBatch) -> _DecodeGraph | None:
        items = batch.items
        if not items or any(item.num_tokens != 1 or item.num_samples != 1 for item in items):
            return None
        if any(i.sequence.is_prefilling and i.sequence.sampling.prompt_logprobs is not None for i in items):
            return None
        return next((graph for graph in self._graphs if graph.batch >= len(items)), None)

    def _compute(
        self, inputs: ForwardInputs, on_layers_done: Callable[[int, int], None] | None, layers_per_group: int
    ) -> torch.Tensor:
        """[num_tokens, hidden_size] after the last layer, kernel by kernel."""
        attend = RaggedAttention(self._attention, self._kv_cache, self._config.windows, inputs)
        x = self._decoder.embed(inputs.input_ids)
        for first in range(0, self._num_layers, layers_per_group):
            count = min(layers_per_group, self._num_layers - first)
            x = self._decoder.run_layers(
                x, first, count, inputs.positions, inputs.slot_mapping, self._kv_cache.storage, attend
            )
            if on_layers_done is not None:
                on_layers_done(first, count)
        return x


class RaggedAttention:
    """Attention of one step over a ragged batch: decodes by the decode kernel, prompt chunks by what is fastest.

    Without windows torch's fused attention (cuDNN) was the fastest measured. A chunk without earlier context needs no
    cache for it; one with context attends to itself and to a gathered copy of its context, and the two are merged
    (1,984 tokens behind 2,048: 0.23 ms a layer, the paged prompt kernel 0.41). But cuDNN makes a plan for every new
    shape, some 50 ms each, so that only regular shapes go there (the scheduler cuts prompts so that most are); all
    others go through the paged kernel.
    """

    def __init__(
        self,
        decode: DecodeAttention,
        kv_cache: PagedKVCache,
        windows: tuple[int | None, ...],
        inputs: ForwardInputs,
    ) -> None:
        self._decode = decode
        self._storage = kv_cache.storage
        self._block_size = kv_cache.block_size
        self._windows = windows
        is_low_precision = kv_cache.storage.dtype != torch.float32
        may_use_cudnn = is_low_precision and not any(window is not None for window in windows)
        decodes, paged, dense, split = [], [], [], []
        for item in range(inputs.num_items):
            num_queries = inputs.num_queries(item)
            num_earlier = inputs.context_lens[item] - num_queries
            is_regular = may_use_cudnn and num_queries % _REGULAR == 0 and num_earlier % _REGULAR == 0
            if num_queries == 1:
                decodes.append(item)
            elif not is_regular:
                paged.append(item)
            elif num_earlier:
                split.append(item)
            else:
                dense.append(item)
        device = self._storage.device
        self._decodes = _DecodeRows.build(inputs, decodes, device) if decodes else None
        self._paged = _PagedChunks.build(inputs, paged, self._storage.dtype, device) if paged else None
        self._dense = _dense_runs(inputs, dense)
        self._split = [_SplitChunk.build(inputs, item, self._block_size, device) for item in split]

    def __call__(self, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> None:
        window = self._windows[layer]
        if self._decodes is not None:
            d = self._decodes
            rows, attended = qkv.view(len(qkv), -1), out
            if d.rows is not None:
                rows, attended = rows[d.rows], out.new_empty(len(d.context_lens), *out.shape[1:])
            self._decode(rows, self._storage[layer], d.tables, d.context_lens, attended, window=window)
            if d.rows is not None:
                out[d.rows] = attended
        if self._paged is not None:
            p = self._paged
            prompt_attention(
                qkv,
                self._storage[layer],
                p.tables,
                p.tile_items,
                p.tile_rows,
                p.starts,
                p.context_lens,
                out,
                self._block_size,
                window=window,
            )
        num_heads, num_kv_heads = out.shape[1], self._storage.shape[3]
        for first, count, length in self._dense:
            rows = qkv[first : first + count * length].view(count, length, *qkv.shape[1:]).transpose(1, 2)
            queries, keys, values = rows.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
            attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
            out[first : first + count * length].view(count, length, *out.shape[1:]).copy_(attended.transpose(1, 2))
        for chunk in self._split:
            rows = qkv[chunk.first : chunk.last].unsqueeze(0).transpose(1, 2)
            queries, keys, values = rows.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
            own, own_lse = _cudnn_attention(queries, keys, values, is_causal=True)
            context = self._storage[layer].index_select(1, chunk.slots).unsqueeze(1).transpose(2, 3)
            earlier, earlier_lse = _cudnn_attention(queries, context[0], context[1], is_causal=False)
            place = out[chunk.first : chunk.last]
            place.copy_(own[0].transpose(0, 1))
            merge_into(place, own_lse, earlier[0].transpose(0, 1), earlier_lse)


def _cudnn_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """([1, num_heads, num_queries, head_dim], log-sum-exp [num_heads, num_queries]); called directly for the latter."""
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(queries, keys, values, None, True, 0.0, is_causal)
    return result[0], result[1].reshape(queries.shape[1], queries.shape[2])


@dataclass(frozen=True, slots=True)
class _SplitChunk:
    """Rows `first` to `last`, and the slots of the tokens before them."""

    first: int
    last: int
    slots: torch.Tensor

    @staticmethod
    def build(inputs: ForwardInputs, item: int, block_size: int, device: torch.device) -> _SplitChunk:
        num_earlier = inputs.context_lens[item] - inputs.num_queries(item)
        position = np.arange(num_earlier)
        table = np.asarray(inputs.block_tables[item], dtype=np.int64)
        slots = table[position // block_size] * block_size + position % block_size
        first, last = inputs.query_starts[item : item + 2]
        return _SplitChunk(first, last, torch.from_numpy(slots).to(device))


@dataclass(frozen=True, slots=True)
class _DecodeRows:
    """`rows` is None when the decodes are the whole batch."""

    rows: torch.Tensor | None
    tables: torch.Tensor
    context_lens: torch.Tensor

    @staticmethod
    def build(inputs: ForwardInputs, items: list[int], device: torch.device) -> _DecodeRows:
        whole = len(items) == inputs.num_items
        rows = None if whole else torch.tensor([inputs.query_starts[i] for i in items], device=device)
        lens = torch.tensor([inputs.context_lens[i] for i in items], dtype=torch.int32, device=device)
        return _DecodeRows(rows, _padded_tables(inputs, items, device), lens)


@dataclass(frozen=True, slots=True)
class _PagedChunks:
    """Arguments of `prompt_attention`. Items that are not its own have no tile."""

    tables: torch.Tensor
    tile_items: torch.Tensor
    tile_rows: torch.Tensor
    starts: torch.Tensor
    context_lens: torch.Tensor

    @staticmethod
    def build(inputs: ForwardInputs, items: list[int], dtype: torch.dtype, device: torch.device) -> _PagedChunks:
        step = prompt_tile(dtype)[0]
        tiles = [(item, row) for item in items for row in range(0, inputs.num_queries(item), step)]
        tiles.sort(key=lambda tile: tile[1] - inputs.context_lens[tile[0]])  # the longest first
        columns = np.asarray(tiles, dtype=np.int32).T
        return _PagedChunks(
            _padded_tables(inputs, list(range(inputs.num_items)), device),
            torch.from_numpy(np.ascontiguousarray(columns[0])).to(device),
            torch.from_numpy(np.ascontiguousarray(columns[1])).to(device),
            torch.tensor(inputs.query_starts, dtype=torch.int32, device=device),
            torch.tensor(inputs.context_lens, dtype=torch.int32, device=device),
        )


class _DecodeGraph:
    """One captured decode step for up to `batch` sequences, with its static buffers."""

    def __init__(self, runner: CudaModelRunner, batch: int, pool: Any) -> None:
        self.batch = batch
        self._max_blocks = runner._max_blocks
        self._block_size = runner._block_size
        # One row per sequence: id, position, slot, context, then its block table; int64 so that one copy takes all.
        self._host = np.zeros((batch, 4 + self._max_blocks), dtype=np.int64)
        self._pinned = torch.from_numpy(self._host).pin_memory()
        self._host = self._pinned.numpy()
        self._host[:, 2] = -1
        self._tables_of_rows: list[tuple[list[int], int, int]] = [([], 0, -1)] * batch  # (table, blocks, last block)
        device = runner._model.device
        self._device = self._pinned.to(device)
        self._tables = torch.zeros(batch, self._max_blocks, dtype=torch.int32, device=device)
        self._contexts = torch.zeros(batch, dtype=torch.int32, device=device)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(runner)  # compiles kernels and sets libraries up, which a capture must not see
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.logits, self.next_ids = self._step(runner)

    def _step(self, runner: CudaModelRunner) -> tuple[torch.Tensor, torch.Tensor]:
        self._tables.copy_(self._device[:, 4:])
        self._contexts.copy_(self._device[:, 3])
        positions, slots = self._device[:, 1].contiguous(), self._device[:, 2].contiguous()
        x = runner._decoder.embed(self._device[:, 0].contiguous())
        storage, attention, windows = runner._kv_cache.storage, runner._attention, runner._config.windows

        def attend(layer: int, qkv: torch.Tensor, out: torch.Tensor) -> None:
            rows = qkv.view(self.batch, -1)
            attention(rows, storage[layer], self._tables, self._contexts, out, window=windows[layer])

        x = runner._decoder.run_layers(x, 0, runner._num_layers, positions, slots, storage, attend)
        logits = runner._decoder.partial_logits(x)
        return logits, runner._decoder.largest(logits)

    def fill(self, items: tuple[ScheduledSequence, ...]) -> np.ndarray:
        """Writes this step's rows; rows beyond them are padding. Returns them, up to the longest block table's end."""
        torch.cuda.current_stream().synchronize()  # the last step's copy has left the pinned buffer
        host, size = self._host, self._block_size
        for row, item in enumerate(items):
            sequence = item.sequence
            position, table = sequence.num_computed_tokens, sequence.block_table
            host[row, 0] = sequence.token_ids[position]
            host[row, 1] = position
            host[row, 2] = table[position // size] * size + position % size
            host[row, 3] = position + 1
            count = position // size + 1
            known, known_count, known_last = self._tables_of_rows[row]
            # A table only grows at its end, or has its last block replaced; another list is another history.
            if known is not table or known_count != count or known_last != table[count - 1]:
                host[row, 4 : 4 + count] = table[:count]
                self._tables_of_rows[row] = (table, count, table[count - 1])
        host[len(items) :, 2] = -1
        host[len(items) :, 3] = 0
        self._device.copy_(self._pinned, non_blocking=True)
        longest = max(item.sequence.num_computed_tokens for item in items) // size + 1
        return host[: len(items), : 4 + longest]

    def fill_rows(self, rows: np.ndarray) -> None:
        """On another rank: writes what `fill` gave on rank 0."""
        torch.cuda.current_stream().synchronize()
        self._host[: len(rows), : rows.shape[1]] = rows
        self._host[len(rows) :, 2] = -1
        self._host[len(rows) :, 3] = 0
        self._device.copy_(self._pinned, non_blocking=True)

    def replay(self) -> None:
        self._graph.replay()


def _capture_all(runner: CudaModelRunner, batches: list[int]) -> list[_DecodeGraph]:
    """Graphs by growing batch; captured from the largest down, so that all fit into the memory of the first."""
    pool = torch.cuda.graph_pool_handle()
    graphs = [_DecodeGraph(runner, batch, pool) for batch in reversed(batches)]
    torch.cuda.synchronize()
    return graphs[::-1]


def _takes_largest(sampling: SamplingParams) -> bool:
    """True when the largest logit is all that is wanted."""
    return (
        sampling.temperature == 0
        and sampling.logprobs is None
        and not sampling.logit_bias
        and not sampling.presence_penalty
        and not sampling.frequency_penalty
        and sampling.repetition_penalty == 1.0
    )


def _padded_tables(inputs: ForwardInputs, items: list[int], device: torch.device) -> torch.Tensor:
    width = max(len(inputs.block_tables[item]) for item in items)
    tables = np.zeros((len(items), width), dtype=np.int32)
    for row, item in enumerate(items):
        table = inputs.block_tables[item]
        tables[row, : len(table)] = table
    return torch.from_numpy(tables).to(device)


def _dense_runs(inputs: ForwardInputs, items: list[int]) -> list[tuple[int, int, int]]:
    """(first row, number of chunks, rows of each): neighbours of equal length are one call."""
    runs: list[tuple[int, int, int]] = []
    for item in items:
        first, length = inputs.query_starts[item], inputs.num_queries(item)
        if runs and runs[-1][2] == length and runs[-1][0] + runs[-1][1] * length == first:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, length)
        else:
            runs.append((first, 1, length))
    return runs
