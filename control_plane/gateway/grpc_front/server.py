"""The gRPC front door: decode, call the service, stream, map errors. It decides nothing.

The life of a Generate call here:

1. accepted: the service has taken the request; from now on there is a GenerationStream to close
2. streaming: all deltas that have come go out as one message
3. over, in exactly one way: `finished` sent; an error status; or the client is gone (cancel, disconnect, deadline),
   which grpc.aio turns into a cancellation of the handler. In each, `close` frees what the request still holds.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from control_plane.gateway.bodies import LARGE_BYTES, Bodies
from control_plane.gateway.grpc_front.codec import (
    DECODERS,
    encode_delta,
    encode_finished,
    encode_model,
    encode_started,
)
from control_plane.gateway.grpc_front.health import GatewayHealth
from control_plane.gateway.grpc_front.refusals import (
    GRPC_LOGGER,
    NOT_OF_CLIENTS_THAT_LEFT,
    CallGuard,
    LargeMessage,
    abort,
    client_left,
    client_of_call,
)
from control_plane.gateway.quota import Quota, share_of
from control_plane.gateway.service import GenerationStream, InferenceService
from control_plane.gateway.streams import StreamReader
from phasewise.core.errors import ConfigError
from phasewise.rpc import phasewise_pb2 as pb
from phasewise.rpc import phasewise_pb2_grpc

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_HEALTH_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_LARGE_METHODS = frozenset(f"/{SERVICE_NAME}/{method}" for method in DECODERS)


async def start_grpc_server(
    service: InferenceService,
    address: str,
    *,
    max_message_bytes: int,
    max_calls: int = 4096,
    bodies: Bodies | None = None,
) -> tuple[grpc.aio.Server, int]:
    """Serves `service` on `address` (HOST:PORT; port 0 asks for a free one) and returns (server, port).

    At most `max_calls` are open at once, health watches among them, and three quarters of them by one client; more get
    RESOURCE_EXHAUSTED. `bodies` reads large messages, as it does for HTTP; None: they are read on the loop.

    The caller drains the service before it stops the server: `server.stop(grace)` waits for open calls, health watches
    among them, until `grace` is over, and cancels the rest.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    logging.getLogger(GRPC_LOGGER).addFilter(NOT_OF_CLIENTS_THAT_LEFT)
    calls = Quota("gRPC calls open", max_calls, share_of(max_calls))
    server = grpc.aio.server(
        interceptors=(CallGuard(calls, _LARGE_METHODS if bodies is not None else (), LARGE_BYTES),),
        options=(
            # Two servers on one port would share its requests without anyone noticing.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            # A client whose host is gone sends no reset: its requests are cancelled after 40 s.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.max_pings_without_data", 0),
            # The SDK pings as often; without this it would be cut off for doing so.
            ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ),
    )
    phasewise_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(service, bodies), server)
    health_pb2_grpc.add_HealthServicer_to_server(GatewayHealth(service, (SERVICE_NAME,)), server)
    reflection.enable_server_reflection((SERVICE_NAME, _HEALTH_NAME, reflection.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        await server.stop(None)
        raise ConfigError(
            f"gateway.grpc: cannot listen on {address} ({error}); free the port, or choose another one "
            "(port 0 takes any that is free)",
            field="gateway.grpc",
        ) from None
    await server.start()
    return server, port


class InferenceServicer(phasewise_pb2_grpc.InferenceServicer):
    """phasewise.v1.Inference over an InferenceService."""

    def __init__(self, service: InferenceService, bodies: Bodies | None = None) -> None:
        self._service = service
        self._bodies = bodies

    async def Generate(self, request: pb.GenerateRequest | LargeMessage, context: grpc.aio.ServicerContext) -> None:
        # Writes to the context rather than yielding: grpc.aio does not close an abandoned generator at once.
        request_id = ""
        try:
            call = await self._read("Generate", request, context)
            request_id = call.given.request_id or ""
            client, timeout_s = client_of_call(context), context.time_remaining()
            stream = await self._service.generate(replace(call.given, client=client, timeout_s=timeout_s))
            await self._answer(stream, context, with_timeline=call.with_timeline)
        except Exception as error:
            await abort(context, error, request_id)

    async def Tokenize(
        self, request: pb.TokenizeRequest | LargeMessage, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        try:
            call = await self._read("Tokenize", request, context)
            token_ids = await self._service.tokenize(call.text, call.messages, call.model)
        except Exception as error:
            await abort(context, error, "")
        return pb.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: pb.DetokenizeRequest | LargeMessage, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        try:
            call = await self._read("Detokenize", request, context)
            text = await asyncio.to_thread(self._service.detokenize, call.token_ids, call.model)
        except Exception as error:
            await abort(context, error, "")
        return pb.DetokenizeResponse(text=text)

    async def GetModel(self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext) -> pb.Model:
        return encode_model(self._service.model)

    async def _read(self, method: str, request: Any, context: grpc.aio.ServicerContext) -> Any:
        """What a message of `method` says. Raises InvalidRequest, and Overloaded for a large one."""
        if not isinstance(request, LargeMessage):
            return DECODERS[method][1](request)
        assert self._bodies is not None, "there are none otherwise"
        with self._bodies.begin(client_of_call(context)) as preparation:
            preparation.grow(len(request.raw))
            return await self._bodies.read_message(method, request.raw)

    async def _answer(
        self, stream: GenerationStream, context: grpc.aio.ServicerContext, *, with_timeline: bool
    ) -> None:
        """Writes all messages of an answer, and closes the stream whatever happens. Raises the stream's error."""
        reader = StreamReader()
        reader.add(stream)
        is_first, is_last = True, False
        try:
            while not is_last:
                deltas, is_last = await reader.take()
                message = pb.GenerateResponse(deltas=[encode_delta(delta) for _, delta in deltas])
                if is_first:
                    message.started.CopyFrom(encode_started(stream))
                    is_first = False
                if is_last:
                    message.finished.CopyFrom(encode_finished(stream, with_timeline=with_timeline))
                await _write(context, message)
        finally:
            reader.close()


async def _write(context: grpc.aio.ServicerContext, message: pb.GenerateResponse) -> None:
    try:
        await context.write(message)
    except grpc.aio.BaseError:  # the call is over; grpc.aio's word of it may come later than this
        raise client_left() from None
