"""The gRPC server as clients see it that we did not write: plain stubs, the health stubs, the reflection database."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from control_plane.gateway.grpc_front.health import LIVENESS
from control_plane.gateway.grpc_front.refusals import client_of_call
from control_plane.gateway.grpc_front.server import SERVICE_NAME, start_grpc_server
from control_plane.gateway.service import SampleDelta
from phasewise.connection import CHANNEL_OPTIONS
from phasewise.core.errors import ConfigError, InvalidRequest, RequestCancelled, WorkerLost
from phasewise.core.request import FinishReason
from phasewise.rpc import phasewise_pb2 as pb
from phasewise.rpc.phasewise_pb2_grpc import InferenceStub
from phasewise.rpc.status import ERROR_KEY
from tests.phasewise.scripted_service import WAIT_S, Attempt, ScriptedService, ScriptedStream, serve_in_thread

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService()


@pytest.fixture
async def channel(service: ScriptedService) -> AsyncIterator[grpc.aio.Channel]:
    server, port = await start_grpc_server(service, "127.0.0.1:0", max_message_bytes=1 << 20)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)
    for stream in service.streams:
        assert stream.closed.is_set(), f"nobody closed {stream.request_id}"


def generate(text: str = "abc", *, max_tokens: int = 4, **rest: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, sampling=pb.Sampling(max_tokens=max_tokens), **rest)  # type: ignore[arg-type]


async def happened(event: threading.Event) -> bool:
    return await asyncio.to_thread(event.wait, WAIT_S)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """Reads to the end, which must be an error."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:  # noqa: PT012
        while await call.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
            pass
    return caught.value


def detail(error: grpc.aio.AioRpcError) -> pb.ErrorDetail:
    return pb.ErrorDetail.FromString(dict(error.trailing_metadata())[ERROR_KEY])  # type: ignore[arg-type,call-overload]


async def test_ready_deltas_share_a_message_with_the_beginning_and_the_end(channel: grpc.aio.Channel) -> None:
    messages = [message async for message in InferenceStub(channel).Generate(generate(timeline=True))]
    (message,) = messages
    assert [(delta.text, list(delta.token_ids)) for delta in message.deltas] == [("cbac", [99, 98, 97, 99])]
    assert message.started.request_id == "chosen-by-the-server"
    assert message.deltas[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert message.finished.usage.num_output_tokens == 4
    assert message.finished.placement.decode_worker == "decode-0"
    assert [event.stage for event in message.finished.timeline] == ["received", "handoff_end"]


async def test_a_delta_does_not_wait_for_the_next(channel: grpc.aio.Channel, service: ScriptedService) -> None:
    service.script(Attempt(num_tokens=1))
    call = InferenceStub(channel).Generate(generate())
    message = await call.read()
    assert [delta.text for delta in message.deltas] == ["c"] and not message.HasField("finished")
    assert not service.last.closed.is_set()
    call.cancel()
    assert await happened(service.last.closed)


async def test_a_long_backlog_is_split_and_complete(channel: grpc.aio.Channel) -> None:
    messages = [message async for message in InferenceStub(channel).Generate(generate(max_tokens=1000))]
    assert len(messages) == 4 and max(len(d.token_ids) for message in messages for d in message.deltas) == 256
    assert "".join(delta.text for message in messages for delta in message.deltas) == ("cba" * 334)[:1000]
    assert [message.HasField("started") for message in messages] == [True, False, False, False]
    assert [message.HasField("finished") for message in messages] == [False, False, False, True]


async def test_prompt_logprobs_come_first(channel: grpc.aio.Channel) -> None:
    request = generate()
    request.sampling.prompt_logprobs = 1
    call = InferenceStub(channel).Generate(request)
    tokens = (await call.read()).started.prompt_tokens
    assert [(token.raw, token.HasField("logprob")) for token in tokens] == [(b"a", False), (b"b", True), (b"c", True)]
    assert await call.read() is grpc.aio.EOF  # type: ignore[attr-defined]


async def test_deltas_before_an_error_are_sent(channel: grpc.aio.Channel, service: ScriptedService) -> None:
    service.script(Attempt(WorkerLost("prefill-0 died", retry_after_s=0.5), num_tokens=2))
    call = InferenceStub(channel).Generate(generate())
    message = await call.read()
    assert [delta.text for delta in message.deltas] == ["cb"]
    error = await failure(call)
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "prefill-0 died")
    assert detail(error) == pb.ErrorDetail(code="worker_lost", retry_after_s=0.5, retry_safe=True)
    assert service.last.closed.is_set()


async def test_a_request_without_a_prompt_is_refused_naming_the_field(channel: grpc.aio.Channel) -> None:
    stub = InferenceStub(channel)
    error = await failure(stub.Generate(pb.GenerateRequest()))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and detail(error).field == "prompt"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Tokenize(pb.TokenizeRequest())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and detail(caught.value).field == "text"


async def test_a_refusal_of_the_service_keeps_its_field(channel: grpc.aio.Channel) -> None:
    error = await failure(InferenceStub(channel).Generate(generate(max_tokens=0)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert detail(error).field == "max_tokens" and detail(error).code == "invalid_request"


async def test_unary_calls_map_errors_too(channel: grpc.aio.Channel) -> None:
    stub = InferenceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Tokenize(pb.TokenizeRequest(text="a", model="other"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND and detail(caught.value).code == "model_not_found"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Detokenize(pb.DetokenizeRequest(token_ids=[255]))  # not UTF-8: a fault of this service
    assert caught.value.code() is grpc.StatusCode.INTERNAL


async def test_a_fault_is_logged_with_the_request_id_and_hidden(
    channel: grpc.aio.Channel, service: ScriptedService, caplog: pytest.LogCaptureFixture
) -> None:
    service.script(Attempt(ZeroDivisionError("inside"), num_tokens=1))
    with caplog.at_level(logging.ERROR):
        error = await failure(InferenceStub(channel).Generate(generate(request_id="r-9")))
    assert error.code() is grpc.StatusCode.INTERNAL and "inside" not in str(error.details())
    (record,) = [r for r in caplog.records if r.name == "control_plane.gateway.grpc_front.refusals"]
    assert record.__dict__["request_id"] == "r-9" and "inside" in str(record.exc_info)


async def test_a_stream_that_is_cancelled_inside_ends_its_call(
    channel: grpc.aio.Channel, service: ScriptedService
) -> None:
    service.script(Attempt(RequestCancelled("the server is stopping"), num_tokens=1))
    error = await failure(InferenceStub(channel).Generate(generate(), timeout=WAIT_S))
    assert error.code() is grpc.StatusCode.CANCELLED and detail(error).code == "cancelled"


async def test_the_deadline_becomes_timeout_s_and_closes_the_stream(
    channel: grpc.aio.Channel, service: ScriptedService
) -> None:
    service.script(None, Attempt(num_tokens=1))
    stub = InferenceStub(channel)
    _ = [message async for message in stub.Generate(generate())]
    assert service.requests[0].timeout_s is None
    error = await failure(stub.Generate(generate(), timeout=0.5))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await happened(service.last.closed)
    timeout_s = service.requests[1].timeout_s
    assert timeout_s is not None and 0 < timeout_s < 0.6, "gRPC rounds a little"


async def test_a_lost_connection_closes_the_stream(service: ScriptedService) -> None:
    service.script(Attempt(num_tokens=1))
    server, port = await start_grpc_server(service, "127.0.0.1:0", max_message_bytes=1 << 20)
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    call = InferenceStub(channel).Generate(generate())
    await call.read()
    await channel.close()
    assert await happened(service.last.closed)
    await server.stop(None)


async def test_a_stream_that_is_silent_for_long_outlives_the_pings_of_its_client(service: ScriptedService) -> None:
    """A request that waits for a worker to come back is silent for seconds. Three pings too many end a connection."""
    service.script(Attempt(num_tokens=1))
    server, port = await start_grpc_server(service, "127.0.0.1:0", max_message_bytes=1 << 20)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        call = InferenceStub(channel).Generate(generate())
        await call.read()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(9.0):
                await call.read()
    await server.stop(None)


async def test_a_server_that_stops_has_closed_every_stream_once(service: ScriptedService) -> None:
    """Also the one whose handler it cancels, and the one that has just sent its last message."""
    service.script(None, Attempt(num_tokens=1))
    server, port = await start_grpc_server(service, "127.0.0.1:0", max_message_bytes=1 << 20)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = InferenceStub(channel)
        whole, open_one = stub.Generate(generate()), stub.Generate(generate())
        assert (await whole.read()).HasField("finished")
        assert (await open_one.read()).deltas
        await server.stop(None)
        assert [await happened(stream.closed) for stream in service.streams] == [True, True]
    assert [stream.num_closes for stream in service.streams] == [1, 1]


class Burst(ScriptedStream):
    """Deltas that come one at a time, as fast as the loop turns."""

    async def _deltas(self) -> AsyncIterator[SampleDelta]:
        for position in range(300):
            await asyncio.get_running_loop().run_in_executor(None, int)
            yield SampleDelta(0, "x", (position,), (), FinishReason.LENGTH if position == 299 else None)


async def test_order_and_number_hold_while_reading_ahead(
    channel: grpc.aio.Channel, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def burst(request: object) -> Burst:
        return Burst(request, (1,), None)  # type: ignore[arg-type]

    monkeypatch.setattr(service, "generate", burst)
    token_ids: list[int] = []
    async for message in InferenceStub(channel).Generate(generate()):
        token_ids.extend(token_id for delta in message.deltas for token_id in delta.token_ids)
    assert token_ids == list(range(300))


async def test_a_message_over_the_limit_is_refused(channel: grpc.aio.Channel) -> None:
    error = await failure(InferenceStub(channel).Generate(generate("a" * (2 << 20))))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_taken_port_is_a_config_error_that_names_it(service: ScriptedService) -> None:
    server, port = await start_grpc_server(service, "127.0.0.1:0", max_message_bytes=1 << 20)
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*choose another") as caught:
        await start_grpc_server(service, f"127.0.0.1:{port}", max_message_bytes=1 << 20)
    assert caught.value.field == "gateway.grpc"
    with pytest.raises(ConfigError, match=r"no\.such\.host\.invalid"):
        await start_grpc_server(service, "no.such.host.invalid:1", max_message_bytes=1 << 20)
    await server.stop(None)


async def test_health_follows_the_service(channel: grpc.aio.Channel, service: ScriptedService) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for reason, expected in (("", SERVING), ("no decode worker is ready", NOT_SERVING), ("", SERVING)):
        service.unready_reason = reason
        for name in ("", SERVICE_NAME):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == expected
        answer = await health.Check(health_pb2.HealthCheckRequest(service=LIVENESS))
        assert answer.status == SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_health_watch_tells_each_change_once(channel: grpc.aio.Channel, service: ScriptedService) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=WAIT_S)
    assert (await watch.read()).status == SERVING
    service.unready_reason = "draining"
    assert (await watch.read()).status == NOT_SERVING
    service.unready_reason = ""
    assert (await watch.read()).status == SERVING
    watch.cancel()
    unknown = health.Watch(health_pb2.HealthCheckRequest(service="other"), timeout=WAIT_S)
    assert (await unknown.read()).status == SERVICE_UNKNOWN
    unknown.cancel()


def test_reflection_describes_the_whole_service(service: ScriptedService) -> None:
    with serve_in_thread(service) as serving, grpc.insecure_channel(serving.target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {SERVICE_NAME, "grpc.health.v1.Health"} <= set(database.get_services())
        found = DescriptorPool(database).FindServiceByName(SERVICE_NAME)
        ours = pb.DESCRIPTOR.services_by_name["Inference"]
        assert {m.name for m in found.methods} == {m.name for m in ours.methods}
        generate_method = found.FindMethodByName("Generate")
        assert {f.name for f in generate_method.input_type.fields} == {
            f.name for f in pb.GenerateRequest.DESCRIPTOR.fields
        }


async def test_a_bad_request_is_not_started(channel: grpc.aio.Channel, service: ScriptedService) -> None:
    service.script(Attempt(InvalidRequest("no", field="top_p"), refuse=True))
    error = await failure(InferenceStub(channel).Generate(generate()))
    assert detail(error).field == "top_p" and service.streams == []


@pytest.mark.parametrize(
    ("peer", "client"),
    [
        ("ipv4:1.2.3.4:55", "1.2.3.4"),
        ("ipv6:%5B2001:db8:1:2::7%5D:55", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:1.2.3.4%5D:55", "1.2.3.4"),
    ],
)
def test_clients_by_their_peer(peer: str, client: str) -> None:
    class Context:
        def peer(self) -> str:
            return peer

    assert client_of_call(Context()) == client
