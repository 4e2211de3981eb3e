"""What is made of calls to actors, over handles that record the calls. No cluster."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

import pytest
from ray.exceptions import RayError

from control_plane import remote_members
from control_plane.actors import ControlPlaneActor, GatewayActor, GatewaySettings
from control_plane.remote_members import RemoteMembers
from control_plane.remote_placer import RemotePlacer
from phasewise.core.config import ServingConfig, build_config
from phasewise.core.errors import ConfigError, Overloaded, Unavailable
from phasewise.core.messages import PeerLost
from phasewise.core.placement import PlaceRequest
from tests.support.members import worker_info


class RecordingHandle:
    """An actor's handle: `handle.method.remote(…)` keeps the call, and answers with what `answers` has for it."""

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        calls, answers = self.calls, self._answers

        class Method:
            def remote(self, *arguments: Any) -> Any:
                calls.append((name, arguments))
                return answers.get(name)

        return Method()


class Answer:
    """What a call returns: to be awaited, or asked for its future."""

    def __init__(self, value: Any) -> None:
        self._future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        if isinstance(value, RayError):
            self._future.set_exception(value)
        else:
            self._future.set_result(value)

    def future(self) -> concurrent.futures.Future[Any]:
        return self._future

    def __await__(self) -> Any:
        return asyncio.wrap_future(self._future).__await__()


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


async def test_a_refusal_comes_as_a_value_and_is_raised_again() -> None:
    placer = RemotePlacer(RecordingHandle(place=Answer(Overloaded("full", retry_after_s=3.0))))
    with pytest.raises(Overloaded, match="full") as caught:
        await placer.place(PlaceRequest("r", 10, 1, 8), 5.0)
    assert caught.value.retry_after_s == 3.0


async def test_a_control_plane_that_is_gone_is_unavailable() -> None:
    gone = Answer(RayError("it died"))
    methods = ("place", "snapshot", "links", "probe_links", "wait_closed")
    placer = RemotePlacer(RecordingHandle(**dict.fromkeys(methods, gone)))
    for question in (
        placer.place(PlaceRequest("r", 10, 1, 8), 5.0),
        placer.snapshot(),
        placer.links(),
        placer.probe_links([32], 1.0),
    ):
        with pytest.raises(Unavailable, match="the control plane does not answer"):
            await question
    await placer.control_plane_ended()


async def test_members_are_reached_by_their_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(remote_members.ray, "kill", killed.append)
    worker = RecordingHandle(wait_closed=Answer(RayError("it died")), links=Answer("known"))
    gateway = RecordingHandle(wait_closed=Answer(None))
    members = RemoteMembers()
    members.connect_worker("decode-0", worker)
    members.connect_gateway("gateway-0", gateway)
    members.tell_worker("decode-0", PeerLost("prefill-0"))
    members.tell_gateway("gateway-0", "prefill-0")
    assert worker.calls == [("member_lost", (PeerLost("prefill-0"),))]
    assert gateway.calls == [("worker_lost", ("prefill-0",))]
    assert await members.links("decode-0", ()) == "known"
    assert (await members.worker_ended("decode-0"), await members.gateway_ended("gateway-0")) == ("RayError", "")
    members.kill_worker("decode-0")
    assert killed == [worker]
    with pytest.raises(Unavailable, match="decode-0 was lost"):
        await members.links("decode-0", ())


async def test_the_control_planes_shell_gives_errors_as_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.actors.setup_logging", lambda *_, **__: None)
    actor = ControlPlaneActor(ServingConfig(), None)
    refused = await actor.place(PlaceRequest("r", 10, 1, 8))
    assert isinstance(refused, Unavailable)
    silent = RecordingHandle(links=Answer(RayError("it died")), wait_closed=asyncio.get_running_loop().create_future())
    await actor.join(worker_info("prefill-0"), silent)
    answers = await actor.links(), await actor.probe_links([32], 1.0)
    assert [type(answer) for answer in answers] == [Unavailable, Unavailable]
    await actor.stop()
    await actor.wait_closed()


async def test_the_gateways_shell_gives_errors_as_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.actors.setup_logging", lambda *_, **__: None)
    config = build_config({"gateway": {"http": "127.0.0.1:0"}}, source="test")
    first = GatewayActor(GatewaySettings("gateway-0", config))
    address = await first.bind()
    assert isinstance(address, str)
    config = build_config({"gateway": {"http": address}}, source="test")
    second = GatewayActor(GatewaySettings("gateway-1", config))
    refused = await second.bind()
    assert isinstance(refused, ConfigError) and address in str(refused)
    await second.stop()
    await first.stop()
