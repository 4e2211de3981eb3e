"""What the SDK hands to a user: frozen, plain, free of protobuf."""

from __future__ import annotations

from dataclasses import dataclass

from phasewise.core.request import FinishReason


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One alternative beside a token. `raw` holds its exact bytes; `text` shows them as well as text can."""

    token_id: int
    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token with its log-probability (None for the first token of a prompt) and the likeliest alternatives."""

    token_id: int
    text: str
    raw: bytes
    logprob: float | None
    top_logprobs: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. `num_cached_tokens` of the prompt came from the prefix cache."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TimelineEvent:
    """One moment of a request; the stages are those of `phasewise.core.lifecycle.Stage`."""

    stage: str
    at_unix_s: float
    worker_id: str
    num_bytes: int = 0
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PlacedOn:
    """The workers that served a request. `attempt` is 0 unless it had to be moved."""

    prefill_worker: str
    decode_worker: str
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new in one sample of a stream.

    `token_ids` may be ahead of `text`: text is held back until its characters are whole and cannot be the beginning of
    a stop string. `tokens` is filled when `logprobs` was asked for. The sample's last delta has a `finish_reason`, and
    as `stop_reason` the stop string or the stop token id that ended it, if one did.
    """

    sample_index: int
    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One whole sample."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """All samples of a request. `text`, `token_ids`, `tokens` and `finish_reason` are those of the first one.

    `prompt_tokens` is filled when `prompt_logprobs` was asked for, `timeline` and `placement` when `timeline=True` was.
    """

    request_id: str
    samples: tuple[Sample, ...]
    usage: Usage
    prompt_tokens: tuple[Token, ...] = ()
    timeline: tuple[TimelineEvent, ...] = ()
    placement: PlacedOn | None = None

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(sample.text for sample in self.samples)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.samples[0].token_ids

    @property
    def tokens(self) -> tuple[Token, ...]:
        return self.samples[0].tokens

    @property
    def finish_reason(self) -> FinishReason:
        return self.samples[0].finish_reason

    @property
    def finish_reasons(self) -> tuple[FinishReason, ...]:
        return tuple(sample.finish_reason for sample in self.samples)


@dataclass(frozen=True, slots=True)
class Model:
    """The model that a cluster serves. `context_length` bounds prompt and output together, in tokens."""

    name: str
    context_length: int
    vocab_size: int
    dtype: str
    created_unix_s: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
