"""Protobuf ↔ the gateway's nouns (`service.py`), both directions, nothing else. Ranges are checked by the service."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from control_plane.gateway.quota import MAX_BIASES, check_items
from control_plane.gateway.service import (
    GenerateInput,
    GenerationStream,
    ModelCard,
    SampleDelta,
    SampleSoFar,
    SamplingInput,
    TokenInfo,
)
from phasewise.core.errors import InvalidRequest
from phasewise.core.shown import clipped
from phasewise.options import SCALAR_SAMPLING
from phasewise.rpc import phasewise_pb2 as pb
from phasewise.rpc.codec import FINISH_REASON_FROM_PB, FINISH_REASON_TO_PB


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """What a message of Generate says; its deadline and its client are known from the call."""

    given: GenerateInput
    with_timeline: bool


@dataclass(frozen=True, slots=True)
class TokenizeCall:
    """One of `text` and `messages` is None."""

    text: str | None
    messages: tuple[Mapping[str, Any], ...] | None
    model: str | None


@dataclass(frozen=True, slots=True)
class DetokenizeCall:
    token_ids: Sequence[int]
    model: str | None


def decode_generate(request: pb.GenerateRequest) -> GenerateCall:
    """Raises InvalidRequest when there is no prompt, or a field that this version does not know."""
    _check_lists(request)
    refuse_unknown_fields(request)
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("the request has no prompt: set text, token_ids or messages", field="prompt")
    given = GenerateInput(
        text=request.text if kind == "text" else None,
        token_ids=array("q", request.token_ids.ids) if kind == "token_ids" else None,
        messages=_decode_messages(request.messages) if kind == "messages" else None,
        sampling=_decode_sampling(request.sampling),
        model=request.model or None,
        request_id=request.request_id or None,
        cache_salt=request.cache_salt,
        resume_after=[_decode_sample(sample) for sample in request.resume_after],
    )
    return GenerateCall(given, request.timeline)


def _check_lists(request: pb.GenerateRequest) -> None:
    sampling = request.sampling
    check_items(len(request.messages.messages), "messages")
    check_items(len(sampling.stop), "stop")
    check_items(len(sampling.stop_token_ids), "stop_token_ids")
    check_items(len(sampling.logit_bias), "logit_bias", MAX_BIASES)
    check_items(len(request.resume_after), "resume_after")


def refuse_unknown_fields(message: Message, path: str = "") -> None:
    """A parameter that a newer client sends and this server would ignore must not look as if it had worked.

    Raises:
        InvalidRequest: names the message and the number of the field.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown):
        place = path or message.DESCRIPTOR.name
        raise InvalidRequest(
            f"{place} has field number {unknown[0].field_number}, which this server does not know; "
            "leave it out or update the server",
            field=place,
        )
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None or descriptor.message_type.GetOptions().map_entry:
            continue
        for item in (value,) if isinstance(value, Message) else value:
            refuse_unknown_fields(item, descriptor.name)


def decode_tokenize(request: pb.TokenizeRequest) -> TokenizeCall:
    """Raises InvalidRequest when there is nothing to tokenize."""
    kind, model = request.WhichOneof("prompt"), request.model or None
    if kind is None:
        raise InvalidRequest("nothing to tokenize: set text or messages", field="text")
    if kind == "text":
        return TokenizeCall(request.text, None, model)
    check_items(len(request.messages.messages), "messages")
    return TokenizeCall(None, _decode_messages(request.messages), model)


def decode_detokenize(request: pb.DetokenizeRequest) -> DetokenizeCall:
    """Which ids the model knows is checked by the service."""
    return DetokenizeCall(array("q", request.token_ids), request.model or None)


DECODERS: dict[str, tuple[type[Message], Callable[[Any], GenerateCall | TokenizeCall | DetokenizeCall]]] = {
    "Generate": (pb.GenerateRequest, decode_generate),
    "Tokenize": (pb.TokenizeRequest, decode_tokenize),
    "Detokenize": (pb.DetokenizeRequest, decode_detokenize),
}
"""How the messages of each method are read."""


def decode_raw(method: str, raw: bytes) -> GenerateCall | TokenizeCall | DetokenizeCall:
    """A message as it came. Raises InvalidRequest, also where it is no valid protobuf."""
    kind, decode = DECODERS[method]
    try:
        request = kind.FromString(raw)
    except DecodeError as error:
        raise malformed(str(error)) from None
    return decode(request)


def malformed(reason: str) -> InvalidRequest:
    """The refusal of what is no valid protobuf."""
    return InvalidRequest(f"the message cannot be read ({clipped(reason)}); send what phasewise.proto says")


def encode_started(stream: GenerationStream) -> pb.Started:
    return pb.Started(request_id=stream.request_id, prompt_tokens=map(_encode_token, stream.prompt_tokens))


def encode_delta(delta: SampleDelta) -> pb.SampleDelta:
    encoded = pb.SampleDelta(
        sample_index=delta.sample_index,
        text=delta.text,
        token_ids=delta.token_ids,
        tokens=map(_encode_token, delta.tokens),
        finish_reason=FINISH_REASON_TO_PB[delta.finish_reason],
    )
    if isinstance(delta.stop_reason, str):
        encoded.stop_string = delta.stop_reason
    elif delta.stop_reason is not None:
        encoded.stop_token_id = delta.stop_reason
    return encoded


def encode_finished(stream: GenerationStream, *, with_timeline: bool) -> pb.Finished:
    """Usage, and on request timeline and placement. For use after the last delta."""
    usage = stream.usage
    finished = pb.Finished(
        usage=pb.Usage(
            num_prompt_tokens=usage.num_prompt_tokens,
            num_output_tokens=usage.num_output_tokens,
            num_cached_tokens=usage.num_cached_tokens,
        )
    )
    if with_timeline:
        if (placement := stream.placement) is not None:
            finished.placement.prefill_worker = placement.prefill_worker
            finished.placement.decode_worker = placement.decode_worker
            finished.placement.attempt = placement.attempt
        for event in stream.timeline:
            finished.timeline.add(
                stage=event.stage.value,
                at_unix_s=event.at_unix_s,
                worker_id=event.worker_id,
                num_bytes=event.num_bytes,
                duration_s=event.duration_s,
            )
    return finished


def encode_model(card: ModelCard) -> pb.Model:
    return pb.Model(
        name=card.name,
        context_length=card.context_length,
        vocab_size=card.vocab_size,
        dtype=card.dtype,
        created_unix_s=card.created_unix_s,
        eos_token_ids=card.eos_token_ids,
        has_chat_template=card.has_chat_template,
    )


def _decode_messages(messages: pb.ChatMessages) -> tuple[Mapping[str, Any], ...]:
    return tuple({"role": message.role, "content": message.content} for message in messages.messages)


def _decode_sampling(sampling: pb.Sampling) -> SamplingInput:
    given: dict[str, Any] = {name: getattr(sampling, name) for name in SCALAR_SAMPLING if sampling.HasField(name)}
    return SamplingInput(
        **given,
        logit_bias=dict(sampling.logit_bias) or None,
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
    )


def _decode_sample(sample: pb.SampleSoFar) -> SampleSoFar:
    if sample.finish_reason not in FINISH_REASON_FROM_PB:
        raise InvalidRequest(f"resume_after has finish reason {sample.finish_reason}", field="resume_after")
    return SampleSoFar(sample.sample_index, array("q", sample.token_ids), FINISH_REASON_FROM_PB[sample.finish_reason])


def _encode_token(token: TokenInfo) -> pb.Token:
    return pb.Token(
        token_id=token.token_id,
        text=token.text,
        raw=token.raw,
        logprob=token.logprob,
        top_logprobs=_encode_top(token.top_logprobs),
    )


def _encode_top(top: Sequence[tuple[int, str, bytes, float]]) -> list[pb.TopLogprob]:
    return [pb.TopLogprob(token_id=i, text=text, raw=raw, logprob=logprob) for i, text, raw, logprob in top]
