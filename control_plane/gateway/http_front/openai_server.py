"""The OpenAI-compatible HTTP server: the same way as gRPC, in other clothes.

It reads a body, makes `GenerateInput` of it, and writes what the service's streams bring. Every answer carries
`x-request-id`, given or made. What a client may send beyond OpenAI's fields:
`x-request-id` (the request's id), `x-phasewise-timeout-s` (its deadline; `timeout` in the body goes first),
`x-phasewise-timeline: 1` (adds `timeline` to the body, or to the last event of a stream).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from control_plane.gateway.bodies import Bodies, Room, is_to_be_closed
from control_plane.gateway.http_front.openai_errors import (
    NO_RENAMES,
    BodyTooLarge,
    ParameterNames,
    error_event,
    error_response,
)
from control_plane.gateway.http_front.openai_generation import Answer, ClientLeft, until_disconnect
from control_plane.gateway.http_front.openai_responses import ChatForm, ChunkWriter, CompletionForm, Envelope, dumps
from control_plane.gateway.http_front.openai_schema import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ProbeLinksBody,
    TokenizeBody,
)
from control_plane.gateway.preparation import is_request_id
from control_plane.gateway.quota import client_of
from control_plane.gateway.service import GenerateInput, InferenceService, ModelCard
from control_plane.gateway.summed_log import SummedLog
from phasewise.core.clock import Clock, MonotonicClock
from phasewise.core.errors import InternalError, InvalidRequest, ModelNotFound, Overloaded, ServingError, Unavailable
from phasewise.core.shown import clipped, shown

logger = logging.getLogger(__name__)

_REQUEST_ID_HEADER = "x-request-id"
_Schema = TypeVar("_Schema", bound=Body)


def build_app(
    service: InferenceService,
    bodies: Bodies,
    *,
    cors_origins: Sequence[str] = (),
    clock: Clock | None = None,
    lines: SummedLog | None = None,
) -> ASGIApp:
    """The ASGI application over `service`.

    Args:
        bodies: reads the bodies of requests; the caller closes it.
        cors_origins: the origins of pages whose scripts may call this server; ("*",) means all.
        lines: takes what is said of single requests; the caller flushes it at the end.
    """
    clock = clock or MonotonicClock()
    api = _Api(service, bodies, clock, lines or SummedLog(clock))
    routes = [
        Route("/v1/chat/completions", api.answering(api.chat), methods=["POST"]),
        Route("/v1/completions", api.answering(api.completions), methods=["POST"]),
        Route("/v1/models", api.answering(api.models), methods=["GET"]),
        Route("/v1/models/{model:path}", api.answering(api.model), methods=["GET"]),
        Route("/tokenize", api.answering(api.tokenize), methods=["POST"]),
        Route("/detokenize", api.answering(api.detokenize), methods=["POST"]),
        Route("/health", api.answering(api.ready), methods=["GET", "HEAD"]),
        Route("/health/ready", api.answering(api.ready), methods=["GET", "HEAD"]),
        Route("/health/live", api.answering(api.live), methods=["GET", "HEAD"]),
        Route("/status", api.answering(api.status), methods=["GET"]),
        Route("/links", api.answering(api.links), methods=["GET"]),
        Route("/links/probe", api.answering(api.probe_links), methods=["POST"]),
        Route("/metrics", api.answering(api.metrics), methods=["GET"]),
    ]
    middleware = []
    if cors_origins:
        own_headers = [_REQUEST_ID_HEADER, "x-should-retry", "retry-after"]
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=own_headers,
        )
        middleware.append(cors)
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _unknown_route})
    app.router.redirect_slashes = False
    return _without_trailing_slash(app)


def _without_trailing_slash(app: ASGIApp) -> ASGIApp:
    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path.endswith("/"):
            scope = {**scope, "path": path.rstrip("/") or "/"}
        await app(scope, receive, send)

    return routed


class _Call:
    """One HTTP request on its way: its id, its headers, and how the core's field names are called in it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        given = request.headers.get(_REQUEST_ID_HEADER)
        self.request_id = given if given is not None and is_request_id(given) else uuid.uuid4().hex
        self.asked_id = given or self.request_id  # refused by the service where it is wrong, and never sent back
        self.names: ParameterNames = NO_RENAMES
        self.room: Room | None = None

    def leave_room(self) -> None:
        """Nothing of the request is in preparation any more."""
        if self.room is not None:
            self.room.leave()

    @property
    def client(self) -> str | None:
        """Whose share the request counts to."""
        client = self.request.client
        return client_of(client.host) if client is not None else None

    @property
    def headers(self) -> dict[str, str]:
        return {_REQUEST_ID_HEADER: self.request_id}

    @property
    def wants_timeline(self) -> bool:
        return self.request.headers.get("x-phasewise-timeline", "") in ("1", "true")

    @property
    def timeout_s(self) -> float | None:
        text = self.request.headers.get("x-phasewise-timeout-s")
        if text is None:
            return None
        try:
            timeout_s = float(text)
        except ValueError:
            timeout_s = math.nan
        if not (math.isfinite(timeout_s) and timeout_s > 0):
            raise InvalidRequest(
                f"header x-phasewise-timeout-s must be a number of seconds above 0, not {shown(text)}",
                field="x-phasewise-timeout-s",
            )
        return timeout_s

    def json(self, body: object, status: int = 200) -> Response:
        return Response(dumps(body), status, headers=self.headers, media_type="application/json")

    def error(self, error: ServingError) -> Response:
        is_unread = isinstance(error, BodyTooLarge | Overloaded) and is_to_be_closed(self.request)
        headers = {**self.headers, "connection": "close"} if is_unread else self.headers
        return error_response(error, self.names, headers)


class _Api:
    """The endpoints."""

    def __init__(self, service: InferenceService, bodies: Bodies, clock: Clock, lines: SummedLog) -> None:
        self._service = service
        self._bodies = bodies
        self._clock = clock
        self._lines = lines

    def answering(self, endpoint: Callable[[_Call], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """`endpoint`, with every error turned into an answer."""

        async def answer(request: Request) -> Response:
            call = _Call(request)
            try:
                return await endpoint(call)
            except ServingError as error:
                return call.error(error)
            except (ClientLeft, ClientDisconnect):
                self._client_left(call)
                return Response(status_code=499)
            except Exception:
                logger.exception("request failed", extra={"request_id": call.request_id})
                return call.error(_internal(call))
            finally:
                call.leave_room()

        return answer

    def _client_left(self, call: _Call) -> None:
        self._lines.log(logger, logging.INFO, "client left", "client left", call.request_id)

    async def chat(self, call: _Call) -> Response:
        body = await self._read(call, ChatBody)
        call.names = body.names
        inputs = body.inputs(call.asked_id, call.timeout_s, call.client)
        return await self._generate(call, body, inputs, ChatForm(bool(body.logprobs)), None)

    async def completions(self, call: _Call) -> Response:
        body = await self._read(call, CompletionBody)
        call.names = body.names
        inputs = body.inputs(call.asked_id, call.timeout_s, call.client)
        echo = self._prompt_text if body.echo else None
        return await self._generate(call, body, inputs, CompletionForm(body.logprobs is not None), echo)

    async def models(self, call: _Call) -> Response:
        return call.json({"object": "list", "data": [_model_fields(self._service.model)]})

    async def model(self, call: _Call) -> Response:
        name, card = call.request.path_params["model"], self._service.model
        if name != card.name:
            raise ModelNotFound(f"model {shown(name)} is not served here; use {card.name!r}", field="model")
        return call.json(_model_fields(card))

    async def tokenize(self, call: _Call) -> Response:
        call.names = ParameterNames({"text": "prompt"})
        body = await self._read(call, TokenizeBody)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("give exactly one of prompt and messages", field="text")
        messages = None if body.messages is None else tuple(body.messages)
        work = self._service.tokenize(body.prompt, messages, body.model)
        tokens = await until_disconnect(call.request.receive, work)
        limit = self._service.model.context_length
        return call.json({"tokens": tokens, "count": len(tokens), "max_model_len": limit})

    async def detokenize(self, call: _Call) -> Response:
        call.names = ParameterNames({"token_ids": "tokens"})
        body = await self._read(call, DetokenizeBody)
        work = asyncio.to_thread(self._service.detokenize, body.tokens, body.model)
        text = await until_disconnect(call.request.receive, work)
        return call.json({"prompt": text})

    async def ready(self, call: _Call) -> Response:
        if reason := self._service.unready_reason:
            raise Unavailable(reason, retry_after_s=1.0)
        return call.json({"status": "ok"})

    async def live(self, call: _Call) -> Response:
        return call.json({"status": "ok"})

    async def status(self, call: _Call) -> Response:
        return call.json(await self._service.status())

    async def links(self, call: _Call) -> Response:
        return call.json(await self._service.links())

    async def probe_links(self, call: _Call) -> Response:
        body = await self._read(call, ProbeLinksBody, empty=b"{}")
        probing = self._service.probe_links(body.sizes, body.timeout_s)
        return call.json(await until_disconnect(call.request.receive, probing))

    async def metrics(self, call: _Call) -> Response:
        body, content_type = await self._service.metrics_text()
        return Response(body, headers={**call.headers, "content-type": content_type})

    async def _generate(
        self,
        call: _Call,
        body: ChatBody | CompletionBody,
        inputs: list[GenerateInput],
        form: ChatForm | CompletionForm,
        echo_text: Callable[[GenerateInput], str] | None,
    ) -> Response:
        receive, card = call.request.receive, self._service.model
        answer = Answer(inputs, form, echo_text)
        kind, with_token_ids = form.chunk_kind if body.stream else form.kind, bool(body.return_token_ids)
        envelope = Envelope(
            form.prefix + call.request_id, kind, int(self._clock.unix_s()), card.name, _fingerprint(card)
        )
        try:
            await until_disconnect(receive, answer.open(self._service))
            call.leave_room()
            if body.stream:
                writer = ChunkWriter(envelope, form, body.wants_usage, with_token_ids)
                return await _stream(call, answer, writer, body.wants_usage, lambda: self._client_left(call))
            whole = answer.whole(envelope, with_timeline=call.wants_timeline, with_token_ids=with_token_ids)
            content = await until_disconnect(receive, whole)
            return Response(content, headers=call.headers, media_type="application/json")
        except BaseException:
            await answer.aclose()  # a client may leave before the work has even begun, and then it cleans nothing up
            raise

    def _prompt_text(self, given: GenerateInput) -> str:
        return given.text if given.text is not None else self._service.detokenize(given.token_ids or (), given.model)

    async def _read(self, call: _Call, schema: type[_Schema], empty: bytes = b"") -> _Schema:
        """The body as `schema`; `empty` stands for one without content."""
        call.room = self._bodies.enter(call.client)
        return await self._bodies.read(call.request, call.room, schema, empty)


class EventStream(Response):
    """Sends events as they come, and calls `close` at the end, or as soon as the client leaves; `on_left` tells."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], Awaitable[None]],
        on_left: Callable[[], None],
        headers: dict[str, str],
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._events = events
        self._close = close
        self._on_left = on_left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        except ClientLeft:
            self._on_left()
        finally:
            await self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _stream(
    call: _Call, answer: Answer, writer: ChunkWriter, with_usage: bool, on_left: Callable[[], None]
) -> Response:
    """Waits for the first event, so that what fails before it gets its HTTP status."""
    events = answer.events(writer, with_usage=with_usage, with_timeline=call.wants_timeline)
    first = await until_disconnect(call.request.receive, anext(events))

    async def close() -> None:
        await events.aclose()
        await answer.aclose()

    return EventStream(_with_error_event(call, first, events), close, on_left, call.headers)


async def _with_error_event(call: _Call, first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """All events; an error becomes the last one, and no [DONE] follows."""
    try:
        yield first
        async for event in events:
            yield event
    except ServingError as error:  # logged where it arose
        yield error_event(error, call.names)
    except Exception:
        logger.exception("stream failed", extra={"request_id": call.request_id})
        yield error_event(_internal(call), call.names)


def _internal(call: _Call) -> InternalError:
    return InternalError(f"internal error; the server's log has it under request {call.request_id}")


def _model_fields(card: ModelCard) -> dict[str, object]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created_unix_s,
        "owned_by": "phasewise",
        "max_model_len": card.context_length,
        "vocab_size": card.vocab_size,
        "dtype": card.dtype,
    }


def _fingerprint(card: ModelCard) -> str:
    """Changes when the model behind a name changes in a way that this server can see."""
    facts = json.dumps([card.name, card.dtype, card.context_length, card.vocab_size, card.created_unix_s])
    return "fp_" + hashlib.sha256(facts.encode()).hexdigest()[:12]


async def _unknown_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = "method not allowed" if status == 405 else "no such path"
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    # Not `request.url`, which a client's Host header can make unreadable.
    asked = f"{clipped(request.method)} {clipped(request.scope['path'])}"
    message = f"{detail}: {asked}; see GET /v1/models and POST /v1/chat/completions"
    code = "method_not_allowed" if status == 405 else "not_found"
    fields = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return Response(dumps({"error": fields}), status, headers=headers, media_type="application/json")
