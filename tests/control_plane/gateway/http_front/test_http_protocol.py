"""Connections as hostile, old and odd clients make them, over real sockets and the real server."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.responses import Response

from control_plane.gateway.http_front.protocol import GatewayProtocol, HttpLimits
from tests.control_plane.gateway.conftest import HashService
from tests.support.http_server import api_server, http_server
from tests.support.served import until

HASTY = HttpLimits(header_timeout_s=0.3, body_grace_s=0.3, write_stall_s=0.3)
LONG = {"prompt": "hello", "max_tokens": 5000, "ignore_eos": True}


@contextlib.contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        yield connection


@pytest.fixture
def address(service: HashService) -> Iterator[str]:
    with api_server(service) as address:
        yield address


@pytest.fixture
def hasty(service: HashService) -> Iterator[str]:
    with api_server(service, HASTY) as address:
        yield address


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def post(body: dict[str, Any], version: str = "1.1", path: str = "/v1/completions", headers: str = "") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Length: {len(content)}\r\n{headers}\r\n"
    return head.encode() + content


def answer_of(raw: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    "start",
    [
        b"GET /health HTTP/1.1\r\nA: ",
        b"GET /",
        b"",
        b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{}\n\r\n0\r\nA: ",
        b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;x=",
    ],
    ids=["header", "path", "empty-lines", "trailer", "chunk-extension"],
)
def test_what_has_no_end_is_cut_off(address: str, start: bytes) -> None:
    filler = b"a" * 1000 if start else b"\r\n" * 500
    with connected(address) as connection:
        connection.sendall(start)
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                connection.sendall(filler)
        raw = read_all(connection)
    if raw and start.startswith(b"GET"):  # the reset may overtake the answer
        status, body = answer_of(raw)
        assert status == 431 and body["error"]["code"] == "header_too_large"


def test_many_headers_are_served_up_to_the_bound(address: str) -> None:
    for num_bytes, expected in ((60_000, 200), (70_000, 431)):
        with connected(address) as connection:
            headers = b"".join(b"X-%04d: %s\r\n" % (i, b"a" * 91) for i in range(num_bytes // 101))
            connection.sendall(b"GET /health HTTP/1.1\r\nConnection: close\r\n" + headers + b"\r\n")
            assert int(read_all(connection).split()[1]) == expected


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (b"\r\n", None),
        (b"GET /health HTTP/1.1\r\nA: ", 408),
        (b"POST /tokenize HTTP/1.1\r\nContent-Length: 100\r\n\r\n{", 408),
        (b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{}", 408),
    ],
    ids=["nothing", "an empty line", "half a header", "half a body", "half a chunk"],
)
def test_who_sends_nothing_more_is_closed(hasty: str, sent: bytes, status: int | None) -> None:
    with connected(hasty) as connection:
        connection.sendall(sent)
        raw = read_all(connection)
    assert (answer_of(raw)[0] if raw else None) == status


def test_who_sends_its_body_by_drops_is_closed(hasty: str, service: HashService) -> None:
    has_ended = threading.Event()

    def drip(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not has_ended.wait(0.02):
                connection.sendall(b" ")

    with connected(hasty) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")
        thread = threading.Thread(target=drip, args=(connection,))
        thread.start()
        raw = read_all(connection)
        has_ended.set()
        thread.join()
    assert not raw or answer_of(raw)[0] == 408


def test_a_connection_is_used_again_after_its_time_outs(hasty: str) -> None:
    with connected(hasty) as connection:
        for _ in range(3):
            connection.sendall(post({"prompt": "hello"}, path="/tokenize"))
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        service_is_slow = post({"prompt": "hello", "max_tokens": 700, "ignore_eos": True})
        connection.sendall(service_is_slow)  # longer than all time-outs: they are about the client
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_half_closed_gets_its_answer(address: str, stream: bool) -> None:
    host, port = address.split(":")
    client = http.client.HTTPConnection(host, int(port), timeout=30)
    body = {"prompt": "hello", "max_tokens": 100, "ignore_eos": True, "stream": stream}
    client.request("POST", "/v1/completions", json.dumps(body))
    client.sock.shutdown(socket.SHUT_WR)
    answer = client.getresponse()
    content = answer.read()
    assert answer.status == 200
    if stream:
        assert content.endswith(b"data: [DONE]\n\n") and content.count(b"data: ") > 50
    else:
        assert json.loads(content)["usage"]["completion_tokens"] == 100
    client.close()


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_left_is_not_taken_for_one(
    address: str, service: HashService, version: str, stream: bool
) -> None:
    service.step_s = 0.05
    with connected(address) as connection:
        connection.sendall(post({**LONG, "stream": stream}, version))
        until(lambda: bool(service.open), 10.0)
    until(lambda: not service.open, 10.0)  # its tokens take minutes


def test_a_client_that_half_closes_and_leaves_while_nothing_is_written(address: str, service: HashService) -> None:
    service.step_s = 20.0
    with connected(address) as connection:
        connection.sendall(post({**LONG, "stream": True}))
        until(lambda: bool(service.open), 10.0)
    until(lambda: not service.open, 10.0)


def test_one_that_sent_two_requests_at_once_and_left(address: str, service: HashService) -> None:
    service.step_s = 0.05
    with connected(address) as connection:
        connection.sendall(post(LONG) + post(LONG))
        until(lambda: bool(service.open), 10.0)
    until(lambda: not service.open, 10.0)


@pytest.mark.parametrize("keep_alive", ["", "Connection: keep-alive\r\n"])
def test_http_1_0_gets_no_chunks(address: str, keep_alive: str) -> None:
    body = {"prompt": "hello", "max_tokens": 5, "ignore_eos": True, "stream": True}
    with connected(address) as connection:
        connection.sendall(post(body, "1.0", headers=keep_alive))
        head, _, content = read_all(connection).partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower() and b"connection: close" in head.lower()
    events = [line for line in content.split(b"\n\n") if line]
    assert all(event.startswith(b"data: ") for event in events) and events[-1] == b"data: [DONE]"


def test_who_does_not_read_is_closed() -> None:
    has_left = threading.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        leaving = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not leaving.done():  # `send` waits while the client does not read
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)
        has_left.set()

    with http_server(endless, HASTY) as address, connected(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert has_left.wait(30)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the size of the body, or with 20 MB."""
    if scope["path"] == "/large":
        await Response(b"x" * 20_000_000)(scope, receive, send)
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await Response(b"%s %d bytes" % (scope["path"].encode(), len(body)))(scope, receive, send)


def test_who_reads_slowly_but_always_gets_all() -> None:
    with http_server(echo, HASTY) as address, connected(address) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nConnection: close\r\n\r\n")
        num_bytes, pause = 0, threading.Event()
        while data := connection.recv(200_000):
            num_bytes += len(data)
            pause.wait(0.01)  # 1 s in all and more: longer than a client may take nothing
    assert num_bytes > 20_000_000


def test_one_read_queues_no_more_requests_than_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[int] = []
    received = GatewayProtocol.data_received

    def look(self: GatewayProtocol, data: bytes) -> None:
        received(self, data)
        queued.append(len(self.pipeline))

    monkeypatch.setattr(GatewayProtocol, "data_received", look)
    num_requests = 3000
    with http_server(echo) as address, connected(address) as connection:
        sender = threading.Thread(target=connection.sendall, args=(b"GET /a HTTP/1.1\r\n\r\n" * num_requests,))
        sender.start()
        raw = b""
        while raw.count(b"/a 0 bytes") < num_requests:
            raw += connection.recv(65536)
        sender.join()
    assert max(queued) <= 100


@pytest.mark.parametrize("size", [0, 10, 5000, 200_000])
def test_an_offer_of_another_protocol_is_not_taken_up(size: int) -> None:
    head = b"POST /a HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n"
    request = head + b"Content-Length: %d\r\n\r\n" % size
    with http_server(echo) as address, connected(address) as connection:
        for _ in range(2):  # the connection goes on
            connection.sendall(request + b"x" * size)
            assert connection.recv(4096).endswith(b"/a %d bytes" % size)
        connection.sendall(request.replace(b"Content-Length: %d" % size, b"Transfer-Encoding: chunked"))
        connection.sendall(b"3\r\nabc\r\n0\r\n\r\nGET /b HTTP/1.1\r\nConnection: close\r\n\r\n")
        raw = read_all(connection)
    assert b"/a 3 bytes" in raw and raw.endswith(b"/b 0 bytes")


def test_a_tunnel_is_refused() -> None:
    with http_server(echo) as address, connected(address) as connection:
        connection.sendall(b"CONNECT example.org:443 HTTP/1.1\r\n\r\n")
        assert answer_of(read_all(connection))[0] == 400


def test_one_client_cannot_have_all_connections() -> None:
    with http_server(echo, max_connections=8) as address, contextlib.ExitStack() as held:
        connections = [held.enter_context(connected(address)) for _ in range(6)]
        with connected(address) as connection:
            status, body = answer_of(read_all(connection))
            assert status == 429 and "this client" in body["error"]["message"]
        connections[0].close()

        def is_answered() -> bool:
            with connected(address) as connection:
                connection.sendall(b"GET /a HTTP/1.1\r\nConnection: close\r\n\r\n")
                return read_all(connection).startswith(b"HTTP/1.1 200")

        until(is_answered, 10.0)


def test_a_body_that_was_not_asked_for_ends_the_connection(address: str) -> None:
    with connected(address) as connection:
        head = b"POST /tokenize HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9999999\r\n\r\n"
        connection.sendall(head)
        raw = read_all(connection)
    assert raw.startswith(b"HTTP/1.1 413") and b"connection: close" in raw


def test_a_refused_body_that_stops_coming_gets_no_second_answer(hasty: str) -> None:
    with connected(hasty) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n{")
        raw = read_all(connection)
    assert raw.count(b"HTTP/1.1") == 1 and raw.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/links/probe"])
def test_a_client_that_leaves_is_noticed_by_all_that_takes_time(
    service: HashService, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    has_begun, was_cancelled = threading.Event(), threading.Event()

    async def work(*_: Any) -> Any:
        has_begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            was_cancelled.set()

    monkeypatch.setattr(service, "tokenize", work)
    monkeypatch.setattr(service, "probe_links", work)
    monkeypatch.setattr(asyncio, "to_thread", work)
    with api_server(service) as address:
        with connected(address) as connection:
            connection.sendall(
                post({"/tokenize": {"prompt": "a"}, "/detokenize": {"tokens": [1]}}.get(path, {}), path=path)
            )
            assert has_begun.wait(10)
        assert was_cancelled.wait(10)


def test_what_is_no_http_gets_400(address: str) -> None:
    with connected(address) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
        status, body = answer_of(read_all(connection))
    assert status == 400 and body["error"]["code"] == "invalid_http"
