"""What a cluster is to its host, and what a pause of one of its processes does."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import phasewise
from tests.support.processes import ClusterProcess, processes_of
from tests.support.served import Served, served, until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="reads sockets and priorities from /proc, which only Linux has"),
]

OVERDUE_S = 3.0
CONFIG = f"""
health: {{heartbeat_s: 0.25, overdue_s: {OVERDUE_S}}}
gateway: {{drain_s: 2}}
"""

# One method of each of Ray's services.
RAY_METHODS = (
    "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.rpc.NodeManagerService/GetSystemConfig",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
)


@pytest.fixture(scope="module")
def guest(tiny_model: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    file = tmp_path_factory.mktemp("guest") / "cluster.yaml"
    file.write_text(CONFIG)
    with served(str(tiny_model[0]), "--config", str(file)) as cluster:
        yield cluster


@pytest.fixture
def processes(guest: Served) -> list[ClusterProcess]:
    return processes_of(guest.pid)


def ours(processes: list[ClusterProcess]) -> list[ClusterProcess]:
    """Gateway, control plane and workers."""
    found = [p for p in processes if "Actor" in p.command and p.command.startswith("ray::")]
    assert len(found) == 4, [p.command for p in processes]
    return found


def test_every_thread_of_ours_is_as_nice_as_the_command(guest: Served, processes: list[ClusterProcess]) -> None:
    own = os.getpriority(os.PRIO_PROCESS, guest.pid)
    for process in ours(processes):
        assert process.niceness == {own}, process.command


def test_nobody_listens_to_the_network_without_the_token(guest: Served, processes: list[ClusterProcess]) -> None:
    open_to_all = [
        (process.command, port)
        for process in processes
        for address, port in process.listens()
        if address in ("0.0.0.0", "::")
    ]
    assert open_to_all, "Ray's own ports, which docs/operations.md tells of"
    for command, port in open_to_all:
        codes = set()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            for method in RAY_METHODS:
                call = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
                with pytest.raises(grpc.RpcError) as caught:
                    call(b"", timeout=30)
                codes.add(caught.value.code())
        # Each port has one of the services.
        assert codes == {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}, (command, port)


def test_ray_keeps_no_list_of_tasks(processes: list[ClusterProcess]) -> None:
    """What every process was told; that gcs_server then stays as it is takes minutes to see."""
    (server,) = [p for p in processes if "gcs_server" in p.command.split(" ", 1)[0]]
    for process in (server, *ours(processes)):
        assert process.environment["RAY_task_events_report_interval_ms"] == "0", process.command


def test_a_pause_of_the_control_plane_is_not_the_workers_silence(
    guest: Served, processes: list[ClusterProcess]
) -> None:
    (control_plane,) = [p for p in processes if "ControlPlaneActor" in p.command]
    with phasewise.Client(guest.grpc, max_retries=0) as client:
        stream = client.stream(token_ids=[1, 2, 3], max_tokens=8000, temperature=0.0, ignore_eos=True)
        deltas = iter(stream)
        next(deltas)
        os.kill(control_plane.pid, signal.SIGSTOP)
        try:
            end_s = time.monotonic() + OVERDUE_S + 1.0
            while time.monotonic() < end_s:
                next(deltas)  # it needs no control plane
        finally:
            num_lines = len(guest.lines)
            os.kill(control_plane.pid, signal.SIGCONT)
        pause = "the control plane did not run for"
        until(lambda: any(pause in line for line in guest.lines[num_lines:]), 20.0)
        next(deltas)
        stream.close()
        end_s = time.monotonic() + OVERDUE_S + 1.0  # in which a silence could become too long
        while time.monotonic() < end_s:
            assert client.generate(token_ids=[5, 6], max_tokens=8, ignore_eos=True).usage.num_output_tokens == 8
        assert [worker["state"] for worker in guest.status()["workers"]] == ["ready", "ready"]
    assert not any("worker was lost" in line for line in guest.lines)
