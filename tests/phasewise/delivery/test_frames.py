"""Outputs and greetings survive their way over a connection for tokens; what is none of them is refused."""

from __future__ import annotations

import json
import marshal

import pytest

from phasewise.core.lifecycle import Stage
from phasewise.core.messages import NewTokens, PromptLogprobs, RequestFailed, TimelineEvent, WorkerOutput
from phasewise.core.request import FinishReason, SampledToken
from phasewise.delivery.frames import (
    LENGTH,
    WIRE_VERSION,
    Hello,
    Refused,
    Welcome,
    decode_answer,
    decode_hello,
    decode_output,
    encode_greeting,
    encode_output,
    why_refused,
)

OUTPUT = WorkerOutput(
    "mixed-0#1",
    (
        NewTokens("a", 0, 0, (SampledToken(5),)),
        NewTokens("a", 1, 7, (SampledToken(6), SampledToken(0)), FinishReason.LENGTH),
        NewTokens("b", 0, 3, (SampledToken(7, -0.5), SampledToken(8, 0.0, ((8, 0.0), (9, float("-inf")))))),
        NewTokens("c", 0, 4, (), FinishReason.STOP),
    ),
    (PromptLogprobs("a", (SampledToken(1), SampledToken(2, -1.5))),),
    (TimelineEvent("a", Stage.FIRST_TOKEN, 1.25, "mixed-0#1", 17, 0.5, num_tokens=3),),
    (RequestFailed("d", "overloaded", "full"),),
)
HELLO = Hello("decode-0#2", "gateway-0#1", 17, "secret")


def body(frame: bytes) -> bytes:
    """Without its length, which is right."""
    assert LENGTH.unpack_from(frame) == (len(frame) - LENGTH.size,)
    return frame[LENGTH.size :]


@pytest.mark.parametrize("output", [OUTPUT, WorkerOutput("mixed-0#1")])
def test_an_output_comes_back_as_it_was(output: WorkerOutput) -> None:
    decoded = decode_output(body(encode_output(output)), "mixed-0#1")
    assert decoded == output
    assert all(type(chunk) is NewTokens for chunk in decoded.chunks)
    assert [type(chunk.finish_reason) for chunk in decoded.chunks] == [
        type(chunk.finish_reason) for chunk in output.chunks
    ]


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"hello",
        marshal.dumps(5, 2),
        marshal.dumps(([], []), 2),
        marshal.dumps(([("a", 0)], [], [], []), 2),
        marshal.dumps(([], [], [("a", "no such stage", 0.0, "w", 0, 0.0, 0)], []), 2),
        body(encode_output(OUTPUT))[:-5],
    ],
)
def test_what_is_no_output_is_refused(frame: bytes) -> None:
    with pytest.raises(ValueError, match="a frame of mixed-0#1 cannot be read"):
        decode_output(frame, "mixed-0#1")


def test_greetings_come_back_as_they_were() -> None:
    assert decode_hello(body(encode_greeting(HELLO))) == HELLO
    for answer in (Welcome(12), Refused("no")):
        assert decode_answer(body(encode_greeting(answer))) == answer


@pytest.mark.parametrize(
    "greeting", [b"", b"GET / HTTP/1.1", b"[]", b"{}", b'["Welcome", {"next": 1}]', b'["Hello", {"first": 1}]', b"\xff"]
)
def test_what_is_no_hello_is_refused(greeting: bytes) -> None:
    with pytest.raises(ValueError, match="is no greeting of version"):
        decode_hello(greeting)


def test_a_gateway_takes_workers_of_its_cluster_and_version_that_mean_it() -> None:
    assert why_refused(HELLO, "gateway-0#1", "secret") == ""
    assert "does not know its secret" in why_refused(HELLO, "gateway-0#1", "another")
    assert why_refused(HELLO, "gateway-0#2", "secret") == "this is gateway-0#2, not gateway-0#1"
    newer = json.loads(body(encode_greeting(HELLO)))
    newer[1]["version"] = WIRE_VERSION + 1
    reason = why_refused(decode_hello(json.dumps(newer).encode()), "gateway-0#1", "secret")
    assert reason == f"version {WIRE_VERSION + 1} there, {WIRE_VERSION} here"


def test_a_secret_is_not_shown() -> None:
    assert "secret" not in repr(HELLO)
