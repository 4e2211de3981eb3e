"""The model's output head over chosen rows of a step's hidden states: their logits, and prompt log-probabilities."""

from __future__ import annotations

import torch

from engine.batch import ScheduledSequence
from engine.models.llama import LlamaModel
from engine.sampler import describe
from engine.tensor_parallel import Command, OtherRanks, together
from phasewise.core.request import SampledToken

# Bounds the memory for prompt log-probabilities: rows of logits held at once.
_LOGITS_ROWS = 128


class OutputHead:
    """Logits, computed by all ranks together. `others` are the other ranks, on rank 0 of several.

    Rank 0 gives the hidden states with each call. The other ranks keep those of the last step for the calls after it.
    """

    def __init__(self, model: LlamaModel, others: OtherRanks | None) -> None:
        self._model = model
        self._others = others
        self._kept: torch.Tensor | None = None

    def logits(self, hidden: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Of these rows of `hidden`, [num_tokens, hidden_size].  # [len(rows), vocab_size] float32"""
        with together(self._others, ("logits", rows), "a step"):
            if len(rows) < len(hidden):
                hidden = hidden[torch.tensor(rows, device=hidden.device)]
            return self._model.logits(hidden)

    def prompt_logprobs(
        self, item: ScheduledSequence, hidden: torch.Tensor, first_row: int
    ) -> tuple[SampledToken, ...]:
        """The item's entry of StepResult.prompt_logprobs. Waits for the device.

        hidden: [num_tokens, hidden_size] of the whole step; the item's rows begin at `first_row`.
        """
        wanted = item.sequence.sampling.prompt_logprobs
        return () if wanted is None else self._prompt_logprobs(item, hidden, first_row, wanted)

    def _prompt_logprobs(
        self, item: ScheduledSequence, hidden: torch.Tensor, first_row: int, wanted: int
    ) -> tuple[SampledToken, ...]:
        """With so many alternatives."""
        sequence, start = item.sequence, item.start + 1
        targets = sequence.token_ids[start : min(start + item.num_tokens, sequence.num_prompt_tokens)]
        described: list[SampledToken] = []
        for i in range(0, len(targets), _LOGITS_ROWS):
            part = targets[i : i + _LOGITS_ROWS]
            logits = self.logits(hidden, list(range(first_row + i, first_row + i + len(part))))
            described += describe(logits, part, [wanted] * len(part))
        return tuple(described)

    def keep(self, hidden: torch.Tensor | None) -> None:
        """On a rank other than 0: the last step's hidden states, [num_tokens, hidden_size]."""
        self._kept = hidden

    def carry_out(self, command: Command) -> None:
        """On a rank other than 0. ("logits", rows): the logits of these rows of what was kept.

        Raises:
            ValueError: the command is unknown.
        """
        match command:
            case ("logits", rows):
                assert self._kept is not None, "logits before any step"
                self._model.logits(self._kept[rows])
            case _:
                raise ValueError(f"unknown command {command[0]!r}")
