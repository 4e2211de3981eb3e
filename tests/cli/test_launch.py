"""The order in which a cluster is started and stopped, over a Ray that makes recording handles. No process is made."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from cli.cluster import ClusterEnd
from cli.launch import Launcher
from control_plane.gateway.listening import bind_http, format_address
from phasewise.core.config import ServingConfig, build_config
from phasewise.core.errors import ConfigError, ModelLoadError
from phasewise.core.handles import value_of
from tests.support.members import worker_info


class Ref:
    """An answer that is there, or one that a test gives with `future`."""

    def __init__(self, value: Any, future: concurrent.futures.Future[Any] | None = None) -> None:
        self.value = value
        self._future = future

    def future(self) -> concurrent.futures.Future[Any]:
        assert self._future is not None, "nobody waits for this one"
        return self._future


class Handle:
    """An actor's handle: each call is kept as `name.method`, and answered by `answers` or with None."""

    def __init__(self, name: str, runtime: FakeRuntime) -> None:
        self._name = name
        self._runtime = runtime

    def __getattr__(self, method: str) -> Any:
        call = f"{self._name}.{method}"
        runtime = self._runtime

        class Method:
            def remote(self, *arguments: Any) -> Ref:
                runtime.calls.append(call)
                if method in ("wait_closed", "wait_unservable"):
                    return Ref(None, runtime.open_calls.setdefault(call, concurrent.futures.Future()))
                answer = runtime.answers.get(call)
                return Ref(answer(*arguments) if callable(answer) else answer)

        return Method()


class FakeRuntime:
    """RayRuntime (cli/ray_runtime.py) whose actors only record. `calls`: in order, `made` too."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.open_calls: dict[str, concurrent.futures.Future[Any]] = {}
        self.answers: dict[str, Any] = {"gateway-0.bind": "127.0.0.1:1", "gateway-0.serve": "127.0.0.1:2"}

    def start(self) -> None:
        self.calls.append("ray.start")

    def close(self) -> None:
        self.calls.append("ray.close")

    def num_gpus(self) -> int:
        return 0

    def head_address(self) -> str:
        return "127.0.0.2"

    def make(self, actor_class: type, name: str, *arguments: Any, **options: Any) -> Handle:
        self.calls.append(f"make {name}")
        self.answers.setdefault(f"{name}.progress", 1.0)
        if name.split("-")[0] in ("prefill", "decode", "mixed"):
            self.answers.setdefault(f"{name}.load", worker_info(name))
        return Handle(name, self)

    def ask(self, ref: Ref, timeout_s: float = 0.0) -> Any:
        return value_of(ref.value)

    def ask_all(self, refs: list[Ref], timeout_s: float | None = 0.0) -> list[Any]:
        return [value_of(ref.value) for ref in refs]

    def ask_next(self, refs: list[Ref], timeout_s: float) -> list[Ref]:
        value_of(refs[0].value)
        return refs[1:]

    def wait_all(self, refs: list[Ref], timeout_s: float) -> None: ...


def config(**sections: Any) -> ServingConfig:
    values = {"gateway": {"http": "127.0.0.1:0", "grpc": "127.0.0.1:0"}, "model": {"device": "cpu"}, **sections}
    return build_config(values, source="test")


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def launcher(runtime: FakeRuntime) -> Iterator[Launcher]:
    with Launcher(config(), runtime, lambda step, share: None) as launcher:
        yield launcher


def in_order(calls: list[str], *expected: str) -> bool:
    """Whether the first of each of `expected` comes behind those of the ones before it."""
    positions = [calls.index(call) for call in expected]
    return positions == sorted(positions)


def test_all_are_connected_before_any_takes_work_and_join_before_requests_come(
    launcher: Launcher, runtime: FakeRuntime
) -> None:
    cluster = launcher.start()
    assert cluster.addresses == {"http": "127.0.0.1:1", "grpc": "127.0.0.1:2"}
    assert [info.worker_id for info in cluster.workers] == ["prefill-0", "decode-0"]
    for worker in ("prefill-0", "decode-0"):
        other = {"prefill-0": "decode-0", "decode-0": "prefill-0"}[worker]
        assert in_order(
            runtime.calls,
            "ray.start",
            f"make {worker}",
            "gateway-0.bind",
            f"{worker}.load",
            f"{worker}.connect",
            f"{other}.start",
            "control-plane.join",
            "control-plane.join_gateway",
            "control-plane.start_health_checks",
            "gateway-0.serve",
        )
    assert runtime.calls.count("control-plane.join") == 2
    assert not any("open_links" in call for call in runtime.calls), "no worker has a direct link"


def test_the_stop_is_in_order_and_once_even_if_a_process_is_gone(launcher: Launcher, runtime: FakeRuntime) -> None:
    def gone(*_: Any) -> Any:
        raise ConnectionError("the actor died")

    launcher.start()
    runtime.answers["control-plane.stop"] = gone
    num_calls = len(runtime.calls)
    launcher.stop(drain_s=3.0)
    stopping = [
        "gateway-0.drain",
        "control-plane.stop",
        "prefill-0.stop",
        "decode-0.stop",
        "gateway-0.stop",
        "ray.close",
    ]
    assert runtime.calls[num_calls:] == stopping
    launcher.stop(drain_s=3.0)
    assert runtime.calls[num_calls:] == [*stopping, "ray.close"], "half-way up or stopped, only Ray is left to close"


def test_an_error_of_loading_is_raised_and_nobody_is_connected(launcher: Launcher, runtime: FakeRuntime) -> None:
    runtime.answers["decode-0.load"] = ModelLoadError("weights.safetensors is cut")
    with pytest.raises(ModelLoadError, match="is cut"):
        launcher.start()
    assert not any("connect" in call or "serve" in call for call in runtime.calls)


def test_a_taken_port_is_said_before_anything_is_started(runtime: FakeRuntime) -> None:
    with bind_http("127.0.0.1:0") as listener:
        taken = format_address(listener)
        given = config(gateway={"http": "127.0.0.1:0", "grpc": taken})
        with pytest.raises(ConfigError, match=f"--grpc: cannot listen on {taken}"):
            Launcher(given, runtime, lambda step, share: None).start()
    assert runtime.calls == []


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (lambda calls: calls["gateway-0.wait_closed"].set_result(None), "the gateway process has ended"),
        (
            lambda calls: calls["control-plane.wait_closed"].set_exception(ConnectionError()),
            "the control plane process has ended",
        ),
        (lambda calls: calls["control-plane.wait_unservable"].set_result("no decode worker"), "no decode worker"),
    ],
    ids=["gateway", "control-plane", "pool"],
)
def test_a_process_that_nothing_goes_without_ends_the_cluster(
    end: Callable[[dict[str, Any]], None], expected: str, launcher: Launcher, runtime: FakeRuntime
) -> None:
    """Open requests may finish where only new ones cannot be placed."""
    cluster = launcher.start()
    assert cluster.ends.empty()
    end(runtime.open_calls)
    assert cluster.ends.get_nowait() == ClusterEnd(expected, drains=expected == "no decode worker")
    assert cluster.ends.empty()


def test_links_are_opened_from_prefill_to_decode_before_any_worker_starts(runtime: FakeRuntime) -> None:
    opened: dict[str, Any] = {}
    for name in ("prefill-0", "decode-0", "decode-1"):
        runtime.answers[f"{name}.load"] = replace(worker_info(name), link_address=f"127.0.0.1:{len(name)}")
    runtime.answers["prefill-0.open_links"] = opened.update
    with Launcher(config(pools={"decode": {"workers": 2}}), runtime, lambda step, share: None) as launcher:
        launcher.start()
    assert opened == {"decode-0": "127.0.0.1:8", "decode-1": "127.0.0.1:8"}
    assert [call for call in runtime.calls if "open_links" in call] == ["prefill-0.open_links"]
    assert in_order(runtime.calls, "decode-1.connect", "prefill-0.open_links", "prefill-0.start", "decode-0.start")
