"""Computes scheduled batches on a GPU, a step ahead of the host that takes their results.

`submit` gives a step to the device and waits for nothing: what a step samples stays on the device, where the next step
finds it, and is copied to the host behind it. Steps of decodes alone, and of a few short prompts alone, replay captured
graphs; others go kernel by kernel.

Of several ranks, rank 0 has the sequences and samples. It tells the others a step's StepInputs, which is all that the
computation needs; what is sampled from the largest logits alone, every rank finds by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
import torch

from engine.batch import (
    ComputedStep,
    DeviceLost,
    PendingStep,
    ScheduledBatch,
    ScheduledSequence,
    StepResult,
    all_or_none,
)
from engine.cuda import sampling
from engine.cuda.attention import RaggedAttention, planned_shapes
from engine.cuda.decode_attention import DecodeAttention
from engine.cuda.decoder import CudaDecoder
from engine.cuda.elementwise import prepare_step
from engine.cuda.graphs import PROMPT_CHUNKS, StepOutputs, StepParts, capture_all
from engine.cuda.sampling import Drawn, DrawRow, draw
from engine.cuda.step_inputs import (
    DecodeInputs,
    DecodeRows,
    PromptChunk,
    RowAssignment,
    TokenRows,
    Upload,
    aligned,
    prompt_rows,
)
from engine.kv_cache import PagedKVCache
from engine.loader import LoadedModel
from engine.model_runner import ModelRunner, sample_indices
from engine.sampler import is_adjusted
from engine.sequence import Sequence
from engine.tensor_parallel import Command, OtherRanks
from phasewise.core.request import SampledToken, SamplingParams

_NO_TOKENS = TokenRows.padding(0)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _loses_device(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """CUDA reports an illegal access or a broken device to every later call of the process, too."""

    @functools.wraps(method)
    def guarded(*arguments: _P.args, **named: _P.kwargs) -> _R:
        try:
            return method(*arguments, **named)
        except torch.AcceleratorError as error:
            raise DeviceLost(str(error)) from error

    return guarded


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
        others: OtherRanks | None = None,
    ) -> None:
        super().__init__(loaded, kv_cache, max_model_len, attention="reference", others=others)
        config = loaded.config
        # cuDNN's fused attention took 101 us where flash attention took 189 (one layer, 1 x 2048). A context manager
        # around each call says the same, and costs more than the call.
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.enable_flash_sdp(False)
        device, block_size = loaded.model.device, kv_cache.block_size
        self._max_batch = max_batch
        self._assignment = RowAssignment(block_size)
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
            rows = DecodeRows(max_batch, -(-max_model_len // block_size), device)
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

    @_loses_device
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
        inputs = self._plan(decodes, prompts, layers_per_group or self._num_layers)
        with self._together(("step", inputs)):
            computed = self._execute(inputs, on_layers_done)
            # The prompts' rows, of tokens and of logits, come behind those of the decodes, padding included.
            num_rows = len(inputs.decodes.contexts)
            rows = [*inputs.decodes.rows.tolist(), *range(num_rows, num_rows + len(inputs.sampled_chunks))]
            sampling_items = [*decodes, *(item for item in prompts if item.num_samples)]
            items = list(zip(sampling_items, rows, strict=True))
            drawn = self._draw(items, computed) if inputs.needs_draw else None
            if drawn is not None and decodes:
                newest = self._parts.decoder.share_ids(drawn.tokens[: len(decodes)])
                self._parts.rows.write_newest(inputs.decodes, newest)
        logprobs: tuple[tuple[SampledToken, ...], ...] | None = None
        if inputs.needs_hidden and self._others is not None:  # the other ranks keep one step's hidden states
            logprobs = self.prompt_logprobs(batch, computed.hidden, num_rows)
        tokens = None
        if drawn is not None:
            drawn.start_copy()
        elif items:
            assert computed.tokens is not None
            tokens = torch.empty(computed.tokens.shape, dtype=torch.int64, pin_memory=True)
            tokens.copy_(computed.tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        hidden = computed.hidden if inputs.needs_hidden else None  # else as much memory as a step takes, for nothing
        return _CudaStep(self, batch, event, items, drawn, tokens, hidden, num_rows, logprobs)

    @torch.inference_mode()
    def follow(self, command: Command) -> None:
        """As ModelRunner.follow; also ("step", StepInputs)."""
        match command:
            case ("step", inputs):
                computed = self._execute(inputs, None)
                self._followed = computed.hidden
                if inputs.needs_draw and len(inputs.decodes.rows):
                    nothing = torch.zeros(len(inputs.decodes.rows), dtype=torch.int64, device=self._model.device)
                    self._parts.rows.write_newest(inputs.decodes, self._parts.decoder.share_ids(nothing))
            case _:
                super().follow(command)

    def prompt_logprobs(
        self, batch: ScheduledBatch, hidden: torch.Tensor | None, first_prompt_row: int
    ) -> tuple[tuple[SampledToken, ...], ...]:
        """As StepResult.prompt_logprobs. Waits for the device."""
        if not any(_wants_prompt_logprobs(item) for item in batch.items):
            return ((),) * len(batch.items)
        assert hidden is not None
        described: list[tuple[SampledToken, ...]] = []
        row = first_prompt_row
        for item in batch.items:
            if _is_decode(item):
                described.append(())
                continue
            described.append(self._prompt_logprobs(item, hidden, row))
            row += item.num_tokens
        return tuple(described)

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

    def _plan(
        self, decodes: list[ScheduledSequence], prompts: list[ScheduledSequence], layers_per_group: int
    ) -> StepInputs:
        """What the ranks need to know of a step."""
        longest = max(item.start + item.num_tokens for item in (*decodes, *prompts))
        if len(decodes) > self._max_batch or longest > self._max_model_len:
            raise ValueError(
                f"{len(decodes)} decodes, a sequence of {longest} tokens: more than this runner was made for"
            )
        needs_hidden = any(_wants_prompt_logprobs(item) for item in prompts)
        num_prompt_tokens = sum(item.num_tokens for item in prompts)
        prompt_graph = -1
        if prompts and len(prompts) <= PROMPT_CHUNKS and not needs_hidden:
            graphs = enumerate(self._prompt_graphs)
            prompt_graph = next((i for i, graph in graphs if graph.num_tokens >= num_prompt_tokens), -1)
        is_replay = bool(self._decode_graphs) and (prompt_graph >= 0 or not prompts)
        # Only graphs need padding: elsewhere it would be computed with the rest.
        num_rows = len(decodes)
        if decodes and is_replay:
            num_rows = next(graph.batch for graph in self._decode_graphs if graph.batch >= len(decodes))
        first_row = 0 if is_replay else num_rows
        chunks, tokens = prompt_rows(prompts, first_row, self._kv_cache.block_size) if prompts else ([], _NO_TOKENS)
        return StepInputs(
            decodes=self._assignment.assign(decodes, num_rows) if decodes else DecodeInputs.none(),
            chunks=chunks,
            tokens=tokens,
            sampled_chunks=[i for i, item in enumerate(prompts) if item.num_samples],
            is_replay=is_replay,
            prompt_graph=prompt_graph,
            layers_per_group=layers_per_group,
            needs_draw=any(i.num_samples and _needs_draw(i) for i in (*decodes, *prompts)),
            needs_hidden=needs_hidden,
        )

    def _execute(self, inputs: StepInputs, on_layers_done: Callable[[int, int], None] | None) -> _Computed:
        """Computes a step on this rank, as all others do."""
        self._parts.rows.write_tables(inputs.decodes)
        if inputs.is_replay:
            outputs, hidden = self._replay(inputs), None
            if on_layers_done is not None:
                on_layers_done(0, self._num_layers)
        else:
            outputs, hidden = self._compute(inputs, on_layers_done)
        logits = outputs.logits
        if inputs.needs_draw and logits is not None:
            logits = self._parts.decoder.gather(logits)
        return _Computed(outputs.input_ids, logits, outputs.tokens, hidden)

    def _replay(self, inputs: StepInputs) -> StepOutputs:
        """Decodes and short prompts beside each other.

        64 decodes beside 256 tokens behind 1,792 took 16.9 ms on an H100, kernel by kernel in one batch 22.9. For more
        tokens the two are equal within the noise: a product of many rows leaves no room for another. Several ranks
        have one set of buffers for their sums, so there one follows the other.
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

    def _compute(
        self, inputs: StepInputs, on_layers_done: Callable[[int, int], None] | None
    ) -> tuple[StepOutputs, torch.Tensor]:
        """A step kernel by kernel; also the hidden states, [num_tokens, hidden_size]."""
        parts, block_size, decodes = self._parts, self._kv_cache.block_size, inputs.decodes
        num_decodes = len(decodes.contexts)
        last_rows = [inputs.chunks[i].first + inputs.chunks[i].num_queries - 1 for i in inputs.sampled_chunks]
        num_tokens = num_decodes + len(inputs.tokens.sources)
        upload = Upload.of_size(
            3 * aligned(8 * num_tokens)
            + aligned(4 * num_decodes)
            + aligned(8 * (num_decodes + len(last_rows)))
            + RaggedAttention.upload_bytes(inputs.chunks),
            self._model.device,
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
            return StepOutputs(ids, None, None), x
        logits = parts.decoder.partial_logits(x[sampled] if len(sampled) < len(x) else x)
        tokens = parts.decoder.largest(logits)
        parts.rows.newest[:num_decodes].copy_(tokens[:num_decodes])
        return StepOutputs(ids, logits, tokens), x

    def _draw(self, items: list[tuple[ScheduledSequence, int]], computed: _Computed) -> Drawn:
        assert computed.logits is not None
        wanted = [
            DrawRow(
                item.sequence,
                index,
                row,
                _num_outputs(item),
                row if item.start == len(item.sequence.token_ids) else -1,
            )
            for item, row in items
            for index in sample_indices(item)
        ]
        return draw(computed.logits, wanted, computed.input_ids)


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """A step as its ranks compute it; without sequences and sampling parameters, which stay on rank 0.

    Attributes:
        chunks, tokens: the prompts; `sampled_chunks` of them end with a sample.
        is_replay: captured graphs compute it; `prompt_graph` is the one of the prompts, by number.
        needs_draw: the largest logit is not all that is wanted.
        needs_hidden: prompt log-probabilities are wanted.
    """

    decodes: DecodeInputs
    chunks: list[PromptChunk]
    tokens: TokenRows
    sampled_chunks: list[int]
    is_replay: bool
    prompt_graph: int
    layers_per_group: int
    needs_draw: bool
    needs_hidden: bool


@dataclass(frozen=True, slots=True)
class _Computed:
    """A step on the device. Rows of logits and tokens: those of decodes, padding included, then of sampled chunks."""

    input_ids: torch.Tensor
    logits: torch.Tensor | None
    tokens: torch.Tensor | None
    hidden: torch.Tensor | None


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
    prompt_logprobs: tuple[tuple[SampledToken, ...], ...] | None  # if they are known already

    @_loses_device
    def is_done(self) -> bool:
        return self.event.query()

    @_loses_device
    @torch.inference_mode()
    def collect(self) -> StepResult:
        self.event.synchronize()
        sampled: dict[int, tuple[SampledToken, ...] | None] = {}
        if self.drawn is not None:
            drawn = iter(self.drawn.result())
            for item, _ in self.items:
                sampled[id(item)] = all_or_none([next(drawn) for _ in range(item.num_samples)])
        elif self.tokens is not None:
            tokens = self.tokens.tolist()
            for item, row in self.items:
                token = tokens[row]
                sampled[id(item)] = None if token < 0 else (SampledToken(token),) * item.num_samples
        logprobs = self.prompt_logprobs
        if logprobs is None:
            logprobs = self.runner.prompt_logprobs(self.batch, self.hidden, self.first_prompt_row)
        return StepResult(tuple(sampled.get(id(item), ()) for item in self.batch.items), logprobs)


def _is_decode(item: ScheduledSequence) -> bool:
    return item.num_tokens == 1 and item.start >= item.sequence.num_prompt_tokens


def _wants_prompt_logprobs(item: ScheduledSequence) -> bool:
    return item.sequence.sampling.prompt_logprobs is not None and not _is_decode(item)


def _num_outputs(item: ScheduledSequence) -> int:
    """Output tokens before the one that the item samples, those that the host has not seen included."""
    return item.start + item.num_tokens - item.sequence.first_output


def _needs_draw(item: ScheduledSequence) -> bool:
    """False when the largest logit is all that is wanted."""
    sampling = item.sequence.sampling
    if sampling.temperature > 0 or sampling.logprobs is not None:
        return True
    return is_adjusted(sampling, _num_outputs(item) if sampling.min_tokens else 0)
