"""What both servers call, and the nouns of it: a request and its answer in neither protocol's form. Pure.

The HTTP and gRPC servers translate their own form into `GenerateInput`, read a `GenerationStream`, and translate what
comes out, errors included. They decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from control_plane.gateway.request_ids import ClaimedId
from phasewise.core.messages import TimelineEvent
from phasewise.core.placement import Placement
from phasewise.core.request import FinishReason
from phasewise.core.sampling_defaults import NO_SAMPLING_DEFAULTS, SamplingDefaults


@dataclass(frozen=True, slots=True)
class SamplingInput:
    """Sampling parameters as the user gave them; None means "not given". Ranges are checked by the gateway."""

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
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class SampleSoFar:
    """One sample of an answer that broke off, as its client has it. `finish_reason`: of a sample that has ended."""

    sample_index: int
    token_ids: Sequence[int]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class GenerateInput:
    """A request in neither protocol's form. Exactly one of `text`, `token_ids`, `messages` is given.

    `messages` are plain dicts with "role" and "content" (a string), as the chat template wants them.
    `model` may be None (the one model served). `timeout_s` None means the gateway's default. `client` is whose share of
    the open requests it counts to: a network address, or None for nobody's. `claimed` is what `claim_id` gave for
    `request_id`, where several requests share it. `echo`: the answer begins with the prompt, so it may be asked for
    without output (`max_tokens` 0). `resume_after`: the samples of which something has come already, where the answer
    to the same request broke off, here or at another gateway.
    """

    text: str | None = None
    token_ids: Sequence[int] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    sampling: SamplingInput = field(default_factory=SamplingInput)
    model: str | None = None
    request_id: str | None = None
    timeout_s: float | None = None
    cache_salt: str = ""
    client: str | None = None
    echo: bool = False
    claimed: ClaimedId | None = None
    resume_after: Sequence[SampleSoFar] = ()


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One token with its text and log-probabilities. `text` is the token alone; `raw` its bytes, exact.

    A special token (`is_special`) is listed with its name but is no part of the sample's text.
    """

    token_id: int
    text: str
    raw: bytes
    logprob: float | None
    top_logprobs: tuple[tuple[int, str, bytes, float], ...] = ()  # (token id, text, bytes, logprob)
    is_special: bool = False


@dataclass(frozen=True, slots=True)
class SampleDelta:
    """What is new in one sample: text that is certain (whole characters, no beginning of a stop string in it).

    `token_ids` are all new ids, including those whose text is still held back. `tokens` is filled only when
    logprobs were asked for. A delta with a `finish_reason` is the sample's last; `stop_reason` is then the stop string
    or stop token id that ended it, or None.
    """

    sample_index: int
    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[TokenInfo, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. `num_cached_tokens` of the prompt came from the prefix cache."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0


class News(Protocol):
    """An `asyncio.Event`, or whatever else somebody waits for."""

    def set(self) -> None: ...


class NotRead:
    """The news of a stream that nobody reads yet."""

    def set(self) -> None: ...


class GenerationStream(Protocol):
    """An accepted request; a `StreamReader` (streams.py) reads it. Its holder must `close` it in the end.

    `usage` and `timeline` are whole after the last delta.
    """

    @property
    def request_id(self) -> str: ...

    @property
    def prompt_token_ids(self) -> tuple[int, ...]: ...

    @property
    def prompt_tokens(self) -> tuple[TokenInfo, ...]:
        """The prompt with log-probabilities when `prompt_logprobs` was asked for; known before the first delta."""

    @property
    def usage(self) -> Usage: ...

    @property
    def timeline(self) -> tuple[TimelineEvent, ...]: ...

    @property
    def placement(self) -> Placement | None:
        """The newest; None where nothing was left to be run."""

    @property
    def is_over(self) -> bool:
        """True when all deltas were taken and the request has ended well."""

    def listen(self, news: News) -> None:
        """Sets `news` now, and whenever there is something to take; it takes the place of an earlier one."""

    def take(self) -> list[SampleDelta]:
        """Some of the deltas that have come, in order. `news` is set again where there is more to take.

        Raises the request's error when all were taken.
        """

    def close(self) -> None:
        """Cancels what is still running; harmless after the end."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a client may know of the model. `sampling`: what requests that give no value have."""

    name: str
    context_length: int
    vocab_size: int
    dtype: str
    created_unix_s: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    sampling: SamplingDefaults = NO_SAMPLING_DEFAULTS


class InferenceService(Protocol):
    """The gateway as its protocol servers see it."""

    @property
    def model(self) -> ModelCard: ...

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would be taken. False while starting and draining, and when a pool is empty."""

    @property
    def unready_reason(self) -> str:
        """Why it would not be taken; "" when it would. Answered from what is known, without waiting."""

    def claim_id(self, request_id: str) -> ClaimedId:
        """Sets an id aside for several requests that share it. Raises DuplicateRequest when it is in use."""

    async def generate(self, request: GenerateInput) -> GenerationStream:
        """Checks, tokenises, places. Raises InvalidRequest, Overloaded, Unavailable … before anything runs."""

    async def tokenize(
        self, text: str | None, messages: tuple[Mapping[str, Any], ...] | None, model: str | None
    ) -> list[int]:
        """Token ids of a text (special tokens as in generation) or of a chat with its template."""

    def detokenize(self, token_ids: Sequence[int], model: str | None) -> str: ...

    async def status(self) -> dict[str, Any]:
        """The cluster's state as JSON: {"workers": [{"id", "pid", "role", "state", …}], "gateway": {…}, …}."""

    async def links(self) -> dict[str, Any]:
        """The links between workers as JSON (control_plane/gateway/link_report.py). Raises Unavailable."""

    async def probe_links(self, sizes: Sequence[int], timeout_s: float) -> dict[str, Any]:
        """The same, measured with parts of these sizes. Raises InvalidRequest, Unavailable, Overloaded."""

    async def metrics_text(self) -> tuple[bytes, str]:
        """(body, content type) in Prometheus' text format."""
