"""The life of a gateway's process, from its first port to its last, without Ray and without workers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from control_plane.gateway.process import GatewayProcess
from control_plane.gateway.service import ModelCard
from phasewise.core.config import build_config
from phasewise.core.errors import ConfigError
from phasewise.core.messages import NewTokens, PrefillTask, WorkerOutput
from phasewise.core.placement import Placement, PlaceRequest, WorkerId
from phasewise.core.request import FinishReason, SampledToken
from phasewise.delivery.sinks import TokenSinks
from tests.support.members import worker_info

SECRET = "known to the cluster"
CARD = ModelCard("m", 2048, 49152, "float32", 1, (2,), True)
INFOS = [worker_info(name) for name in ("prefill-0", "prefill-1", "decode-0")]


class ControlPlane:
    """A WatchedPlacer that places everything on the same two workers, and ends when `has_ended` is set."""

    def __init__(self) -> None:
        self.has_ended = asyncio.Event()
        self.finished_ids: list[str] = []

    async def place(self, request: PlaceRequest, timeout_s: float) -> Placement:
        return Placement(request.request_id, "prefill-1", "decode-0", request.attempt)

    def first_token(self, request_id: str) -> None: ...

    def finished(self, request_id: str, num_output_tokens: int) -> None:
        self.finished_ids.append(request_id)

    async def snapshot(self) -> Any:
        return []

    async def links(self) -> Any:
        raise AssertionError("nobody asks")

    async def probe_links(self, sizes: Any, timeout_s: float) -> Any:
        raise AssertionError("nobody asks")

    async def control_plane_ended(self) -> None:
        await self.has_ended.wait()


class WorkerHandle:
    """`handle.post.remote(message)` calls `take`."""

    def __init__(self, take: Callable[[Any], None]) -> None:
        self.post = self
        self.remote = take


@pytest.fixture
async def process() -> AsyncIterator[GatewayProcess]:
    config = build_config({"gateway": {"http": "127.0.0.1:0", "grpc": "127.0.0.1:0"}}, source="test")
    process = GatewayProcess("gateway-0", config, SECRET)
    yield process
    await process.stop()


async def ready(http: httpx.AsyncClient) -> str:
    """Why the gateway is not ready; "" when it is."""
    answer = await http.get("/health/ready")
    return "" if answer.status_code == 200 else str(answer.json()["error"]["message"])


async def test_a_gateway_says_that_it_lives_while_the_model_loads(process: GatewayProcess) -> None:
    async with httpx.AsyncClient(base_url=f"http://{await process.bind()}") as http:
        assert (await http.get("/health/live")).status_code == 200
        for answer in (await http.get("/health/ready"), await http.post("/v1/completions", json={"prompt": "a"})):
            assert answer.status_code == 503 and "being loaded" in answer.json()["error"]["message"]


async def test_from_the_first_port_to_the_last(process: GatewayProcess) -> None:
    address, tokens_address = await process.bind(), await process.listen_for_tokens()
    await process.load()
    assert process.has_chat_template
    process.worker_lost("prefill-0")  # before there is a service
    control_plane = ControlPlane()
    tasks: asyncio.Queue[tuple[WorkerId, PrefillTask]] = asyncio.Queue()
    handles = {
        info.worker_id: WorkerHandle(lambda message, name=info.worker_id: tasks.put_nowait((name, message)))
        for info in INFOS
    }
    grpc_address = await process.serve(CARD, INFOS, handles, control_plane)
    async with httpx.AsyncClient(base_url=f"http://{address}") as http:
        assert await ready(http) == ""
        asking = asyncio.create_task(http.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 1}))
        worker_id, task = await asyncio.wait_for(tasks.get(), 10)
        assert worker_id == "prefill-1"
        request_id = task.request.request_id
        tokens = NewTokens(request_id, 0, 0, (SampledToken(97),), FinishReason.LENGTH)
        sinks = TokenSinks("decode-0", SECRET)
        sinks.connect({"gateway-0": tokens_address})
        sinks.deliver("gateway-0", WorkerOutput("decode-0", chunks=(tokens,)))
        assert (await asyncio.wait_for(asking, 10)).json()["usage"]["completion_tokens"] == 1
        sinks.close()
        assert control_plane.finished_ids == [request_id]
        process.worker_lost("prefill-1")
        assert await ready(http) == "no prefill worker is ready", "the other was lost before"
        control_plane.has_ended.set()
        await asyncio.sleep(0)
        assert "the control plane has ended" in await ready(http)
        await process.drain(5.0)
        assert (await http.get("/health/live")).status_code == 200, "it drains"
    await process.stop()
    await asyncio.wait_for(process.wait_closed(), 5)
    for each in (address, grpc_address, tokens_address):
        host, port = each.split(":")
        with socket.socket() as probe:
            assert probe.connect_ex((host, int(port))) != 0


async def test_a_port_of_grpc_that_is_taken_is_an_error_of_serve_and_leaves_no_port() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = "{}:{}".format(*other.getsockname())
        config = build_config({"gateway": {"http": "127.0.0.1:0", "grpc": taken}}, source="test")
        process = GatewayProcess("gateway-0", config)
        host, port = (await process.bind()).split(":")
        await process.load()
        with pytest.raises(ConfigError, match=taken):
            await process.serve(CARD, INFOS, {}, ControlPlane())
        await process.stop()
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0
