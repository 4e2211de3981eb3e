"""Protobuf ↔ the SDK's own types. The server's side is in `control_plane/gateway/grpc_front/codec.py`.

What cannot be put on the wire (a wrong type, a number that does not fit) raises InvalidRequest naming the field.
Ranges are the server's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phasewise.core.errors import InternalError, InvalidRequest
from phasewise.core.request import FinishReason
from phasewise.options import SCALAR_SAMPLING, Options
from phasewise.results import Delta, Model, PlacedOn, TimelineEvent, Token, TopLogprob, Usage
from phasewise.rpc import phasewise_pb2 as pb

Messages = Sequence[Mapping[str, str]]
"""A chat: mappings with "role" and "content"."""

FINISH_REASON_TO_PB = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}
FINISH_REASON_FROM_PB = {wire: reason for reason, wire in FINISH_REASON_TO_PB.items()}


def encode_generate(
    options: Options,
    *,
    request_id: str,
    prompt: str | None = None,
    token_ids: Sequence[int] | None = None,
    messages: Messages | None = None,
) -> pb.GenerateRequest:
    """The wire form of a request. Exactly one of `prompt`, `token_ids` and `messages` must be given."""
    given = [value for value in (prompt, token_ids, messages) if value is not None]
    if len(given) != 1:
        raise InvalidRequest(f"give one prompt, not {len(given)}: a text, token_ids or messages", field="prompt")
    request = pb.GenerateRequest(sampling=_encode_sampling(options))
    if prompt is not None:
        _put("prompt", setattr, request, "text", prompt)
    elif messages is not None:
        request.messages.CopyFrom(encode_messages(messages))
    else:
        request.token_ids.SetInParent()
        _put("token_ids", request.token_ids.ids.extend, token_ids)
    _put("request_id", setattr, request, "request_id", request_id)
    _put("model", setattr, request, "model", options.get("model") or "")
    _put("cache_salt", setattr, request, "cache_salt", options.get("cache_salt", ""))
    _put("timeline", setattr, request, "timeline", options.get("timeline", False))
    return request


def encode_messages(messages: Messages) -> pb.ChatMessages:
    """Every message needs a string "role" and a string "content", and has nothing else."""
    encoded = pb.ChatMessages()
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        unknown = sorted(set(message) - {"role", "content"}) if isinstance(message, Mapping) else []
        if not isinstance(message, Mapping) or unknown or "role" not in message or "content" not in message:
            what = f"has unknown keys {unknown}" if unknown else f"is {message!r}"
            raise InvalidRequest(f"{field} must be a mapping of 'role' and 'content', but {what}", field=field)
        added = encoded.messages.add()
        _put(f"{field}.role", setattr, added, "role", message["role"])
        _put(f"{field}.content", setattr, added, "content", message["content"])
    return encoded


def encode_tokenize(text: str | None, messages: Messages | None, model: str | None) -> pb.TokenizeRequest:
    """Exactly one of `text` and `messages` must be given."""
    if (text is None) == (messages is None):
        raise InvalidRequest("give either a text or messages to tokenize", field="text")
    request = pb.TokenizeRequest()
    _put("model", setattr, request, "model", model or "")
    if messages is not None:
        request.messages.CopyFrom(encode_messages(messages))
    else:
        _put("text", setattr, request, "text", text)
    return request


def encode_detokenize(token_ids: Sequence[int], model: str | None) -> pb.DetokenizeRequest:
    request = pb.DetokenizeRequest()
    _put("model", setattr, request, "model", model or "")
    _put("token_ids", request.token_ids.extend, token_ids)
    return request


def decode_delta(delta: pb.SampleDelta) -> Delta:
    """Raises InternalError for a finish reason that this version does not know."""
    if delta.finish_reason not in FINISH_REASON_FROM_PB:
        raise InternalError(f"the server sent finish reason {delta.finish_reason}, unknown here: update phasewise")
    stop_field = delta.WhichOneof("stop_reason")
    return Delta(
        sample_index=delta.sample_index,
        text=delta.text,
        token_ids=tuple(delta.token_ids),
        tokens=decode_tokens(delta.tokens),
        finish_reason=FINISH_REASON_FROM_PB[delta.finish_reason],
        stop_reason=None if stop_field is None else getattr(delta, stop_field),
    )


def decode_tokens(tokens: Sequence[pb.Token]) -> tuple[Token, ...]:
    return tuple(
        Token(
            token_id=token.token_id,
            text=token.text,
            raw=token.raw,
            logprob=token.logprob if token.HasField("logprob") else None,
            top_logprobs=tuple(TopLogprob(t.token_id, t.text, t.raw, t.logprob) for t in token.top_logprobs),
        )
        for token in tokens
    )


def decode_usage(usage: pb.Usage) -> Usage:
    return Usage(usage.num_prompt_tokens, usage.num_output_tokens, usage.num_cached_tokens)


def decode_timeline(events: Sequence[pb.TimelineEvent]) -> tuple[TimelineEvent, ...]:
    return tuple(TimelineEvent(e.stage, e.at_unix_s, e.worker_id, e.num_bytes, e.duration_s) for e in events)


def decode_placement(finished: pb.Finished) -> PlacedOn | None:
    """None when the request did not ask for it."""
    if not finished.HasField("placement"):
        return None
    placement = finished.placement
    return PlacedOn(placement.prefill_worker, placement.decode_worker, placement.attempt)


def decode_model(model: pb.Model) -> Model:
    return Model(
        name=model.name,
        context_length=model.context_length,
        vocab_size=model.vocab_size,
        dtype=model.dtype,
        created_unix_s=model.created_unix_s,
        eos_token_ids=tuple(model.eos_token_ids),
        has_chat_template=model.has_chat_template,
    )


def _encode_sampling(options: Options) -> pb.Sampling:
    sampling = pb.Sampling()
    values: Mapping[str, Any] = options
    for name in SCALAR_SAMPLING:
        value = values.get(name)
        if value is not None:
            _put(name, setattr, sampling, name, value)
    stop = options.get("stop") or ()
    _put("stop", sampling.stop.extend, [stop] if isinstance(stop, str) else stop)
    _put("stop_token_ids", sampling.stop_token_ids.extend, options.get("stop_token_ids") or ())
    _put("logit_bias", sampling.logit_bias.update, options.get("logit_bias") or {})
    _put("ignore_eos", setattr, sampling, "ignore_eos", options.get("ignore_eos", False))
    return sampling


def _put(field: str, write: Callable[..., None], *values: Any) -> None:
    """Writes into a message; protobuf's own complaint becomes an InvalidRequest naming `field`."""
    try:
        write(*values)
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
        raise InvalidRequest(f"{field} cannot be sent: {error}", field=field) from None
