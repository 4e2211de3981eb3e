"""The life of a worker's process with a real engine, without Ray: the others are handles that record."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.worker_plan import worker_settings
from phasewise.core.config import build_config
from phasewise.core.errors import ConfigError
from phasewise.core.heartbeat import HeartbeatAnswer
from phasewise.core.messages import PrefillTask, WorkerLoad, WorkerOutput
from phasewise.core.placement import Placement
from phasewise.core.request import Request, SamplingParams
from phasewise.core.view import Gone, Member, MemberState, View, next_view
from phasewise.delivery.listener import TokenListener
from tests.support.members import gateway_info
from tests.support.tiny_model import save_tiny_model
from workers.process import WorkerProcess

WAIT_S = 30.0
GATEWAY = "gateway-0#1"


class Answer:
    """What a call of an actor returns."""

    def __init__(self, value: Any) -> None:
        self._future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._future.set_result(value)

    def future(self) -> concurrent.futures.Future[Any]:
        return self._future


class Handle:
    """An actor's handle: `handle.<name>.remote(value)` calls `take` with the name and the value."""

    def __init__(self, take: Callable[[str, Any], Any]) -> None:
        self._take = take

    def __getattr__(self, name: str) -> Any:
        take = self._take

        class Method:
            def remote(self, *values: Any) -> Answer:
                return Answer(take(name, *values))

        return Method()


class Queue:
    """What the loop's thread tells, to be awaited."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._values: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, value: Any) -> None:
        self._loop.call_soon_threadsafe(self._values.put_nowait, value)

    async def until(self, condition: Callable[[Any], bool]) -> Any:
        """The next value for which it holds; TimeoutError when none comes."""
        async with asyncio.timeout(WAIT_S):
            while not condition(value := await self._values.get()):
                pass
        return value


class Gateway:
    """Where a worker's tokens arrive."""

    def __init__(self, outputs: Queue) -> None:
        self.deliver = outputs.put

    def tokens_lost(self, worker_id: str) -> None:
        raise AssertionError("nothing is lost")


class Cluster:
    """A mixed worker with a tiny model, alone with a gateway. `said` has what the control plane hears, `outputs` what
    the gateway gets."""

    def __init__(self, folder: Path, *, grows: bool = True) -> None:
        pools = {"prefill": {"workers": 0}, "decode": {"workers": 0}, "mixed": {"workers": 1}}
        sections = {
            "model": {"path": str(folder)},
            "cache": {"kv_cache_gib": 0.02 if grows else 1e-9},
            "pools": pools,
            "health": {"heartbeat_s": 0.05, "suspect_s": 1.0},
        }
        settings = worker_settings(build_config(sections, source="test"), "cpu", None)[0]
        self.said, self.outputs = Queue(), Queue()
        self.loads: list[WorkerLoad] = []
        self.listener = TokenListener(GATEWAY, "", Gateway(self.outputs))
        self.view = View(1)
        self.is_gone = False
        self.ends: list[tuple[str, int]] = []
        self.process = WorkerProcess(
            settings, Handle(self._hear), lambda name: None, lambda *end: self.ends.append(end)
        )
        self.life = asyncio.create_task(self.process.run())

    async def listen(self) -> None:
        """The gateway is there, before the worker joins."""
        info = replace(gateway_info(GATEWAY), tokens=await self.listener.open("127.0.0.1"))
        self.view, _ = next_view(self.view, changed=[Member(GATEWAY, None, MemberState.READY, info)])

    def _hear(self, name: str, *values: Any) -> Any:
        self.said.put((name, values))
        if name == "join":
            info = values[0].info
            self.view, _ = next_view(self.view, changed=[Member(info.worker_id, info.role, MemberState.READY, info)])
            return self.view
        return HeartbeatAnswer(is_gone=self.is_gone) if name == "heartbeat" else None

    async def heard(self, name: str) -> tuple[Any, ...]:
        """The next call of that name: its arguments."""
        _, values = await self.said.until(lambda entry: entry[0] == name)
        return tuple(values)

    async def load(self, condition: Callable[[WorkerLoad], bool]) -> WorkerLoad:
        """The next load with a heartbeat for which it holds."""
        _, (beat,) = await self.said.until(
            lambda entry: entry[0] == "heartbeat" and entry[1][0].load is not None and condition(entry[1][0].load)
        )
        assert beat.load is not None
        return beat.load  # type: ignore[no-any-return]

    def post(self, request_id: str) -> None:
        assert self.process.worker is not None
        self.process.worker.post(task(request_id))


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A worker that has joined; stopped in the end, or its loop's thread would keep the tests from ending."""
    save_tiny_model(tmp_path)
    cluster = Cluster(tmp_path)
    await cluster.listen()
    (joining,) = await cluster.heard("join")
    assert joining.info.worker_id == "mixed-0"
    yield cluster
    await cluster.process.stop()
    await asyncio.wait([cluster.life])
    await cluster.listener.close()


def task(request_id: str) -> PrefillTask:
    """A request of the gateway that ends by itself only after 8000 tokens."""
    request = Request(request_id, (1, 2, 3), SamplingParams(max_tokens=8000, temperature=0.0))
    return PrefillTask(request, Placement(request_id, "mixed-0", "mixed-0"), GATEWAY, 1e6)


async def test_a_worker_serves_hears_of_a_lost_gateway_and_stops(cluster: Cluster) -> None:
    cluster.post("r1")
    output: WorkerOutput = await cluster.outputs.until(lambda output: bool(output.chunks))
    assert output.chunks[0].request_id == "r1"
    await cluster.load(lambda load: load.num_running == 1)
    _, delta = next_view(cluster.view, gone=(Gone(GATEWAY, "it died"),))
    cluster.process.view_changed(delta)
    await cluster.load(lambda load: (load.num_running, load.num_used_blocks) == (0, 0))
    assert not cluster.life.done()
    await cluster.process.stop()
    await asyncio.wait_for(cluster.life, WAIT_S)


async def test_a_worker_that_is_told_to_drain_leaves_when_it_is_empty(cluster: Cluster) -> None:
    cluster.process.drain(0.0)
    assert await cluster.heard("left") == ("mixed-0",)
    await asyncio.wait_for(cluster.life, WAIT_S)
    async with asyncio.timeout(WAIT_S):
        while not cluster.ends:  # noqa: ASYNC110  the last thing that the process does
            await asyncio.sleep(0.01)
    assert cluster.ends == [("", 0)]


async def test_a_worker_that_is_called_lost_ends_at_once(cluster: Cluster) -> None:
    cluster.is_gone = True
    async with asyncio.timeout(WAIT_S):
        while not cluster.ends:  # noqa: ASYNC110  another thread ends it
            await asyncio.sleep(0.01)
    assert cluster.ends[0] == ("it was taken for lost, and is in the view no more", 1)


async def test_a_worker_says_how_long_its_step_runs(cluster: Cluster) -> None:
    assert cluster.process.worker is not None
    cluster.process.worker.post(task("r1"))
    _, (beat,) = await cluster.said.until(lambda entry: entry[0] == "heartbeat" and entry[1][0].step_s > 0)
    assert beat.member_id == "mixed-0" and beat.step_s < WAIT_S


async def test_what_cannot_be_loaded_is_said_and_ends_the_worker(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    cluster = Cluster(tmp_path, grows=False)
    member_id, error = await cluster.heard("failed")
    assert member_id == "mixed-0" and isinstance(error, ConfigError)
    with pytest.raises(ConfigError):
        await asyncio.wait_for(cluster.life, WAIT_S)


async def test_a_loop_that_breaks_is_an_error_of_who_waits_for_its_end(cluster: Cluster) -> None:
    worker = cluster.process.worker
    assert worker is not None
    worker.post(PrefillTask(None, Placement("r", "mixed-0", "mixed-0"), GATEWAY, 1.0))  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        await asyncio.wait_for(cluster.life, WAIT_S)
