"""The keyword arguments of a generation, in one place for both clients."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TypedDict


class SamplingOptions(TypedDict, total=False):
    """How to choose tokens. What is absent or None takes the server's default; the server checks the ranges.

    `n` samples; `max_tokens` of output at most; nothing ends a sample before it has `min_tokens`; `top_k` 0 is off;
    `logit_bias` maps token ids to what is added to their logits; `seed` makes a sample repeatable; `logprobs`
    (`prompt_logprobs`) is the number of alternatives reported beside each output (prompt) token, 0 for the token alone;
    `stop` ends a sample before the given text, one string or several; `stop_token_ids` end it too; `ignore_eos` goes on
    past the end-of-sequence token.
    """

    n: int | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool


class Options(SamplingOptions, total=False):
    """Sampling, and what concerns the request itself.

    `model` must name the served model if given. `request_id` (default: a new one) names the request in logs and makes
    a repetition recognisable. Prefix caches are shared only between equal `cache_salt`s. `timeline` asks for the
    request's timeline and placement. `timeout_s` replaces the client's; None there means no deadline of one's own.
    """

    model: str | None
    request_id: str | None
    cache_salt: str
    timeline: bool
    timeout_s: float | None


SCALAR_SAMPLING = (
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "logprobs",
    "prompt_logprobs",
)
"""The sampling fields that hold one number, under one name in Python and on the wire."""


def check_names(options: Options) -> None:
    """Raises TypeError for an unknown keyword, naming the nearest right one."""
    for name in options:
        if name not in Options.__annotations__:
            near = difflib.get_close_matches(name, Options.__annotations__, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(Options.__annotations__))}"
            raise TypeError(f"unexpected keyword argument {name!r}; {hint}")
