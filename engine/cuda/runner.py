"""Computes scheduled batches on a GPU, a step ahead of the host that takes their results.

`submit` gives a step to the device and waits for nothing: what a step samples stays on the device, where the next step
finds it, and is copied to the host behind it. Steps of decodes alone, and of a few short prompts alone, replay captured
graphs; others go kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from engine.batch import ComputedStep, PendingStep, ScheduledBatch, ScheduledSequence, StepResult
from engine.cuda import sampling
from engine.cuda.attention import RaggedAttention, planned_shapes
from engine.cuda.decoder import CudaDecoder
from engine.cuda.graphs import PROMPT_CHUNKS, PromptGraph, StepOutputs, StepParts, capture_all, decode_batches
from engine.cuda.kernels import DecodeAttention, prepare_step
from engine.cuda.sampling import Drawn, DrawRow, draw, greedy
from engine.cuda.step_inputs import DecodeRows, TokenRows, Upload, aligned, prompt_rows
from engine.kv_cache import PagedKVCache
from engine.loader import LoadedModel
from engine.model_runner import ModelRunner, sample_indices
from engine.sequence import Sequence
from phasewise.core.errors import InternalError
from phasewise.core.request import SampledToken, SamplingParams

_NO_DECODES: tuple[list[int], TokenRows, np.ndarray] = ([], TokenRows.padding(0), np.zeros(0, dtype=np.int32))


class CudaModelRunner(ModelRunner):
    """One model with one KV cache on one GPU, for up to `max_batch` sequences that decode."""

    def __init__(
        self,
        loaded: LoadedModel,
        kv_cache: PagedKVCache,
        max_model_len: int,
        *,
        max_batch: int = 256,
        graphs: bool = True,
    ) -> None:
        super().__init__(loaded, kv_cache, max_model_len, attention="reference")
        config = loaded.config
        # cuDNN's fused attention took 101 us where flash attention took 189 (one layer, 1 x 2048). A context manager
        # around each call says the same, and costs more than the call.
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.enable_flash_sdp(False)
        device, block_size = loaded.model.device, kv_cache.block_size
        self._max_batch = max_batch
        self._side = torch.cuda.Stream()
        self._vocab_size = config.vocab_size
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
            rows = DecodeRows(max_batch, -(-max_model_len // block_size), block_size, device)
            decoder = CudaDecoder(loaded.model, max_model_len)
            self._parts = StepParts(decoder, kv_cache, attention, rows, config.windows)
            self._decode_graphs, self._prompt_graphs = capture_all(self._parts, max_batch) if graphs else ([], [])

    @property
    def num_steps_ahead(self) -> int:
        return 1

    def run(
        self,
        batch: ScheduledBatch,
        on_layers_done: Callable[[int, int], None] | None = None,
        layers_per_group: int = 0,
    ) -> StepResult:
        """As ModelRunner.run."""
        return self.submit(batch, on_layers_done, layers_per_group).collect()

    @torch.inference_mode()
    def submit(
        self,
        batch: ScheduledBatch,
        on_layers_done: Callable[[int, int], None] | None = None,
        layers_per_group: int = 0,
    ) -> PendingStep:
        """As ModelRunner.submit; at most one step may be in flight, and its sequences have their newest token there.

        `on_layers_done` is called when the layers' kernels are on the device's stream, not when they have run.
        """
        if not batch.items:
            return ComputedStep(StepResult((), ()))
        decodes = [item for item in batch.items if _is_decode(item)]
        prompts = [item for item in batch.items if not _is_decode(item)]
        if len(decodes) > self._max_batch or any(i.start + i.num_tokens > self._max_model_len for i in batch.items):
            raise ValueError(f"{len(decodes)} decodes, longest {max(i.start + i.num_tokens for i in batch.items)}")
        prompt_graph = self._prompt_graph(prompts)
        has_graph = bool(self._decode_graphs) and (prompt_graph is not None or not prompts)
        # Only graphs need padding: elsewhere it would be computed with the rest.
        num_rows = self._padded(len(decodes)) if decodes and has_graph else len(decodes)
        rows, tokens, contexts = self._parts.rows.assign(decodes, num_rows) if decodes else _NO_DECODES
        if has_graph:
            computed = self._replay(prompt_graph, prompts, num_rows, tokens, contexts)
            if on_layers_done is not None:
                on_layers_done(0, self._num_layers)
        else:
            groups = layers_per_group or self._num_layers
            computed = self._compute(tokens, contexts, prompts, on_layers_done, groups)
        return self._sample_step(batch, decodes, prompts, rows, num_rows, computed)

    @torch.inference_mode()
    def warm_up(self, token_budget: int) -> None:
        """Compiles the kernels of mixed steps and lets cuDNN plan for prompts: what would hold up the first requests.

        Overwrites blocks of the cache, which must not be in use.
        """
        sampling.warm_up(torch.zeros(1, self._vocab_size, dtype=self._model.dtype, device=self._model.device))
        size = self._kv_cache.block_size
        capacity = min(self._max_model_len, self._kv_cache.num_blocks * size)
        for count, length in [(1, 1), (1, 1023), *planned_shapes(token_budget)]:
            if length > capacity:
                continue
            table = list(range(-(-length // size)))  # of all of them: nobody reads what they write
            prompts = [Sequence("warm-up", SamplingParams(temperature=0.0), [0] * length, length) for _ in range(count)]
            decode = Sequence("warm-up", SamplingParams(temperature=0.0), [0, 0], 1, num_computed_tokens=1)
            for sequence in (*prompts, decode):
                sequence.block_table = list(table)
            items = [ScheduledSequence(decode, 1, 1), *(ScheduledSequence(s, length, 1) for s in prompts)]
            self.run(ScheduledBatch(tuple(items)))

    # ---- inside

    def _padded(self, num_decodes: int) -> int:
        """Rows of the graph for so many decodes."""
        return next(batch for batch in decode_batches(self._max_batch) if batch >= num_decodes)

    def _prompt_graph(self, prompts: list[ScheduledSequence]) -> PromptGraph | None:
        if not prompts or len(prompts) > PROMPT_CHUNKS or any(_wants_prompt_logprobs(item) for item in prompts):
            return None
        num_tokens = sum(item.num_tokens for item in prompts)
        return next((graph for graph in self._prompt_graphs if graph.num_tokens >= num_tokens), None)

    def _replay(
        self,
        prompt_graph: PromptGraph | None,
        prompts: list[ScheduledSequence],
        num_rows: int,
        tokens: TokenRows,
        contexts: np.ndarray,
    ) -> _Computed:
        """Decodes and short prompts beside each other.

        64 decodes beside 256 tokens behind 1,792 took 16.9 ms on an H100, kernel by kernel in one batch 22.9. For more
        tokens the two are equal within the noise: a product of many rows leaves no room for another.
        """
        if not num_rows:
            assert prompt_graph is not None
            return self._replay_prompts(prompt_graph, prompts)
        decode_graph = next(graph for graph in self._decode_graphs if graph.batch == num_rows)
        if prompt_graph is None:
            return _Computed(decode_graph.submit(tokens, contexts), None)
        main = torch.cuda.current_stream()
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            decodes = decode_graph.submit(tokens, contexts)
        computed = self._replay_prompts(prompt_graph, prompts)
        main.wait_stream(self._side)
        outputs = computed.outputs
        assert decodes.logits is not None and decodes.tokens is not None
        assert outputs.logits is not None and outputs.tokens is not None
        logits = torch.cat((decodes.logits, outputs.logits))
        joined = StepOutputs(decodes.input_ids, logits, torch.cat((decodes.tokens, outputs.tokens)))
        return _Computed(joined, None, computed.prompt_rows)

    def _replay_prompts(self, graph: PromptGraph, prompts: list[ScheduledSequence]) -> _Computed:
        chunks, tokens = prompt_rows(prompts, 0, self._kv_cache.block_size)
        sampled = [i for i, item in enumerate(prompts) if item.num_samples]
        return _Computed(graph.submit(chunks, tokens), None, sampled)

    def _compute(
        self,
        decodes: TokenRows,
        contexts: np.ndarray,
        prompts: list[ScheduledSequence],
        on_layers_done: Callable[[int, int], None] | None,
        layers_per_group: int,
    ) -> _Computed:
        """A step kernel by kernel."""
        parts, block_size, num_decodes = self._parts, self._kv_cache.block_size, len(contexts)
        chunks, tokens = prompt_rows(prompts, num_decodes, block_size) if prompts else ([], TokenRows.padding(0))
        last_rows = [c.first + c.num_queries - 1 for c, p in zip(chunks, prompts, strict=True) if p.num_samples]
        num_tokens = num_decodes + len(tokens.sources)
        upload = Upload.of_size(
            3 * aligned(8 * num_tokens)
            + aligned(4 * num_decodes)
            + aligned(8 * (num_decodes + len(last_rows)))
            + RaggedAttention.upload_bytes(chunks),
            self._model.device,
        )
        sources = upload.add(np.concatenate((decodes.sources, tokens.sources)))
        positions = upload.add(np.concatenate((decodes.positions, tokens.positions)))
        slots = upload.add(np.concatenate((decodes.slots, tokens.slots)))
        contexts_on_device = upload.add(contexts)
        sampled = upload.add(np.asarray([*range(num_decodes), *last_rows], dtype=np.int64))
        tables = parts.rows.tables
        attend = RaggedAttention(
            parts.attention, self._kv_cache, parts.windows, tables[:num_decodes], contexts_on_device, chunks, upload
        )
        upload.send()
        ids = prepare_step(sources, positions, slots, parts.rows.newest, tables, num_decodes, block_size)
        x = parts.decoder.embed(ids)
        for first in range(0, self._num_layers, layers_per_group):
            count = min(layers_per_group, self._num_layers - first)
            x = parts.decoder.run_layers(x, first, count, positions, slots, self._kv_cache.storage, attend)
            if on_layers_done is not None:
                on_layers_done(first, count)
        if not len(sampled):
            return _Computed(StepOutputs(ids, None, None), x)
        logits = parts.decoder.logits(x[sampled] if len(sampled) < len(x) else x)
        greedy_tokens = greedy(logits)
        parts.rows.newest[:num_decodes].copy_(greedy_tokens[:num_decodes])
        return _Computed(StepOutputs(ids, logits, greedy_tokens), x, list(range(len(last_rows))))

    def _sample_step(
        self,
        batch: ScheduledBatch,
        decodes: list[ScheduledSequence],
        prompts: list[ScheduledSequence],
        rows: list[int],
        first_prompt_row: int,
        computed: _Computed,
    ) -> PendingStep:
        """Draws where the largest logit is not all that is wanted, and sends the tokens on their way to the host.

        The prompts' rows, of tokens and of logits, come behind those of the decodes, padding included.
        """
        outputs = computed.outputs
        prompts_that_sample = [item for item in prompts if item.num_samples]
        logits_rows = [*rows, *(first_prompt_row + row for row in computed.prompt_rows)]
        items = list(zip([*decodes, *prompts_that_sample], logits_rows, strict=True))
        drawn = tokens = None
        if items and not all(_takes_largest(item.sequence.sampling) for item, _ in items):
            assert outputs.logits is not None
            wanted = [
                DrawRow(
                    item.sequence,
                    index,
                    row,
                    item.start + item.num_tokens - item.sequence.num_prompt_tokens,
                    row if item.start == len(item.sequence.token_ids) else -1,
                )
                for item, row in items
                for index in sample_indices(item)
            ]
            drawn = draw(outputs.logits, wanted, outputs.input_ids)
            if decodes:
                index = Upload.of_size(aligned(8 * len(rows)), self._model.device)
                places = index.add(np.asarray(rows, dtype=np.int64))
                index.send()
                self._parts.rows.newest.index_copy_(0, places, drawn.tokens[: len(rows)])
            drawn.start_copy()
        elif items:
            assert outputs.tokens is not None
            tokens = torch.empty(outputs.tokens.shape, dtype=torch.int64, pin_memory=True)
            tokens.copy_(outputs.tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return _CudaStep(self, batch, event, items, drawn, tokens, computed.hidden, first_prompt_row)


@dataclass(frozen=True, slots=True)
class _Computed:
    """A step on the device. `prompt_rows` are rows of logits, counted from the first that is a prompt's."""

    outputs: StepOutputs
    hidden: torch.Tensor | None
    prompt_rows: Seq[int] = ()


@dataclass(frozen=True, slots=True)
class _CudaStep:
    """A step in flight: PendingStep."""

    runner: CudaModelRunner
    batch: ScheduledBatch
    event: torch.cuda.Event
    items: list[tuple[ScheduledSequence, int]]  # those that sample, and their row of logits
    drawn: Drawn | None
    tokens: torch.Tensor | None  # of each row of logits
    hidden: torch.Tensor | None
    first_prompt_row: int

    @torch.inference_mode()
    def collect(self) -> StepResult:
        self.event.synchronize()
        sampled: dict[int, tuple[SampledToken, ...]] = {}
        if self.drawn is not None:
            drawn = iter(self.drawn.result())
            for item, _ in self.items:
                sampled[id(item)] = tuple(_checked(next(drawn), item) for _ in range(item.num_samples))
        elif self.tokens is not None:
            tokens = self.tokens.tolist()
            for item, row in self.items:
                token = _checked(SampledToken(tokens[row]) if tokens[row] >= 0 else None, item)
                sampled[id(item)] = (token,) * item.num_samples
        return StepResult(tuple(sampled.get(id(item), ()) for item in self.batch.items), self._prompt_logprobs())

    def _prompt_logprobs(self) -> tuple[tuple[SampledToken, ...], ...]:
        if not any(_wants_prompt_logprobs(item) for item in self.batch.items):
            return ((),) * len(self.batch.items)
        assert self.hidden is not None
        described: list[tuple[SampledToken, ...]] = []
        row = self.first_prompt_row
        for item in self.batch.items:
            if _is_decode(item):
                described.append(())
                continue
            described.append(self.runner._prompt_logprobs(item, self.hidden, row))
            row += item.num_tokens
        return tuple(described)


def _checked(token: SampledToken | None, item: ScheduledSequence) -> SampledToken:
    if token is None:
        request_id = item.sequence.request_id
        raise InternalError(f"the model computed NaN logits for request {request_id}; its weights may be damaged")
    return token


def _is_decode(item: ScheduledSequence) -> bool:
    return item.num_tokens == 1 and item.start >= item.sequence.num_prompt_tokens


def _wants_prompt_logprobs(item: ScheduledSequence) -> bool:
    return item.sequence.sampling.prompt_logprobs is not None and not _is_decode(item)


def _takes_largest(params: SamplingParams) -> bool:
    """True when the largest logit is all that is wanted."""
    return (
        params.temperature == 0
        and params.logprobs is None
        and not params.logit_bias
        and not params.presence_penalty
        and not params.frequency_penalty
        and params.repetition_penalty == 1.0
    )
