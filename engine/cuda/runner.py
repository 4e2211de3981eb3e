"""Computes scheduled batches on a GPU, a step ahead of the host that takes their results.

`submit` gives a step to the device and waits for nothing: what a step samples stays on the device, where the next step
finds it, and is copied to the host behind it. Steps of decodes alone, and of a few short prompts alone, replay captured
graphs; others go kernel by kernel.

Of several ranks, rank 0 has the sequences and samples. It tells the others a step's StepInputs, which is all that the
computation needs; every rank finds the largest logits, and so the greedy tokens, by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.batch import ComputedStep, PendingStep, ScheduledBatch, ScheduledSequence, StepResult, sample_indices
from engine.cuda import sampling
from engine.cuda.attention import planned_shapes
from engine.cuda.executor import StepExecutor
from engine.cuda.graphs import StepOutputs
from engine.cuda.pending_step import CudaStep, loses_device, prompt_logprobs
from engine.cuda.sampling import Drawn, DrawRow, draw
from engine.cuda.step_plan import is_decode, num_outputs
from engine.kv_cache import PagedKVCache
from engine.loader import LoadedModel
from engine.output_head import OutputHead
from engine.sequence import Sequence
from engine.tensor_parallel import Command, OtherRanks, together
from phasewise.core.request import SampledToken, SamplingParams


class CudaModelRunner:
    """One model with one KV cache on one GPU, for up to `max_batch` sequences that decode.

    Raises:
        ValueError: the cache was made for another model or device.
        ConfigError: `max_model_len` is more than the model's positions allow.
    """

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
        loaded.check_cache(kv_cache)
        self._model = loaded.model
        self._kv_cache = kv_cache
        self._max_model_len = max_model_len
        self._others = others
        self._head = OutputHead(loaded.model, others)
        self._executor = StepExecutor(loaded, kv_cache, max_model_len, max_batch, graphs=graphs)
        self._planner = self._executor.planner()

    @property
    def num_steps_ahead(self) -> int:
        """As ModelRunner.num_steps_ahead."""
        return 1

    def run(
        self,
        batch: ScheduledBatch,
        on_layers_done: Callable[[int, int], None] | None = None,
        layers_per_group: int = 0,
    ) -> StepResult:
        """As ModelRunner.run."""
        return self.submit(batch, on_layers_done, layers_per_group).collect()

    @loses_device
    @torch.inference_mode()
    def submit(
        self,
        batch: ScheduledBatch,
        on_layers_done: Callable[[int, int], None] | None = None,
        layers_per_group: int = 0,
    ) -> PendingStep:
        """As ModelRunner.submit; at most one step may be in flight, and its sequences have their newest token there.

        `on_layers_done` is called when the layers' kernels are on the device's stream, not when they have run.

        Raises:
            DeviceLost: the device failed, in this step or in one before.
        """
        if not batch.items:
            return ComputedStep(StepResult((), ()))
        try:
            return self._submit(batch, on_layers_done, layers_per_group)
        except Exception:
            self._planner.forget()
            raise

    def _submit(
        self, batch: ScheduledBatch, on_layers_done: Callable[[int, int], None] | None, layers_per_group: int
    ) -> PendingStep:
        decodes: list[ScheduledSequence] = []
        prompts: list[ScheduledSequence] = []
        for item in batch.items:
            (decodes if is_decode(item) else prompts).append(item)
        inputs = self._planner.plan(decodes, prompts, layers_per_group or self._model.config.num_layers)
        with together(self._others, ("step", inputs), "a step"):
            computed = self._executor.execute(inputs, on_layers_done)
            # The prompts' rows, of tokens and of logits, come behind those of the decodes, padding included.
            num_rows = len(inputs.decodes.contexts)
            rows = [*inputs.decodes.rows.tolist(), *range(num_rows, num_rows + len(inputs.sampled_chunks))]
            sampling_items = [*decodes, *(item for item in prompts if item.num_samples)]
            items = list(zip(sampling_items, rows, strict=True))
            drawn = _draw(items, computed) if inputs.needs_draw else None
            if drawn is not None and decodes:
                self._executor.keep_drawn(inputs, drawn.tokens[: len(decodes)])
        hidden = computed.hidden if inputs.needs_hidden else None  # kept only then: it takes as much memory as a step
        logprobs: tuple[tuple[SampledToken, ...], ...] | None = None
        if hidden is not None and self._others is not None:  # the other ranks keep one step's hidden states
            logprobs = prompt_logprobs(self._head, batch, hidden, num_rows)
        tokens = None
        if drawn is not None:
            drawn.start_copy()
        elif items:
            assert computed.tokens is not None
            tokens = torch.empty(computed.tokens.shape, dtype=torch.int64, pin_memory=True)
            tokens.copy_(computed.tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return CudaStep(self._head, batch, event, items, drawn, tokens, hidden, num_rows, logprobs)

    @torch.inference_mode()
    def carry_out(self, command: Command) -> None:
        """On a rank other than 0: computes what rank 0 computes at this command.

        ("step", StepInputs): a step. The others are those of OutputHead.carry_out.

        Raises:
            ValueError: the command is unknown.
        """
        match command:
            case ("step", inputs):
                self._head.keep(self._executor.execute(inputs, None).hidden)
                if inputs.needs_draw and len(inputs.decodes.rows):
                    self._executor.keep_drawn(inputs, None)
            case _:
                self._head.carry_out(command)

    @torch.inference_mode()
    def warm_up(self, token_budget: int) -> None:
        """Compiles the kernels of mixed steps and lets cuDNN plan for prompts, which the first requests would wait for.

        Overwrites blocks of the cache, which must not be in use.
        """
        model = self._model
        sampling.warm_up(torch.zeros(1, model.config.vocab_size, dtype=model.dtype, device=model.device))
        size = self._kv_cache.block_size
        capacity = min(self._max_model_len, self._kv_cache.num_blocks * size)
        for count, length in [(1, 1), (1, 1023), *planned_shapes(token_budget)]:
            if length > capacity:
                continue
            table = list(range(-(-length // size)))  # the same blocks for all: what they write is not read
            prompts = [Sequence("warm-up", SamplingParams(temperature=0.0), [0] * length, length) for _ in range(count)]
            decode = Sequence("warm-up", SamplingParams(temperature=0.0), [0, 0], 1, num_computed_tokens=1)
            for sequence in (*prompts, decode):
                sequence.block_table = list(table)
            items = [ScheduledSequence(decode, 1, 1), *(ScheduledSequence(s, length, 1) for s in prompts)]
            self.run(ScheduledBatch(tuple(items)))


def _draw(items: list[tuple[ScheduledSequence, int]], computed: StepOutputs) -> Drawn:
    """Draws the tokens of the items that sample, given with their rows of logits."""
    assert computed.logits is not None
    wanted = [
        DrawRow(
            item.sequence,
            index,
            row,
            num_outputs(item),
            row if item.start == len(item.sequence.token_ids) else -1,
        )
        for item, row in items
        for index in sample_indices(item)
    ]
    return draw(computed.logits, wanted, computed.input_ids)
