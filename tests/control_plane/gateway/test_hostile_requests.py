"""Single requests that were a fault of the server once, or said too much: over real servers to a whole cluster."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from pydantic import ValidationError

from control_plane.gateway.http_front.openai_schema import ChatBody, DetokenizeBody
from phasewise.core.errors import InvalidRequest
from phasewise.core.shown import MAX_SHOWN, clipped, shown
from phasewise.rpc import phasewise_pb2 as pb
from tests.support.front_doors import FrontDoors, front_doors
from tests.support.hostile_inputs import HUGE_DIGITS
from tests.support.tiny_model import save_tiny_model

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
LONG = "q" * 5000


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontDoors]:
    folder: Path = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, context=2048)
    with front_doors(folder) as doors:
        yield doors


@pytest.fixture(scope="module")
def http(doors: FrontDoors) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{doors.http_port}", timeout=30) as client:
        yield client


@pytest.fixture(autouse=True)
def _nothing_stays(doors: FrontDoors) -> Iterator[None]:
    yield
    doors.wait_until_empty()
    faults = doors.faults[:]
    doors.faults.clear()
    assert faults == []


def error_of(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    return dict(answer.json()["error"])


def chat(**fields: Any) -> str:
    return json.dumps({"messages": HI, "max_tokens": 1, **fields})


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, chat(messages=["hi"]), "messages[0]"),
        (CHAT, chat(messages=[*HI, None]), "messages[1]"),
        (CHAT, chat(messages=[[1]]), "messages[0]"),
        (CHAT, chat(messages=[{"role": ["user"], "content": "a"}]), "messages[0].role"),
        (CHAT, chat(messages=[{"role": "user", "content": ["a"]}]), "messages[0].content[0]"),
        (CHAT, chat(messages=[{"role": "user", "content": [{"type": {}}]}]), "messages[0].content[0].type"),
        (CHAT, chat(messages=[{"role": "user", "content": "a", "name": 5}]), "messages[0].name"),
        (CHAT, chat(stop=["a", None]), "stop[1]"),
        (CHAT, chat(stop_token_ids=5), "stop_token_ids"),
        (CHAT, chat(stop_token_ids=[1, [2]]), "stop_token_ids[1]"),
        (CHAT, chat(logit_bias={HUGE_DIGITS: 1}), "logit_bias"),
        (CHAT, chat(logit_bias={"5": 1, "05": 2}), "logit_bias"),
        (CHAT, chat(logit_bias={"5": None}), "logit_bias[5]"),
        (CHAT, chat(logit_bias=[5]), "logit_bias"),
        (CHAT, chat(n=2**62), "n"),
        (CHAT, chat(n=2**63), "n"),
        (CHAT, chat(cache_salt="s" * 257), "cache_salt"),
        (COMPLETIONS, json.dumps({"prompt": [[5], [2**31]]}), "prompt[1][0]"),
        (COMPLETIONS, json.dumps({"prompt": [["a"]]}), "prompt"),
        (COMPLETIONS, json.dumps({"prompt": [10**400]}), "prompt[0]"),
        ("/tokenize", json.dumps({"messages": ["hi"]}), "messages[0]"),
        ("/detokenize", json.dumps({"tokens": [1.5]}), "tokens[0]"),
        ("/links/probe", json.dumps({"sizes": {}}), "sizes"),
    ],
)
def test_a_wrong_shape_names_its_place(http: httpx.Client, path: str, body: str, param: str) -> None:
    error = error_of(http.post(path, content=body))
    assert (error["param"], error["code"]) == (param, "invalid_request") and len(error["message"]) < 400


@pytest.mark.parametrize("field", ["n", "max_tokens", "temperature", "seed", "stop", "logit_bias", "user", "tools"])
def test_a_number_of_thousands_of_digits_is_refused_in_every_field(http: httpx.Client, field: str) -> None:
    error = error_of(http.post(CHAT, content=chat(**{field: "@"}).replace('"@"', HUGE_DIGITS)))
    assert "99999" not in error["message"]


def test_a_check_ends_at_the_first_fault() -> None:
    """Pydantic by itself describes all: 41 s and 3.6 GiB for 4 million of them."""
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate_json(chat(**{f"f{i}": 1 for i in range(1000)}))
    assert caught.value.error_count() == 1
    for schema, body in ((DetokenizeBody, {"tokens": [""] * 1000}), (ChatBody, {"messages": [""] * 1000})):
        with pytest.raises(InvalidRequest, match=r"\[0\]"):
            schema.model_validate_json(json.dumps(body))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"5", b'"x"', b"[" * 50_000, b'{"messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "\\ud800", "content": "a"}]}',
        b'{"messages": [{"role": "user", "content": "a", "name": "\\udfff"}]}', b'{"\\ud800": 1}',
        b'{"messages": [{"role": "user", "content": "a"}], "stop": "\\ud800"}',
        b'{"messages": [{"role": "user", "content": "a"}], "model": "\\ud800"}',
        b'{"messages": [{"role": "user", "content": "a"}], "cache_salt": "\\ud800"}',
        b'{"messages": [{"role": "user", "content": "a"}], "user": "\\ud800"}',
    ],
)  # fmt: skip
def test_a_body_that_is_no_request(http: httpx.Client, body: bytes) -> None:
    error_of(http.post(CHAT, content=body))


def test_nul_characters_are_text(http: httpx.Client) -> None:
    body = {"prompt": "a\x00b", "max_tokens": 1, "stop": "\x00", "cache_salt": "\x00", "user": "\x00"}
    assert http.post(COMPLETIONS, json=body).status_code == 200


ECHOED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"model": LONG}),
    (CHAT, {"temperature": LONG}),
    (CHAT, {LONG: 1}),
    (CHAT, {"stream": True, "stream_options": {LONG: 1}}),
    (CHAT, {"messages": [{"role": LONG, "content": "a"}]}),
    (CHAT, {"messages": [{"role": "user", "content": "a", LONG: 1}]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": LONG}]}]}),
    (CHAT, {"logit_bias": {LONG: 1}}),
    (CHAT, {"logit_bias": {"5": LONG}}),
    (CHAT, {"stop_token_ids": [LONG]}),
    (CHAT, {"cache_salt": LONG}),
    (CHAT, {"stop": [LONG]}),
    (CHAT, {"tools": LONG}),
    ("/detokenize", {"tokens": LONG}),
    ("/links/probe", {"sizes": [LONG]}),
]


@pytest.mark.parametrize(("path", "fields"), ECHOED)
def test_no_message_over_http_has_more_than_100_characters_of_the_input(
    http: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    answer = http.post(path, json={"messages": HI, **fields} if path == CHAT else fields)
    assert 400 <= answer.status_code < 500 and longest_run(answer.text) <= MAX_SHOWN


def test_nor_has_a_header_or_a_path(http: httpx.Client) -> None:
    refused = http.post(CHAT, json={"messages": HI}, headers={"x-request-id": LONG})
    error = error_of(refused)
    assert error["param"] == "request_id" and re.fullmatch("[0-9a-f]{32}", refused.headers["x-request-id"])
    answers = [
        refused,
        http.post(CHAT, json={"messages": HI}, headers={"x-phasewise-timeout-s": LONG}),
        http.get(f"/{LONG}"),
        http.get(f"/v1/models/{LONG}"),
        http.request(LONG[:40].upper(), "/health"),
    ]
    for answer in answers:
        assert 400 <= answer.status_code < 500 and longest_run(answer.text + str(answer.headers)) <= MAX_SHOWN


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Generate", pb.GenerateRequest(text="a", model=LONG)),
        ("Generate", pb.GenerateRequest(text="a", request_id=LONG)),
        ("Generate", pb.GenerateRequest(text="a", cache_salt=LONG)),
        ("Generate", pb.GenerateRequest(messages=pb.ChatMessages(messages=[pb.ChatMessage(role=LONG, content="a")]))),
        ("Tokenize", pb.TokenizeRequest(text="a", model=LONG)),
        ("Health/Check", pb.TokenizeRequest(text=LONG)),
    ],
)
def test_nor_has_a_message_over_grpc(doors: FrontDoors, method: str, request_: Any) -> None:
    path = f"/grpc.health.v1.{method}" if "/" in method else f"/phasewise.v1.Inference/{method}"
    with grpc.insecure_channel(f"127.0.0.1:{doors.grpc_port}") as channel:
        call = channel.unary_stream(path)(request_.SerializeToString(), timeout=30)
        with contextlib.suppress(grpc.RpcError):
            list(call)
        assert call.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
        assert longest_run(call.details()) <= MAX_SHOWN and longest_run(str(call.trailing_metadata())) <= MAX_SHOWN


def longest_run(text: str) -> int:
    """The most letters of LONG in a row."""
    return max((len(run) for run in re.findall("[qQ]+", text)), default=0)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /nothing HTTP/1.1\r\nHost: [\r\n",
        b"GET /%ff%zz% HTTP/1.1\r\nHost: a\r\n",
        b"GET /v1/models/%00%ff HTTP/1.1\r\nHost: a\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n",
        b"GET /nothing HTTP/1.1\r\nHost: \xff\xfe\r\nx-request-id: \xff\xfe\r\n",
        b"PUT /v1/models HTTP/1.1\r\nHost: a\r\n",
        b"GET /v1/chat/completions HTTP/1.1\r\nHost: a\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: " + HUGE_DIGITS.encode() + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nx-phasewise-timeout-s: \xb2\xff\r\n",
    ],
)
def test_an_odd_head_of_a_request_is_a_4xx(doors: FrontDoors, head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", doors.http_port), timeout=30) as connection:
        connection.sendall(head + b"Connection: close\r\n\r\n")
        status_line = connection.makefile("rb").readline()
    assert status_line.startswith(b"HTTP/1.1 4"), status_line


ID = "i" * 128


@pytest.mark.parametrize("stream", [False, True])
def test_an_id_of_the_allowed_length_serves_several_prompts_and_at_once_again(http: httpx.Client, stream: bool) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": 2, "stream": stream}
    for _ in range(3):
        answer = http.post(COMPLETIONS, json=body, headers={"x-request-id": ID})
        assert answer.status_code == 200 and f"cmpl-{ID}" in answer.text and answer.headers["x-request-id"] == ID


@pytest.mark.parametrize("num_open", [1, 2])
@pytest.mark.parametrize("num_asked", [1, 2])
def test_an_id_is_open_once_whatever_the_number_of_prompts(
    doors: FrontDoors, http: httpx.Client, num_open: int, num_asked: int
) -> None:
    headers = {"x-request-id": "twice"}
    long = {"prompt": ["a", "b"][:num_open], "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with http.stream("POST", COMPLETIONS, json=long, headers=headers) as first:
        lines = first.iter_lines()  # held: an iterator that is thrown away closes the connection
        assert next(lines).startswith("data: ")
        num_running = doors.num_open()
        asked = {"prompt": ["c", "d"][:num_asked], "max_tokens": 1}
        assert error_of(http.post(COMPLETIONS, json=asked, headers=headers), 409)["code"] == "duplicate_request"
        assert doors.num_open() <= num_running, "nothing of it was begun"
        assert http.post(COMPLETIONS, json=asked, headers={"x-request-id": "twice-0"}).status_code == 200
    doors.wait_until_empty()
    assert http.post(COMPLETIONS, json=asked, headers=headers).status_code == 200


def test_a_refused_prompt_gives_the_id_back(http: httpx.Client) -> None:
    headers = {"x-request-id": "again"}
    error_of(http.post(COMPLETIONS, json={"prompt": ["a", ""]}, headers=headers))
    assert http.post(COMPLETIONS, json={"prompt": ["a", "b"], "max_tokens": 1}, headers=headers).status_code == 200


def test_what_is_shown_of_a_value_is_short_and_on_one_line() -> None:
    assert shown("a\nb") == "'a\\nb'" and shown(None) == "None" and shown(1.5) == "1.5" and shown([1]) == "a list"
    for value in ("x" * 10**6, "\U000e0001" * 1000, "\ud800" * 1000, 10**5000, -(10**5000)):
        assert len(shown(value)) <= MAX_SHOWN and shown(value).isprintable()
    assert clipped("a\nb") == "a\N{REPLACEMENT CHARACTER}b" and len(clipped("x" * 1000)) == MAX_SHOWN
