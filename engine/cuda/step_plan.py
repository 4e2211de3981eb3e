"""What the ranks need to know of a step: a scheduled batch as arrays, and which captured graphs compute it.

Decodes are the first rows of a step, prompts follow. Only graphs need padding: elsewhere it would be computed like any
other row.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from engine.batch import ScheduledSequence
from engine.cuda.step_inputs import (
    PROMPT_CHUNKS,
    DecodeInputs,
    PromptChunk,
    RowAssignment,
    TokenRows,
    prompt_rows,
)
from engine.sampler import is_adjusted

_NO_TOKENS = TokenRows.padding(0)


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """A step as its ranks compute it; without sequences and sampling parameters, which stay on rank 0.

    Attributes:
        chunks, tokens: the prompts; `sampled_chunks` of them end with a sample.
        is_replay: captured graphs compute it; `prompt_graph` is the one of the prompts, by number, -1 for none.
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


class StepPlanner:
    """Plans the steps of one runner, one after the other: a decode keeps its row from step to step.

    `decode_sizes` and `prompt_sizes` are the rows of the captured graphs, by growing size; empty where there are none.
    """

    def __init__(
        self,
        block_size: int,
        max_model_len: int,
        max_batch: int,
        decode_sizes: Seq[int],
        prompt_sizes: Seq[int],
    ) -> None:
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._max_batch = max_batch
        self._decode_sizes = decode_sizes
        self._prompt_sizes = prompt_sizes
        self._assignment = RowAssignment(block_size)

    def forget(self) -> None:
        """A planned step may not have reached the device. The next has all tokens on the host."""
        self._assignment.forget()

    def plan(
        self, decodes: list[ScheduledSequence], prompts: list[ScheduledSequence], layers_per_group: int
    ) -> StepInputs:
        """The step that computes these items, in this order; `decodes` are those of which `is_decode` is true.

        Raises:
            ValueError: they are more or longer than this runner was made for, or a sequence lacks tokens or blocks: a
                bug of the scheduler.
        """
        longest = max(item.start + item.num_tokens for item in (*decodes, *prompts))
        if len(decodes) > self._max_batch or longest > self._max_model_len:
            raise ValueError(
                f"{len(decodes)} decodes, a sequence of {longest} tokens: more than this runner was made for"
            )
        needs_hidden = any(item.sequence.sampling.prompt_logprobs is not None for item in prompts)
        num_prompt_tokens = sum(item.num_tokens for item in prompts)
        prompt_graph = -1
        if prompts and len(prompts) <= PROMPT_CHUNKS and not needs_hidden:
            sizes = enumerate(self._prompt_sizes)
            prompt_graph = next((i for i, size in sizes if size >= num_prompt_tokens), -1)
        is_replay = bool(self._decode_sizes) and (prompt_graph >= 0 or not prompts)
        num_rows = len(decodes)
        if decodes and is_replay:
            num_rows = next(size for size in self._decode_sizes if size >= len(decodes))
        first_row = 0 if is_replay else num_rows
        chunks, tokens = prompt_rows(prompts, first_row, self._block_size) if prompts else ([], _NO_TOKENS)
        return StepInputs(
            decodes=self._assignment.assign(decodes, num_rows) if decodes else DecodeInputs.none(),
            chunks=chunks,
            tokens=tokens,
            sampled_chunks=[i for i, item in enumerate(prompts) if item.num_samples],
            is_replay=is_replay,
            prompt_graph=prompt_graph,
            layers_per_group=layers_per_group,
            needs_draw=any(i.num_samples and needs_draw(i) for i in (*decodes, *prompts)),
            needs_hidden=needs_hidden,
        )


def is_decode(item: ScheduledSequence) -> bool:
    """Whether the item computes one output token, not tokens of its prompt."""
    return item.num_tokens == 1 and item.start >= item.sequence.num_prompt_tokens


def num_outputs(item: ScheduledSequence) -> int:
    """Output tokens before the one that the item samples, those that the host has not seen included."""
    return item.start + item.num_tokens - item.sequence.first_output


def needs_draw(item: ScheduledSequence) -> bool:
    """False when the largest logit is all that is wanted."""
    sampling = item.sequence.sampling
    if sampling.temperature > 0 or sampling.logprobs is not None:
        return True
    return is_adjusted(sampling, num_outputs(item) if sampling.min_tokens else 0)
