"""How calls end that nobody can answer: a message that is none, a client that is gone. Most over a real server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from control_plane.gateway.grpc_front.refusals import GRPC_LOGGER, NOT_OF_CLIENTS_THAT_LEFT
from control_plane.gateway.grpc_front.server import InferenceServicer, start_grpc_server
from phasewise.core.errors import Overloaded
from phasewise.rpc import phasewise_pb2 as pb
from phasewise.rpc.status import ERROR_KEY
from tests.phasewise.scripted_service import Attempt, ScriptedService

SERVICE = "/phasewise.v1.Inference/"
TORN = b"\x0a\x05ab"  # a field of five bytes, of which two came
WITH_STRINGS = ("Generate", "Tokenize", "Health/Check", "Health/Watch")  # their first field is one
NOT_UTF8 = b"\x0a\x02\xff\xfe"


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService()


@pytest.fixture
async def channel(service: ScriptedService) -> AsyncIterator[grpc.aio.Channel]:
    server, port = await start_grpc_server(service, "127.0.0.1:0", max_message_bytes=1 << 20)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


@pytest.mark.parametrize(
    ("method", "raw"),
    [
        *((method, raw) for method in WITH_STRINGS for raw in (TORN, NOT_UTF8, b"\xff\xff")),
        *((method, raw) for method in ("Detokenize", "GetModel") for raw in (TORN, b"\xff\xff")),
    ],
)
async def test_a_malformed_message_is_an_invalid_argument(
    channel: grpc.aio.Channel, service: ScriptedService, caplog: pytest.LogCaptureFixture, method: str, raw: bytes
) -> None:
    path = f"/grpc.health.v1.{method}" if "/" in method else SERVICE + method
    call = channel.unary_stream(path)(raw)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    error = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "cannot be read" in str(error.details()) and "\n" not in str(error.details())
    detail = dict(error.trailing_metadata())[ERROR_KEY]  # type: ignore[arg-type,call-overload]
    assert pb.ErrorDetail.FromString(detail).code == "invalid_request"
    assert not service.requests and not caplog.records


async def test_reflection_refuses_a_malformed_message_too(
    channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    call = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(iter([TORN]))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and not caplog.records


class GoneContext:
    """What a handler has of a client that left when nothing has told it so yet: whatever is sent fails."""

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def time_remaining(self) -> None:
        return None

    async def write(self, message: object) -> None:
        raise grpc.aio.InternalError('Failed "execute_batch"')

    async def abort(self, code: object, details: str, metadata: object) -> None:
        raise grpc.aio.InternalError('Failed "execute_batch"')


@pytest.mark.parametrize("is_refused", [False, True])
async def test_a_send_that_fails_is_a_client_that_left(
    service: ScriptedService, caplog: pytest.LogCaptureFixture, is_refused: bool
) -> None:
    if is_refused:
        service.script(Attempt(Overloaded("full"), refuse=True))
    request = pb.GenerateRequest(text="abc", sampling=pb.Sampling(max_tokens=3))
    with pytest.raises(asyncio.CancelledError):
        await InferenceServicer(service).Generate(request, GoneContext())  # type: ignore[arg-type]
    assert not caplog.records
    assert all(stream.closed.is_set() for stream in service.streams)


async def test_bursts_of_cancels_are_no_errors(
    channel: grpc.aio.Channel, service: ScriptedService, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(7)
    good = pb.GenerateRequest(text="abc", sampling=pb.Sampling(max_tokens=50)).SerializeToString()
    generate = channel.unary_stream(SERVICE + "Generate")
    others = [
        (channel.unary_unary(SERVICE + "Tokenize"), pb.TokenizeRequest(text="abc").SerializeToString()),
        (channel.unary_unary(SERVICE + "GetModel"), b""),
        (channel.unary_unary(SERVICE + "Tokenize"), TORN),
    ]
    caplog.set_level(logging.INFO)
    async with asyncio.timeout(60):
        for _ in range(30):
            calls = [generate(rng.choice([good, good, b"", TORN])) for _ in range(8)]
            calls += [method(raw) for method, raw in others]
            watched = rng.choice(calls[:8])
            num_turns = rng.choice([0, 1, 3, 10, 30, 100])
            for _ in range(num_turns):
                await asyncio.sleep(0)
            if num_turns == 100:  # not before the server has begun
                await watched.initial_metadata()
            for call in calls:
                call.cancel()
            await asyncio.gather(*(call.code() for call in calls))
    assert not [record for record in caplog.records if record.levelno > logging.INFO or record.exc_info]
    async with asyncio.timeout(10):
        for stream in service.streams:
            await asyncio.to_thread(stream.closed.wait, 10)


def test_only_tracebacks_of_clients_that_left_are_dropped() -> None:
    def record(error: Exception) -> logging.LogRecord:
        return logging.LogRecord(GRPC_LOGGER, logging.ERROR, "", 0, "raised", None, (type(error), error, None))

    assert not NOT_OF_CLIENTS_THAT_LEFT.filter(record(grpc.aio.InternalError('Failed "execute_batch": (…)')))
    assert NOT_OF_CLIENTS_THAT_LEFT.filter(record(grpc.aio.InternalError("the server is broken")))
    assert NOT_OF_CLIENTS_THAT_LEFT.filter(record(ValueError('Failed "execute_batch"')))


async def test_one_client_cannot_open_all_calls(service: ScriptedService) -> None:
    server, port = await start_grpc_server(service, "127.0.0.1:0", max_message_bytes=1 << 20, max_calls=8)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(6)]
        for watch in watches:
            await watch.read()
        with pytest.raises(grpc.aio.AioRpcError, match="this client") as caught:
            await health.Check(health_pb2.HealthCheckRequest())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        watches[0].cancel()
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await health.Check(health_pb2.HealthCheckRequest())
                    break
        for watch in watches:
            watch.cancel()
    await server.stop(None)
