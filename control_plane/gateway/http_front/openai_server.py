"""The OpenAI-compatible HTTP server: the same service as over gRPC.

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
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from control_plane.gateway.bodies import Bodies
from control_plane.gateway.http_front.call import REQUEST_ID_HEADER, Call
from control_plane.gateway.http_front.disconnects import ClientLeft, until_disconnect
from control_plane.gateway.http_front.event_stream import EventStream
from control_plane.gateway.http_front.openai_errors import ParameterNames
from control_plane.gateway.http_front.openai_generation import Answer
from control_plane.gateway.http_front.openai_responses import ChatForm, CompletionForm, Envelope, EventWriter, dumps
from control_plane.gateway.http_front.openai_schema import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ProbeLinksBody,
    TokenizeBody,
)
from control_plane.gateway.service import GenerateInput, InferenceService, ModelCard
from control_plane.gateway.summed_log import SummedLog
from phasewise.core.clock import Clock, MonotonicClock
from phasewise.core.errors import InvalidRequest, ModelNotFound, ServingError, Unavailable
from phasewise.core.shown import clipped, shown

logger = logging.getLogger(__name__)

_MODEL_PATH = "/v1/models/"
_Schema = TypeVar("_Schema", bound=Body)
_Endpoint = Callable[[Call], Awaitable[Response]]


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
    if not cors_origins:
        return api
    return CORSMiddleware(
        api,
        allow_origins=list(cors_origins),
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=[REQUEST_ID_HEADER, "x-should-retry", "retry-after"],
    )


class _Api:
    """The ASGI application: all endpoints, by path and method.

    It is no Starlette application, which would wrap `send` three times: an event stream calls it for every token.
    """

    def __init__(self, service: InferenceService, bodies: Bodies, clock: Clock, lines: SummedLog) -> None:
        self._service = service
        self._bodies = bodies
        self._clock = clock
        self._lines = lines
        self._endpoints = {
            "/v1/chat/completions": _post(self._chat),
            "/v1/completions": _post(self._completions),
            "/v1/models": _get(self._models),
            "/tokenize": _post(self._tokenize),
            "/detokenize": _post(self._detokenize),
            "/health": _get(self._ready),
            "/health/ready": _get(self._ready),
            "/health/live": _get(self._live),
            "/status": _get(self._status),
            "/links": _get(self._links),
            "/links/probe": _post(self._probe_links),
            "/metrics": _get(self._metrics),
        }
        self._any_model = _get(self._model)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        path, request = scope["path"].rstrip("/"), Request(scope, receive)
        endpoints = self._any_model if path.startswith(_MODEL_PATH) else self._endpoints.get(path)
        if endpoints is None:
            await _refusal(request, 404, "not_found", "no such path")(scope, receive, send)
        elif request.method not in endpoints:
            response = _refusal(request, 405, "method_not_allowed", "method not allowed")
            response.headers["allow"] = ", ".join(endpoints)
            await response(scope, receive, send)
        else:
            call = Call(request)
            response = await self._answer(endpoints[request.method], call)
            try:
                await response(scope, receive, send)
            except ClientLeft:
                self._client_left(call)

    async def _answer(self, endpoint: _Endpoint, call: Call) -> Response:
        """What `endpoint` answers, with every error turned into an answer."""
        try:
            return await endpoint(call)
        except ServingError as error:
            return call.error(error)
        except (ClientLeft, ClientDisconnect):
            self._client_left(call)
            return Response(status_code=499)
        except Exception:
            logger.exception("request failed", extra={"request_id": call.request_id})
            return call.error(call.internal_error())
        finally:
            call.end_preparation()

    def _client_left(self, call: Call) -> None:
        self._lines.log(logger, logging.INFO, "client left", "client left", call.request_id)

    async def _chat(self, call: Call) -> Response:
        body = await self._read(call, ChatBody)
        call.names = body.names
        inputs = body.inputs(call.asked_id, call.timeout_s, call.client)
        return await self._generate(call, body, inputs, ChatForm(bool(body.logprobs)), None)

    async def _completions(self, call: Call) -> Response:
        body = await self._read(call, CompletionBody)
        call.names = body.names
        inputs = body.inputs(call.asked_id, call.timeout_s, call.client)
        echo = self._prompt_text if body.echo else None
        return await self._generate(call, body, inputs, CompletionForm(body.logprobs is not None), echo)

    async def _models(self, call: Call) -> Response:
        return call.json({"object": "list", "data": [_model_fields(self._service.model)]})

    async def _model(self, call: Call) -> Response:
        name, card = call.request.scope["path"].rstrip("/").removeprefix(_MODEL_PATH), self._service.model
        if name != card.name:
            raise ModelNotFound(f"model {shown(name)} is not served here; use {card.name!r}", field="model")
        return call.json(_model_fields(card))

    async def _tokenize(self, call: Call) -> Response:
        call.names = ParameterNames({"text": "prompt"})
        body = await self._read(call, TokenizeBody)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("give exactly one of prompt and messages", field="text")
        messages = None if body.messages is None else tuple(body.messages)
        work = self._service.tokenize(body.prompt, messages, body.model)
        tokens = await until_disconnect(call.request.receive, work)
        limit = self._service.model.context_length
        return call.json({"tokens": tokens, "count": len(tokens), "max_model_len": limit})

    async def _detokenize(self, call: Call) -> Response:
        call.names = ParameterNames({"token_ids": "tokens"})
        body = await self._read(call, DetokenizeBody)
        work = asyncio.to_thread(self._service.detokenize, body.tokens, body.model)
        text = await until_disconnect(call.request.receive, work)
        return call.json({"prompt": text})

    async def _ready(self, call: Call) -> Response:
        if reason := self._service.unready_reason:
            raise Unavailable(reason, retry_after_s=1.0)
        return call.json({"status": "ok"})

    async def _live(self, call: Call) -> Response:
        return call.json({"status": "ok"})

    async def _status(self, call: Call) -> Response:
        return call.json(await self._service.status())

    async def _links(self, call: Call) -> Response:
        return call.json(await self._service.links())

    async def _probe_links(self, call: Call) -> Response:
        body = await self._read(call, ProbeLinksBody, empty=b"{}")
        probing = self._service.probe_links(body.sizes, body.timeout_s)
        return call.json(await until_disconnect(call.request.receive, probing))

    async def _metrics(self, call: Call) -> Response:
        body, content_type = await self._service.metrics_text()
        return Response(body, headers={**call.headers, "content-type": content_type})

    async def _generate(
        self,
        call: Call,
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
            call.end_preparation()
            if not body.stream:
                return await self._whole(call, answer, envelope, with_token_ids=with_token_ids)
            writer = EventWriter(
                envelope,
                form,
                wants_usage=body.wants_usage,
                wants_token_ids=with_token_ids,
                wants_timeline=call.wants_timeline,
            )
            # What fails before the first event gets its HTTP status.
            first = await until_disconnect(receive, answer.next_events(writer))
            return EventStream(call, answer, writer, first)
        except BaseException:
            answer.close()  # a client may leave before the work has even begun, and then it cleans nothing up
            raise

    async def _whole(self, call: Call, answer: Answer, envelope: Envelope, *, with_token_ids: bool) -> Response:
        """The answer in one piece."""
        whole = answer.whole(envelope, with_timeline=call.wants_timeline, with_token_ids=with_token_ids)
        content = await until_disconnect(call.request.receive, whole)
        return Response(content, headers=call.headers, media_type="application/json")

    def _prompt_text(self, given: GenerateInput) -> str:
        return given.text if given.text is not None else self._service.detokenize(given.token_ids or (), given.model)

    async def _read(self, call: Call, schema: type[_Schema], empty: bytes = b"") -> _Schema:
        """The body as `schema`; `empty` stands for one without content."""
        call.preparation = self._bodies.begin(call.client)
        return await self._bodies.read(call.request, call.preparation, schema, empty)


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


def _get(endpoint: _Endpoint) -> dict[str, _Endpoint]:
    return {"GET": endpoint, "HEAD": endpoint}


def _post(endpoint: _Endpoint) -> dict[str, _Endpoint]:
    return {"POST": endpoint}


def _refusal(request: Request, status: int, code: str, detail: str) -> Response:
    """The answer to a request that no endpoint takes."""
    # Not `request.url`, which a client's Host header can make unreadable.
    asked = f"{clipped(request.method)} {clipped(request.scope['path'])}"
    message = f"{detail}: {asked}; see GET /v1/models and POST /v1/chat/completions"
    fields = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return Response(dumps({"error": fields}), status, media_type="application/json")
