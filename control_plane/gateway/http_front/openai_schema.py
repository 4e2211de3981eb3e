"""The bodies of the OpenAI-compatible requests, and how they become `GenerateInput`.

Types are strict ("5" is no number); unknown fields are refused. Every shape is checked here, before anything else sees
the body, and the check of a long list ends at its first fault: pydantic by itself would describe each of millions.
Ranges are checked by `preparation.py`, for all protocols alike. Fields of OpenAI's API fall in three classes: served;
harmless, accepted and without effect here; refused because ignoring them would change the answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from control_plane.gateway.http_front.openai_errors import ParameterNames
from control_plane.gateway.http_front.openai_shapes import (
    MAX_CHOICES,
    logit_bias_of,
    split_prompts,
    stop_strings,
    whole_numbers,
)
from control_plane.gateway.quota import MAX_BIASES, check_items
from control_plane.gateway.service import GenerateInput, SamplingInput
from control_plane.gateway.text.chat_template import plain_messages
from control_plane.link_survey import DEFAULT_SIZES, DEFAULT_TIMEOUT_S
from phasewise.core.errors import InvalidRequest

_WITHOUT_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)

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


def _numbers(given: Any, info: ValidationInfo) -> list[int]:
    return whole_numbers(given, info.field_name or "")


def _numbers_or_none(given: Any, info: ValidationInfo) -> list[int] | None:
    return None if given is None else _numbers(given, info)


Unsupported = Annotated[Any, AfterValidator(_refuse)]
# Nothing behind the schema meets a number that does not fit: JSON has numbers of any length.
Whole = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Messages = Annotated[list[Any], AfterValidator(plain_messages)]
Numbers = Annotated[Any, AfterValidator(_numbers)]  # a list of whole numbers


class Body(BaseModel):
    """What all bodies share."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    def compact(self) -> None:
        """Makes the body fit for the way from the process that parsed it: what one step of a program reads at once.

        Long lists of token ids become arrays, and what has no effect is dropped.

        Raises:
            InvalidRequest: another list is longer than any request needs.
        """

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, given: Any) -> Any:
        """Refuses the first unknown field."""
        if isinstance(given, dict):
            for name in given:
                if name not in cls.model_fields:
                    raise PydanticCustomError("unknown_field", "unknown field", {"name": name})
        return given


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; without effect here


class _GenerateBody(Body):
    """What both kinds of generation share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Whole | None = None
    max_tokens: Whole | None = None
    min_tokens: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[Any, AfterValidator(logit_bias_of)] = None
    seed: Whole | None = None
    stop: Annotated[Any, AfterValidator(stop_strings)] = ()
    stop_token_ids: Annotated[Any, AfterValidator(_numbers_or_none)] = None
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
        """The sampling parameters."""
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
            logit_bias=self.logit_bias,
            seed=self.seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )

    def compact(self) -> None:
        for name in _WITHOUT_EFFECT:
            setattr(self, name, None)
        check_items(len(self.stop), "stop")
        check_items(len(self.stop_token_ids or ()), "stop_token_ids")
        check_items(len(self.logit_bias or ()), "logit_bias", MAX_BIASES)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream: true; leave it out or stream", field="stream_options")


class ChatBody(_GenerateBody):
    """POST /v1/chat/completions"""

    messages: Messages
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
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

    def compact(self) -> None:
        super().compact()
        check_items(len(self.messages), "messages")

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

    prompt: Annotated[Any, AfterValidator(split_prompts)]  # a string, token ids, or a list of either
    logprobs: Whole | None = None
    echo: bool | None = None
    best_of: Whole | None = None
    suffix: Unsupported = None

    def compact(self) -> None:
        super().compact()
        self.prompt = [p if isinstance(p, str) else array("q", p) for p in self.prompt]

    def inputs(self, request_id: str, timeout_s: float | None, client: str | None = None) -> list[GenerateInput]:
        """One request per prompt, in order. Raises InvalidRequest."""
        self.check_stream_options()
        if self.best_of is not None and self.best_of != (1 if self.n is None else self.n):
            raise InvalidRequest("best_of is supported only where it equals n; leave it out", field="best_of")
        prompts: list[str | Sequence[int]] = self.prompt
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
                request_id=request_id,
                timeout_s=timeout,
                cache_salt=self.cache_salt or "",
                client=client,
            )
            for prompt in prompts
        ]

    @property
    def names(self) -> ParameterNames:
        renamed = {"timeout_s": "timeout", "text": "prompt", "token_ids": "prompt", "prompt_logprobs": "logprobs"}
        return ParameterNames(renamed)


class TokenizeBody(Body):
    """POST /tokenize: one of prompt and messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None

    def compact(self) -> None:
        check_items(len(self.messages or ()), "messages")


class DetokenizeBody(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: Numbers

    def compact(self) -> None:
        self.tokens = array("q", self.tokens)


class ProbeLinksBody(Body):
    """POST /links/probe"""

    sizes: Numbers = list(DEFAULT_SIZES)
    timeout_s: float = DEFAULT_TIMEOUT_S

    def compact(self) -> None:
        check_items(len(self.sizes), "sizes")


SCHEMAS: dict[str, type[Body]] = {
    schema.__name__: schema for schema in (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody, ProbeLinksBody)
}
"""The bodies by their names, for a process that is told a name."""
