"""Computes planned steps on one GPU: by captured graphs, or kernel by kernel. The same on every rank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from engine.cuda.attention import RaggedAttention
from engine.cuda.decode_attention import DecodeAttention
from engine.cuda.decoder import CudaDecoder
from engine.cuda.elementwise import prepare_step
from engine.cuda.graphs import StepOutputs, StepParts, capture_all
from engine.cuda.step_inputs import DecodeRows, Upload, aligned
from engine.cuda.step_plan import StepInputs, StepPlanner
from engine.kv_cache import PagedKVCache
from engine.loader import LoadedModel


class StepExecutor:
    """One model with one KV cache on one GPU, for steps of up to `max_batch` decodes.

    Raises:
        ConfigError: `max_model_len` is more than the model's positions allow.
    """

    def __init__(
        self, loaded: LoadedModel, kv_cache: PagedKVCache, max_model_len: int, max_batch: int, *, graphs: bool
    ) -> None:
        config = loaded.config
        # cuDNN's fused attention took 101 us where flash attention took 189 (one layer, 1 x 2048). A context manager
        # around each call says the same, and costs more than the call.
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.enable_flash_sdp(False)
        device, block_size = loaded.model.device, kv_cache.block_size
        self._kv_cache = kv_cache
        self._num_layers = config.num_layers
        self._max_model_len, self._max_batch = max_model_len, max_batch
        self._side = torch.cuda.Stream()
        with torch.inference_mode():
            attention = DecodeAttention(
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                block_size,
                max_batch,
                device,
                loaded.model.dtype,
            )
            rows = DecodeRows(max_batch, -(-max_model_len // block_size), device)
            decoder = CudaDecoder(loaded.model, max_model_len)
            self._parts = StepParts(decoder, kv_cache, attention, rows, config.windows)
            self._decode_graphs, self._prompt_graphs = capture_all(self._parts, max_batch) if graphs else ([], [])

    def planner(self) -> StepPlanner:
        """Plans steps for this executor, on rank 0."""
        return StepPlanner(
            self._kv_cache.block_size,
            self._max_model_len,
            self._max_batch,
            [graph.batch for graph in self._decode_graphs],
            [graph.num_tokens for graph in self._prompt_graphs],
        )

    def execute(self, inputs: StepInputs, on_layers_done: Callable[[int, int], None] | None) -> StepOutputs:
        """Computes a step on this rank, as all others do. Enqueues it, and does not wait for the device.

        Rows of logits and tokens: those of decodes, padding included, then of sampled chunks. Logits of all ids where
        the step needs a draw.
        """
        self._parts.rows.write_tables(inputs.decodes)
        if inputs.is_replay:
            outputs = self._replay(inputs)
            if on_layers_done is not None:
                on_layers_done(0, self._num_layers)
        else:
            outputs = self._compute(inputs, on_layers_done)
        if inputs.needs_draw and outputs.logits is not None:
            logits = self._parts.decoder.gather(outputs.logits)
            return StepOutputs(outputs.input_ids, logits, outputs.tokens, outputs.hidden)
        return outputs

    def keep_drawn(self, inputs: StepInputs, tokens: torch.Tensor | None) -> None:
        """Makes drawn tokens the newest ones of the step's decodes, on all ranks.

        tokens: [num_decodes] int64, in the order of `inputs.decodes.rows`; None on a rank other than 0.
        """
        rows, decoder = self._parts.rows, self._parts.decoder
        if tokens is None:
            tokens = torch.zeros(len(inputs.decodes.rows), dtype=torch.int64, device=rows.newest.device)
        rows.write_newest(inputs.decodes, decoder.share_ids(tokens))

    def _replay(self, inputs: StepInputs) -> StepOutputs:
        """Decodes and short prompts beside each other.

        64 decodes beside 256 tokens behind 1,792 took 16.9 ms on an H100, kernel by kernel in one batch 22.9. For more
        tokens the two are equal within the noise: a product of many rows fills the device. Several ranks
        have one set of buffers for their sums, so there one runs after the other.
        """
        decodes, num_rows = inputs.decodes, len(inputs.decodes.contexts)
        if not num_rows:
            return self._replay_prompts(inputs)
        graph = next(graph for graph in self._decode_graphs if graph.batch == num_rows)
        if not inputs.chunks:
            return graph.submit(decodes.tokens, decodes.contexts)
        main = torch.cuda.current_stream()
        side = self._side if self._parts.decoder.num_ranks == 1 else main
        side.wait_stream(main)
        with torch.cuda.stream(side):
            decoded = graph.submit(decodes.tokens, decodes.contexts)
        prompted = self._replay_prompts(inputs)
        main.wait_stream(side)
        if not inputs.sampled_chunks:
            return decoded
        assert decoded.logits is not None and decoded.tokens is not None
        assert prompted.logits is not None and prompted.tokens is not None
        tokens = torch.cat((decoded.tokens, prompted.tokens))
        return StepOutputs(decoded.input_ids, torch.cat((decoded.logits, prompted.logits)), tokens)

    def _replay_prompts(self, inputs: StepInputs) -> StepOutputs:
        return self._prompt_graphs[inputs.prompt_graph].submit(inputs.chunks, inputs.tokens, inputs.sampled_chunks)

    def _compute(self, inputs: StepInputs, on_layers_done: Callable[[int, int], None] | None) -> StepOutputs:
        """A step kernel by kernel; also the hidden states."""
        parts, block_size, decodes = self._parts, self._kv_cache.block_size, inputs.decodes
        num_decodes = len(decodes.contexts)
        last_rows = [inputs.chunks[i].first + inputs.chunks[i].num_queries - 1 for i in inputs.sampled_chunks]
        num_tokens = num_decodes + len(inputs.tokens.sources)
        upload = Upload.of_size(
            3 * aligned(8 * num_tokens)
            + aligned(4 * num_decodes)
            + aligned(8 * (num_decodes + len(last_rows)))
            + RaggedAttention.upload_bytes(inputs.chunks),
            self._kv_cache.device,
        )
        sources = upload.add(np.concatenate((decodes.tokens.sources, inputs.tokens.sources)))
        positions = upload.add(np.concatenate((decodes.tokens.positions, inputs.tokens.positions)))
        slots = upload.add(np.concatenate((decodes.tokens.slots, inputs.tokens.slots)))
        contexts = upload.add(decodes.contexts)
        sampled = upload.add(np.asarray([*range(num_decodes), *last_rows], dtype=np.int64))
        tables = parts.rows.tables
        attend = RaggedAttention(
            parts.attention, self._kv_cache, parts.windows, tables[:num_decodes], contexts, inputs.chunks, upload
        )
        upload.send()
        ids = prepare_step(sources, positions, slots, parts.rows.newest, tables, num_decodes, block_size)
        x = parts.decoder.embed(ids)
        for first in range(0, self._num_layers, inputs.layers_per_group):
            count = min(inputs.layers_per_group, self._num_layers - first)
            x = parts.decoder.run_layers(x, first, count, positions, slots, self._kv_cache.storage, attend)
            if on_layers_done is not None:
                on_layers_done(first, count)
        if not len(sampled):
            return StepOutputs(ids, None, None, x)
        logits = parts.decoder.partial_logits(x[sampled] if len(sampled) < len(x) else x)
        tokens = parts.decoder.largest(logits)
        parts.rows.newest[:num_decodes].copy_(tokens[:num_decodes])
        return StepOutputs(ids, logits, tokens, x)
