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
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from control_plane.gateway.openai_errors import (
    NO_RENAMES,
    BodyTooLarge,
    ParameterNames,
    error_event,
    error_response,
    from_validation,
)
from control_plane.gateway.openai_generation import Answer, ClientLeft, open_answer, until_disconnect
from control_plane.gateway.openai_responses import ChatForm, ChunkWriter, CompletionForm, Envelope, dumps
from control_plane.gateway.openai_schema import ChatBody, CompletionBody, DetokenizeBody, ProbeLinksBody, TokenizeBody
from control_plane.gateway.service import GenerateInput, InferenceService, ModelCard
from phasewise.core.clock import Clock, MonotonicClock
from phasewise.core.errors import InternalError, InvalidRequest, ModelNotFound, ServingError, Unavailable

logger = logging.getLogger(__name__)

_REQUEST_ID_HEADER = "x-request-id"
_Schema = TypeVar("_Schema", bound=BaseModel)


def build_app(service: InferenceService, *, max_body_bytes: int, clock: Clock | None = None) -> Starlette:
    """The ASGI application over `service`. Bodies longer than `max_body_bytes` are refused with 413."""
    api = _Api(service, max_body_bytes, clock or MonotonicClock())
    routes = [
        Route("/v1/chat/completions", api.answering(api.chat), methods=["POST"]),
        Route("/v1/completions", api.answering(api.completions), methods=["POST"]),
        Route("/v1/models", api.answering(api.models), methods=["GET"]),
        Route("/v1/models/{model:path}", api.answering(api.model), methods=["GET"]),
        Route("/tokenize", api.answering(api.tokenize), methods=["POST"]),
        Route("/detokenize", api.answering(api.detokenize), methods=["POST"]),
        Route("/health", api.answering(api.health), methods=["GET"]),
        Route("/status", api.answering(api.status), methods=["GET"]),
        Route("/links", api.answering(api.links), methods=["GET"]),
        Route("/links/probe", api.answering(api.probe_links), methods=["POST"]),
        Route("/metrics", api.answering(api.metrics), methods=["GET"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _unknown_route})


class _Call:
    """One HTTP request on its way: its id, its headers, and how the core's field names are called in it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.request_id = request.headers.get(_REQUEST_ID_HEADER) or uuid.uuid4().hex
        self.names: ParameterNames = NO_RENAMES

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
                f"header x-phasewise-timeout-s must be a number of seconds above 0, not {text!r}",
                field="x-phasewise-timeout-s",
            )
        return timeout_s

    def json(self, body: object, status: int = 200) -> Response:
        return Response(dumps(body), status, headers=self.headers, media_type="application/json")

    def error(self, error: ServingError) -> Response:
        return error_response(error, self.names, self.headers)


class _Api:
    """The endpoints."""

    def __init__(self, service: InferenceService, max_body_bytes: int, clock: Clock) -> None:
        self._service = service
        self._max_body_bytes = max_body_bytes
        self._clock = clock

    def answering(self, endpoint: Callable[[_Call], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """`endpoint`, with every error turned into an answer."""

        async def answer(request: Request) -> Response:
            call = _Call(request)
            try:
                return await endpoint(call)
            except ServingError as error:
                return call.error(error)
            except (ClientLeft, ClientDisconnect):
                logger.info("client left", extra={"request_id": call.request_id})
                return Response(status_code=499)
            except Exception:
                logger.exception("request failed", extra={"request_id": call.request_id})
                return call.error(_internal(call))

        return answer

    async def chat(self, call: _Call) -> Response:
        body = await self._read(call, ChatBody)
        call.names = body.names
        inputs = body.inputs(call.request_id, call.timeout_s)
        return await self._generate(call, body, inputs, ChatForm(bool(body.logprobs)), None)

    async def completions(self, call: _Call) -> Response:
        body = await self._read(call, CompletionBody)
        call.names = body.names
        inputs = body.inputs(call.request_id, call.timeout_s)
        echo = self._prompt_text if body.echo else None
        return await self._generate(call, body, inputs, CompletionForm(body.logprobs is not None), echo)

    async def models(self, call: _Call) -> Response:
        return call.json({"object": "list", "data": [_model_fields(self._service.model)]})

    async def model(self, call: _Call) -> Response:
        name, card = call.request.path_params["model"], self._service.model
        if name != card.name:
            raise ModelNotFound(f"model {name!r} is not served here; use {card.name!r}", field="model")
        return call.json(_model_fields(card))

    async def tokenize(self, call: _Call) -> Response:
        call.names = ParameterNames({"text": "prompt"})
        body = await self._read(call, TokenizeBody)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("give exactly one of prompt and messages", field="text")
        messages = None if body.messages is None else tuple(body.messages)
        tokens = await self._service.tokenize(body.prompt, messages, body.model)
        limit = self._service.model.context_length
        return call.json({"tokens": tokens, "count": len(tokens), "max_model_len": limit})

    async def detokenize(self, call: _Call) -> Response:
        call.names = ParameterNames({"token_ids": "tokens"})
        body = await self._read(call, DetokenizeBody)
        text = await asyncio.to_thread(self._service.detokenize, tuple(body.tokens), body.model)
        return call.json({"prompt": text})

    async def health(self, call: _Call) -> Response:
        if not self._service.is_ready:
            raise Unavailable("the server is starting or draining; try again soon", retry_after_s=1.0)
        return call.json({"status": "ok"})

    async def status(self, call: _Call) -> Response:
        return call.json(await self._service.status())

    async def links(self, call: _Call) -> Response:
        return call.json(await self._service.links())

    async def probe_links(self, call: _Call) -> Response:
        body = await self._read(call, ProbeLinksBody, empty=b"{}")
        return call.json(await self._service.probe_links(body.sizes, body.timeout_s))

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
        answer = await until_disconnect(receive, open_answer(self._service, inputs, form, echo_text))
        kind, with_token_ids = form.chunk_kind if body.stream else form.kind, bool(body.return_token_ids)
        envelope = Envelope(
            form.prefix + call.request_id, kind, int(self._clock.unix_s()), card.name, _fingerprint(card)
        )
        try:
            if body.stream:
                writer = ChunkWriter(envelope, form, body.wants_usage, with_token_ids)
                return await _stream(call, answer, writer, body.wants_usage)
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
        raw = await self._read_body(call.request) or empty
        try:
            return schema.model_validate_json(raw)
        except ValidationError as error:
            raise from_validation(error, schema) from None

    async def _read_body(self, request: Request) -> bytes:
        """The whole body; never holds more than `max_body_bytes`."""
        limit = self._max_body_bytes
        announced = request.headers.get("content-length", "0")
        parts: list[bytes] = []
        num_bytes = int(announced) if announced.isdigit() and int(announced) > limit else 0
        if not num_bytes:
            async for part in request.stream():
                num_bytes += len(part)
                if num_bytes > limit:
                    break
                parts.append(part)
        if num_bytes > limit:
            raise BodyTooLarge(f"the body is longer than the {limit} bytes that this server accepts; send less")
        return b"".join(parts)


class EventStream(Response):
    """Sends events as they come, and calls `close` at the end, or as soon as the client leaves."""

    def __init__(
        self, events: AsyncIterator[bytes], close: Callable[[], Awaitable[None]], headers: dict[str, str]
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        except ClientLeft:
            logger.info("client left", extra={"request_id": self.headers[_REQUEST_ID_HEADER]})
        finally:
            await self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _stream(call: _Call, answer: Answer, writer: ChunkWriter, with_usage: bool) -> Response:
    """Waits for the first event, so that what fails before it gets its HTTP status."""
    events = answer.events(writer, with_usage=with_usage, with_timeline=call.wants_timeline)
    first = await until_disconnect(call.request.receive, anext(events))

    async def close() -> None:
        await events.aclose()
        await answer.aclose()

    return EventStream(_with_error_event(call, first, events), close, call.headers)


async def _with_error_event(call: _Call, first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """All events; an error becomes the last one, and no [DONE] follows."""
    try:
        yield first
        async for event in events:
            yield event
    except ServingError as error:
        logger.info("stream failed: %s", error.message, extra={"request_id": call.request_id})
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
    message = f"{detail}: {request.method} {request.url.path}; see GET /v1/models and POST /v1/chat/completions"
    code = "method_not_allowed" if status == 405 else "not_found"
    fields = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return Response(dumps({"error": fields}), status, headers=headers, media_type="application/json")
