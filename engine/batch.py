"""What a step computes, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass

from engine.sequence import Sequence
from phasewise.core.request import SampledToken


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Compute the next `num_tokens` tokens of `sequence`, starting at its `num_computed_tokens`.

    `num_samples` is how many tokens to sample from the logits of the last one: 0 for a chunk in the middle of a prompt,
    1 for a decode (as the sequence's own sample index), n for the last chunk of a prompt (sample indices 0 to n - 1).
    """

    sequence: Sequence
    num_tokens: int
    num_samples: int


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

    `tokens[i]` has `num_samples` entries. `prompt_logprobs[i]` is empty unless the request asked for prompt
    log-probabilities; else it describes the prompt tokens that follow the chunk's tokens: entry j belongs to the
    token at position `num_computed_tokens + 1 + j`, as far as that is inside the prompt.
    """

    tokens: tuple[tuple[SampledToken, ...], ...]
    prompt_logprobs: tuple[tuple[SampledToken, ...], ...]
