"""Attention of one step over a ragged batch: rows of decodes first, then prompt chunks."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from engine.cuda.decode_attention import DecodeAttention
from engine.cuda.prompt_attention import (
    MAX_SHARES,
    PromptTile,
    PromptWorkspace,
    merge_into,
    prompt_attention,
    prompt_tile,
)
from engine.cuda.step_inputs import PromptChunk, Upload, aligned
from engine.kv_cache import PagedKVCache, as_words

_REGULAR = 256  # chunk lengths that are multiples of it, and short of the longest, have cuDNN's plans made for them
_LONG = 1024  # shorter chunks are given to cuDNN several at a time
_FAR = 4096  # from so much earlier context on, cuDNN is worth a new plan
_LONGEST = 8192
_COUNTS = (8, 4, 2, 1)


def planned_shapes(token_budget: int) -> list[tuple[int, int]]:
    """(number of chunks, tokens of each) for which cuDNN should have its plans before the first request."""
    lengths = range(_REGULAR, min(token_budget, _LONGEST) + 1, _REGULAR)
    counts = [(count, length) for length in lengths for count in (_COUNTS if length < _LONG else (1,))]
    return [(count, length) for count, length in counts if count * length <= token_budget]


class RaggedAttention:
    """Decodes by the decode kernel, prompt chunks by what is fastest.

    Microseconds of one layer of the Llama-3.1-8B shape on an H100 (flash: torch's variable-length call on a gathered
    copy of the context, which has no plans either):

        tokens behind context   8 x 512   1 x 512   1 x 2048   1984 behind 2048   1 x 8192   2048 behind 16384
        cuDNN                        55        30         84                230        906
        paged kernel                103        39        167                408       1834                1831
        flash                       126        39        168                408       1684                1770

    cuDNN makes a plan for every new shape, 50 ms each. So chunks without earlier context go there when their length is
    regular (the scheduler cuts prompts so that many are): their plans are made when the runner starts. One behind long
    context attends to itself and to a gathered copy of its context, and the two are merged. All others, and models with
    windows, take the paged kernel.

    Decodes are rows 0 to num_decodes, with `tables` [num_decodes, max_blocks] and `contexts` [num_decodes], both int32;
    the arrays that chunks need go with `upload`, which has room for `upload_bytes(chunks)`.

    Attributes:
        paged: the chunks that the paged kernel computes; None without any.
        split: the chunks behind long context, each with the blocks of that context.
    """

    def __init__(
        self,
        decode: DecodeAttention,
        kv_cache: PagedKVCache,
        windows: tuple[int | None, ...],
        tables: torch.Tensor,
        contexts: torch.Tensor,
        chunks: Seq[PromptChunk],
        upload: Upload,
    ) -> None:
        self._decode = decode
        self._cache = kv_cache
        self._storage = kv_cache.storage
        self._windows = windows
        self._tables, self._contexts = tables, contexts
        is_low_precision = kv_cache.storage.dtype != torch.float32
        may_use_cudnn = is_low_precision and not any(window is not None for window in windows)
        regular = [c for c in chunks if may_use_cudnn and _is_regular(c)]
        paged = [c for c in chunks if c not in regular]
        tile = prompt_tile(decode.dtype, decode.num_heads, decode.num_kv_heads)
        self.paged = PagedChunks.build(paged, tile, kv_cache.storage, upload) if paged else None
        self._dense = _dense_runs([c for c in regular if not c.num_earlier])
        self.split = [(c, upload.add(_earlier_blocks(c, kv_cache.block_size))) for c in regular if c.num_earlier]

    @staticmethod
    def upload_bytes(chunks: Seq[PromptChunk]) -> int:
        """At least the bytes that the arrays of these chunks take."""
        width = max((len(chunk.table) for chunk in chunks), default=0)
        work = sum(chunk.num_queries for chunk in chunks) + MAX_SHARES
        return 8 * aligned(0) + 20 * work + sum(aligned(4 * width) + aligned(16) for _ in chunks)

    def __call__(self, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """qkv: [num_tokens, heads, head_dim], written to the cache already. Fills `out`, or returns another tensor."""
        window, storage = self._windows[layer], self._storage[layer]
        num_decodes = len(self._contexts)
        if num_decodes:
            rows = qkv[:num_decodes].view(num_decodes, -1)
            self._decode(rows, storage, self._tables, self._contexts, out[:num_decodes], window=window)
        if self.paged is not None:
            self.paged.attend(qkv, storage, out, self._cache.block_size, window)
        num_heads, num_kv_heads = out.shape[1], storage.shape[2]
        heads = (num_heads, num_kv_heads, num_kv_heads)
        for first, count, length in self._dense:
            last = first + count * length
            queries, keys, values = qkv[first:last].view(count, length, *qkv.shape[1:]).transpose(1, 2).split(heads, 1)
            attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
            attended = attended.transpose(1, 2)
            if count * length == len(qkv) and attended.is_contiguous():
                return attended.view(out.shape)
            out[first:last].view(count, length, *out.shape[1:]).copy_(attended)
        for chunk, blocks in self.split:
            last = chunk.first + chunk.num_queries
            queries, keys, values = qkv[chunk.first : last].unsqueeze(0).transpose(1, 2).split(heads, 1)
            own, own_lse = _cudnn_attention(queries, keys, values, is_causal=True)
            context = as_words(self._cache.blocks_view()[layer]).index_select(1, blocks).view(storage.dtype)
            context = context.to(qkv.dtype).view(2, 1, -1, *storage.shape[2:]).transpose(2, 3)
            earlier, earlier_lse = _cudnn_attention(queries, context[0], context[1], is_causal=False)
            place = out[chunk.first : last]
            place.copy_(own[0].transpose(0, 1))
            merge_into(place, own_lse, earlier[0].transpose(0, 1), earlier_lse)
        return out


def _cudnn_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """([1, num_heads, num_queries, head_dim], log-sum-exp [num_heads, num_queries]); called directly for the latter."""
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(queries, keys, values, None, True, 0.0, is_causal)
    return result[0], result[1].reshape(queries.shape[1], queries.shape[2])


@dataclass(frozen=True, slots=True)
class PagedChunks:
    """Arguments of `prompt_attention`."""

    tables: torch.Tensor
    work: torch.Tensor
    spans: torch.Tensor
    workspace: PromptWorkspace
    tile: PromptTile

    @staticmethod
    def arrays(chunks: Seq[PromptChunk], tile: PromptTile) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tables [num_chunks, width], work [5, num_work], spans [3, num_chunks]), all int32."""
        tables = np.zeros((len(chunks), max(len(chunk.table) for chunk in chunks)), dtype=np.int32)
        for row, chunk in enumerate(chunks):
            tables[row, : len(chunk.table)] = chunk.table
        tiles = [
            (min(chunk.num_earlier + token + tile.tokens, chunk.context), item, token)
            for item, chunk in enumerate(chunks)
            for token in range(0, chunk.num_queries, tile.tokens)
        ]
        tiles.sort(reverse=True)  # the longest first
        # In whole turns of the kernel's loop, as the kernel cuts.
        fair = -(-sum(num_keys for num_keys, _, _ in tiles) // (tile.num_shares * tile.keys)) * tile.keys
        share = max(fair, tile.min_share)
        work: list[tuple[int, int, int, int, int]] = []
        num_cells = 0
        for num_keys, item, token in tiles:
            count = -(-num_keys // share)
            work += [(item, token, i, count, num_cells) for i in range(count)]
            num_cells += count if count > 1 else 0
        spans = [(chunk.first, chunk.num_queries, chunk.context) for chunk in chunks]
        columns = np.ascontiguousarray(np.asarray(work, dtype=np.int32).T)
        return tables, columns, np.ascontiguousarray(np.asarray(spans, dtype=np.int32).T)

    @staticmethod
    def build(chunks: Seq[PromptChunk], tile: PromptTile, storage: torch.Tensor, upload: Upload) -> PagedChunks:
        """storage: that of the cache, [num_layers, 2, num_slots, num_kv_heads, head_dim]."""
        tables, work, spans = PagedChunks.arrays(chunks, tile)
        num_cells = int(np.count_nonzero(work[3] > 1))
        workspace = PromptWorkspace.of(num_cells, tile, storage)
        return PagedChunks(upload.add(tables), upload.add(work), upload.add(spans), workspace, tile)

    def attend(
        self, qkv: torch.Tensor, storage: torch.Tensor, out: torch.Tensor, block_size: int, window: int | None
    ) -> None:
        """Fills the chunks' rows of `out`, as `prompt_attention`, from a layer's `storage` [2, num_slots, …]."""
        arguments = (self.tables, self.work, self.spans, self.workspace, self.tile)
        prompt_attention(qkv, storage, *arguments, out, block_size, window=window)


def _is_regular(chunk: PromptChunk) -> bool:
    if chunk.num_queries % _REGULAR or chunk.num_queries > _LONGEST:
        return False
    if not chunk.num_earlier:
        return True
    return chunk.num_earlier >= _FAR and chunk.num_earlier % _REGULAR == 0 and chunk.num_queries >= _LONG


def _earlier_blocks(chunk: PromptChunk, block_size: int) -> np.ndarray:
    """[num_blocks] int32: those before the chunk, which begins with a block of its own, as both lengths are regular."""
    return chunk.table[: chunk.num_earlier // block_size]


def _dense_runs(chunks: Seq[PromptChunk]) -> list[tuple[int, int, int]]:
    """(first row, number of chunks, rows of each): short neighbours of equal length share a call."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    while start < len(chunks):
        first, length = chunks[start].first, chunks[start].num_queries
        count = 1
        while (
            start + count < len(chunks)
            and chunks[start + count].num_queries == length
            and chunks[start + count].first == first + count * length
        ):
            count += 1
        start += count
        for size in _COUNTS if length < _LONG else (1,):
            while count >= size:
                runs.append((first, size, length))
                first += size * length
                count -= size
    return runs
