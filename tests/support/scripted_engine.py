"""A tiny deterministic engine for life-cycle tests: real cache, real blocks, real handoffs; arithmetic for a model.

The KV of a token is a function of its id, position and layer. The next token is a function of all KV that the cache
holds for the sequence, read back through its block table. So a block that was lost, mixed up, not sent or overwritten
changes the tokens, and the right tokens are known without any cache: `expected_tokens`. NaN in a block leaves its
sequences without a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from engine.batch import (
    DeviceLost,
    PendingStep,
    ScheduledBatch,
    ScheduledSequence,
    StepResult,
    all_or_none,
    sample_indices,
)
from engine.kv_cache import PagedKVCache
from engine.sequence import Sequence
from kv_transfer.staging import slots_of
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.request import SampledToken

VOCAB = 50021
SPEC = KVCacheSpec(
    num_layers=4, num_kv_heads=1, head_dim=2, block_size=16, dtype="float32", model_fingerprint="scripted"
)


def _kv(token_id: int, position: int, layer: int) -> int:
    return (token_id * 31 + position * 17 + layer * 7) % 4093


def next_token(token_ids: list[int], sample_index: int) -> int:
    """The token after `token_ids`: what a right cache leads to."""
    total = sum(
        _kv(token, position, layer) * (position % 13 + 1)
        for position, token in enumerate(token_ids)
        for layer in range(SPEC.num_layers)
    )
    return (total + sample_index * 101) % VOCAB


def expected_tokens(prompt: list[int], num_tokens: int, sample_index: int = 0) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, sample_index))
    return tokens[len(prompt) :]


class ScriptedStep:
    """A submitted step. `fails` makes `collect` raise; `on_look` is asked whether it is done."""

    def __init__(self, result: StepResult, fails: bool, on_look: Callable[[], bool]) -> None:
        self._result = result
        self._fails = fails
        self._on_look = on_look

    def is_done(self) -> bool:
        return self._on_look()

    def collect(self) -> StepResult:
        if self._fails:
            raise RuntimeError("scripted failure")
        return self._result


class ScriptedRunner:
    """Runs batches as workers.driver.Runner. `fail_next` makes the next step raise, `fail_late` when it is collected.

    `breaks` is asked of each batch whether it breaks the engine: "early" in the middle of its layers, "late" when it is
    collected, "" not at all. What a batch that breaks has written until then is wrong.

    With `num_steps_ahead` 1 it feeds a sequence the token of the step before, which the host has not seen, as a device
    does; and as there, that holds for the very next step only.
    """

    def __init__(self, cache: PagedKVCache, num_steps_ahead: int = 0) -> None:
        self._cache = cache
        self.num_steps_ahead = num_steps_ahead
        self.fail_next = False
        self.fail_late = False
        self.is_device_lost = False
        self.on_look: Callable[[], bool] = lambda: True
        self.breaks: Callable[[ScheduledBatch], str] = lambda batch: ""
        self.batches: list[ScheduledBatch] = []
        self._newest: dict[Sequence, int] = {}

    def submit(
        self,
        batch: ScheduledBatch,
        on_layers_done: Callable[[int, int], None] | None = None,
        layers_per_group: int = 0,
    ) -> PendingStep:
        if self.is_device_lost:
            raise DeviceLost("scripted loss of the device")
        if self.fail_next:
            self.fail_next = False
            self.batches.append(batch)
            self._newest = {}  # it broke in the middle: what the step before left on the device is lost
            raise RuntimeError("scripted failure")
        if how := self.breaks(batch):
            return self._break(batch, on_layers_done, layers_per_group, is_late=how == "late")
        result = self._run(batch, on_layers_done, layers_per_group)
        sampled = zip(batch.items, result.tokens, strict=True)
        self._newest = {item.sequence: tokens[0].token_id if tokens else 0 for item, tokens in sampled if tokens != ()}
        fails, self.fail_late = self.fail_late, False
        return ScriptedStep(result, fails, self.on_look)

    def _break(
        self,
        batch: ScheduledBatch,
        on_layers_done: Callable[[int, int], None] | None,
        layers_per_group: int,
        *,
        is_late: bool,
    ) -> PendingStep:
        self.batches.append(batch)
        self._newest = {item.sequence: 13 for item in batch.items}  # wrong
        step = layers_per_group or SPEC.num_layers
        for first in range(0, SPEC.num_layers if is_late else SPEC.num_layers // 2, step):
            for item in batch.items:
                slots = self._slots(item.sequence, item.start, item.num_tokens)
                self._cache.storage[first : first + step, :, slots] = 7
            if on_layers_done is not None:
                on_layers_done(first, step)
        if not is_late:
            raise RuntimeError("scripted failure")
        return ScriptedStep(StepResult((), ()), True, self.on_look)

    def _run(
        self, batch: ScheduledBatch, on_layers_done: Callable[[int, int], None] | None, layers_per_group: int
    ) -> StepResult:
        self.batches.append(batch)
        step = layers_per_group or SPEC.num_layers
        for first in range(0, SPEC.num_layers, step):
            count = min(step, SPEC.num_layers - first)
            for item in batch.items:
                self._write(item, range(first, first + count))
            if on_layers_done is not None:
                on_layers_done(first, count)
        tokens, logprobs = [], []
        for item in batch.items:
            s = item.sequence
            in_prompt = item.start < s.num_prompt_tokens
            tokens.append(all_or_none([self._sample(item, index) for index in sample_indices(item)]))
            after = range(item.start + 1, item.start + 1 + item.num_tokens)
            wanted = s.sampling.prompt_logprobs is not None and in_prompt
            logprobs.append(
                tuple(SampledToken(s.token_ids[p], -1.0) for p in after if wanted and p < s.num_prompt_tokens)
            )
        return StepResult(tuple(tokens), tuple(logprobs))

    def _slots(self, sequence: Sequence, first: int, count: int) -> torch.Tensor:
        return slots_of(sequence.block_table, SPEC.block_size, first, count, torch.device("cpu"))

    def _write(self, item: ScheduledSequence, layers: range) -> None:
        s = item.sequence
        slots = self._slots(s, item.start, item.num_tokens)
        for i, slot in enumerate(slots.tolist()):
            position = item.start + i
            token = s.token_ids[position] if position < s.num_tokens else self._newest[s]
            for layer in layers:
                self._cache.storage[layer, :, slot] = float(_kv(token, position, layer))

    def _sample(self, item: ScheduledSequence, sample_index: int) -> SampledToken | None:
        s = item.sequence
        end = item.start + item.num_tokens
        cells = self._cache.storage[:, 0, self._slots(s, 0, end), 0, 0]  # [layers, tokens]
        weights = torch.arange(end) % 13 + 1
        total = (cells * weights).sum(dtype=torch.float64).item()
        return None if math.isnan(total) else SampledToken(int(total + sample_index * 101) % VOCAB)
