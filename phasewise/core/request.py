"""What is asked and what is answered: frozen nouns that travel between processes. Token ids, never tensors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a sample ended. The values are those of the OpenAI API."""

    STOP = "stop"  # a stop token, the end-of-sequence token or a stop string
    LENGTH = "length"  # max_tokens, or the model's context, is used up
    ABORT = "abort"  # cancelled or failed; never reported as a success


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Every value is final: defaults, limits and the seed were settled by the gateway.

    `stop_token_ids` holds the model's end-of-sequence ids too, unless the request ignores them, so workers know one
    kind of stop only. None of them can be drawn before a sample has `min_tokens` output tokens. `max_tokens` 0: the
    prompt is computed, and nothing is generated. `logprobs` is None (none wanted) or the number of alternatives beside
    each chosen token.
    A sample is a pure function of (logits, seed, sample index, position): see engine/sampler.py.
    """

    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    def must_go_on(self, num_output_tokens: int) -> bool:
        """Whether a sample that has so many output tokens may not end with its next one."""
        return num_output_tokens < self.min_tokens and bool(self.stop_token_ids)


@dataclass(frozen=True, slots=True)
class Request:
    """One accepted request, as every worker sees it.

    `request_id` is the client's id with a suffix of the gateway's, and never used twice: what is still on its way for
    an earlier request of the same client id cannot reach this one.

    `cache_salt` separates prefix caches: two requests share KV only when their salts are equal.

    One that goes on where an earlier attempt was lost has that attempt's output at the end of its prompt:
    `num_resumed_tokens`. They count as output wherever outputs are counted, `max_tokens` included. `sample_index` is
    that of the first of its `sampling.n` samples.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    cache_salt: str = ""
    num_resumed_tokens: int = 0
    sample_index: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens to prefill: resumed ones, too."""
        return len(self.prompt_token_ids)

    @property
    def max_new_tokens(self) -> int:
        """Most tokens per sample that are still to come."""
        return self.sampling.max_tokens - self.num_resumed_tokens

    @property
    def sample_indices(self) -> range:
        return range(self.sample_index, self.sample_index + self.sampling.n)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One output (or prompt) token with its log-probabilities, where asked for.

    `top_logprobs` is ((token id, logprob), ...) in falling order, at most as many as asked for.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
