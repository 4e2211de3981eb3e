"""How a gRPC call ends without an answer: refused, failed, or left by its client.

To grpc.aio, a deserializer that raises and a handler that raises are faults of the server: it logs a traceback and
answers UNKNOWN, whatever the client sent. So a message that cannot be read becomes a value, `Malformed`, which the
handler refuses. A handler whose client is gone ends as a cancelled one does.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import unquote

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from control_plane.gateway.grpc_front.codec import malformed
from control_plane.gateway.quota import Quota, client_of
from phasewise.core.errors import InternalError, Overloaded, ServingError
from phasewise.core.shown import clipped
from phasewise.rpc.status import to_status

logger = logging.getLogger(__name__)


async def abort(context: grpc.aio.ServicerContext, error: Exception, request_id: str) -> NoReturn:
    """Ends the call with the status of `error`; any but a ServingError is a fault of the server, logged and not
    shown."""
    if not isinstance(error, ServingError):
        logger.error("gRPC request failed", exc_info=error, extra={"request_id": clipped(request_id)})
        name = clipped(request_id) or "(no id)"
        error = InternalError(f"internal error; the gateway's log has the details of request {name}")
    code, message, metadata = to_status(error)
    try:
        await context.abort(code, message, metadata)
    except grpc.aio.AbortError:
        raise
    except grpc.aio.BaseError:  # the status cannot be sent
        raise client_left() from None
    raise AssertionError("abort always raises")


def client_left() -> asyncio.CancelledError:
    """What a handler raises when its client is gone; grpc.aio was about to cancel the handler."""
    return asyncio.CancelledError("the client is gone")


class _NotOfClientsThatLeft(logging.Filter):
    """Drops grpc.aio's traceback of a last message or a status that could not be sent.

    grpc.aio knows that the client is gone once the end of the call has reached it. A send that fails before that counts
    as a fault of the server, and no handler can catch it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        return not (isinstance(error, grpc.aio.InternalError) and "execute_batch" in str(error))


NOT_OF_CLIENTS_THAT_LEFT = _NotOfClientsThatLeft()
"""For grpc's logger of the name `GRPC_LOGGER`."""
GRPC_LOGGER = "grpc._cython.cygrpc"


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands for a request message that cannot be read. `reason` is protobuf's."""

    reason: str


@dataclass(frozen=True, slots=True)
class LargeMessage:
    """Stands for a request message that is not read on the event loop."""

    raw: bytes


class CallGuard(grpc.aio.ServerInterceptor):
    """What all calls of a server pass, of whatever service.

    A message that is no valid protobuf is answered with INVALID_ARGUMENT. A client that has its share of `calls` open
    already is refused. The handlers of `large_methods` (full names) get a `LargeMessage` instead of a message above
    `large_bytes`.
    """

    def __init__(self, calls: Quota, large_methods: Collection[str] = (), large_bytes: int = 0) -> None:
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}
        self._calls = calls
        self._large_methods = large_methods
        self._large_bytes = large_bytes

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method
            return handler
        method = handler_call_details.method
        if method not in self._handlers:
            large_bytes = self._large_bytes if method in self._large_methods else sys.maxsize
            self._handlers[method] = self._guarded(handler, large_bytes)
        return self._handlers[method]

    def _guarded(self, handler: Any, large_bytes: int) -> grpc.RpcMethodHandler:
        """`handler` behind the checks. No method here takes a stream and returns one message."""
        forms = {
            "request_deserializer": _reader(handler, large_bytes),
            "response_serializer": handler.response_serializer,
        }
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(self._streams(handler.stream_stream), **forms)
        if not handler.response_streaming:
            return grpc.unary_unary_rpc_method_handler(self._answer(handler.unary_unary), **forms)
        if inspect.isasyncgenfunction(handler.unary_stream):
            return grpc.unary_stream_rpc_method_handler(self._stream(handler.unary_stream), **forms)
        return grpc.unary_stream_rpc_method_handler(self._answer(handler.unary_stream), **forms)

    @contextlib.asynccontextmanager
    async def _counted(self, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        client = client_of_call(context)
        try:
            self._calls.take(client)
        except Overloaded as error:
            await abort(context, error, "")
        try:
            yield
        finally:
            self._calls.give_back(client)

    def _answer(self, method: Any) -> Any:
        async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._counted(context):
                await _check(request, context)
                return await method(request, context)

        return answer

    def _stream(self, method: Any) -> Any:
        async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with self._counted(context):
                await _check(request, context)
                async for response in method(request, context):
                    yield response

        return stream

    def _streams(self, method: Any) -> Any:
        async def readable(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async for request in requests:
                await _check(request, context)
                yield request

        async def stream(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with self._counted(context):
                async for response in method(readable(requests, context), context):
                    yield response

        return stream


def client_of_call(context: grpc.aio.ServicerContext) -> str:
    """Whose share a call counts to. A peer is written `ipv4:1.2.3.4:5`, `ipv6:%5B::1%5D:5` or `unix:PATH`."""
    _, _, address = unquote(context.peer()).partition(":")
    return client_of(address.rpartition(":")[0].strip("[]"))


def _reader(handler: Any, large_bytes: int) -> Callable[[bytes], Any]:
    def read(raw: bytes) -> Any:
        if len(raw) > large_bytes:
            return LargeMessage(raw)
        try:
            return handler.request_deserializer(raw)
        except DecodeError as error:
            return Malformed(str(error))

    return read


async def _check(request: Any, context: grpc.aio.ServicerContext) -> None:
    if isinstance(request, Malformed):
        await abort(context, malformed(request.reason), "")
