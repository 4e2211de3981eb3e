"""What is made of calls to actors, over handles that record the calls. No cluster."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayError

from control_plane import remote_members
from control_plane.births import ClusterFacts
from control_plane.control_plane_actor import ControlPlaneActor, ControlPlaneSettings
from control_plane.remote_members import RemoteMembers
from control_plane.remote_placer import RemotePlacer
from phasewise.core.birth import MemberBirth
from phasewise.core.config import build_config
from phasewise.core.errors import DeadlineExceeded, Overloaded, Unavailable
from phasewise.core.heartbeat import Joining
from phasewise.core.placement import Placement, PlaceRequest, WorkerRole
from phasewise.core.view import ViewDelta
from tests.support.members import worker_info

GATEWAY = "gateway-0#1"
REQUEST = PlaceRequest("r", 10, 1, 8)


class RecordingHandle:
    """An actor's handle: `handle.method.remote(…)` keeps the call, and answers with what `answers` has for it: always
    the same, or of a list one after the other."""

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        calls, answers = self.calls, self._answers

        class Method:
            def remote(self, *arguments: Any) -> Any:
                calls.append((name, arguments))
                answer = answers.get(name)
                return answer.pop(0) if isinstance(answer, list) else answer

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
    placer = RemotePlacer(handle, GATEWAY)
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
    placer = RemotePlacer(RecordingHandle(place=Answer(Overloaded("full", retry_after_s=3.0))), GATEWAY)
    with pytest.raises(Overloaded, match="full") as caught:
        await placer.place(REQUEST, 5.0)
    assert caught.value.retry_after_s == 3.0


async def test_a_request_waits_for_a_control_plane_that_is_started_again_and_says_whose_it_is() -> None:
    placement = Placement("r", "prefill-0#1", "decode-0#1")
    handle = RecordingHandle(place=[Answer(RayError("away")), Answer(RayError("away")), Answer(placement)])
    assert await RemotePlacer(handle, GATEWAY).place(REQUEST, 30.0) == placement
    assert [arguments[0].gateway_id for _, arguments in handle.calls] == [GATEWAY] * 3


async def test_a_request_waits_no_longer_than_its_deadline_and_its_placement_is_given_back() -> None:
    handle = RecordingHandle(place=Answer(RayError("away")))
    with pytest.raises(DeadlineExceeded, match="before it was placed"):
        await RemotePlacer(handle, GATEWAY).place(REQUEST, 0.01)
    await asyncio.sleep(0)
    assert handle.calls[-1] == ("progress", ([("r", 0)],))


async def test_a_control_plane_that_is_gone_is_unavailable() -> None:
    ended, gone = Answer(ActorDiedError()), Answer(RayError("it died"))
    placer = RemotePlacer(RecordingHandle(place=ended, snapshot=gone, links=gone, probe_links=gone), GATEWAY)
    with pytest.raises(Unavailable, match="the control plane has ended"):
        await placer.place(REQUEST, 5.0)
    for question in (placer.snapshot(), placer.links(), placer.probe_links([32], 1.0)):
        with pytest.raises(Unavailable, match="the control plane does not answer"):
            await question


class Directory:
    """Ray as far as RemoteMembers asks it for actors."""

    def __init__(self, **actors: RecordingHandle) -> None:
        self.actors = {f"{name.replace('_', '-')}#1": handle for name, handle in actors.items()}
        self.killed: list[Any] = []

    def get_actor(self, name: str) -> RecordingHandle:
        if name not in self.actors:
            raise ValueError(name)
        return self.actors[name]

    def kill(self, handle: RecordingHandle) -> None:
        self.killed.append(handle)


async def test_members_are_found_by_their_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = RecordingHandle(
        wait_closed=[Answer(RayError("not reached")), Answer(ActorDiedError())],
        links=Answer("known"),
        describe=Answer("d"),
    )
    gateway = RecordingHandle(wait_closed=Answer(None), describe=Answer(RayError("silent")))
    directory = Directory(decode_0=worker, gateway_0=gateway)
    monkeypatch.setattr(remote_members.ray, "get_actor", directory.get_actor)
    monkeypatch.setattr(remote_members.ray, "kill", directory.kill)
    members = RemoteMembers(object, object)
    assert (await members.describe("decode-0#1"), await members.describe("gateway-0#1")) == ("d", None)
    assert await members.describe("decode-0#2") is None, "there is no such process"
    delta = ViewDelta(3)
    members.tell("decode-0#1", delta)
    members.drain("gateway-0#1", 3.0)
    members.change_role("decode-0#1", WorkerRole.PREFILL)
    assert worker.calls[1:] == [("view_changed", (delta,)), ("change_role", (WorkerRole.PREFILL,))]
    assert gateway.calls[1:] == [("drain", (3.0,))]
    assert await members.links("decode-0#1", ()) == "known"
    ends = [await members.ended(m) for m in ("decode-0#1", "gateway-0#1", "decode-0#2")]
    assert ends == ["its process has ended", "", "its process has ended"]
    members.kill("decode-0#1")
    members.kill("decode-0#1")
    assert directory.killed == [worker]
    del directory.actors["decode-0#1"]
    with pytest.raises(Unavailable, match="decode-0#1 was lost"):
        await members.links("decode-0#1", ())


async def test_what_a_worker_needs_and_nobody_has_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_config({"pools": {"decode": {"resources": {"highmem": 2}}}}, source="test")
    members = RemoteMembers(object, object)
    monkeypatch.setattr(remote_members.ray, "available_resources", lambda: {"CPU": 4.0, "GPU": 1.0, "highmem": 2.0})
    gpus = MemberBirth("decode-0#1", WorkerRole.DECODE, config, "cuda", tensor_parallel=2)
    assert await members.lacks(gpus) == "it needs 2 GPU, and 1 free"
    assert await members.lacks(MemberBirth("decode-0#1", WorkerRole.DECODE, config, "cuda")) == ""
    monkeypatch.setattr(remote_members.ray, "available_resources", lambda: {"GPU": 1.0})
    assert await members.lacks(MemberBirth("decode-0#1", WorkerRole.DECODE, config)) == "it needs 2 highmem, and 0 free"
    assert await members.lacks(MemberBirth("prefill-0#1", WorkerRole.PREFILL, config)) == ""
    assert await members.lacks(MemberBirth("gateway-0#1", None, config)) == ""


async def test_the_control_planes_shell_gives_errors_as_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.control_plane_actor.setup_logging", lambda *_, **__: None)
    monkeypatch.setattr(remote_members.ray.util, "list_named_actors", lambda: ["control-plane"])
    monkeypatch.setattr(remote_members.ray, "nodes", lambda: [{"Alive": True}])
    monkeypatch.setattr(RemoteMembers, "lacks", _lacking)
    config = build_config({"admin": {"http": "127.0.0.1:0"}}, source="test")
    actor = ControlPlaneActor(ControlPlaneSettings(ClusterFacts(config, "cpu"), object, object))
    refused = await actor.place(REQUEST)
    assert isinstance(refused, Unavailable)
    assert isinstance(await actor.join(Joining(worker_info("prefill-0#7"))), Unavailable)
    await actor.stop(0.0)
    await actor.wait_closed()


async def _lacking(self: RemoteMembers, birth: MemberBirth) -> str:
    return "nobody is started here"
