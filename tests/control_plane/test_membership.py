"""Who is told of what, and when: events in, messages out, no process and no event loop."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

import pytest

from control_plane.cluster_scheduler import ClusterScheduler
from control_plane.membership import Membership
from phasewise.core.clock import ManualClock
from phasewise.core.errors import Unavailable
from phasewise.core.messages import GatewayLost, PeerLost, WorkerLoad
from phasewise.core.placement import PlaceRequest, WorkerId, WorkerRole, WorkerState
from tests.support.members import RecordingMembers, worker_info

OVERDUE_S = 5.0
HEARTBEAT_S = 1.0
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


class Cluster:
    """A membership that `workers` and `gateways` have joined."""

    def __init__(self, workers: Iterable[WorkerId] = WORKERS, gateways: Iterable[str] = ("gateway-0",)) -> None:
        self.clock = ManualClock()
        self.scheduler = ClusterScheduler(self.clock, max_waiting=9, overdue_s=OVERDUE_S, heartbeat_s=HEARTBEAT_S)
        self.members = RecordingMembers()
        self.membership = Membership(self.scheduler, self.members)
        for worker_id in workers:
            self.membership.worker_joined(worker_info(worker_id))
        for gateway_id in gateways:
            self.membership.gateway_joined(gateway_id)

    def report(self, worker_ids: Collection[WorkerId]) -> None:
        for worker_id in worker_ids:
            role = WorkerRole(worker_id.split("-")[0])
            self.scheduler.worker_load(WorkerLoad(worker_id, role, WorkerState.READY))

    def beat(self, count: int, *, silent: Collection[WorkerId] = ()) -> None:
        """So many heartbeats: all workers but the silent ones report, then comes the tick."""
        for _ in range(count):
            self.clock.advance(HEARTBEAT_S)
            self.report([worker_id for worker_id in WORKERS if worker_id not in silent])
            self.membership.tick()

    def states(self) -> dict[WorkerId, WorkerState]:
        return {member.info.worker_id: member.load.state for member in self.scheduler.registry.members()}


def test_of_a_dead_worker_peers_and_gateways_hear_once_and_its_process_is_killed() -> None:
    cluster = Cluster(gateways=("gateway-0", "gateway-1"))
    cluster.membership.worker_ended("decode-0", "ActorDiedError")
    assert cluster.members.killed == ["decode-0"]
    told = cluster.members.take_told()
    assert len(told) == 5
    assert set(told) == {
        ("prefill-0", PeerLost("decode-0")),
        ("prefill-1", PeerLost("decode-0")),
        ("decode-1", PeerLost("decode-0")),
        ("gateway-0", "decode-0"),
        ("gateway-1", "decode-0"),
    }
    assert cluster.states()["decode-0"] is WorkerState.LOST
    placed = {cluster.scheduler.place(PlaceRequest(f"r{i}", 10, 1, 8)).decode_worker for i in range(4)}
    assert placed == {"decode-1"}
    cluster.membership.worker_ended("decode-0", "ActorDiedError")
    cluster.beat(20)
    assert (cluster.members.take_told(), cluster.members.killed) == ([], ["decode-0"]), "it is lost once"


def test_a_silent_worker_is_killed_after_its_time_and_its_end_is_no_further_news(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster = Cluster()
    cluster.beat(5, silent=["prefill-1"])
    assert cluster.members.killed == []
    cluster.beat(1, silent=["prefill-1"])
    assert cluster.members.killed == ["prefill-1"]
    assert ("gateway-0", "prefill-1") in cluster.members.take_told()
    assert "silent for 5 s" in caplog.text
    cluster.membership.worker_ended("prefill-1", "ActorDiedError")  # it was killed, and so it ends
    assert cluster.members.take_told() == []


def test_a_worker_that_is_called_lost_stays_lost_though_it_reports() -> None:
    cluster = Cluster()
    cluster.beat(6, silent=["decode-0"])
    cluster.beat(3)
    assert cluster.states()["decode-0"] is WorkerState.LOST
    assert cluster.members.killed == ["decode-0"]


def test_a_pause_of_the_control_plane_is_said_and_is_nobodys_silence(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster()
    cluster.beat(3)
    assert "did not run" not in caplog.text
    cluster.clock.advance(3600.0)
    cluster.membership.tick()  # the reports that queued up are read behind it
    assert "the control plane did not run for 3599.0 s; no worker's silence counts for it" in caplog.text
    cluster.beat(20)
    assert (cluster.members.killed, cluster.members.take_told()) == ([], [])
    assert caplog.text.count("did not run") == 1


def test_a_worker_that_died_in_a_pause_is_found_in_its_time_behind_it() -> None:
    cluster = Cluster()
    cluster.beat(3)
    cluster.clock.advance(3600.0)
    cluster.membership.tick()
    cluster.beat(4, silent=["decode-1"])
    assert cluster.members.killed == []
    cluster.beat(1, silent=["decode-1"])
    assert cluster.members.killed == ["decode-1"]


@pytest.mark.parametrize(("fault", "level"), [("ActorDiedError", logging.ERROR), ("", None)])
def test_of_a_gateway_that_ended_every_worker_hears(
    fault: str, level: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Cluster(gateways=("gateway-0", "gateway-1"))
    cluster.membership.worker_ended("decode-0", "ActorDiedError")
    cluster.members.take_told()
    caplog.clear()
    cluster.membership.gateway_ended("gateway-0", fault)
    told = cluster.members.take_told()
    assert told == [(name, GatewayLost("gateway-0")) for name in ("prefill-0", "prefill-1", "decode-1")]
    assert [record.levelno for record in caplog.records] == ([level] if level else [])
    cluster.membership.worker_ended("decode-1", "ActorDiedError")
    assert [who for who, _ in cluster.members.take_told()] == ["prefill-0", "prefill-1", "gateway-1"]


def test_who_joins_behind_losses_is_told_of_them() -> None:
    cluster = Cluster()
    cluster.membership.worker_ended("decode-0", "ActorDiedError")
    cluster.membership.worker_ended("prefill-0", "ActorDiedError")
    cluster.members.take_told()
    cluster.membership.gateway_joined("gateway-1")
    assert cluster.members.take_told() == [("gateway-1", "prefill-0"), ("gateway-1", "decode-0")]
    cluster.membership.worker_joined(worker_info("decode-2"))
    expected = [("decode-2", PeerLost("prefill-0")), ("decode-2", PeerLost("decode-0"))]
    assert cluster.members.take_told() == expected
    assert {cluster.scheduler.place(PlaceRequest(f"r{i}", 9, 1, 8)).decode_worker for i in range(4)} == {
        "decode-1",
        "decode-2",
    }


def test_what_can_be_served_is_over_only_when_a_pool_is_lost() -> None:
    cluster = Cluster(workers=())
    assert cluster.membership.why_unservable() == "", "nobody has joined yet"
    cluster.membership.worker_joined(worker_info("prefill-0"))
    assert cluster.membership.why_unservable() == "", "the cluster starts"
    cluster = Cluster()
    cluster.membership.worker_ended("decode-1", "its loop ended")
    assert cluster.membership.why_unservable() == ""
    cluster.membership.worker_ended("decode-0", "ActorDiedError")
    reason = "no decode worker is ready: decode-0 was lost (ActorDiedError), and lost workers do not come back"
    assert cluster.membership.why_unservable() == reason
    with pytest.raises(Unavailable, match="no decode worker is ready"):
        cluster.scheduler.place(PlaceRequest("r", 10, 1, 8))


def test_a_mixed_worker_serves_what_lost_pools_cannot() -> None:
    cluster = Cluster(workers=("prefill-0", "decode-0", "mixed-0"))
    for worker_id in ("prefill-0", "decode-0"):
        cluster.membership.worker_ended(worker_id, "ActorDiedError")
    assert cluster.membership.why_unservable() == ""
    cluster.membership.worker_ended("mixed-0", "ActorDiedError")
    assert cluster.membership.why_unservable().startswith("no prefill and no decode and no mixed worker is ready")


def test_in_a_cluster_that_stops_ends_and_silence_are_no_losses() -> None:
    cluster = Cluster()
    cluster.membership.stop()
    cluster.membership.worker_ended("decode-0", "its loop ended")
    cluster.beat(20, silent=WORKERS)
    assert (cluster.members.killed, cluster.members.take_told()) == ([], [])
    assert cluster.states()["decode-0"] is WorkerState.READY
