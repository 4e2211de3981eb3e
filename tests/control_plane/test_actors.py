"""What the actors' shells do beside delegating."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from ray.exceptions import RayError

from control_plane import actors
from control_plane.actors import ControlPlaneActor, GatewayActor, GatewaySettings, RemotePlacer
from control_plane.link_survey import LinkSurvey
from phasewise.core.clock import ManualClock
from phasewise.core.config import ServingConfig, build_config
from phasewise.core.errors import Overloaded, Unavailable
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import PeerLost, WorkerInfo
from phasewise.core.placement import WorkerRole
from phasewise.core.profile import DeviceProfile
from tests.control_plane.test_link_survey import Workers


class RecordingHandle:
    """An actor's handle: `handle.method.remote(…)` keeps the call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        calls = self.calls

        class Method:
            def remote(self, *arguments: Any) -> None:
                calls.append((name, arguments))

        return Method()


async def test_what_happens_in_one_turn_of_the_loop_is_told_in_one_call_and_in_order() -> None:
    handle = RecordingHandle()
    placer = RemotePlacer(handle)
    placer.first_token("a")
    placer.first_token("b")
    placer.finished("a", 7)
    assert handle.calls == []
    await asyncio.sleep(0)
    assert handle.calls == [("progress", ([("a", None), ("b", None), ("a", 7)],))]
    placer.finished("b", 0)
    await asyncio.sleep(0)
    assert handle.calls[1:] == [("progress", ([("b", 0)],))]


async def test_the_links_are_probed_by_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.actors.setup_logging", lambda *_, **__: None)
    actor = ControlPlaneActor(ServingConfig(), None)
    has_begun, may_go_on = asyncio.Event(), asyncio.Event()
    for info, _ in Workers().members():
        actor._scheduler.worker_joined(info)

    class Slow(Workers):
        async def probe(self, *arguments: Any) -> Any:
            has_begun.set()
            await may_go_on.wait()
            return await super().probe(*arguments)

    monkeypatch.setattr(actor, "_link_asker", Slow())
    first = asyncio.create_task(actor.probe_links([32], 10.0))
    await asyncio.wait_for(has_begun.wait(), 10)
    second = await actor.probe_links([32], 10.0)
    assert isinstance(second, Overloaded)
    assert isinstance(await actor.links(), LinkSurvey), "looking is always allowed"
    may_go_on.set()
    survey = await asyncio.wait_for(first, 10)
    assert isinstance(survey, LinkSurvey)
    assert [pair.probes[0].seconds for pair in survey.pairs] == [0.5] * 4
    assert not isinstance(await actor.probe_links([32], 10.0), Overloaded)


async def test_a_worker_that_does_not_answer_is_an_error_of_the_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.actors.setup_logging", lambda *_, **__: None)
    actor = ControlPlaneActor(ServingConfig(), None)
    info, _ = Workers().members()[0]
    actor._scheduler.worker_joined(info)  # and it has no handle: as if it was lost this moment
    answers = await actor.links(), await actor.probe_links([32], 1.0)
    assert [type(answer) for answer in answers] == [Unavailable, Unavailable]
    assert not actor._is_probing


async def test_a_cluster_that_is_stopped_does_not_end_for_want_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.actors.setup_logging", lambda *_, **__: None)
    control_plane = ControlPlaneActor(ServingConfig(), None)
    for info, _ in Workers().members():
        control_plane._scheduler.worker_joined(info)
    unservable = asyncio.create_task(control_plane.wait_unservable())
    await asyncio.sleep(0)
    await control_plane.stop()
    assert await asyncio.wait_for(unservable, 5) == ""


async def test_the_start_of_a_cluster_is_no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control plane is made before workers load their models, and first ticks a heartbeat after the last has."""
    clock, config = ManualClock(), ServingConfig()
    monkeypatch.setattr(actors, "setup_logging", lambda *_, **__: None)
    monkeypatch.setattr(actors, "freeze_collector", lambda: None)
    monkeypatch.setattr(actors, "MonotonicClock", lambda: clock)
    control_plane = ControlPlaneActor(config, None)
    clock.advance(60.0)
    await control_plane.start_health_checks()
    clock.advance(config.health.heartbeat_s)
    control_plane._scheduler.tick()
    assert not control_plane._scheduler.listened.is_behind_pause, "a warning would be logged"
    for watch in control_plane._watches:
        watch.cancel()


class WorkerHandle(RecordingHandle):
    """A worker's handle; `wait_closed` raises what `ends` gets, as a call to an actor whose loop broke does."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def wait_closed(self) -> Any:
        return self

    def remote(self) -> asyncio.Future[None]:
        return self.ends


async def test_a_worker_whose_loop_broke_is_ended_and_its_peers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process lives on, with its memory of the device and its ends of the links."""
    killed: list[Any] = []
    is_killed = asyncio.Event()

    def kill(handle: Any) -> None:
        killed.append(handle)
        is_killed.set()

    monkeypatch.setattr(actors, "setup_logging", lambda *args, **options: None)
    monkeypatch.setattr(actors.ray, "kill", kill)
    control_plane = ControlPlaneActor(ServingConfig(), None)
    handles = {name: WorkerHandle() for name in ("prefill-0", "decode-0")}
    profile = DeviceProfile.linear(0.0, 0.001, 0.0, 0.001)
    for name, handle in handles.items():
        role, spec = WorkerRole(name.split("-")[0]), KVCacheSpec(2, 1, 4, 16, "float32")
        await control_plane.join(WorkerInfo(name, role, 1, "h", "cpu", "float32", 1, spec, 8, 128, profile), handle)
    unservable = asyncio.create_task(control_plane.wait_unservable())
    await asyncio.sleep(0)
    assert not unservable.done()
    handles["decode-0"].ends.set_exception(RayError("the device was lost"))
    await asyncio.wait_for(is_killed.wait(), 5)
    assert killed == [handles["decode-0"]]
    assert handles["prefill-0"].calls == [("post", (PeerLost("decode-0"),))]
    assert [load.state.value for _, load in await control_plane.snapshot()] == ["ready", "lost"]
    reason = "no decode worker is ready: decode-0 was lost (RayError), and lost workers do not come back"
    assert await asyncio.wait_for(unservable, 5) == await control_plane.wait_unservable() == reason
    late_gateway = WorkerHandle()
    await control_plane.join_gateway("late", late_gateway)
    assert late_gateway.calls == [("worker_lost", ("decode-0",))]
    await control_plane.stop()
    handles["prefill-0"].ends.set_result(None)
    late_gateway.ends.set_result(None)
    await asyncio.gather(*control_plane._watches)
    assert len(killed) == 1, "a worker that was stopped is not lost"


async def test_a_gateway_says_that_it_lives_while_the_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.actors.setup_logging", lambda *_, **__: None)
    config = build_config({"gateway": {"http": "127.0.0.1:0"}}, source="test")
    gateway = GatewayActor(GatewaySettings("gateway-0", config))
    address = await gateway.bind()
    async with httpx.AsyncClient(base_url=f"http://{address}") as http:
        assert (await http.get("/health/live")).status_code == 200
        for answer in (await http.get("/health/ready"), await http.post("/v1/completions", json={"prompt": "a"})):
            assert answer.status_code == 503 and "being loaded" in answer.json()["error"]["message"]
    await gateway.stop()
