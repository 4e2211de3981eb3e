"""The bodies of the OpenAI-compatible requests, and how they become `GenerateInput`.

Types are strict ("5" is no number); unknown fields are refused. Ranges are checked by `preparation.py`, for all
protocols alike. Fields of OpenAI's API fall in three classes: served; harmless, accepted and without effect here;
refused because ignoring them would change the answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo
from pydantic_core import PydanticCustomError

from control_plane.gateway.openai_errors import ParameterNames
from control_plane.gateway.service import GenerateInput, SamplingInput
from control_plane.link_survey import DEFAULT_SIZES, DEFAULT_TIMEOUT_S
from phasewise.core.errors import InvalidRequest

MAX_CHOICES = 1024

# Values that ask for nothing, so that clients that always send the field still work.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "suffix": ("",),
}


def _refuse(value: Any, info: ValidationInfo) -> Any:
    name = info.field_name or ""
    if value is None or value in ([], {}) or value in _NEUTRAL.get(name, ()):
        return value
    raise PydanticCustomError("unsupported", "this server does not support it; leave it out")


Unsupported = Annotated[Any, AfterValidator(_refuse)]


class Body(BaseModel):
    """What all bodies share."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    def compact(self) -> None:
        """Makes arrays of long lists of token ids, for the way to another process. Raises InvalidRequest."""


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; without effect here


class _GenerateBody(Body):
    """What both kinds of generation share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Any = None  # a string or a list of strings: checked by `_stop`
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    timeout: float | None = None
    cache_salt: str | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    def sampling(self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None) -> SamplingInput:
        """The sampling parameters. Raises InvalidRequest for `stop` and `logit_bias` of a wrong form."""
        return SamplingInput(
            n=self.n,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=_logit_bias(self.logit_bias),
            seed=self.seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop=_stop(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream: true; leave it out or stream", field="stream_options")


class ChatBody(_GenerateBody):
    """POST /v1/chat/completions"""

    messages: list[Any]  # checked by chat_template.plain_messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Unsupported = None
    tool_choice: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    parallel_tool_calls: Unsupported = None
    response_format: Unsupported = None
    audio: Unsupported = None
    modalities: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None

    def inputs(self, request_id: str, timeout_s: float | None, client: str | None = None) -> list[GenerateInput]:
        """The one request of a chat. Raises InvalidRequest."""
        self.check_stream_options()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", field="top_logprobs")
        max_tokens = self.max_tokens
        if self.max_completion_tokens is not None:
            if max_tokens is not None and max_tokens != self.max_completion_tokens:
                raise InvalidRequest(
                    "give max_tokens or max_completion_tokens, not both", field="max_completion_tokens"
                )
            max_tokens = self.max_completion_tokens
        sampling = self.sampling(
            max_tokens=max_tokens, logprobs=(self.top_logprobs or 0) if self.logprobs else None, prompt_logprobs=None
        )
        given = GenerateInput(
            messages=tuple(self.messages),
            sampling=sampling,
            model=self.model,
            request_id=request_id,
            timeout_s=self.timeout if self.timeout is not None else timeout_s,
            cache_salt=self.cache_salt or "",
            client=client,
        )
        return [given]

    @property
    def names(self) -> ParameterNames:
        renamed = {"timeout_s": "timeout", "logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            renamed["max_tokens"] = "max_completion_tokens"
        return ParameterNames(renamed)


class CompletionBody(_GenerateBody):
    """POST /v1/completions"""

    prompt: Any  # a string, token ids, or a list of either: checked by `split_prompts`
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: Unsupported = None

    def compact(self) -> None:
        self.prompt = [p if isinstance(p, str) else _as_array(p, "prompt") for p in split_prompts(self.prompt)]

    def inputs(self, request_id: str, timeout_s: float | None, client: str | None = None) -> list[GenerateInput]:
        """One request per prompt, in order. Raises InvalidRequest."""
        self.check_stream_options()
        if self.best_of is not None and self.best_of != (1 if self.n is None else self.n):
            raise InvalidRequest("best_of is supported only where it equals n; leave it out", field="best_of")
        prompts = split_prompts(self.prompt)
        if len(prompts) * (self.n or 1) > MAX_CHOICES:
            raise InvalidRequest(
                f"{len(prompts)} prompts times n {self.n or 1} are more than {MAX_CHOICES} choices; send fewer prompts",
                field="prompt",
            )
        sampling = self.sampling(
            max_tokens=self.max_tokens, logprobs=self.logprobs, prompt_logprobs=self.logprobs if self.echo else None
        )
        timeout = self.timeout if self.timeout is not None else timeout_s
        return [
            GenerateInput(
                text=prompt if isinstance(prompt, str) else None,
                token_ids=None if isinstance(prompt, str) else prompt,
                echo=bool(self.echo),
                sampling=sampling,
                model=self.model,
                request_id=request_id if len(prompts) == 1 else f"{request_id}-{index}",
                timeout_s=timeout,
                cache_salt=self.cache_salt or "",
                client=client,
            )
            for index, prompt in enumerate(prompts)
        ]

    @property
    def names(self) -> ParameterNames:
        renamed = {"timeout_s": "timeout", "text": "prompt", "token_ids": "prompt", "prompt_logprobs": "logprobs"}
        return ParameterNames(renamed)


class TokenizeBody(Body):
    """POST /tokenize: one of prompt and messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None


class DetokenizeBody(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[int]

    def compact(self) -> None:
        self.tokens = _as_array(self.tokens, "tokens")  # type: ignore[assignment]


class ProbeLinksBody(Body):
    """POST /links/probe"""

    sizes: list[int] = list(DEFAULT_SIZES)
    timeout_s: float = DEFAULT_TIMEOUT_S


SCHEMAS: dict[str, type[Body]] = {
    schema.__name__: schema for schema in (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody, ProbeLinksBody)
}
"""The bodies by their names, for a process that is told a name."""


def _as_array(token_ids: Sequence[int], field: str) -> array[int]:
    try:
        return array("q", token_ids)
    except OverflowError:
        raise InvalidRequest(f"{field} holds a number that is no token id; token ids are small", field=field) from None


def split_prompts(prompt: object) -> list[str | Sequence[int]]:
    """The four forms of `prompt` as a list of prompts. Raises InvalidRequest for any other form."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        what = "an empty list" if prompt == [] else "null" if prompt is None else f"a {type(prompt).__name__}"
        raise InvalidRequest(
            f"prompt must be a string, a list of token ids, or a list of either; it is {what}", field="prompt"
        )
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [prompt]
    if kinds == {str} or kinds == {array}:
        return list(prompt)
    if kinds == {list}:
        for index, ids in enumerate(prompt):
            if set(map(type, ids)) - {int}:
                raise InvalidRequest(f"prompt[{index}] must hold token ids, which are whole numbers", field="prompt")
        return list(prompt)
    raise InvalidRequest(
        "prompt must be all strings, all token ids (whole numbers), or all lists of token ids", field="prompt"
    )


def _stop(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    if isinstance(stop, str):
        return (stop,)
    if isinstance(stop, list):
        for index, string in enumerate(stop):
            if not isinstance(string, str):
                raise InvalidRequest(
                    f"stop[{index}] must be a string, not a {type(string).__name__}", field=f"stop[{index}]"
                )
        return tuple(stop)
    raise InvalidRequest(f"stop must be a string or a list of strings, not a {type(stop).__name__}", field="stop")


def _logit_bias(given: dict[str, float] | None) -> dict[int, float] | None:
    if not given:
        return None
    for key in given:
        if not (key.isascii() and key.isdigit()):
            raise InvalidRequest(
                f"logit_bias has the key {key!r}; keys are token ids such as '50256'", field="logit_bias"
            )
    return {int(key): bias for key, bias in given.items()}
