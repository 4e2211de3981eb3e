"""Answers in OpenAI's form, built straight from deltas: whole bodies, and the events of event streams.

The field names and shapes are those that the official `openai` package parses (`openai/types`). Events are put together
from strings made once per request, because one is written for every token.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quote
from typing import Any

from control_plane.gateway.service import GenerationStream, SampleDelta, TokenInfo, Usage

DONE_EVENT = b"data: [DONE]\n\n"
_LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity; OpenAI writes this


def dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all objects of one answer share."""

    id: str
    kind: str  # the value of "object"
    created_unix_s: int
    model: str
    fingerprint: str

    def fields(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created_unix_s,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


@dataclass(slots=True)
class Choice:
    """One choice while it grows. `offset` is where the next token's text begins in the choice's text, in characters."""

    index: int
    text: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    has_begun: bool = False
    offset: int = 0
    decode: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace").decode)

    def take(self, delta: SampleDelta) -> None:
        """Adds what is new, for an answer in one piece."""
        self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason.value
            self.stop_reason = delta.stop_reason


def usage_fields(usage: Sequence[Usage]) -> dict[str, Any]:
    """`usage` of one answer: the sum over its prompts."""
    prompt = sum(u.num_prompt_tokens for u in usage)
    output = sum(u.num_output_tokens for u in usage)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(u.num_cached_tokens for u in usage)},
    }


def timeline_fields(stream: GenerationStream) -> dict[str, Any]:
    """When and where a request passed: its events in order of time, and the workers of its placement."""
    events = []
    for event in sorted(stream.timeline, key=lambda e: e.at_unix_s):
        entry: dict[str, Any] = {"stage": event.stage.value, "at_unix_s": event.at_unix_s, "worker": event.worker_id}
        if event.num_bytes:
            entry["bytes"] = event.num_bytes
        if event.duration_s:
            entry["duration_s"] = event.duration_s
        events.append(entry)
    placement = stream.placement
    assert placement is not None, "no request over HTTP is resumed"
    return {
        "request_id": stream.request_id,
        "prefill_worker": placement.prefill_worker,
        "decode_worker": placement.decode_worker,
        "attempt": placement.attempt,
        "events": events,
    }


def chat_logprobs(tokens: Sequence[TokenInfo]) -> list[dict[str, Any]]:
    """`choices[].logprobs.content`: a token, its bytes and the alternatives with theirs."""
    return [
        {
            **_chat_token(token.text, token.raw, token.logprob),
            "top_logprobs": [_chat_token(text, raw, logprob) for _, text, raw, logprob in token.top_logprobs],
        }
        for token in tokens
    ]


def _chat_token(text: str, raw: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "bytes": list(raw), "logprob": _finite(logprob if logprob is not None else 0.0)}


def completion_logprobs(choice: Choice, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
    """`choices[].logprobs` of a completion. Moves `choice.offset` on.

    A token that is no whole text is written as OpenAI does, `bytes:\\xf0\\x9f`: names stay different and exact. The
    first token of a prompt has no logprob.
    """
    names: list[str] = []
    values: list[float | None] = []
    alternatives: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token in tokens:
        name = _token_name(token.raw)
        if token.raw and token.raw[0] & 0xC0 != 0x80:  # no continuation byte: an unfinished character ends here
            choice.offset += len(choice.decode(b"", True))
        names.append(name)
        offsets.append(choice.offset)
        if token.logprob is None:
            values.append(None)
            alternatives.append(None)
        else:
            value = _finite(token.logprob)
            values.append(value)
            top: dict[str, float] = {}
            for _, _, raw, logprob in token.top_logprobs:
                top.setdefault(_token_name(raw), _finite(logprob))  # of tokens with one name the likeliest
            top.setdefault(name, value)
            alternatives.append(top)
        if not token.is_special:
            choice.offset += len(choice.decode(token.raw))
    return {"tokens": names, "token_logprobs": values, "top_logprobs": alternatives, "text_offset": offsets}


def _token_name(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)


def merge_completion_logprobs(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parts of one choice in a row."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [entry for part in parts for entry in part[name]] for name in names}


class ChatForm:
    """Chat completions: `message` in one piece, `delta` in a stream."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, wants_logprobs: bool) -> None:
        self._wants_logprobs = wants_logprobs

    def logprobs(self, choice: Choice, tokens: Sequence[TokenInfo]) -> dict[str, Any] | None:
        """The logprobs of new tokens, or None where none were asked for."""
        return {"content": chat_logprobs(tokens), "refusal": None} if self._wants_logprobs else None

    def choice(self, choice: Choice) -> dict[str, Any]:
        content = [entry for part in choice.logprobs for entry in part["content"]]
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": {"content": content, "refusal": None} if self._wants_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def payload(self, text: str, is_first: bool) -> str:
        """The part of a chunk that holds the text."""
        if is_first:
            return f'"delta":{{"role":"assistant","content":{quote(text)}}}'
        return f'"delta":{{"content":{quote(text)}}}' if text else '"delta":{}'


class CompletionForm:
    """Text completions: `text` in both."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, wants_logprobs: bool) -> None:
        self._wants_logprobs = wants_logprobs

    def logprobs(self, choice: Choice, tokens: Sequence[TokenInfo]) -> dict[str, Any] | None:
        """The logprobs of new tokens, or None where none were asked for."""
        return completion_logprobs(choice, tokens) if self._wants_logprobs else None

    def choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": "".join(choice.text),
            "logprobs": merge_completion_logprobs(choice.logprobs) if self._wants_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def payload(self, text: str, is_first: bool) -> str:
        """The part of a chunk that holds the text."""
        return f'"text":{quote(text)}'


class EventWriter:
    """Writes the events of one event stream, which ends with usage and timeline where they are wanted."""

    def __init__(
        self,
        envelope: Envelope,
        form: ChatForm | CompletionForm,
        *,
        wants_usage: bool = False,
        wants_token_ids: bool = False,
        wants_timeline: bool = False,
    ) -> None:
        self.wants_usage = wants_usage
        self.wants_timeline = wants_timeline
        self._envelope = envelope
        self._form = form
        self._wants_token_ids = wants_token_ids
        self._head = "data: " + dumps(envelope.fields())[:-1] + ',"choices":[{"index":'
        # With include_usage every chunk has the field, null but in the last.
        self._tail = '}],"usage":null}\n\n' if wants_usage else "}]}\n\n"

    def delta(self, choice: Choice, delta: SampleDelta) -> bytes:
        """The event of one delta; nothing for a delta that brings the client nothing."""
        # With token ids every delta is news: their text may still be held back.
        has_news = delta.text or delta.tokens or delta.finish_reason is not None or self._wants_token_ids
        if not has_news and choice.has_begun:
            return b""
        finish, reason = "null", "null"
        if delta.finish_reason is not None:
            finish, reason = quote(delta.finish_reason.value), dumps(delta.stop_reason)
        finish = f'{finish},"stop_reason":{reason}'
        if self._wants_token_ids:
            finish += f',"token_ids":{dumps(list(delta.token_ids))}'
        return self._chunk(choice, delta.text, delta.tokens, finish)

    def echo(self, choice: Choice, text: str, tokens: Sequence[TokenInfo]) -> bytes:
        """The prompt, as the beginning of a choice."""
        return self._chunk(choice, text, tokens, "null")

    def _chunk(self, choice: Choice, text: str, tokens: Sequence[TokenInfo], finish: str) -> bytes:
        logprobs = self._form.logprobs(choice, tokens) if tokens else None
        is_first, choice.has_begun = not choice.has_begun, True
        line = (
            f"{self._head}{choice.index},{self._form.payload(text, is_first)},"
            f'"logprobs":{dumps(logprobs) if logprobs else "null"},"finish_reason":{finish}{self._tail}'
        )
        return line.encode()

    def end(self, usage: dict[str, Any] | None, timeline: Any) -> bytes:
        """[DONE], and before it an event without a choice, but with usage and timeline where they are given."""
        if usage is None and timeline is None:
            return DONE_EVENT
        body = {**self._envelope.fields(), "choices": []}
        if usage is not None:
            body["usage"] = usage
        if timeline is not None:
            body["timeline"] = timeline
        return b"data: " + dumps(body).encode() + b"\n\n" + DONE_EVENT
