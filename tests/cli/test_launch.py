"""How a cluster is started and stopped, over a Ray that makes recording handles. No process is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cli.cluster import RAY_HAS_ENDED, ClusterEnd
from cli.launch import Launcher
from cli.ray_runtime import Outcome
from control_plane.control_plane import StartReport
from control_plane.gateway.listening import bind_http, format_address
from control_plane.gateway.service import ModelCard
from phasewise.core.config import ServingConfig, build_config
from phasewise.core.errors import ConfigError, ModelLoadError
from phasewise.core.handles import value_of
from phasewise.core.placement import WorkerRole
from phasewise.core.view import Member, MemberState, View
from tests.support.members import gateway_info, worker_info

CARD = ModelCard("m", 128, 9, "float32", 1, (2,), True)
WORKERS = [worker_info(name) for name in ("prefill-0#1", "decode-0#1")]
MEMBERS = [Member(info.worker_id, info.role, MemberState.READY, info) for info in WORKERS]
MEMBERS.append(Member("gateway-0#1", None, MemberState.READY, gateway_info("gateway-0#1")))
VIEW = View(7, {member.member_id: member for member in MEMBERS}, admin="127.0.0.1:3")


class Handle:
    """An actor's handle: each call is kept as `name.method`, and answered by `answers` or with None."""

    def __init__(self, name: str, runtime: FakeRuntime) -> None:
        self._name = name
        self._runtime = runtime

    def __getattr__(self, method: str) -> Any:
        call = f"{self._name}.{method}"
        runtime = self._runtime

        class Method:
            def remote(self, *arguments: Any) -> Any:
                runtime.calls.append(call)
                answer = runtime.answers.get(call)
                if isinstance(answer, list):
                    answer = answer.pop(0) if len(answer) > 1 else answer[0]
                return answer(*arguments) if callable(answer) else answer

        return Method()


class FakeRuntime:
    """RayRuntime (cli/ray_runtime.py) whose actors only record. `calls`: in order, `made` too.

    `outcomes` are those of the watch, one after the other; then it stays open.
    """

    def __init__(self, *, is_private: bool = True) -> None:
        self.is_private = is_private
        self.calls: list[str] = []
        self.outcomes: list[Outcome] = []
        self.is_there = True
        self.answers: dict[str, Any] = {
            "control-plane.start_report": [StartReport(False, 0.5), StartReport(True, 1.0)],
            "control-plane.view": VIEW,
            "gateway-0#1.wait_serving": CARD,
        }

    def start(self) -> None:
        self.calls.append("ray.start")

    def close(self) -> None:
        self.calls.append("ray.close")

    def gpus(self) -> tuple[int, int]:
        return 0, 0

    def head_address(self) -> str:
        return "127.0.0.2"

    def make(self, actor_class: type, name: str, *arguments: Any, **options: Any) -> Handle:
        self.calls.append(f"make {name}")
        assert options["max_restarts"] == -1
        return Handle(name, self)

    def find(self, name: str) -> Handle:
        return Handle(name, self)

    def kill(self, actor: Handle) -> None:
        self.calls.append("kill")

    def ask(self, answer: Any, timeout_s: float = 0.0) -> Any:
        return value_of(answer)

    def outcome(self, call: Any, timeout_s: float) -> Outcome:
        return self.outcomes.pop(0) if self.outcomes else Outcome.OPEN

    def is_alive(self) -> bool:
        return self.is_there


def config(**sections: Any) -> ServingConfig:
    free = "127.0.0.1:0"
    values = {"gateway": {"http": free, "grpc": free}, "admin": {"http": free}, "model": {"device": "cpu"}, **sections}
    return build_config(values, source="test")


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def launcher(runtime: FakeRuntime) -> Iterator[Launcher]:
    with Launcher(config(), runtime, lambda step, share: None) as launcher:
        yield launcher


def without_watch(calls: list[str]) -> list[str]:
    return [call for call in calls if call != "control-plane.wait_closed"]


def test_the_control_plane_makes_all_and_the_launcher_waits_until_they_are_ready(runtime: FakeRuntime) -> None:
    shown: list[tuple[str, float]] = []
    with Launcher(config(), runtime, lambda step, share: shown.append((step, share))) as launcher:
        cluster = launcher.start()
        assert cluster.addresses == {"http": "127.0.0.1:8000", "grpc": "127.0.0.1:50051", "admin": "127.0.0.1:3"}
        assert (cluster.model_name, cluster.context_length, cluster.workers) == ("m", 128, WORKERS)
        assert [info.role for info in cluster.workers] == [WorkerRole.PREFILL, WorkerRole.DECODE]
    assert ("loading the model", 0.5) in shown
    assert without_watch(runtime.calls) == [
        "ray.start",
        "make control-plane",
        "control-plane.start_report",
        "control-plane.start_report",
        "control-plane.view",
        "gateway-0#1.wait_serving",
        "control-plane.stop",
        "ray.close",
    ]


def test_the_stop_is_once_even_if_the_control_plane_is_gone(launcher: Launcher, runtime: FakeRuntime) -> None:
    def gone(*_: Any) -> Any:
        raise ConnectionError("the actor died")

    launcher.start()
    runtime.answers["control-plane.stop"] = gone
    launcher.stop(drain_s=3.0)
    launcher.stop(drain_s=3.0)
    assert without_watch(runtime.calls)[-3:] == ["control-plane.stop", "ray.close", "ray.close"]


def test_a_cluster_on_a_ray_of_others_goes_on_once_it_is_up() -> None:
    runtime = FakeRuntime(is_private=False)
    with Launcher(config(), runtime, lambda step, share: None) as launcher:
        launcher.start()
        assert launcher.outlives_us
    assert "control-plane.stop" not in runtime.calls
    assert runtime.calls[-1] == "ray.close"


def test_a_start_that_fails_on_a_ray_of_others_leaves_nothing_there() -> None:
    runtime = FakeRuntime(is_private=False)
    runtime.answers["control-plane.start_report"] = StartReport(False, 0.0, ConfigError("no"))
    with pytest.raises(ConfigError), Launcher(config(), runtime, lambda step, share: None) as launcher:
        launcher.start()
    assert runtime.calls[-3:] == ["control-plane.stop", "kill", "ray.close"]


def test_an_error_of_loading_is_raised(launcher: Launcher, runtime: FakeRuntime) -> None:
    failure = ModelLoadError("weights.safetensors is cut")
    runtime.answers["control-plane.start_report"] = StartReport(False, 0.5, failure)
    with pytest.raises(ModelLoadError, match="is cut"):
        launcher.start()


@pytest.mark.parametrize("which", ["grpc", "admin"])
def test_a_taken_port_is_said_before_anything_is_started(which: str, runtime: FakeRuntime) -> None:
    with bind_http("127.0.0.1:0") as listener:
        taken = format_address(listener)
        sections = {"gateway": {"http": "127.0.0.1:0", "grpc": taken}, "admin": {"http": taken}}
        given = config(**({"gateway": sections["gateway"]} if which == "grpc" else {"admin": sections["admin"]}))
        with pytest.raises(ConfigError, match=f"--{which}: cannot listen on {taken}"):
            Launcher(given, runtime, lambda step, share: None).start()
    assert runtime.calls == []


def ray_ends(runtime: FakeRuntime) -> None:
    runtime.is_there = False


@pytest.mark.parametrize(
    ("is_private", "happens", "expected"),
    [
        (True, lambda r: r.outcomes.append(Outcome.ANSWERED), ClusterEnd(drains=False)),
        (True, lambda r: r.outcomes.append(Outcome.ENDED), ClusterEnd("the control plane has ended for good", False)),
        (False, lambda r: r.outcomes.append(Outcome.ENDED), ClusterEnd(drains=False)),
        (True, ray_ends, ClusterEnd(RAY_HAS_ENDED, drains=False)),
    ],
    ids=["stopped", "ended", "ended elsewhere", "ray"],
)
def test_what_ends_a_cluster(is_private: bool, happens: Callable[[FakeRuntime], None], expected: ClusterEnd) -> None:
    runtime = FakeRuntime(is_private=is_private)
    with Launcher(config(), runtime, lambda step, share: None) as launcher:
        cluster = launcher.start()
        assert cluster.ends.empty()
        happens(runtime)
        assert cluster.ends.get(timeout=20) == expected


def test_a_control_plane_that_is_started_again_is_no_end(launcher: Launcher, runtime: FakeRuntime) -> None:
    cluster = launcher.start()
    runtime.outcomes += [Outcome.UNREACHED, Outcome.OPEN, Outcome.ANSWERED]
    assert cluster.ends.get(timeout=20) == ClusterEnd(drains=False)
    assert runtime.calls.count("control-plane.wait_closed") == 2
