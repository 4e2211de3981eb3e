"""The asyncio SDK against a real server on the same loop."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from control_plane.gateway.grpc_front.server import start_grpc_server
from phasewise.aio_client import AsyncClient
from phasewise.core.errors import (
    DeadlineExceeded,
    DuplicateRequest,
    InvalidRequest,
    Overloaded,
    RequestCancelled,
    ServingError,
    Unavailable,
    WorkerLost,
)
from tests.phasewise.scripted_service import WAIT_S, Attempt, ScriptedService, all_errors, chat_text


async def happened(event: threading.Event) -> bool:
    return await asyncio.to_thread(event.wait, WAIT_S)


async def test_generate_stream_chat_and_the_small_calls(aio_client: AsyncClient) -> None:
    completion = await aio_client.generate("abc", n=2, max_tokens=2, timeline=True)
    assert completion.texts == ("cb", "cb") and len(completion.timeline) == 2
    async with aio_client.stream(token_ids=[97, 98], max_tokens=3) as stream:
        assert [delta.text async for delta in stream] == ["b", "a", "b"]
        assert stream.completion().usage.num_output_tokens == 3
    messages = [{"role": "user", "content": "hi"}]
    expected = chat_text(tuple(messages))[::-1][:3]
    assert (await aio_client.chat(messages, max_tokens=3)).text == expected
    assert "".join([d.text async for d in aio_client.chat(messages, stream=True, max_tokens=3)]) == expected
    assert await aio_client.tokenize("ab") == [97, 98]
    assert await aio_client.detokenize([97, 98]) == "ab"
    assert (await aio_client.model()).name == "bytes"


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: error.code)
async def test_every_error_class_comes_back_as_itself(
    error: ServingError, aio_target: str, service: ScriptedService
) -> None:
    service.script(Attempt(error, refuse=True), Attempt(error, num_tokens=1))
    async with AsyncClient(aio_target, max_retries=0) as client:
        with pytest.raises(type(error)) as refused:
            await client.generate("ab")
        stream = client.stream("ab")
        assert (await anext(stream)).text == "b"
        with pytest.raises(type(error)) as failed:
            await anext(stream)
    for caught in (refused.value, failed.value):
        assert type(caught) is type(error)
        assert (caught.message, caught.field, caught.retry_after_s) == (error.message, error.field, 1.5)


async def test_break_and_an_exception_cancel(aio_client: AsyncClient, service: ScriptedService) -> None:
    service.script(Attempt(num_tokens=2), Attempt(num_tokens=2))
    kept = aio_client.stream("abc")
    async for _ in kept:
        break
    assert await happened(service.last.closed)
    with pytest.raises(RequestCancelled):
        await anext(kept)

    async def consume() -> None:
        async for _ in aio_client.stream("abc"):
            raise KeyError("the caller's own")

    with pytest.raises(KeyError):
        await consume()
    assert await happened(service.last.closed)


async def test_cancelling_the_task_cancels_the_request(aio_client: AsyncClient, service: ScriptedService) -> None:
    service.script(Attempt(num_tokens=1))
    task = asyncio.create_task(aio_client.generate("abc"))
    assert await asyncio.to_thread(service.accepted.acquire, timeout=WAIT_S)
    assert await happened(service.last.silent)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await happened(service.last.closed)


async def test_a_timeout_around_a_stream_cancels_the_request(aio_client: AsyncClient, service: ScriptedService) -> None:
    service.script(Attempt(num_tokens=1))

    async def consume() -> None:
        async for _ in aio_client.stream("abc"):
            pass

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(consume(), 0.3)
    assert await happened(service.last.closed)


async def test_dropping_an_unread_stream_cancels(aio_client: AsyncClient, service: ScriptedService) -> None:
    service.script(Attempt(num_tokens=1))
    stream = aio_client.stream("abc")
    assert await asyncio.to_thread(service.accepted.acquire, timeout=WAIT_S)
    del stream
    gc.collect()
    assert await happened(service.last.closed)


async def test_aclose_from_another_task_ends_a_waiting_read(aio_client: AsyncClient, service: ScriptedService) -> None:
    service.script(Attempt(num_tokens=1))
    stream = aio_client.stream("abc")
    await anext(stream)
    reading = asyncio.ensure_future(anext(stream))
    assert await happened(service.last.silent)
    await stream.aclose()
    with pytest.raises(RequestCancelled):
        await reading
    assert await happened(service.last.closed)


async def test_closing_the_client_ends_what_is_open(aio_target: str, service: ScriptedService) -> None:
    service.script(Attempt(num_tokens=1))
    client = AsyncClient(aio_target)
    stream = client.stream("abc")
    await anext(stream)
    await client.close()
    with pytest.raises(RequestCancelled):
        await anext(stream)
    assert await happened(service.last.closed)
    with pytest.raises(RuntimeError, match="closed"):
        await client.generate("a")


async def test_the_deadline_ends_the_request(aio_client: AsyncClient, service: ScriptedService) -> None:
    service.script(Attempt(num_tokens=1))
    with pytest.raises(DeadlineExceeded):
        await aio_client.generate("abc", timeout_s=0.5)
    assert await happened(service.last.closed)


async def test_safe_errors_are_retried_with_the_same_id(aio_client: AsyncClient, service: ScriptedService) -> None:
    service.script(Attempt(Overloaded("full"), refuse=True), Attempt(WorkerLost("gone"), num_tokens=2))
    assert (await aio_client.generate("abc", max_tokens=3, request_id="mine")).text == "cba"
    assert [request.request_id for request in service.requests] == ["mine"] * 3


async def test_nothing_is_retried_after_a_token_or_when_unsafe(
    aio_client: AsyncClient, service: ScriptedService
) -> None:
    service.script(Attempt(WorkerLost("gone"), num_tokens=1), Attempt(InvalidRequest("no"), refuse=True))
    stream = aio_client.stream("abc")
    assert (await anext(stream)).text == "c"
    with pytest.raises(WorkerLost):
        await anext(stream)
    with pytest.raises(InvalidRequest):
        await aio_client.generate("abc")
    assert len(service.requests) == 2


async def test_a_request_that_an_earlier_attempt_left_open_is_waited_for(
    aio_client: AsyncClient, service: ScriptedService
) -> None:
    service.script(Attempt(WorkerLost("gone"), refuse=True), Attempt(DuplicateRequest("open"), refuse=True))
    assert (await aio_client.generate("abc", max_tokens=1)).text == "c"


async def test_a_stream_goes_on_when_its_gateway_is_away(aio_client: AsyncClient, service: ScriptedService) -> None:
    service.script(Attempt(Unavailable("the server is shutting down"), num_tokens=1))
    stream = aio_client.stream("abcd", max_tokens=4)
    assert "".join([delta.text async for delta in stream]) == "dcba" == stream.completion().text
    assert [len(request.resume_after) for request in service.requests] == [0, 1]


async def test_failover(aio_target: str) -> None:
    server, port = await start_grpc_server(ScriptedService(), "127.0.0.1:0", max_message_bytes=1 << 20)
    await server.stop(None)
    dead = f"127.0.0.1:{port}"
    async with AsyncClient([dead, aio_target], max_retries=1) as client:
        assert (await client.generate("ab", max_tokens=2)).text == "ba"
    async with AsyncClient(dead, max_retries=0) as client:
        with pytest.raises(Unavailable, match=dead):
            await client.model()


async def test_many_tasks_share_a_client(aio_client: AsyncClient) -> None:
    completions = await asyncio.gather(*(aio_client.generate(f"{i:03}", max_tokens=3) for i in range(60)))
    assert [completion.text for completion in completions] == [f"{i:03}"[::-1] for i in range(60)]


async def test_a_second_loop_is_refused(aio_client: AsyncClient) -> None:
    await aio_client.model()
    with pytest.raises(RuntimeError, match="loop"):
        await asyncio.to_thread(lambda: asyncio.run(aio_client.model()))
