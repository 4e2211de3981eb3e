"""How a control plane keeps a cluster, over processes that start and end when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from control_plane.births import ClusterFacts
from control_plane.cluster_admin import ClusterAdmin
from control_plane.control_plane import ControlPlane
from phasewise.core.clock import MonotonicClock
from phasewise.core.config import build_config
from phasewise.core.errors import InvalidRequest, ModelLoadError, Unavailable
from phasewise.core.heartbeat import Description, Heartbeat, Joining
from phasewise.core.identity import MemberId
from phasewise.core.placement import PlaceRequest, WorkerRole
from phasewise.core.view import MemberState
from tests.control_plane.test_link_survey import Workers
from tests.support.members import MemberProcessesInMemory, info_of

FIRST = ["prefill-0#1", "decode-0#1", "gateway-0#1"]


class Cluster:
    """A control plane over processes in memory. It takes hundreds of heartbeats before anybody is called silent."""

    def __init__(self, processes: MemberProcessesInMemory | None = None, **sections: Any) -> None:
        health = {"heartbeat_s": 0.01, "suspect_s": 100.0, "overdue_s": 100.0}
        self.config = build_config({"health": health, **sections}, source="test")
        self.processes = processes or MemberProcessesInMemory()
        self.plane = ControlPlane(ClusterFacts(self.config, "cpu"), self.processes, Workers(), MonotonicClock())
        self.admin = ClusterAdmin(self.plane, drain_s=1.0)

    async def begin(self) -> None:
        await self.plane.begin()

    async def up(self) -> None:
        """Returns when the first members have joined."""
        await self.begin()
        await until(lambda: self.processes.started == FIRST)
        for member_id in FIRST:
            await self.join(member_id)

    async def join(self, member_id: MemberId) -> None:
        await self.plane.join(Joining(info_of(member_id)))

    async def started(self, member_id: MemberId) -> None:
        await until(lambda: member_id in self.processes.started)

    def states(self) -> dict[MemberId, str]:
        return {m: member.state.value for m, member in self.plane.membership.view.members.items()}

    async def close(self) -> None:
        stopping = asyncio.create_task(self.plane.stop(0.0))
        await until(lambda: self.plane.membership.is_stopping)
        while not stopping.done():
            for gateway in self.plane.membership.view.gateways():
                await self.plane.left(gateway.member_id)
            await asyncio.sleep(0)
        await stopping


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20.0):
        while not condition():  # noqa: ASYNC110  what others do is looked at again and again
            await asyncio.sleep(0.001)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    await cluster.up()
    yield cluster
    await cluster.close()


async def test_a_cluster_starts_with_what_is_configured_and_is_up_when_all_are_ready() -> None:
    cluster = Cluster()
    await cluster.begin()
    await until(lambda: cluster.processes.started == FIRST)
    await cluster.plane.loading("prefill-0#1", 0.5)
    await cluster.plane.loading("decode-0#1", 0.25)
    await cluster.plane.loading("gateway-0#1", 1.0)
    report = await cluster.plane.start_report()
    assert (report.is_up, report.share, report.failure) == (False, 0.25, None)
    for member_id in FIRST:
        await cluster.join(member_id)
    assert (await cluster.plane.start_report()).is_up
    assert cluster.processes.started == FIRST
    await cluster.close()
    assert set(cluster.processes.killed) == set(FIRST)


async def test_a_member_whose_process_ends_is_started_again_under_its_name(cluster: Cluster) -> None:
    cluster.processes.end("decode-0#1")
    await cluster.started("decode-0#2")
    assert cluster.states() == {"prefill-0#1": "ready", "gateway-0#1": "ready", "decode-0#2": "loading"}
    with pytest.raises(Unavailable, match="no decode worker is ready"):
        await cluster.plane.place(PlaceRequest("r", 10, 1, 8))
    await cluster.join("decode-0#2")
    assert (await cluster.plane.place(PlaceRequest("r", 10, 1, 8))).decode_worker == "decode-0#2"
    assert (await cluster.plane.heartbeat(Heartbeat("decode-0#1", 1))).is_gone


async def test_a_gateways_successor_listens_where_it_did() -> None:
    cluster = Cluster(gateway={"http": "127.0.0.1:0", "grpc": "127.0.0.1:0"})
    await cluster.up()
    cluster.processes.end("gateway-0#1")
    await cluster.started("gateway-0#2")
    birth = cluster.processes.births[-1]
    assert birth.role is None
    assert (birth.config.gateway.http, birth.config.gateway.grpc) == ("127.0.0.1:8000", "127.0.0.1:50051")
    await cluster.close()


async def test_what_a_member_could_not_load_is_the_starts_failure() -> None:
    cluster = Cluster()
    await cluster.begin()
    await cluster.started("decode-0#1")
    await cluster.plane.failed("decode-0#1", ModelLoadError("weights.safetensors is cut"))
    failure = (await cluster.plane.start_report()).failure
    assert isinstance(failure, ModelLoadError) and "is cut" in str(failure)
    await cluster.close()


async def test_who_ends_again_and_again_before_the_cluster_is_up_is_a_failure() -> None:
    cluster = Cluster()
    await cluster.begin()
    for birth in (1, 2, 3):
        await cluster.started(f"decode-0#{birth}")
        await until(lambda birth=birth: cluster.processes.watches(f"decode-0#{birth}"))
        cluster.processes.end(f"decode-0#{birth}")
    await until(lambda: bool(cluster.plane.keeper.reconciler.why_failing(3)))
    failure = (await cluster.plane.start_report()).failure
    assert str(failure) == "decode-0 could not be started, 3 times: its process has ended"
    await cluster.close()


async def test_what_there_is_too_little_of_is_waited_for() -> None:
    cluster = Cluster()
    cluster.processes.lacking["decode-0"] = "it needs 1 GPU, and 0 are free"
    await cluster.begin()
    await until(lambda: cluster.processes.started == ["prefill-0#1", "gateway-0#1"])
    cluster.processes.lacking.clear()
    await cluster.started("decode-0#1")
    await cluster.close()


async def test_an_operator_scales_up_and_down(cluster: Cluster) -> None:
    status = await cluster.admin.order("scale", {"prefill": 2, "decode": 2})
    assert status["cluster"]["desired"] == {"prefill": 2, "decode": 2, "mixed": 0, "gateway": 1}
    for member_id in ("prefill-1#1", "decode-1#1"):
        await cluster.started(member_id)
        await cluster.join(member_id)
    await cluster.admin.order("scale", {"decode": 1, "prefill": 1})
    await until(lambda: len(cluster.processes.drained) == 2)
    assert {m for m, _ in cluster.processes.drained} == {"prefill-1#1", "decode-1#1"}
    await cluster.plane.left("decode-1#1")
    await cluster.plane.left("prefill-1#1")
    assert cluster.states().keys() == set(FIRST)
    assert set(cluster.processes.killed) == {"prefill-1#1", "decode-1#1"}


async def test_an_operator_drains_a_worker_and_its_successor_starts_beside_it(cluster: Cluster) -> None:
    await cluster.admin.order("drain", {"worker": "decode-0"})
    await cluster.started("decode-1#1")
    assert cluster.states()["decode-0#1"] == "draining"
    await cluster.join("decode-1#1")
    await cluster.plane.left("decode-0#1")
    assert cluster.processes.started == [*FIRST, "decode-1#1"]


async def test_an_operator_changes_a_role_and_nobody_is_started_or_drained_for_it(cluster: Cluster) -> None:
    await cluster.admin.order("scale", {"decode": 2})
    await cluster.started("decode-1#1")
    await cluster.join("decode-1#1")
    status = await cluster.admin.order("role", {"worker": "decode-1", "role": "prefill"})
    assert status["cluster"]["desired"] == {"prefill": 2, "decode": 1, "mixed": 0, "gateway": 1}
    assert cluster.processes.changed == [("decode-1#1", WorkerRole.PREFILL)]
    await asyncio.sleep(0.03)  # three heartbeats, at each of which the reconciler decides
    await cluster.plane.role_changed("decode-1#1", WorkerRole.PREFILL)
    member = cluster.plane.membership.view.members["decode-1#1"]
    assert (member.role, member.state) == (WorkerRole.PREFILL, MemberState.READY)
    await asyncio.sleep(0.03)
    assert cluster.processes.started == [*FIRST, "decode-1#1"]
    assert cluster.processes.drained == []


@pytest.mark.parametrize(
    ("order", "fields", "message"),
    [
        ("scale", {"decoder": 2}, "no pool 'decoder'"),
        ("scale", {"decode": -1}, "decode must be 0 to 1024"),
        ("scale", {"decode": True}, "decode must be a whole number"),
        ("scale", {"decode": 0}, "no request could be served"),
        ("scale", {"gateway": 0}, "at least one gateway"),
        ("drain", {"worker": "decode-7"}, "no member 'decode-7': there are decode-0, gateway-0, prefill-0"),
        ("drain", {}, "worker is missing"),
        ("role", {"worker": "decode-0", "role": "prefill"}, "no request could be served"),
        ("role", {"worker": "decode-0", "role": "decode"}, "is a decode worker already"),
        ("role", {"worker": "gateway-0", "role": "decode"}, "is a gateway"),
        ("role", {"worker": "decode-0", "role": "x"}, "no role 'x'"),
        ("stop", {"drain_s": -1}, "drain_s must be 0 to 86400"),
    ],
)
async def test_an_order_that_makes_no_sense_changes_nothing(
    order: str, fields: dict[str, Any], message: str, cluster: Cluster
) -> None:
    version = cluster.plane.membership.view.version
    with pytest.raises(InvalidRequest, match=message):
        await cluster.admin.order(order, fields)
    assert cluster.plane.membership.view.version == version


async def test_a_control_plane_that_is_started_again_takes_over_and_questions_wait_meanwhile(cluster: Cluster) -> None:
    await cluster.admin.order("scale", {"decode": 2})
    await cluster.started("decode-1#1")
    view = cluster.plane.membership.view
    processes = MemberProcessesInMemory()
    processes.there = {m: Description(info_of(m), view) for m in FIRST} | {"decode-1#1": None}
    second = Cluster(processes)
    placing = asyncio.create_task(second.plane.place(PlaceRequest("r", 10, 1, 8)))
    beating = asyncio.create_task(second.plane.heartbeat(Heartbeat("decode-0#1", view.version)))
    await asyncio.sleep(0.01)
    assert not placing.done() and not beating.done()
    await second.begin()
    assert (await placing).decode_worker == "decode-0#1"
    assert (await beating).view == second.plane.membership.view
    assert second.plane.keeper.desired.size(WorkerRole.DECODE) == 2, "what the operator wanted"
    await second.join("decode-1#1")
    await asyncio.sleep(0.03)
    assert processes.started == [], "all were there"
    processes.end("decode-0#1")
    await second.started("decode-0#2")
    await second.close()


async def test_a_stop_drains_gateways_then_stops_workers_then_ends_all(cluster: Cluster) -> None:
    await cluster.admin.order("stop", {"drain_s": 3})
    await until(lambda: cluster.processes.drained == [("gateway-0#1", 3.0)])
    assert cluster.processes.stopped == []
    await cluster.plane.left("gateway-0#1")
    await asyncio.wait_for(cluster.plane.wait_closed(), 20.0)
    assert sorted(cluster.processes.stopped) == ["decode-0#1", "prefill-0#1"]
    assert set(cluster.processes.killed) == set(FIRST)
    assert cluster.processes.started == FIRST, "nobody is replaced"
