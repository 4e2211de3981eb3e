"""From what a user asked to what workers run: all checks of a request, its defaults, its token ids.

Every refusal is an `InvalidRequest` that names the field and says what would be right. Nothing is repaired silently.
"""

from __future__ import annotations

import math
import random
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from control_plane.gateway.model_defaults import with_defaults
from control_plane.gateway.open_requests import OpenSample, PreparedRequest
from control_plane.gateway.resumption import resumed_samples
from control_plane.gateway.service import GenerateInput, ModelCard, SamplingInput
from control_plane.gateway.text.bounded_encoding import TokenLimit
from control_plane.gateway.text.tokenizer import TextTokenizer
from phasewise.core.errors import InvalidRequest, ModelNotFound
from phasewise.core.request import Request, SamplingParams
from phasewise.core.shown import shown

MAX_SAMPLES = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1000
MAX_STOP_TOKEN_IDS = 256
MAX_CACHE_SALT_CHARACTERS = 256
COMPLETION_MAX_TOKENS = 16  # as OpenAI's completions
GREEDY_BELOW = 1e-5
"""A temperature below it is greedy, as in vLLM. A draw would choose only between logits that are equal within their
rounding, and logits divided by a number next to 0 overflow."""
MAX_TOKENIZED = 262_144
"""Most tokens of a call of tokenize or detokenize, where the context is not longer. Their list costs the loop 20 ms."""

_REQUEST_ID = re.compile(r"[!-~]{1,128}")
# Logits are divided and multiplied by it: far from 1 they overflow, and mean nothing long before.
_REPETITION_PENALTY = (0.01, 100.0)
_INT64 = (-(2**63), 2**63 - 1)


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What this gateway allows and assumes.

    `max_samples` bounds n: no worker's batch holds more. `default_max_tokens` is for chats that name none; None: what
    the context leaves. `num_kv_blocks` of `block_size` tokens are what the smallest worker that decodes has: a request
    whose samples could never begin there is refused at once; None: not limited.
    """

    default_timeout_s: float = 600.0
    max_timeout_s: float = 86_400.0
    default_max_tokens: int | None = None
    num_kv_blocks: int | None = None
    block_size: int = 1
    max_samples: int = MAX_SAMPLES


class RequestPreparer:
    """Checks and completes requests for one model.

    Args:
        rng: where seeds come from for requests that give none.
    """

    def __init__(
        self, tokenizer: TextTokenizer, card: ModelCard, limits: RequestLimits, rng: random.Random | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._card = card
        self._limits = limits
        self._rng = rng or random.SystemRandom()
        # Whether a prompt that fills the context leaves room for an output is looked at when its length is known.
        self._limit = TokenLimit(card.context_length, f"the context is {card.context_length} tokens")
        most = max(card.context_length, MAX_TOKENIZED)
        self._tokenize_limit = TokenLimit(most, f"this server counts up to {most} of them")

    def prepare(self, given: GenerateInput) -> PreparedRequest:
        """The request to run.

        Raises:
            ModelNotFound: another model is asked for.
            InvalidRequest: anything else is wrong; `field` is the name in `GenerateInput` or `SamplingInput`.
        """
        self.check_model(given.model)
        request_id = given.request_id if given.request_id is not None else uuid.uuid4().hex
        if not is_request_id(request_id):
            raise InvalidRequest(
                "request_id must be 1 to 128 printable ASCII characters without spaces", field="request_id"
            )
        timeout_s = self._limits.default_timeout_s if given.timeout_s is None else given.timeout_s
        _check_range("timeout_s", timeout_s, 0.0, self._limits.max_timeout_s, above_low=True)
        if given.sampling.stop:
            check_stop(given.sampling.stop)
        _check_lengths(given)
        if given.cache_salt:
            _check_cache_salt(given.cache_salt)
        partial = self._sampling(with_defaults(given.sampling, self._card.sampling))
        prompt = self._prompt(given)
        sampling = self._with_max_tokens(partial, given, len(prompt))
        continues_text = given.messages is None
        samples: tuple[OpenSample, ...] = ()
        if given.resume_after:
            for sample in given.resume_after:
                self.check_token_ids(sample.token_ids, "resume_after")
            texts, stop = self._tokenizer, given.sampling.stop
            samples = resumed_samples(given.resume_after, sampling, texts, stop, continues_text=continues_text)
            sampling = replace(sampling, prompt_logprobs=None)  # they came with the first token of all
        request = Request(request_id, prompt, sampling, cache_salt=given.cache_salt)
        return PreparedRequest(request, given.sampling.stop, timeout_s, continues_text, samples)

    def check_model(self, model: str | None) -> None:
        """Raises ModelNotFound unless `model` is the one served (None means that one)."""
        if model is not None and model != self._card.name:
            raise ModelNotFound(f"model {shown(model)} is not served here; use {self._card.name!r}", field="model")

    def check_token_ids(self, token_ids: Sequence[int], field: str) -> None:
        """Raises InvalidRequest for an id outside of the vocabulary."""
        if len(token_ids) and not (min(token_ids) >= 0 and max(token_ids) < self._card.vocab_size):
            index, wrong = next((i, t) for i, t in enumerate(token_ids) if not 0 <= t < self._card.vocab_size)
            raise InvalidRequest(
                f"{field}[{index}] is {wrong}; token ids of this model are 0 to {self._card.vocab_size - 1}",
                field=f"{field}[{index}]",
            )

    def tokenize(
        self, text: str | None, messages: tuple[Mapping[str, Any], ...] | None, model: str | None
    ) -> list[int]:
        """Token ids of a text or of a chat: at most what the context holds, or `MAX_TOKENIZED` if that is more.

        Raises:
            ModelNotFound: another model is asked for.
            InvalidRequest: not exactly one of them is given, or it cannot be tokenised, or is too long.
        """
        self.check_model(model)
        if (text is None) == (messages is None):
            raise InvalidRequest("give exactly one of text and messages", field="text")
        if text is not None:
            return self._tokenizer.encode(text, limit=self._tokenize_limit)
        return self._tokenizer.encode_chat(messages or (), self._tokenize_limit)

    def check_detokenize(self, token_ids: Sequence[int]) -> None:
        """Raises InvalidRequest for more ids than `tokenize` gives, and for an id outside of the vocabulary."""
        most = self._tokenize_limit.max_tokens
        if len(token_ids) > most:
            raise InvalidRequest(
                f"token_ids has {len(token_ids)} ids; at most {most} are taken; send less", field="token_ids"
            )
        self.check_token_ids(token_ids, "token_ids")

    def _prompt(self, given: GenerateInput) -> tuple[int, ...]:
        inputs = {"text": given.text, "token_ids": given.token_ids, "messages": given.messages}
        present = [name for name, value in inputs.items() if value is not None]
        if len(present) != 1:
            found = " and ".join(present) or "none of them"
            raise InvalidRequest(f"give exactly one of text, token_ids and messages; given: {found}", field="text")
        if given.token_ids is not None:
            self._check_length(len(given.token_ids), "token_ids", given.sampling)  # first: it may be millions
            self.check_token_ids(given.token_ids, "token_ids")
            prompt = tuple(given.token_ids)
        elif given.text is not None:
            prompt = tuple(self._tokenizer.encode(given.text, limit=self._limit))
        else:
            prompt = tuple(self._tokenizer.encode_chat(given.messages or (), self._limit))
        if not prompt:
            raise InvalidRequest(f"{present[0]} is empty; a prompt needs at least one token", field=present[0])
        if max(prompt) >= self._card.vocab_size:  # only a tokenizer that does not belong to the model gives such ids
            raise InvalidRequest(
                f"{present[0]} holds token id {max(prompt)}, beyond the model's vocabulary of {self._card.vocab_size}",
                field=present[0],
            )
        self._check_length(len(prompt), present[0], given.sampling)
        return prompt

    def _check_length(self, num_tokens: int, field: str, sampling: SamplingInput) -> None:
        has_output = sampling.max_tokens != 0
        if num_tokens + has_output > self._card.context_length:
            rest = " with at least one of them for the output" if has_output else ""
            raise InvalidRequest(
                f"the prompt has {num_tokens} tokens, but the context is {self._card.context_length} tokens{rest}; "
                f"shorten {field}",
                field=field,
            )

    def _with_max_tokens(
        self, sampling: SamplingParams, given: GenerateInput, num_prompt_tokens: int
    ) -> SamplingParams:
        """`sampling` with its last value, and what it needs checked against what there is."""
        max_tokens, room = given.sampling.max_tokens, self._card.context_length - num_prompt_tokens
        if max_tokens is None:
            max_tokens = self._default_max_tokens(given, room)
        # Every further sample gets its own copy of the prompt's last block (decode_workers/joining.py).
        num_blocks = -(-num_prompt_tokens // self._limits.block_size) + sampling.n - 1
        if max_tokens > room:
            raise self._too_many_tokens(num_prompt_tokens, max_tokens)
        if sampling.min_tokens > max_tokens:
            raise _less_than_min_tokens(sampling.min_tokens, max_tokens, is_default=given.sampling.max_tokens is None)
        if self._limits.num_kv_blocks is not None and num_blocks > self._limits.num_kv_blocks:
            raise self._too_many_blocks(num_prompt_tokens, sampling.n, num_blocks)
        return replace(sampling, max_tokens=max_tokens)

    def _default_max_tokens(self, given: GenerateInput, room: int) -> int:
        of_chat = self._limits.default_max_tokens or self._card.sampling.max_tokens
        default = of_chat if given.messages is not None else COMPLETION_MAX_TOKENS
        return room if default is None else min(default, room)

    def _too_many_tokens(self, num_prompt_tokens: int, max_tokens: int) -> InvalidRequest:
        context_length = self._card.context_length
        return InvalidRequest(
            f"the prompt's {num_prompt_tokens} tokens and max_tokens {max_tokens} make "
            f"{num_prompt_tokens + max_tokens}, but the context is {context_length} tokens; lower "
            f"max_tokens to {context_length - num_prompt_tokens} or shorten the prompt",
            field="max_tokens",
        )

    def _too_many_blocks(self, num_prompt_tokens: int, n: int, num_blocks: int) -> InvalidRequest:
        return InvalidRequest(
            f"the prompt's {num_prompt_tokens} tokens and n {n} need {num_blocks} KV blocks, but a worker has "
            f"{self._limits.num_kv_blocks}; lower n or shorten the prompt",
            field="n",
        )

    def _sampling(self, given: SamplingInput) -> SamplingParams:
        """All but max_tokens, which depends on the prompt.

        Only the likeliest token is left by `top_p` 0, so that is greedy, too.
        """
        if given.stop_token_ids:
            self._check_stop_tokens(given.stop_token_ids)
        vocab_size = self._card.vocab_size
        eos = () if given.ignore_eos else self._card.eos_token_ids
        ends = dict.fromkeys((*(token for token in eos if 0 <= token < vocab_size), *given.stop_token_ids))
        if given.min_tokens and len(ends) == vocab_size:
            raise _no_token_left(given.min_tokens, vocab_size)
        temperature = _range_or("temperature", given.temperature, 1.0, 0.0, 2.0)
        top_p = _range_or("top_p", given.top_p, 1.0, 0.0, 1.0)
        top_k = _check_int("top_k", given.top_k if given.top_k is not None else 0, -1, None)
        return SamplingParams(
            n=_check_int("n", given.n if given.n is not None else 1, 1, min(MAX_SAMPLES, self._limits.max_samples)),
            min_tokens=given.min_tokens or 0,
            temperature=temperature if temperature >= GREEDY_BELOW and top_p > 0 else 0.0,
            top_p=top_p,
            top_k=top_k if 0 < top_k < vocab_size else 0,
            min_p=_range_or("min_p", given.min_p, 0.0, 0.0, 1.0),
            presence_penalty=_range_or("presence_penalty", given.presence_penalty, 0.0, -2.0, 2.0),
            frequency_penalty=_range_or("frequency_penalty", given.frequency_penalty, 0.0, -2.0, 2.0),
            repetition_penalty=_range_or("repetition_penalty", given.repetition_penalty, 1.0, *_REPETITION_PENALTY),
            logit_bias=self._logit_bias(given.logit_bias) if given.logit_bias else (),
            seed=self._rng.getrandbits(63) if given.seed is None else _check_int("seed", given.seed, *_INT64),
            logprobs=_optional_int("logprobs", given.logprobs, 0, MAX_LOGPROBS),
            prompt_logprobs=_optional_int("prompt_logprobs", given.prompt_logprobs, 0, MAX_LOGPROBS),
            stop_token_ids=tuple(ends),
        )

    def _check_stop_tokens(self, token_ids: Sequence[int]) -> None:
        if len(token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(f"stop_token_ids may hold at most {MAX_STOP_TOKEN_IDS} ids", field="stop_token_ids")
        self.check_token_ids(token_ids, "stop_token_ids")

    def _logit_bias(self, biases: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
        for token_id, bias in biases.items():
            if not 0 <= token_id < self._card.vocab_size:
                raise InvalidRequest(
                    f"logit_bias has token id {token_id}; token ids of this model are 0 to {self._card.vocab_size - 1}",
                    field="logit_bias",
                )
            _check_range("logit_bias", bias, -100.0, 100.0)
        return tuple(sorted((token_id, float(bias)) for token_id, bias in biases.items()))


def _check_lengths(given: GenerateInput) -> None:
    """max_tokens and min_tokens as they are, before the prompt is looked at."""
    sampling = given.sampling
    _optional_int("min_tokens", sampling.min_tokens, 0, None)
    if sampling.max_tokens == 0 and not given.echo and sampling.prompt_logprobs is None:
        raise InvalidRequest(
            "max_tokens must be at least 1; 0 needs an answer without output, which is echo in /v1/completions and "
            "prompt_logprobs over gRPC",
            field="max_tokens",
        )
    if sampling.max_tokens != 0:
        _optional_int("max_tokens", sampling.max_tokens, 1, None)


def _no_token_left(min_tokens: int, vocab_size: int) -> InvalidRequest:
    return InvalidRequest(
        f"min_tokens {min_tokens} leaves no token to generate: all {vocab_size} tokens of this model end a sample; "
        "give fewer stop_token_ids",
        field="min_tokens",
    )


def _less_than_min_tokens(min_tokens: int, max_tokens: int, *, is_default: bool) -> InvalidRequest:
    source = ", which is the default here" if is_default else ""
    return InvalidRequest(
        f"min_tokens {min_tokens} is more than max_tokens {max_tokens}{source}; lower min_tokens or raise max_tokens",
        field="min_tokens",
    )


def is_request_id(text: str) -> bool:
    """Whether a client may call a request so."""
    return _REQUEST_ID.fullmatch(text) is not None


def _check_cache_salt(salt: str) -> None:
    if len(salt) > MAX_CACHE_SALT_CHARACTERS:
        raise InvalidRequest(
            f"cache_salt has {len(salt)} characters; at most {MAX_CACHE_SALT_CHARACTERS} are allowed",
            field="cache_salt",
        )


def check_stop(stop: tuple[str, ...]) -> None:
    """Raises InvalidRequest for too many, too long or empty stop strings."""
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop has {len(stop)} strings; at most {MAX_STOP_STRINGS} are allowed", field="stop")
    for index, string in enumerate(stop):
        if not string:
            raise InvalidRequest(f"stop[{index}] is empty; leave it out", field=f"stop[{index}]")
        if len(string) > MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"stop[{index}] has {len(string)} characters; at most {MAX_STOP_CHARACTERS} are allowed",
                field=f"stop[{index}]",
            )


def _check_range(field: str, value: float, low: float, high: float, *, above_low: bool = False) -> float:
    """`value` as a float when it is finite and in [low, high], or (low, high] with `above_low`."""
    if not math.isfinite(value) or not low <= value <= high or (above_low and value == low):
        span = f"above {low:g}" if above_low else f"{low:g}"
        until = "" if math.isinf(high) else (f" and at most {high:g}" if above_low else f" to {high:g}")
        raise InvalidRequest(f"{field} must be {span}{until}, and finite; it is {value}", field=field)
    return float(value)


def _range_or(field: str, value: float | None, default: float, low: float, high: float) -> float:
    return default if value is None else _check_range(field, value, low, high)


def _check_int(field: str, value: int, low: int, high: int | None) -> int:
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"{low} to {high}"
        raise InvalidRequest(f"{field} must be {span}; it is {value}", field=field)
    return value


def _optional_int(field: str, value: int | None, low: int, high: int | None) -> int | None:
    return None if value is None else _check_int(field, value, low, high)
