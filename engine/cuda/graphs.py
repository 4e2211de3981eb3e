"""Captured steps. A graph has static buffers for a bucket of rows; a smaller step is padded with rows that do nothing.

Padding rows write no KV and attend to nothing; what they compute is never read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from engine.cuda.attention import PagedChunks
from engine.cuda.decode_attention import DecodeAttention
from engine.cuda.decoder import CudaDecoder
from engine.cuda.elementwise import prepare_step
from engine.cuda.prompt_attention import PromptWorkspace, prompt_tile
from engine.cuda.step_inputs import PROMPT_CHUNKS, DecodeRows, PromptChunk, TokenRows, Upload, aligned
from engine.kv_cache import PagedKVCache

DECODE_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
PROMPT_TOKENS = (64, 128, 192, 256, 384, 512)


@dataclass(frozen=True, slots=True)
class StepParts:
    """What steps are made of."""

    decoder: CudaDecoder
    kv_cache: PagedKVCache
    attention: DecodeAttention
    rows: DecodeRows
    windows: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """On the device. Those of a graph hold until the next step of any graph begins.

    Attributes:
        input_ids: [num_tokens] int64; decode rows come first.
        logits: [num_rows, vocab_size], in the model's dtype, of several ranks this one's part; None when nothing is
            sampled.
        tokens: [num_rows] int64, the first largest of each row's logits; -1 where they hold a NaN.
        hidden: [num_tokens, hidden_size] after the last layer; None of a graph.
    """

    input_ids: torch.Tensor
    logits: torch.Tensor | None
    tokens: torch.Tensor | None
    hidden: torch.Tensor | None = None


class Capture:
    """Memory and a stream, which owns the libraries' workspaces, for graphs that never run beside each other."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()


class _Graph(ABC):
    """Captures `_step`, which reads what `_send` sends from the places that `_places` gave."""

    def __init__(self, parts: StepParts, num_bytes: int) -> None:
        self._parts = parts
        self._static = torch.zeros(num_bytes, dtype=torch.uint8, device=parts.kv_cache.device)
        self._graph = torch.cuda.CUDAGraph()

    def _capture(self, capture: Capture) -> None:
        stream = capture.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()  # compiles kernels and sets libraries up, which a capture must not see
        torch.cuda.current_stream().wait_stream(stream)
        # thread_local: other threads, such as those of NCCL, may use the device meanwhile.
        with torch.cuda.graph(self._graph, pool=capture.pool, stream=stream, capture_error_mode="thread_local"):
            self._outputs = self._step()

    def _places(self, arrays: Iterable[np.ndarray]) -> tuple[torch.Tensor, ...]:
        """A place in the static buffer for each array, of its shape and with its values."""
        upload = Upload(self._static)
        places = tuple(upload.add(array) for array in arrays)
        upload.send()
        return places

    def _send(self, arrays: Iterable[np.ndarray]) -> None:
        """Copies arrays of the same shapes and order to the places that `_places` gave."""
        upload = Upload(self._static)
        for array in arrays:
            upload.put(array)
        upload.send()

    def _replay(self) -> StepOutputs:
        self._graph.replay()
        return self._outputs

    @abstractmethod
    def _step(self) -> StepOutputs:
        """Computes a step of the padded size from the static buffers."""


class DecodeGraph(_Graph):
    """A decode step of the first `batch` rows."""

    def __init__(self, parts: StepParts, batch: int, capture: Capture) -> None:
        super().__init__(parts, 3 * aligned(8 * batch) + aligned(4 * batch))
        self.batch = batch
        self._inputs = self._places(self._arrays(TokenRows.padding(batch), np.zeros(batch, dtype=np.int32)))
        self._capture(capture)

    def submit(self, tokens: TokenRows, contexts: np.ndarray) -> StepOutputs:
        """tokens: `batch` rows; contexts: [batch] int32, 0 for padding."""
        self._send(self._arrays(tokens, contexts))
        return self._replay()

    @staticmethod
    def _arrays(tokens: TokenRows, contexts: np.ndarray) -> tuple[np.ndarray, ...]:
        return tokens.sources, tokens.positions, tokens.slots, contexts

    def _step(self) -> StepOutputs:
        sources, positions, slots, contexts = self._inputs
        parts, rows = self._parts, self._parts.rows
        storage, batch = parts.kv_cache.storage, self.batch
        ids = prepare_step(sources, positions, slots, rows.newest, rows.tables, batch, parts.kv_cache.block_size)

        def attend(layer: int, qkv: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            window = parts.windows[layer]
            return parts.attention(
                qkv.view(batch, -1), storage[layer], rows.tables[:batch], contexts, out, window=window
            )

        x = parts.decoder.embed(ids)
        x = parts.decoder.run_layers(x, 0, len(parts.windows), positions, slots, storage, attend)
        logits = parts.decoder.partial_logits(x)
        tokens = parts.decoder.largest(logits)
        rows.newest[:batch].copy_(tokens)
        return StepOutputs(ids, logits, tokens)


class PromptGraph(_Graph):
    """A step of a few short prompt chunks and no decodes, `num_tokens` tokens in all: launching it kernel by kernel
    takes the host longer than the device computes.
    """

    def __init__(self, parts: StepParts, num_tokens: int, capture: Capture) -> None:
        self.num_tokens = num_tokens
        self._tile = prompt_tile(parts.attention.dtype, parts.attention.num_heads, parts.attention.num_kv_heads)
        self._num_work = self._tile.max_work(num_tokens, PROMPT_CHUNKS)
        width = parts.rows.tables.shape[1]
        arrays = 4 * (PROMPT_CHUNKS * width + 5 * self._num_work + 3 * PROMPT_CHUNKS) + 8 * PROMPT_CHUNKS
        super().__init__(parts, 3 * aligned(8 * num_tokens) + arrays + 4 * aligned(0))
        self._inputs = self._places(self._arrays([], TokenRows.padding(0), []))
        self._capture(capture)

    def submit(self, chunks: Seq[PromptChunk], tokens: TokenRows, sampled: Seq[int]) -> StepOutputs:
        """`sampled`: numbers of the chunks whose last tokens' logits are wanted, which are the first rows of logits."""
        self._send(self._arrays(chunks, tokens, sampled))
        return self._replay()

    def _arrays(self, chunks: Seq[PromptChunk], tokens: TokenRows, sampled: Seq[int]) -> tuple[np.ndarray, ...]:
        padded, count = TokenRows.padding(self.num_tokens), len(tokens.sources)
        padded.sources[:count], padded.positions[:count] = tokens.sources, tokens.positions
        padded.slots[:count] = tokens.slots
        tables = np.zeros((PROMPT_CHUNKS, self._parts.rows.tables.shape[1]), dtype=np.int32)
        work = np.full((5, self._num_work), -1, dtype=np.int32)
        spans = np.zeros((3, PROMPT_CHUNKS), dtype=np.int32)
        last_rows = np.zeros(PROMPT_CHUNKS, dtype=np.int64)
        if chunks:
            own_tables, own_work, own_spans = PagedChunks.arrays(chunks, self._tile)
            tables[: len(chunks), : own_tables.shape[1]] = own_tables
            work[:, : own_work.shape[1]] = own_work
            spans[:, : len(chunks)] = own_spans
            last_rows[: len(sampled)] = [chunks[i].first + chunks[i].num_queries - 1 for i in sampled]
        return padded.sources, padded.positions, padded.slots, last_rows, tables, work, spans

    def _step(self) -> StepOutputs:
        sources, positions, slots, last_rows, tables, work, spans = self._inputs
        parts = self._parts
        storage, block_size = parts.kv_cache.storage, parts.kv_cache.block_size
        ids = prepare_step(sources, positions, slots, parts.rows.newest, parts.rows.tables, 0, block_size)
        workspace = PromptWorkspace.of(self._tile.max_cells, self._tile, storage)
        chunks = PagedChunks(tables, work, spans, workspace, self._tile)

        def attend(layer: int, qkv: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            chunks.attend(qkv, storage[layer], out, block_size, parts.windows[layer])
            return out

        x = parts.decoder.embed(ids)
        x = parts.decoder.run_layers(x, 0, len(parts.windows), positions, slots, storage, attend)
        logits = parts.decoder.partial_logits(x[last_rows])
        return StepOutputs(ids, logits, parts.decoder.largest(logits))


def decode_batches(max_batch: int) -> list[int]:
    """The sizes that decode steps are padded to."""
    return [*(batch for batch in DECODE_BATCHES if batch < max_batch), max_batch]


def capture_all(parts: StepParts, max_batch: int) -> tuple[list[DecodeGraph], list[PromptGraph]]:
    """Graphs by growing size; captured from the largest down, so that all fit into the memory of the first."""
    of_prompts, of_decodes = Capture(), Capture()
    prompts = [PromptGraph(parts, num_tokens, of_prompts) for num_tokens in reversed(PROMPT_TOKENS)]
    decodes = [DecodeGraph(parts, batch, of_decodes) for batch in reversed(decode_batches(max_batch))]
    torch.cuda.synchronize()
    return decodes[::-1], prompts[::-1]
