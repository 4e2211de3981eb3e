"""A step in flight: how the host learns that the device has computed it, and takes its tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

from engine.batch import DeviceLost, ScheduledBatch, ScheduledSequence, StepResult, all_or_none
from engine.cuda.sampling import Drawn
from engine.cuda.step_plan import is_decode
from engine.output_head import OutputHead
from phasewise.core.request import SampledToken

_P = ParamSpec("_P")
_R = TypeVar("_R")


def loses_device(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes torch's errors DeviceLost: CUDA reports an illegal access or a broken device to every later call of the
    process, too."""

    @functools.wraps(method)
    def guarded(*arguments: _P.args, **named: _P.kwargs) -> _R:
        try:
            return method(*arguments, **named)
        except torch.AcceleratorError as error:
            raise DeviceLost(str(error)) from error

    return guarded


@dataclass(frozen=True, slots=True)
class CudaStep:
    """The PendingStep of CudaModelRunner."""

    head: OutputHead
    batch: ScheduledBatch
    event: torch.cuda.Event
    items: list[tuple[ScheduledSequence, int]]  # those that sample, and their row of logits
    drawn: Drawn | None
    tokens: torch.Tensor | None  # [num_rows] int64, pinned: of each row of logits
    hidden: torch.Tensor | None  # [num_tokens, hidden_size], if prompt log-probabilities are wanted
    first_prompt_row: int
    prompt_logprobs: tuple[tuple[SampledToken, ...], ...] | None  # if they are known already

    @loses_device
    def is_done(self) -> bool:
        return self.event.query()

    @loses_device
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
            logprobs = prompt_logprobs(self.head, self.batch, self.hidden, self.first_prompt_row)
        return StepResult(tuple(sampled.get(id(item), ()) for item in self.batch.items), logprobs)


def prompt_logprobs(
    head: OutputHead, batch: ScheduledBatch, hidden: torch.Tensor | None, first_prompt_row: int
) -> tuple[tuple[SampledToken, ...], ...]:
    """As StepResult.prompt_logprobs. Waits for the device.

    hidden: [num_tokens, hidden_size], prompts from `first_prompt_row` on; None when no item wants them.
    """
    if hidden is None:
        return ((),) * len(batch.items)
    described: list[tuple[SampledToken, ...]] = []
    row = first_prompt_row
    for item in batch.items:
        if is_decode(item):
            described.append(())
            continue
        described.append(head.prompt_logprobs(item, hidden, row))
        row += item.num_tokens
    return tuple(described)
