"""Bodies over the real server: their forms, their sizes, and how many may be in preparation."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest

from control_plane.gateway.bodies import LARGE_BYTES, Bodies, Preparation, largest_body
from control_plane.gateway.grpc_front.server import start_grpc_server
from control_plane.gateway.quota import Quota, client_of, share_of
from phasewise.core.errors import Overloaded
from phasewise.rpc import phasewise_pb2 as pb
from tests.control_plane.gateway.conftest import HashService
from tests.support.http_server import api_server
from tests.support.served import until

MIB = 1 << 20
HI = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture
def http(base_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_url, timeout=60) as client:
        yield client


def parsers() -> list[int]:
    """The processes that this one has started to parse bodies."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid() and b"large_bodies" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    ("headers", "status", "word"),
    [
        ({"content-type": "application/json"}, 200, ""),
        ({"content-type": "application/json; charset=UTF-8"}, 200, ""),
        ({"content-type": "application/json;charset='utf-8'"}, 200, ""),
        ({"content-type": "application/x-www-form-urlencoded"}, 200, ""),  # curl -d without a header
        ({"content-encoding": "identity"}, 200, ""),
        ({"content-type": "application/json; charset=latin1"}, 415, "latin1"),
        ({"content-type": "application/json; charset=utf-16"}, 415, "UTF-8"),
        ({"content-encoding": "gzip"}, 415, "gzip"),
        ({"content-encoding": "br, gzip"}, 415, "br"),
    ],
)
def test_forms_of_a_body(http: httpx.Client, headers: dict[str, str], status: int, word: str) -> None:
    answer = http.post("/v1/chat/completions", content=json.dumps(HI), headers=headers)
    assert answer.status_code == status, answer.text
    if status != 200:
        error = answer.json()["error"]
        assert error["code"] == "unsupported_media_type" and word in error["message"]


def test_a_byte_order_mark_is_no_part_of_the_body(http: httpx.Client) -> None:
    assert http.post("/v1/chat/completions", content=b"\xef\xbb\xbf" + json.dumps(HI).encode()).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models/", "/health/", "/v1/models/smollm2-135m/", "/metrics//"])
def test_a_slash_at_the_end_changes_nothing(http: httpx.Client, path: str) -> None:
    answer = http.get(path)
    assert answer.status_code == 200 and answer.content == http.get(path.rstrip("/")).content
    assert http.post("/v1/chat/completions/", json=HI).status_code == 200


def test_pages_of_other_origins_are_answered_only_where_that_is_configured(service: HashService) -> None:
    ask = {"origin": "https://page.example", "access-control-request-method": "POST"}
    allowed = "access-control-allow-origin"
    with api_server(service) as address:
        assert allowed not in httpx.options(f"http://{address}/v1/chat/completions", headers=ask).headers
        assert allowed not in httpx.get(f"http://{address}/v1/models", headers=ask).headers
    with api_server(service, cors_origins=("https://page.example",)) as address:
        preflight = httpx.options(f"http://{address}/v1/chat/completions", headers=ask)
        assert preflight.status_code == 200 and preflight.headers[allowed] == "https://page.example"
        answer = httpx.post(f"http://{address}/v1/chat/completions", json=HI, headers={"origin": ask["origin"]})
        assert answer.headers[allowed] == "https://page.example"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        stranger = httpx.get(f"http://{address}/v1/models", headers={"origin": "https://other.example"})
        assert allowed not in stranger.headers


LARGE = LARGE_BYTES + 1


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", HI),
    ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 2}),
    ("/v1/completions", {"prompt": [[1, 2, 3], [4]], "max_tokens": 2}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "stream_options": None}),
    ("/tokenize", {"prompt": "Hello, world"}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/detokenize", {"tokens": [1, 2, 10**18]}),
    ("/links/probe", {"sizes": [32], "timeout_s": 1}),
    ("/v1/completions", {"prompt": [1, 10**7], "max_tokens": 2}),
    ("/v1/completions", {"prompt": [[1], []], "max_tokens": 2}),
    ("/v1/completions", {"prompt": [], "max_tokens": 2}),
    ("/v1/completions", {"prompt": [1.5], "max_tokens": 2}),
    ("/v1/completions", {"prompt": "a", "temperature": "x"}),
]


def test_a_large_body_is_answered_as_a_small_one(http: httpx.Client) -> None:
    for path, body in BODIES:
        content = json.dumps({**body, **SEEDED.get(path, {})})
        small, large = http.post(path, content=content), http.post(path, content=content + " " * LARGE)
        assert large.status_code == small.status_code, (path, body)
        if small.status_code == 200 and path.startswith("/v1"):
            assert large.json()["choices"] == small.json()["choices"], (path, body)
        else:
            assert large.json() == small.json(), (path, body)
    assert len(parsers()) == 1


SEEDED = {"/v1/chat/completions": {"seed": 1}, "/v1/completions": {"seed": 1}}


def nested(field: int, content: bytes) -> bytes:
    """A field of a protobuf that holds bytes."""
    size, length = len(content), b""
    while size > 127:
        length, size = length + bytes((size & 127 | 128,)), size >> 7
    return bytes((field << 3 | 2,)) + length + bytes((size,)) + content


MESSAGES: list[tuple[str, bytes, str | None]] = [
    ("Generate", pb.GenerateRequest(text="x" + " " * LARGE).SerializeToString(), None),
    ("Tokenize", pb.TokenizeRequest(text="x" + " " * LARGE).SerializeToString(), None),
    ("Detokenize", pb.DetokenizeRequest(token_ids=[17] * LARGE).SerializeToString(), None),
    ("Generate", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[17] * LARGE)).SerializeToString(), "65537 tokens"),
    ("Generate", nested(3, nested(1, b"") * LARGE), "messages has 65537 items"),
    ("Tokenize", nested(2, nested(1, b"") * LARGE), "messages has 65537 items"),
    ("Generate", nested(1, b"x") + nested(99 >> 3, b"y" * LARGE), "field number 12"),
    ("Generate", b"\xff" * LARGE, "cannot be read"),
    ("Generate", nested(1, b"\xff" * LARGE), "cannot be read"),
]


async def test_large_messages_are_read_in_the_same_process(service: HashService) -> None:
    bodies = Bodies(MIB, 10)
    server, port = await start_grpc_server(service, "127.0.0.1:0", max_message_bytes=MIB, bodies=bodies)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method, raw, words in MESSAGES:
            call = channel.unary_stream(f"/phasewise.v1.Inference/{method}")(raw)
            if words is None:
                assert [message async for message in call], method
            else:
                with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
                    await call.read()
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(parsers()) == 1
    await server.stop(None)
    assert bodies._requests.in_use == 0 and bodies._large_bytes.in_use == 0
    bodies.close()


LISTS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 70_000}, "messages"),
    ("/tokenize", {"messages": [{"role": "user", "content": ""}] * 70_000}, "messages"),
    ("/v1/completions", {"prompt": "a", "stop": ["a"] * 70_000}, "stop"),
    ("/v1/completions", {"prompt": "a", "stop_token_ids": [1] * 70_000}, "stop_token_ids"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {str(i): 0 for i in range(70_000)}}, "logit_bias"),
    ("/links/probe", {"sizes": [32] * 70_000}, "sizes"),
]


def test_lists_that_no_request_needs(service: HashService) -> None:
    with api_server(service, max_body_bytes=16 * MIB) as address:
        for path, body, field in LISTS:
            answer = httpx.post(f"http://{address}{path}", json=body, timeout=60)
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["param"] == field and "70000 items" in error["message"]


def test_millions_of_prompts_are_refused_by_their_number(http: httpx.Client) -> None:
    """Each was made a list and an array before, which took the process ten seconds."""
    body = b'{"prompt": [' + b",".join([b"[1]"] * 200_000) + b"]}"
    error = http.post("/v1/completions", content=body).json()["error"]
    assert error["param"] == "prompt" and "200000 prompts" in error["message"] and "1024" in error["message"]


def test_a_parser_that_dies_is_replaced_and_none_is_left(service: HashService) -> None:
    body = json.dumps({"prompt": "Hello"}) + " " * LARGE
    with api_server(service, max_body_bytes=16 * MIB) as address:
        assert not parsers(), "the first large body starts it"
        for _ in range(2):
            assert httpx.post(f"http://{address}/tokenize", content=body).status_code == 200
        (first,) = parsers()
        os.kill(first, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{first}/cmdline").read_bytes(), 10.0)  # dead, and not yet waited for
        assert httpx.post(f"http://{address}/tokenize", content=body).status_code == 200
        (second,) = parsers()
        assert second != first
        very_large = json.dumps({"prompt": "Hello"}) + " " * (5 * MIB)
        assert httpx.post(f"http://{address}/tokenize", content=very_large).status_code == 200
        assert parsers() == [second], "the memory of the very large one is given back"
        assert httpx.post(f"http://{address}/tokenize", content=body).status_code == 200
    assert not parsers()


def test_what_one_client_prepares_leaves_room_for_others(service: HashService) -> None:
    """By its address in x-forwarded-for, which counts from a proxy on this host."""
    with api_server(service, max_body_bytes=MIB, max_requests=8) as address:
        host, port = address.split(":")
        with contextlib.ExitStack() as open_connections:
            for _ in range(share_of(8)):
                connection = open_connections.enter_context(socket.create_connection((host, int(port))))
                connection.sendall(b"POST /tokenize HTTP/1.1\r\nX-Forwarded-For: 1.2.3.4\r\nContent-Length: 9\r\n\r\n{")

            def ask(client: str) -> httpx.Response:
                headers = {"x-forwarded-for": client}
                return httpx.post(f"http://{address}/tokenize", json={"prompt": "a"}, headers=headers)

            until(lambda: ask("1.2.3.4").status_code == 429, 10.0)
            refusal = ask("1.2.3.4")
            assert "this client" in refusal.json()["error"]["message"] and refusal.headers["retry-after"]
            assert ask("5.6.7.8").status_code == 200
        until(lambda: ask("1.2.3.4").status_code == 200, 10.0)


def test_what_is_refused_by_its_announced_length_is_not_read(base_url: str) -> None:
    host, port = base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n")
        raw = b""
        while part := connection.recv(65536):
            raw += part
    assert raw.startswith(b"HTTP/1.1 413") and b"connection: close" in raw


def test_room_for_large_bytes_is_shared_and_given_back() -> None:
    requests, large_bytes = Quota("requests", 10, 10), Quota("bytes", 4 * MIB, 2 * MIB)
    first, second = Preparation("a", requests, large_bytes), Preparation("b", requests, large_bytes)
    first.grow(LARGE_BYTES)
    assert large_bytes.in_use == 0, "small bodies always find room"
    first.grow(MIB)
    first.grow(2 * MIB)
    with pytest.raises(Overloaded, match="this client"):
        first.grow(2 * MIB + 1)
    second.grow(2 * MIB)
    with pytest.raises(Overloaded, match="there are"):
        Preparation("c", requests, large_bytes).grow(LARGE_BYTES + 1)
    first.end()
    first.end()
    second.end()
    assert large_bytes.in_use == 0 and requests.in_use == 1


def test_the_largest_body_follows_from_the_model() -> None:
    assert largest_body(8192, 100, 16 * MIB) == 8192 * 100 * 6 + 65536
    assert largest_body(131072, 100, 16 * MIB) == 16 * MIB
    assert largest_body(64, 4, 16 * MIB) == MIB
    assert largest_body(131072, 81, 16 * MIB, is_json=False) == 131072 * 81 + 65536
    assert largest_body(10**6, 1, 16 * MIB, is_json=False) == 5 * 10**6 + 65536


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("testclient", "testclient"),
    ],
)
def test_clients_by_address(address: str, client: str) -> None:
    assert client_of(address) == client
