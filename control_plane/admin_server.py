"""The admin API over HTTP, on an address of its own: watch a cluster, and change it.

    GET  /status        members, in which role and state, and what the cluster should be
    POST /scale         {"prefill": 2, "decode": 3}: other sizes; pools that are not named stay as they are
    POST /drain         {"worker": "decode-0"}: it moves or finishes what it has and goes; another one comes
    POST /role          {"worker": "decode-0", "role": "prefill"}
    POST /stop          {} or {"drain_s": 5}: ends the cluster

Bodies are JSON objects with `content-type: application/json`: a web page cannot send that to another address unasked.
Errors have the form of the OpenAI-compatible server.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Mapping
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from control_plane.gateway.http_front.openai_errors import UnsupportedMedia, error_response
from control_plane.gateway.http_front.protocol import make_http_server
from control_plane.gateway.listening import bind_http, format_address
from phasewise.core.errors import InvalidRequest, ServingError

ORDERS = ("scale", "drain", "role", "stop")
_LARGEST_BODY = 65_536

Fields = Mapping[str, Any]


class AdminService(Protocol):
    """What the server calls. All raise ServingError."""

    async def status(self) -> Fields: ...

    async def order(self, name: str, fields: Fields) -> Fields:
        """`name`: scale, drain, role or stop."""


class AdminServer:
    """`open` gives the address where it listens."""

    def __init__(self, service: AdminService) -> None:
        self._service = service
        self._socket: socket.socket | None = None
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(self, address: str) -> str:
        """Raises ConfigError when the port is taken or the host is not ours."""
        self._socket = bind_http(address, "admin")
        self._server = make_http_server(_build_app(self._service))
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        return format_address(self._socket)

    async def close(self) -> None:
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await self._task
        if self._socket is not None:
            self._socket.close()


def _build_app(service: AdminService) -> Starlette:
    def order(name: str) -> Route:
        async def give(request: Request) -> Response:
            return await _answer(_ordered(service, name, request))

        return Route(f"/{name}", give, methods=["POST"])

    async def status(request: Request) -> Response:
        return await _answer(service.status())

    return Starlette(routes=[Route("/status", status, methods=["GET"]), *(order(name) for name in ORDERS)])


async def _ordered(service: AdminService, name: str, request: Request) -> Fields:
    return await service.order(name, await _body(request))


async def _answer(answer: Awaitable[Fields]) -> Response:
    try:
        fields = await answer
    except ServingError as error:
        return error_response(error)
    return Response(json.dumps(fields, separators=(",", ":")), media_type="application/json")


async def _body(request: Request) -> Fields:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise UnsupportedMedia("send a JSON object with the header content-type: application/json")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _LARGEST_BODY:
            raise InvalidRequest(f"the body has more than {_LARGEST_BODY} bytes")
    try:
        fields = json.loads(body or b"{}")
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be one JSON object")
    return fields
