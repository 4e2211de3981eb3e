"""What a step computes, and what comes out of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from engine.sequence import Sequence
from phasewise.core.request import SampledToken


@dataclass(slots=True, eq=False)
class ScheduledSequence:
    """Compute the next `num_tokens` tokens of `sequence`, from position `start` on: after those in flight.

    `num_samples` is how many tokens to sample from the logits of the last one: 0 for a chunk in the middle of a prompt,
    1 for a decode, n for the last chunk of a prompt (sample indices from the sequence's own on).
    """

    sequence: Sequence
    num_tokens: int
    num_samples: int
    start: int = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.sequence.num_scheduled_tokens


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """A ragged batch: prompt chunks and decodes of many sequences."""

    items: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)


@dataclass(frozen=True, slots=True)
class StepResult:
    """One entry per item of the batch, in its order.

    `tokens[i]` has `num_samples` entries, or is None: the logits to sample from hold NaN, or infinity where the largest
    should be, so that no token can be chosen. `prompt_logprobs[i]` is empty unless the request asked
    for prompt log-probabilities; else it describes the prompt tokens that follow the chunk's tokens: entry j belongs to
    the token at position `start + 1 + j`, as far as that is inside the prompt.
    """

    tokens: tuple[tuple[SampledToken, ...] | None, ...]
    prompt_logprobs: tuple[tuple[SampledToken, ...], ...]


def sample_indices(item: ScheduledSequence) -> list[int]:
    """Consecutive, from the sequence's own on: a decode has one, the last chunk of a prompt one per sample."""
    first = item.sequence.sample_index
    return list(range(first, first + item.num_samples))


def all_or_none(tokens: Collection[SampledToken | None]) -> tuple[SampledToken, ...] | None:
    """An entry of StepResult.tokens; None for a token stands for a row of logits without one."""
    chosen = [token for token in tokens if token is not None]
    return tuple(chosen) if len(chosen) == len(tokens) else None


class DeviceLost(Exception):
    """The device failed in a way that no later step survives: only a new process can use it again."""


class PendingStep(Protocol):
    """A step that was given to the device."""

    def is_done(self) -> bool:
        """Whether `collect` would not wait."""

    def collect(self) -> StepResult:
        """Waits until the step is computed. Called once, in the order of the steps. May raise DeviceLost."""


@dataclass(frozen=True, slots=True)
class ComputedStep:
    """The PendingStep of a runner that computes at once."""

    result: StepResult

    def is_done(self) -> bool:
        return True

    def collect(self) -> StepResult:
        return self.result
