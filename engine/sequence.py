"""A worker's mutable state for one sample of one request. Stays inside one worker and is never sent."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from phasewise.core.request import FinishReason, Request, SampledToken, SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """Token ids, computed-token count and block table.

    `token_ids` is the prompt followed by the outputs. The KV of the first `num_computed_tokens` of them is in the
    cache, in the blocks of `block_table`. `num_in_flight_tokens` more were given to the engine, whose results have not
    been taken: where the engine computes a step ahead, the newest token may be known to the device alone, and is not
    in `token_ids` then. Counted with it, a decoding sequence always has exactly one token that is not computed: the
    last one sampled.

    The last `num_resumed_tokens` of the prompt are output of an earlier attempt (phasewise/core/request.py): computed
    like a prompt, counted as output. `sample_index` of a prompt is that of its first sample.
    """

    request_id: str
    sampling: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int
    sample_index: int = 0
    num_resumed_tokens: int = 0
    cache_salt: str = ""
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    # For BlockManager: the hash chain of full blocks, and of how many of its blocks the prefix cache was told.
    block_hashes: list[bytes] = field(default_factory=list)
    num_published_blocks: int = 0
    num_in_flight_tokens: int = 0
    first_output: int = field(init=False)  # the position of the first output token
    max_length: int = field(init=False)  # `num_tokens` with the last output token

    def __post_init__(self) -> None:
        self.first_output = self.num_prompt_tokens - self.num_resumed_tokens
        self.max_length = self.first_output + self.sampling.max_tokens

    @staticmethod
    def of_prompt(request: Request) -> Sequence:
        """The request's prompt, of which nothing is computed and which has no blocks."""
        return Sequence(
            request_id=request.request_id,
            sampling=request.sampling,
            token_ids=list(request.prompt_token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            sample_index=request.sample_index,
            num_resumed_tokens=request.num_resumed_tokens,
            cache_salt=request.cache_salt,
        )

    def fork(self, sample_index: int, token: SampledToken) -> Sequence:
        """The sequence of one sample: this prompt and its first token. The caller shares the blocks."""
        return replace(
            self,
            sample_index=sample_index,
            token_ids=[*self.token_ids, token.token_id],
            block_table=list(self.block_table),
            block_hashes=list(self.block_hashes),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.first_output

    @property
    def num_scheduled_tokens(self) -> int:
        """Tokens that are computed or in flight: the position that the next step starts at."""
        return self.num_computed_tokens + self.num_in_flight_tokens

    @property
    def num_unscheduled_tokens(self) -> int:
        return len(self.token_ids) - self.num_scheduled_tokens

    @property
    def is_prefilling(self) -> bool:
        """True until the whole prompt is computed."""
        return self.num_computed_tokens < self.num_prompt_tokens

    def begin_step(self, num_tokens: int) -> None:
        """The engine was given the next `num_tokens` tokens."""
        self.num_in_flight_tokens += num_tokens

    def end_step(self, num_tokens: int) -> None:
        """The results of the oldest step in flight, of so many tokens, are taken."""
        self.num_in_flight_tokens -= num_tokens
        self.num_computed_tokens += num_tokens

    def revoke_step(self, num_tokens: int) -> None:
        """The engine broke on a step in flight, of so many tokens: they are to be computed again."""
        self.num_in_flight_tokens -= num_tokens

    @property
    def awaits_last_token(self) -> bool:
        """True when the output token in flight will be the last, whatever it is."""
        return self.num_in_flight_tokens > 0 and len(self.token_ids) + self.num_in_flight_tokens >= self.max_length

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence ends with the token that was sampled last, or None when it goes on."""
        if self.token_ids[-1] in self.sampling.stop_token_ids:
            return FinishReason.STOP
        if len(self.token_ids) >= self.max_length:
            return FinishReason.LENGTH
        return None
