"""A small OpenAI-compatible server with known delays, run by a real uvicorn: what the load generator is tested on."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODEL = "tiny"
WAIT_S = 30.0


@dataclass
class SseServer:
    """How it answers, and what it was asked.

    With `hold_until` no token is sent before so many real requests have come. `faults` maps a prompt's length to what
    goes wrong with it. `refused_fields` get a 400, as at a strict server.
    """

    first_delay_s: float = 0.0
    hold_until: int = 0
    gap_s: float = 0.0
    tokens_per_event: int = 1
    card: dict[str, Any] = field(default_factory=lambda: {"vocab_size": 100})
    refused_fields: frozenset[str] = frozenset()
    sends_token_ids: bool = True
    ignores_length: bool = False
    faults: dict[int, str] = field(default_factory=dict)
    status: dict[str, Any] | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_open: int = 0
    max_open: int = 0
    address: str = ""
    _released: asyncio.Event = field(default_factory=asyncio.Event)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/status", self._status),
            ]
        )

    @property
    def measured(self) -> list[dict[str, Any]]:
        """Bodies of real requests, without probes of one token of prompt."""
        return [body for body in self.bodies if len(body["prompt"]) > 1]

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": MODEL, **self.card}]})

    async def _status(self, request: Request) -> Response:
        return JSONResponse(self.status) if self.status is not None else Response(status_code=404)

    async def _tokenize(self, request: Request) -> Response:
        return JSONResponse({"tokens": [7, 11, 7, 13]})

    async def _completions(self, request: Request) -> Response:
        body = await request.json()
        refused = self.refused_fields & ({*body} | {*body["stream_options"]})
        if refused:
            return JSONResponse({"error": {"message": f"unknown {refused}", "code": "invalid"}}, status_code=400)
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        fault = self.faults.get(len(body["prompt"]), "")
        if fault == "429":
            error = {"message": "queue is full", "type": "overloaded", "code": "overloaded"}
            return JSONResponse({"error": error}, status_code=429)
        return StreamingResponse(self._events(body, fault), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any], fault: str) -> AsyncIterator[str]:
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        try:
            total = 1 if self.ignores_length else body["max_tokens"]
            sent = 0
            if len(self.measured) >= self.hold_until:
                self._released.set()
            await self._released.wait()
            await asyncio.sleep(self.first_delay_s)
            while sent < total:
                if sent and self.gap_s:
                    await asyncio.sleep(self.gap_s)
                if sent and fault == "silent":
                    await asyncio.Event().wait()  # until the client leaves
                if sent and fault == "cut":
                    return
                if sent and fault == "error":
                    yield _line({"error": {"message": "worker died", "code": "worker_lost"}})
                    return
                count = min(self.tokens_per_event, total - sent)
                sent += count
                yield self._chunk(body, sent, count, is_last=sent == total)
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": total}
            yield _line({"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 2}}})
            yield "data: [DONE]\n\n"
        finally:
            self.num_open -= 1

    def _chunk(self, body: dict[str, Any], sent: int, count: int, *, is_last: bool) -> str:
        choice: dict[str, Any] = {"index": 0, "text": "x" * count, "finish_reason": "length" if is_last else None}
        if self.sends_token_ids and body.get("return_token_ids"):
            choice["token_ids"] = [5] * count
        chunk: dict[str, Any] = {"choices": [choice], "usage": None}
        if body["stream_options"].get("continuous_usage_stats"):
            chunk["usage"] = {"prompt_tokens": len(body["prompt"]), "completion_tokens": sent}
        return _line(chunk)


def _line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


@contextmanager
def serve_app(app: Starlette) -> Iterator[str]:
    """Serves an app on a free port in a thread; yields HOST:PORT."""
    # With the protocol named: asyncio sets TCP_NODELAY on connections only then, and without it events come in clumps.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    started = threading.Event()

    class Announcing(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started.set()

    server = Announcing(uvicorn.Config(app, log_level="error", lifespan="off", http="h11", loop="asyncio"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert started.wait(WAIT_S)
        yield "{}:{}".format(*listener.getsockname())
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        listener.close()


@contextmanager
def running(server: SseServer) -> Iterator[SseServer]:
    with serve_app(server.app()) as address:
        server.address = address
        yield server
