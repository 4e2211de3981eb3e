"""Who is in the view, and who hears of it: events in, view, deltas and kills out. No process, no event loop."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import pytest

from control_plane.cluster_scheduler import ClusterScheduler
from control_plane.membership import Membership
from phasewise.core.clock import ManualClock
from phasewise.core.config import HealthConfig
from phasewise.core.desired import DesiredState
from phasewise.core.errors import ConfigError, Unavailable
from phasewise.core.heartbeat import PROTOCOL_VERSION, Description, Heartbeat, HeartbeatAnswer, Joining, OpenAttempt
from phasewise.core.identity import MemberId
from phasewise.core.messages import WorkerLoad
from phasewise.core.placement import Placement, PlaceRequest, WorkerRole, WorkerState
from phasewise.core.view import MemberState, View, ViewFollower
from tests.support.members import RecordingMembers, info_of, worker_info

HEALTH = HealthConfig(heartbeat_s=1.0, suspect_s=3.0, overdue_s=10.0, start_s=60.0)
PREFILL, DECODE, GATEWAY = "prefill-0#1", "decode-0#1", "gateway-0#1"
ALL = (PREFILL, DECODE, GATEWAY)


class Cluster:
    """A membership with its ledger. Those of `ALL` have joined, unless `members` says otherwise."""

    def __init__(self, members: Collection[MemberId] = ALL) -> None:
        self.clock = ManualClock(100.0)
        self.scheduler = ClusterScheduler(self.clock, max_waiting=100)
        self.members = RecordingMembers()
        self.membership = Membership(HEALTH, self.members, self.scheduler, self.clock)
        self.followers: dict[MemberId, ViewFollower] = {}
        for member_id in members:
            self.expect(member_id)
            self.join(member_id)

    def expect(self, member_id: MemberId) -> None:
        pool = member_id.split("-")[0]
        self.membership.expect(member_id, None if pool == "gateway" else WorkerRole(pool))

    def join(self, member_id: MemberId) -> None:
        self.followers[member_id] = ViewFollower()
        self.followers[member_id].replace(self.membership.joined(Joining(info_of(member_id))))

    def beat(self, count: int = 1, *, silent: Collection[MemberId] = ()) -> None:
        """So many heartbeats of all but the silent, each followed by the tick."""
        for _ in range(count):
            self.clock.advance(HEALTH.heartbeat_s)
            self.beats(silent)
            self.membership.tick()

    def beats(self, silent: Collection[MemberId] = ()) -> None:
        for member_id in set(self.membership.view.members) - set(silent):
            self.membership.heard(Heartbeat(member_id, self.membership.view.version))

    def pause(self, seconds: float) -> None:
        """This process is stopped; the tick behind it comes before the heartbeats that queued up."""
        self.clock.advance(seconds)
        self.membership.tick()
        self.beats()

    def state(self, member_id: MemberId) -> MemberState:
        return self.membership.view.members[member_id].state

    def follow(self) -> None:
        """Every member applies what it was told."""
        for member_id, delta in self.members.take_told():
            self.followers[member_id].apply(delta)


def test_a_process_that_was_asked_for_loads_then_joins_and_is_placed_upon() -> None:
    cluster = Cluster(members=[PREFILL])
    cluster.expect(DECODE)
    assert cluster.state(DECODE) is MemberState.LOADING
    with pytest.raises(Unavailable):
        cluster.scheduler.place(PlaceRequest("r", 10, 1, 8))
    cluster.join(DECODE)
    assert cluster.state(DECODE) is MemberState.READY
    assert cluster.scheduler.place(PlaceRequest("r", 10, 1, 8)).decode_worker == DECODE
    version = cluster.membership.view.version
    cluster.join(DECODE)
    assert cluster.membership.view.version == version, "repeating it is harmless"


def test_every_member_follows_every_change_by_deltas_alone() -> None:
    cluster = Cluster()
    cluster.follow()
    cluster.expect("decode-1#1")
    cluster.join("decode-1#1")
    cluster.membership.ended(PREFILL, "its process has ended")
    cluster.membership.want(DesiredState({WorkerRole.DECODE: 2}))
    del cluster.followers[PREFILL]
    cluster.members.told = [(m, delta) for m, delta in cluster.members.told if m != PREFILL]
    cluster.follow()
    for follower in cluster.followers.values():
        assert follower.view == cluster.membership.view


def test_who_is_behind_gets_the_whole_view_and_who_is_gone_hears_it() -> None:
    cluster = Cluster()
    view = cluster.membership.view
    assert cluster.membership.heard(Heartbeat(DECODE, view.version)) == HeartbeatAnswer()
    assert cluster.membership.heard(Heartbeat(DECODE, 0)).view == view
    cluster.membership.ended(DECODE, "its process has ended")
    assert cluster.membership.heard(Heartbeat(DECODE, view.version)).is_gone
    assert cluster.members.killed == [DECODE]


def test_another_protocol_and_another_identity_are_refused() -> None:
    cluster = Cluster()
    cluster.expect("decode-1#2")
    with pytest.raises(ConfigError, match=r"decode-1#2 speaks version 99 .* of two releases"):
        cluster.membership.joined(Joining(worker_info("decode-1#2"), PROTOCOL_VERSION + 98))
    with pytest.raises(Unavailable, match="decode-1#1 is not in the view"):
        cluster.membership.joined(Joining(worker_info("decode-1#1")))
    with pytest.raises(ConfigError, match="was started as something else"):
        cluster.membership.joined(Joining(replace(info_of(GATEWAY), gateway_id="decode-1#2")))  # type: ignore[type-var]
    cluster.membership.ended(DECODE, "its process has ended")
    with pytest.raises(Unavailable, match=f"{DECODE} is not in the view"):
        cluster.join(DECODE)


def test_a_silent_member_is_suspect_then_ready_when_heard_and_gone_in_the_end() -> None:
    cluster = Cluster(members=[*ALL, "decode-1#1"])
    cluster.beat(3, silent=[DECODE])
    assert cluster.state(DECODE) is MemberState.READY
    cluster.beat(1, silent=[DECODE])
    assert cluster.state(DECODE) is MemberState.SUSPECT
    assert {cluster.scheduler.place(PlaceRequest(f"r{i}", 9, 1, 8)).decode_worker for i in range(4)} == {"decode-1#1"}
    cluster.membership.reported(WorkerLoad(DECODE, WorkerRole.DECODE, WorkerState.READY))
    assert cluster.state(DECODE) is MemberState.READY
    cluster.beat(10, silent=[DECODE])
    assert cluster.members.killed == []
    cluster.beat(1, silent=[DECODE])
    assert cluster.members.killed == [DECODE]
    assert DECODE not in cluster.membership.view.members
    assert cluster.scheduler.candidates.keys() == {PREFILL, "decode-1#1"}


def test_a_gateway_is_watched_like_a_worker_and_its_attempts_go_with_it() -> None:
    cluster = Cluster()
    cluster.scheduler.place(PlaceRequest("r", 10, 1, 8, gateway_id=GATEWAY))
    cluster.beat(11, silent=[GATEWAY])
    assert cluster.members.killed == [GATEWAY]
    assert cluster.scheduler.num_open == 0
    assert cluster.scheduler.candidates[DECODE].num_decoding == 0


def test_a_step_that_runs_too_long_ends_a_worker_that_gives_heartbeats() -> None:
    cluster = Cluster()
    assert not cluster.membership.heard(Heartbeat(DECODE, 9, step_s=9.9)).is_gone
    assert cluster.membership.heard(Heartbeat(DECODE, 9, step_s=10.0)).is_gone
    assert cluster.members.killed == [DECODE]
    (end,) = cluster.membership.take_ends()
    assert (end.member_id, end.reason) == (DECODE, "a step has been running for 10 s")


def test_who_is_not_ready_in_its_time_is_ended_and_nobody_calls_a_loading_one_silent() -> None:
    cluster = Cluster(members=[PREFILL])
    cluster.expect(DECODE)
    cluster.beat(60, silent=[DECODE])
    assert cluster.state(DECODE) is MemberState.LOADING
    cluster.beat(1, silent=[DECODE])
    assert cluster.members.killed == [DECODE]


@pytest.mark.parametrize("pause_s", [10.5, 40.0, 45.0, 3600.0])
def test_a_pause_of_the_control_plane_or_of_all_accuses_nobody(pause_s: float) -> None:
    cluster = Cluster()
    cluster.beat(3)
    for _ in range(3):
        cluster.pause(pause_s)
        cluster.beat(20)
    assert cluster.members.killed == []
    assert {cluster.state(m) for m in ALL} == {MemberState.READY}


def test_who_died_in_a_pause_is_found_in_its_time_behind_it() -> None:
    cluster = Cluster()
    cluster.beat(3)
    cluster.clock.advance(3600.0)
    cluster.membership.tick()
    cluster.beat(9, silent=[DECODE])
    assert cluster.members.killed == []
    cluster.beat(1, silent=[DECODE])
    assert cluster.members.killed == [DECODE]


def test_a_drain_takes_nothing_new_and_its_end_is_in_order() -> None:
    cluster = Cluster(members=[*ALL, "decode-1#1"])
    cluster.membership.drain(DECODE, 5.0)
    cluster.membership.drain(DECODE, 5.0)
    assert cluster.members.drained == [(DECODE, 5.0)]
    assert cluster.membership.is_going(cluster.membership.view.members[DECODE])
    assert {cluster.scheduler.place(PlaceRequest(f"r{i}", 9, 1, 8)).decode_worker for i in range(4)} == {"decode-1#1"}
    cluster.membership.left(DECODE)
    cluster.membership.ended(DECODE, "its process has ended")
    (end,) = cluster.membership.take_ends()
    assert (end.member_id, end.reason) == (DECODE, "")
    cluster.expect("decode-2#1")
    cluster.membership.drain("decode-2#1", 5.0)
    assert "decode-2#1" in cluster.members.killed, "it has nothing to finish: it loads"


def test_a_role_change_counts_for_the_new_role_and_a_drain_meanwhile_wins() -> None:
    cluster = Cluster(members=[*ALL, "decode-1#1"])
    cluster.membership.change_role(DECODE, WorkerRole.PREFILL)
    member = cluster.membership.view.members[DECODE]
    assert (member.role, member.state) == (WorkerRole.DECODE, MemberState.DRAINING)
    assert cluster.membership.role_of(member) is WorkerRole.PREFILL
    assert not cluster.membership.is_going(member)
    assert cluster.members.changed == [(DECODE, WorkerRole.PREFILL)]
    cluster.membership.role_changed(DECODE, WorkerRole.PREFILL)
    member = cluster.membership.view.members[DECODE]
    assert (member.role, member.state) == (WorkerRole.PREFILL, MemberState.READY)
    placed = {cluster.scheduler.place(PlaceRequest(f"r{i}", 9, 1, 8)).prefill_worker for i in range(4)}
    assert placed == {PREFILL, DECODE}
    cluster.membership.change_role(DECODE, WorkerRole.DECODE)
    cluster.membership.drain(DECODE, 5.0)
    cluster.membership.role_changed(DECODE, WorkerRole.DECODE)
    assert cluster.state(DECODE) is MemberState.DRAINING


def test_in_a_cluster_that_stops_ends_and_silence_are_no_losses() -> None:
    cluster = Cluster()
    cluster.membership.stop()
    cluster.membership.ended(DECODE, "its process has ended")
    cluster.beat(20, silent=ALL)
    assert cluster.members.killed == []


# ---- a control plane that was started again


def described(cluster: Cluster, member_id: MemberId, *attempts: OpenAttempt) -> Description:
    return Description(info_of(member_id), cluster.membership.view, open_attempts=attempts)


def test_a_new_control_plane_learns_all_from_the_members() -> None:
    before, after = Cluster(), Cluster(members=())
    before.membership.want(DesiredState({WorkerRole.PREFILL: 1, WorkerRole.DECODE: 1}))
    before.membership.serve_admin("127.0.0.1:9")
    attempts = [
        OpenAttempt(Placement("a", PREFILL, DECODE), 10, 1, 8, has_first_token=False),
        OpenAttempt(Placement("b", PREFILL, DECODE), 20, 1, 8, has_first_token=True),
    ]
    found = {m: described(before, m, *(attempts if m == GATEWAY else ())) for m in ALL}
    after.membership.recover(ALL, found)
    view = after.membership.view
    assert view.version > before.membership.view.version
    assert replace(view, version=0) == replace(before.membership.view, version=0)
    assert after.scheduler.num_open == 2
    assert (
        after.scheduler.candidates[PREFILL].num_pending_prompts,
        after.scheduler.candidates[DECODE].num_decoding,
    ) == (1, 2)
    for request_id in "ab":
        after.scheduler.finished(request_id, 8)
    assert after.scheduler.candidates[PREFILL].num_pending_prompt_tokens == 0
    answer = after.membership.heard(Heartbeat(DECODE, before.membership.view.version))
    assert answer.view == view, "everybody has missed something"


def test_of_those_who_do_not_answer_the_others_tell() -> None:
    before, after = Cluster(members=[*ALL, "decode-1#1"]), Cluster(members=())
    before.expect("prefill-1#3")
    before.membership.drain("decode-1#1", 0.0)
    found = {PREFILL: described(before, PREFILL)}
    there = [PREFILL, DECODE, "decode-1#1", "prefill-1#3", "mixed-0#4"]  # the gateway's process is gone
    after.membership.recover(there, found)
    states = {m: member.state for m, member in after.membership.view.members.items()}
    assert states == {
        PREFILL: MemberState.READY,
        DECODE: MemberState.SUSPECT,
        "decode-1#1": MemberState.DRAINING,
        "prefill-1#3": MemberState.LOADING,
        "mixed-0#4": MemberState.LOADING,
    }
    assert [end.member_id for end in after.membership.take_ends()] == [GATEWAY]
    assert after.membership.view.births["mixed-0"] == 4
    after.beat(1)
    assert after.state(DECODE) is MemberState.READY
    after.membership.joined(Joining(worker_info("mixed-0#4")))
    assert after.membership.view.members["mixed-0#4"].role is WorkerRole.MIXED


def test_a_new_control_plane_keeps_nobody_of_another_protocol() -> None:
    after = Cluster(members=())
    old = Description(worker_info(DECODE), View(), protocol_version=PROTOCOL_VERSION + 1)
    after.membership.recover([DECODE], {DECODE: old})
    assert after.members.killed == [DECODE]
    assert after.membership.view.members == {}
