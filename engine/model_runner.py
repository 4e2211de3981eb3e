"""Computes a scheduled batch: forward pass, sampling, prompt log-probabilities. No queue, no transfer, no clock.

Of several ranks rank 0 gets the batches. It tells the others what to compute before it computes it itself: they need
neither sequences nor sampling, only the tensors of a step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.attention.select import select_backend
from engine.batch import ComputedStep, PendingStep, ScheduledBatch, StepResult, all_or_none, sample_indices
from engine.forward_inputs import ForwardInputs, build_forward_inputs
from engine.kv_cache import PagedKVCache
from engine.layers.rotary import RotaryEmbedding
from engine.loader import LoadedModel
from engine.output_head import OutputHead
from engine.sampler import SampleRow, sample
from engine.tensor_parallel import Command, OtherRanks, together
from phasewise.core.request import SampledToken


class ModelRunner:
    """One model with one KV cache. `others` are the other ranks, on rank 0 of several.

    Raises:
        ValueError: the cache was made for another model or device.
        ConfigError: `max_model_len` is more than the model's positions allow, or `attention` is no known backend.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        kv_cache: PagedKVCache,
        max_model_len: int,
        *,
        attention: str = "auto",
        others: OtherRanks | None = None,
    ) -> None:
        loaded.check_cache(kv_cache)
        self._others = others
        self._head = OutputHead(loaded.model, others)
        self._model = loaded.model
        self._num_layers = loaded.config.num_layers
        self._kv_cache = kv_cache
        self._max_model_len = max_model_len
        with torch.inference_mode():
            self._rotary = RotaryEmbedding(loaded.config, max_model_len, loaded.model.dtype, loaded.model.device)
        self._backend = select_backend(attention, kv_cache, loaded.config.windows)

    @property
    def num_steps_ahead(self) -> int:
        """How many steps may be submitted beyond the one that is collected next: none, `submit` computes at once."""
        return 0

    def warm_up(self, token_budget: int) -> None:
        """Does what the first steps of up to `token_budget` tokens would wait for. Call it before the cache is used."""

    def submit(
        self,
        batch: ScheduledBatch,
        on_layers_done: Callable[[int, int], None] | None = None,
        layers_per_group: int = 0,
    ) -> PendingStep:
        """Begins a step. Arguments and errors as for `run`."""
        return ComputedStep(self.run(batch, on_layers_done, layers_per_group))

    @torch.inference_mode()
    def run(
        self,
        batch: ScheduledBatch,
        on_layers_done: Callable[[int, int], None] | None = None,
        layers_per_group: int = 0,
    ) -> StepResult:
        """Computes the batch and writes its KV; the sequences are left as they are.

        `on_layers_done(first_layer, num_layers)` is called after each group of `layers_per_group` layers (0: all at
        once) as soon as their KV of this batch is in the cache.

        Raises:
            ValueError: the batch does not fit its sequences or the cache, a bug of the scheduler.
        """
        if not batch.items:
            return StepResult((), ())
        inputs = build_forward_inputs(batch, self._kv_cache.block_size, self._max_model_len, self._model.device)
        with together(self._others, ("forward", inputs.to_host() if self._others else None), "a step"):
            hidden = self._forward(inputs, on_layers_done, layers_per_group or self._num_layers)
        starts, head = inputs.query_starts, self._head
        prompt_logprobs = [head.prompt_logprobs(item, hidden, starts[i]) for i, item in enumerate(batch.items)]
        return StepResult(self._sample(batch, hidden, starts), tuple(prompt_logprobs))

    @torch.inference_mode()
    def carry_out(self, command: Command) -> None:
        """On a rank other than 0: computes what rank 0 computes at this command.

        ("forward", ForwardInputs.to_host()): a step's hidden states. The others are those of OutputHead.carry_out.

        Raises:
            ValueError: the command is unknown.
        """
        match command:
            case ("forward", host):
                inputs = ForwardInputs.from_host(host, self._model.device)
                self._head.keep(self._forward(inputs, None, self._num_layers))
            case _:
                self._head.carry_out(command)

    def _forward(
        self, inputs: ForwardInputs, on_layers_done: Callable[[int, int], None] | None, layers_per_group: int
    ) -> torch.Tensor:
        """[num_tokens, hidden_size] after the last layer; this rank's part of the work."""
        self._backend.plan(inputs)
        rope = self._rotary.plan(inputs.positions)
        hidden = self._model.embed(inputs.input_ids)
        for first in range(0, self._num_layers, layers_per_group):
            count = min(layers_per_group, self._num_layers - first)
            hidden = self._model.run_layers(hidden, first, count, self._rotary, rope, self._backend)
            if on_layers_done is not None:
                on_layers_done(first, count)
        return hidden

    def _sample(
        self, batch: ScheduledBatch, hidden: torch.Tensor, query_starts: tuple[int, ...]
    ) -> tuple[tuple[SampledToken, ...] | None, ...]:
        """As StepResult.tokens; hidden: [num_tokens, hidden_size]. `query_starts`: as ForwardInputs has it."""
        rows: list[SampleRow] = []
        last_rows: list[int] = []  # only these go through the output head: it is as large as many layers
        for item, end in zip(batch.items, query_starts[1:], strict=True):
            if item.num_samples:
                rows += [SampleRow(item.sequence, index, len(last_rows)) for index in sample_indices(item)]
                last_rows.append(end - 1)
        if not rows:
            return ((),) * len(batch.items)
        tokens = iter(sample(self._head.logits(hidden, last_rows), rows))
        return tuple(all_or_none([next(tokens) for _ in range(item.num_samples)]) for item in batch.items)
