"""Clients that send anything at all, over both protocols' real servers to a whole cluster in one process.

Whatever comes: no 5xx, no UNKNOWN, no traceback in any log, nothing left open, and at most 100 characters of the input
in a message. The examples are the same every time; `pytest --hypothesis-profile=long` looks for new ones.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasewise.rpc import phasewise_pb2 as pb
from tests.support.front_doors import FrontDoors, front_doors
from tests.support.hostile_inputs import ANY_JSON, broken_bytes, faulty_bodies
from tests.support.tiny_model import save_tiny_model

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
VALID: dict[str, dict[str, Any]] = {
    CHAT: {
        "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}],
        "model": "test-model", "stream": True, "stream_options": {"include_usage": True}, "n": 2, "max_tokens": 2,
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.1, "frequency_penalty": 0.1,
        "repetition_penalty": 1.1, "logit_bias": {"7": 1.5}, "seed": 1, "stop": ["x"], "stop_token_ids": [9],
        "ignore_eos": False, "timeout": 600, "cache_salt": "s", "user": "u", "metadata": {"a": "b"}, "logprobs": True,
        "top_logprobs": 2, "response_format": {"type": "text"}, "tools": [],
    },
    COMPLETIONS: {
        "prompt": ["ab", "c"], "stream": False, "n": 1, "max_tokens": 2, "logprobs": 1, "echo": True, "best_of": 1,
        "stop": "y", "logit_bias": {"5": -1}, "return_token_ids": True, "seed": 3, "suffix": "",
    },
    "/tokenize": {"prompt": "ab", "model": "test-model"},
    "/detokenize": {"tokens": [5, 6], "model": "test-model"},
    "/links/probe": {"sizes": [32], "timeout_s": 5},
}  # fmt: skip
_SERVICE = "/phasewise.v1.Inference/"
_CHAT_MESSAGES = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
MESSAGES: dict[str, list[Any]] = {
    _SERVICE + "Generate": [
        pb.GenerateRequest(
            text="ab",
            sampling=pb.Sampling(max_tokens=2, n=1, stop=["x"], logit_bias={5: 1.0}, seed=1, temperature=0.5),
            request_id="r",
            cache_salt="s",
        ),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6, 7]), sampling=pb.Sampling(max_tokens=1), timeline=True),
        pb.GenerateRequest(messages=_CHAT_MESSAGES, sampling=pb.Sampling(max_tokens=1, logprobs=1)),
    ],
    _SERVICE + "Tokenize": [pb.TokenizeRequest(text="ab"), pb.TokenizeRequest(messages=_CHAT_MESSAGES)],
    _SERVICE + "Detokenize": [pb.DetokenizeRequest(token_ids=[5, 6], model="test-model")],
    _SERVICE + "GetModel": [pb.GetModelRequest()],
    "/grpc.health.v1.Health/Check": [pb.TokenizeRequest(text="a")],  # the same wire format: a string
}
OURS = {
    grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}  # fmt: skip


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontDoors]:
    folder: Path = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, context=64)
    with front_doors(folder) as doors:
        yield doors


@pytest.fixture(scope="module")
def http(doors: FrontDoors) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{doors.http_port}", timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def channel(doors: FrontDoors) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{doors.grpc_port}") as channel:
        yield channel


@pytest.fixture(autouse=True)
def _nothing_stays(doors: FrontDoors) -> Iterator[None]:
    yield
    doors.wait_until_empty()
    assert doors.faults == []


def check_http(doors: FrontDoors, http: httpx.Client, path: str, body: bytes) -> httpx.Response:
    """Sends a body; the answer, which is right as an answer to anything."""
    answer = http.post(path, content=body)
    faults = doors.faults[:]
    doors.faults.clear()
    assert faults == []
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        last = answer.text.strip().rsplit("\n\n", 1)[-1].removeprefix("data: ")
        assert last == "[DONE]" or json.loads(last)["error"]["code"] == "deadline_exceeded"
    elif answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(error["message"]) < 500 and len(error["param"] or "") < 200
        # A request may be given no time.
        assert answer.status_code < 500 or (error["code"] == "deadline_exceeded" and b"timeout" in body), answer.text
    return answer


def check_grpc(doors: FrontDoors, channel: grpc.Channel, method: str, raw: bytes) -> tuple[grpc.StatusCode, str]:
    """Sends bytes as the request; the status, which is right as an answer to anything."""
    call = channel.unary_stream(method)(raw, timeout=30)  # of a unary method it is the same on the wire
    with contextlib.suppress(grpc.RpcError):
        for _ in call:
            pass
    code, details = call.code(), call.details() or ""
    faults = doors.faults[:]
    doors.faults.clear()
    assert faults == []
    assert code in OURS and len(details) < 500, (code, details)
    return code, details


def bodies() -> st.SearchStrategy[tuple[str, str]]:
    """(path, body)"""
    faulty = [st.tuples(st.just(path), faulty_bodies(valid)) for path, valid in VALID.items()]
    return st.one_of(*faulty, faulty[0], faulty[1], st.tuples(st.sampled_from(sorted(VALID)), ANY_JSON))


def valid_texts() -> st.SearchStrategy[tuple[str, bytes]]:
    texts = [(path, json.dumps(valid).encode()) for path, valid in VALID.items()]
    return st.sampled_from(texts).flatmap(lambda text: st.tuples(st.just(text[0]), broken_bytes(text[1])))


def broken_messages() -> st.SearchStrategy[tuple[str, bytes]]:
    raws = [(method, message.SerializeToString()) for method, messages in MESSAGES.items() for message in messages]
    return st.sampled_from(raws).flatmap(lambda raw: st.tuples(st.just(raw[0]), broken_bytes(raw[1])))


@pytest.mark.parametrize("path", VALID)
def test_what_is_broken_below_was_right(doors: FrontDoors, http: httpx.Client, path: str) -> None:
    assert check_http(doors, http, path, json.dumps(VALID[path]).encode()).status_code == 200


@given(example=bodies())
def test_no_json_is_a_fault_of_the_server(doors: FrontDoors, http: httpx.Client, example: tuple[str, str]) -> None:
    check_http(doors, http, example[0], example[1].encode())


@given(example=valid_texts())
def test_no_bytes_are_a_fault_of_the_server(doors: FrontDoors, http: httpx.Client, example: tuple[str, bytes]) -> None:
    check_http(doors, http, *example)


@given(example=broken_messages())
def test_no_protobuf_is_a_fault_of_the_server(
    doors: FrontDoors, channel: grpc.Channel, example: tuple[str, bytes]
) -> None:
    check_grpc(doors, channel, *example)
