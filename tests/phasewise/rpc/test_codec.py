"""The wire form stays in step with the nouns on both of its sides."""

from __future__ import annotations

from dataclasses import fields

import pytest

from control_plane.gateway.service import SamplingInput
from phasewise.core.errors import InternalError
from phasewise.core.request import FinishReason
from phasewise.options import Options, SamplingOptions
from phasewise.rpc import phasewise_pb2 as pb
from phasewise.rpc.codec import FINISH_REASON_TO_PB, decode_delta, encode_generate


def test_sampling_has_the_same_fields_everywhere() -> None:
    wire = {field.name for field in pb.Sampling.DESCRIPTOR.fields}
    assert wire == {field.name for field in fields(SamplingInput)} == set(SamplingOptions.__annotations__)


def test_every_finish_reason_has_a_wire_form() -> None:
    assert set(FINISH_REASON_TO_PB) == {None, *FinishReason}
    assert set(FINISH_REASON_TO_PB.values()) == set(pb.FinishReason.values())


def test_a_finish_reason_of_the_future_is_an_error_not_a_guess() -> None:
    with pytest.raises(InternalError, match="update phasewise"):
        decode_delta(pb.SampleDelta(finish_reason=99))


@pytest.mark.parametrize(
    ("wire", "reason"),
    [(pb.SampleDelta(stop_string=""), ""), (pb.SampleDelta(stop_token_id=0), 0), (pb.SampleDelta(), None)],
)
def test_stop_reasons_are_told_apart_even_when_empty(wire: pb.SampleDelta, reason: str | int | None) -> None:
    decoded = decode_delta(pb.SampleDelta.FromString(wire.SerializeToString()))
    assert decoded.stop_reason == reason and type(decoded.stop_reason) is type(reason)


def test_zero_is_sent_and_none_is_not() -> None:
    options: Options = {"temperature": 0.0, "seed": 0, "logprobs": 0, "top_p": None}
    sampling = encode_generate(options, request_id="r", prompt="").sampling
    assert [name for name in ("temperature", "seed", "logprobs", "top_p") if sampling.HasField(name)] == [
        "temperature",
        "seed",
        "logprobs",
    ]


def test_an_empty_prompt_is_still_a_prompt() -> None:
    assert encode_generate({}, request_id="r", prompt="").WhichOneof("prompt") == "text"
    assert encode_generate({}, request_id="r", token_ids=[]).WhichOneof("prompt") == "token_ids"
    assert encode_generate({}, request_id="r", messages=[]).WhichOneof("prompt") == "messages"
