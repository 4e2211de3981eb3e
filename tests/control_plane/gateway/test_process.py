"""The life of a gateway's process, from its first port to its last, without Ray and with workers that only record."""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from control_plane.gateway.process import GatewayProcess
from phasewise.core.birth import MemberBirth
from phasewise.core.config import build_config
from phasewise.core.errors import ConfigError, ServingError
from phasewise.core.heartbeat import HeartbeatAnswer
from phasewise.core.messages import NewTokens, PrefillTask, WorkerOutput
from phasewise.core.placement import Placement, PlaceRequest, WorkerId
from phasewise.core.request import FinishReason, SampledToken
from phasewise.core.view import GatewayInfo, Gone, Member, MemberState, View, ViewDelta, next_view
from phasewise.delivery.sinks import TokenSinks
from tests.support.members import worker_info

GATEWAY, SECRET = "gateway-0#1", "known to the cluster"


class Answer:
    """What a call of the control plane's actor returns."""

    def __init__(self, value: Any) -> None:
        self._future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._future.set_result(value)

    def future(self) -> concurrent.futures.Future[Any]:
        return self._future


class ControlPlane:
    """Its actor's handle, and a Placer that places everything on the same two workers."""

    def __init__(self, *worker_ids: WorkerId) -> None:
        self.current = View(1)
        for worker_id in worker_ids:
            info = worker_info(worker_id)
            self.change(Member(worker_id, info.role, MemberState.READY, info))
        self.said: list[tuple[str, Any]] = []
        self.joined: asyncio.Future[GatewayInfo] = asyncio.get_running_loop().create_future()
        self.was_asked = asyncio.Event()  # for its view
        self.finished_ids: list[str] = []

    def change(self, *members: Member, gone: tuple[Gone, ...] = ()) -> ViewDelta:
        self.current, delta = next_view(self.current, changed=members, gone=gone)
        return delta

    def __getattr__(self, name: str) -> Any:
        plane = self

        class Method:
            def remote(self, *arguments: Any) -> Answer:
                plane.said.append((name, arguments))
                if name == "view":
                    plane.was_asked.set()
                if name == "join":
                    info = arguments[0].info
                    plane.joined.set_result(info)
                    plane.change(Member(info.gateway_id, None, MemberState.READY, info))
                return Answer({"view": plane.current, "join": plane.current, "heartbeat": HeartbeatAnswer()}.get(name))

        return Method()

    async def place(self, request: PlaceRequest, timeout_s: float) -> Placement:
        return Placement(request.request_id, "prefill-1#1", "decode-0#1", request.attempt)

    def first_token(self, request_id: str) -> None: ...

    def finished(self, request_id: str, num_output_tokens: int) -> None:
        self.finished_ids.append(request_id)

    async def snapshot(self) -> Any:
        return []

    async def links(self) -> Any:
        raise AssertionError("nobody asks")

    async def probe_links(self, sizes: Any, timeout_s: float) -> Any:
        raise AssertionError("nobody asks")


class WorkerHandle:
    """`handle.post.remote(message)` calls `take`."""

    def __init__(self, take: Callable[[Any], None]) -> None:
        self.post = self
        self.remote = take


class Running:
    """A gateway's process that runs. `tasks` has what workers were sent; `ends` how it ended its process."""

    def __init__(self, control_plane: ControlPlane, model: Path, http: str = "127.0.0.1:0", grpc: str = "127.0.0.1:0"):
        config = build_config({"model": {"path": str(model)}, "gateway": {"http": http, "grpc": grpc}}, source="test")
        loop = asyncio.get_running_loop()
        self.tasks: asyncio.Queue[tuple[WorkerId, PrefillTask]] = asyncio.Queue()
        self.ends: list[tuple[str, int]] = []

        def find(worker_id: WorkerId) -> Any:
            def take(message: Any) -> None:
                loop.call_soon_threadsafe(self.tasks.put_nowait, (worker_id, message))

            return WorkerHandle(take)

        birth = MemberBirth(GATEWAY, None, config, secret=SECRET)
        self.process = GatewayProcess(birth, control_plane, control_plane, find, lambda *end: self.ends.append(end))
        self.life = asyncio.create_task(self.process.run())

    async def stop(self) -> None:
        await self.process.stop()
        await asyncio.wait_for(asyncio.gather(self.life, return_exceptions=True), 10)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.tiny_model import save_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return folder


@pytest.fixture
async def plane() -> ControlPlane:
    return ControlPlane("prefill-0#1", "prefill-1#1", "decode-0#1")


async def ready(http: httpx.AsyncClient) -> str:
    """Why the gateway is not ready; "" when it is."""
    answer = await http.get("/health/ready")
    return "" if answer.status_code == 200 else str(answer.json()["error"]["message"])


def is_open(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return "{}:{}".format(*probe.getsockname())


async def test_a_gateway_says_that_it_lives_until_there_are_workers_and_then_joins(model: Path) -> None:
    plane, http = ControlPlane("prefill-0#1"), free_port()
    running = Running(plane, model, http)
    async with httpx.AsyncClient(base_url=f"http://{http}") as client:
        await asyncio.wait_for(plane.was_asked.wait(), 20)  # it has looked, and found no decode worker
        assert (await client.get("/health/live")).status_code == 200
        for answer in (await client.get("/health/ready"), await client.post("/v1/completions", json={"prompt": "a"})):
            assert answer.status_code == 503 and "being loaded" in answer.json()["error"]["message"]
        assert not plane.joined.done()
        info = worker_info("decode-0#1")
        plane.change(Member("decode-0#1", info.role, MemberState.READY, info))
        assert (await asyncio.wait_for(plane.joined, 20)).http == http
        assert await ready(client) == ""
        assert (await asyncio.wait_for(running.process.wait_serving(), 10)).context_length == info.max_model_len
    await running.stop()


async def test_from_the_first_request_to_the_last_port(plane: ControlPlane, model: Path) -> None:
    running = Running(plane, model)
    info = await asyncio.wait_for(plane.joined, 20)
    await asyncio.wait_for(running.process.wait_serving(), 10)
    async with httpx.AsyncClient(base_url=f"http://{info.http}") as http:
        assert await ready(http) == ""
        asking = asyncio.create_task(http.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 1}))
        worker_id, task = await asyncio.wait_for(running.tasks.get(), 10)
        assert worker_id == "prefill-1#1"
        request_id = task.request.request_id
        (attempt,) = running.process.describe().open_attempts
        assert (attempt.placement.request_id, attempt.num_prompt_tokens) == (request_id, 2)
        tokens = NewTokens(request_id, 0, 0, (SampledToken(97),), FinishReason.LENGTH)
        sinks = TokenSinks("decode-0#1", SECRET)
        sinks.connect({GATEWAY: info.tokens})
        sinks.deliver(GATEWAY, WorkerOutput("decode-0#1", chunks=(tokens,)))
        assert (await asyncio.wait_for(asking, 10)).json()["usage"]["completion_tokens"] == 1
        await asyncio.to_thread(sinks.close)
        assert plane.finished_ids == [request_id]
        assert running.process.describe().open_attempts == ()
    running.process.drain(5.0)
    await asyncio.wait_for(running.life, 10)
    assert ("left", (GATEWAY,)) in plane.said
    assert running.ends == [("", 0)]
    assert not any(map(is_open, (info.http, info.grpc, info.tokens)))


async def test_readiness_follows_the_view(plane: ControlPlane, model: Path) -> None:
    running = Running(plane, model)
    info = await asyncio.wait_for(plane.joined, 20)
    await asyncio.wait_for(running.process.wait_serving(), 10)
    decode = plane.current.members["decode-0#1"]
    async with httpx.AsyncClient(base_url=f"http://{info.http}") as http:
        for state in (MemberState.SUSPECT, MemberState.DRAINING):
            running.process.view_changed(plane.change(replace(decode, state=state)))
            assert await ready(http) == "no decode worker is ready"
            running.process.view_changed(plane.change(decode))
            assert await ready(http) == ""
        running.process.view_changed(plane.change(gone=(Gone("decode-0#1", "it died"),)))
        assert await ready(http) == "no decode worker is ready"
        successor = worker_info("decode-0#2")
        member = Member("decode-0#2", successor.role, MemberState.READY, successor)
        running.process.view_changed(plane.change(member))
        assert await ready(http) == ""
    await running.stop()


async def test_a_gateway_that_is_in_the_view_no_more_ends(plane: ControlPlane, model: Path) -> None:
    running = Running(plane, model)
    await asyncio.wait_for(plane.joined, 20)
    await asyncio.wait_for(running.process.wait_serving(), 10)
    running.process.view_changed(plane.change(gone=(Gone(GATEWAY, "silent for 30 s"),)))
    assert running.ends == [("it was taken for lost, and is in the view no more", 1)]
    await running.stop()


@pytest.mark.parametrize("which", ["http", "grpc"])
async def test_a_taken_port_is_said_to_the_control_plane(which: str, plane: ControlPlane, model: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = "{}:{}".format(*other.getsockname())
        running = Running(plane, model, **{which: taken})
        with pytest.raises(ConfigError, match=taken):
            await asyncio.wait_for(running.life, 20)
        ((_, (member_id, error)),) = [entry for entry in plane.said if entry[0] == "failed"]
        assert member_id == GATEWAY and isinstance(error, ServingError) and taken in str(error)
        await running.process.stop()
