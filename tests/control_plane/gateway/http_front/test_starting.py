"""The HTTP port is answered while the model loads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from control_plane.gateway.http_front.starting import FrontDoor

MESSAGE = "the server is starting: the model is being loaded"


async def real_app(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("real " + scope["path"])(scope, receive, send)


@pytest.fixture
def door() -> FrontDoor:
    return FrontDoor()


@pytest.fixture
async def http(door: FrontDoor) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://test") as client:
        yield client


@pytest.mark.parametrize("path", ["/health/live", "/health/live/"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_it_is_alive(http: httpx.AsyncClient, method: str, path: str) -> None:
    response = await http.request(method, path, headers={"x-request-id": "mine"})
    assert response.status_code == 200
    assert method == "HEAD" or response.json() == {"status": "ok"}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == "mine"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/health"),
        ("GET", "/health/ready"),
        ("HEAD", "/health/ready"),
        ("POST", "/health/live"),
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/metrics"),
        ("GET", "/nothing/here"),
        ("GET", "/"),
    ],
)
async def test_it_is_ready_for_nothing(http: httpx.AsyncClient, method: str, path: str) -> None:
    response = await http.request(method, path, headers={"x-request-id": "not an id\t"})
    assert response.status_code == 503
    assert method == "HEAD" or response.json() == {
        "error": {"message": MESSAGE, "type": "service_unavailable_error", "param": None, "code": "unavailable"}
    }
    assert (response.headers["retry-after"], response.headers["x-should-retry"]) == ("5", "true")
    assert len(response.headers["x-request-id"]) == 32
    assert "connection" not in response.headers


async def test_a_large_body_is_not_waited_for(http: httpx.AsyncClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"{}"

    small = await http.post("/v1/completions", content=b"{}")
    large = await http.post("/v1/completions", headers={"content-length": str(10**9)}, content=b"{}")
    of_unknown_length = await http.post("/v1/completions", content=pieces())
    assert [answer.status_code for answer in (small, large, of_unknown_length)] == [503] * 3
    assert "connection" not in small.headers
    assert large.headers["connection"] == of_unknown_length.headers["connection"] == "close"


async def test_the_open_door_leads_to_the_application(door: FrontDoor, http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/models")).status_code == 503
    door.open(real_app)
    for path in ("/v1/models", "/health/live"):
        response = await http.get(path)
        assert (response.status_code, response.text) == (200, "real " + path)


async def test_who_began_a_request_ends_it(door: FrontDoor, http: httpx.AsyncClient) -> None:
    has_begun, may_end = asyncio.Event(), asyncio.Event()

    async def slow_app(scope: Scope, receive: Receive, send: Send) -> None:
        has_begun.set()
        await may_end.wait()
        await PlainTextResponse("slow")(scope, receive, send)

    door.open(slow_app)
    request = asyncio.create_task(http.get("/v1/models"))
    await asyncio.wait_for(has_begun.wait(), 10)
    door.open(real_app)
    may_end.set()
    assert (await asyncio.wait_for(request, 10)).text == "slow"
    assert (await http.get("/v1/models")).text == "real /v1/models"
