"""The life of a worker's process with a real engine, without Ray: the others are handles that record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from cli.worker_plan import worker_settings
from phasewise.core.config import build_config
from phasewise.core.messages import GatewayLost, PrefillTask, WorkerLoad, WorkerOutput
from phasewise.core.placement import Placement, WorkerState
from phasewise.core.request import Request, SamplingParams
from phasewise.delivery.listener import TokenListener
from tests.support.tiny_model import save_tiny_model
from workers.process import WorkerProcess

WAIT_S = 30.0


class Handle:
    """An actor's handle with one method: `handle.<any>.remote(value)` calls `take`."""

    def __init__(self, take: Callable[[Any], None]) -> None:
        self._take = take

    def __getattr__(self, name: str) -> Any:
        return self

    def remote(self, value: Any) -> None:
        self._take(value)


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


@pytest.fixture
async def loaded(tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    """A mixed worker with a tiny model; stopped in the end, or its loop's thread would keep the tests from ending."""
    save_tiny_model(tmp_path)
    pools = {"prefill": {"workers": 0}, "decode": {"workers": 0}, "mixed": {"workers": 1}}
    sections = {"model": {"path": str(tmp_path)}, "cache": {"kv_cache_gib": 0.02}, "pools": pools}
    process = WorkerProcess(worker_settings(build_config(sections, source="test"), "cpu", None)[0])
    assert process.progress == 0.0
    info = await process.load()
    assert (info.worker_id, process.progress) == ("mixed-0", 1.0)
    yield process
    await process.stop()


def task(request_id: str) -> PrefillTask:
    """A request of gateway-0 that ends by itself only after 8000 tokens."""
    request = Request(request_id, (1, 2, 3), SamplingParams(max_tokens=8000, temperature=0.0))
    return PrefillTask(request, Placement(request_id, "mixed-0", "mixed-0"), "gateway-0", 1e6)


async def test_a_worker_serves_hears_of_a_lost_gateway_and_stops(loaded: WorkerProcess) -> None:
    loads, outputs = Queue(), Queue()
    listener = TokenListener("gateway-0", "", Gateway(outputs))
    loaded.connect({}, {"gateway-0": await listener.open("127.0.0.1")}, Handle(loads.put))
    loaded.start()
    closed = asyncio.create_task(loaded.wait_closed())
    assert loaded.worker is not None
    loaded.worker.post(task("r1"))
    output: WorkerOutput = await outputs.until(lambda output: bool(output.chunks))
    assert output.chunks[0].request_id == "r1"
    await loads.until(lambda load: load.num_running == 1)
    loaded.member_lost(GatewayLost("gateway-0"))
    await loads.until(lambda load: (load.num_running, load.num_used_blocks) == (0, 0))
    assert not closed.done()
    await loaded.stop()
    await asyncio.wait_for(closed, WAIT_S)
    last: WorkerLoad = await loads.until(lambda load: load.state is not WorkerState.READY)
    assert last.state is WorkerState.STOPPED
    await listener.close()


async def test_a_loop_that_breaks_is_an_error_of_who_waits_for_its_end(
    loaded: WorkerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(load: WorkerLoad) -> None:
        raise ConnectionError("the control plane cannot be reached")

    loaded.connect({}, {}, Handle(fail))
    loaded.start()
    with pytest.raises(ConnectionError, match="cannot be reached"):
        await asyncio.wait_for(loaded.wait_closed(), WAIT_S)
    assert "the step loop broke" in caplog.text
