"""What is to be started and drained: desired state, view and time in, commands out."""

from __future__ import annotations

import pytest

from control_plane.reconciler import Command, Drain, Present, Reconciler, Start
from phasewise.core.desired import DesiredState
from phasewise.core.identity import MemberId, birth_of, name_of
from phasewise.core.placement import WorkerRole
from phasewise.core.view import Member, MemberState, View

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE
TWO_AND_TWO = DesiredState({PREFILL: 2, DECODE: 2})


def present(
    member_id: MemberId,
    burden: int = 0,
    state: str = "ready",
    *,
    role: WorkerRole | None = None,
    is_going: bool = False,
) -> Present:
    pool = member_id.split("-")[0]
    role = role or (None if pool == "gateway" else WorkerRole(pool))
    return Present(Member(member_id, role, MemberState(state)), role, is_going, burden)


def decide(
    reconciler: Reconciler, desired: DesiredState, *there: Present, now_s: float = 0.0, **births: int
) -> list[Command]:
    members = {p.member.member_id: p.member for p in there}
    known = {name_of(m): birth_of(m) for m in members} | {
        name.replace("_", "-"): birth for name, birth in births.items()
    }
    return reconciler.decide(desired, View(1, members, known), {p.member.member_id: p for p in there}, now_s)


def test_an_empty_cluster_is_started_and_a_whole_one_left_alone() -> None:
    commands = decide(Reconciler(), TWO_AND_TWO)
    names = ["prefill-0#1", "prefill-1#1", "decode-0#1", "decode-1#1", "gateway-0#1"]
    assert [c.member_id for c in commands] == names
    assert [c.role for c in commands if isinstance(c, Start)] == [PREFILL, PREFILL, DECODE, DECODE, None]
    assert decide(Reconciler(), TWO_AND_TWO, *(present(name) for name in names)) == []


def test_the_lowest_free_name_comes_back_with_its_next_birth() -> None:
    there = [present(m) for m in ("prefill-0#1", "prefill-2#1", "decode-0#3", "gateway-0#1")]
    desired = DesiredState({PREFILL: 3, DECODE: 2})
    assert decide(Reconciler(), desired, *there, prefill_1=4) == [
        Start("prefill-1#5", PREFILL),
        Start("decode-1#1", DECODE),
    ]


def test_suspects_and_loading_ones_count_and_who_goes_does_not() -> None:
    there = [
        present("prefill-0#1", state="suspect"),
        present("prefill-1#1", state="loading"),
        present("decode-0#1", is_going=True, state="draining"),
        present("decode-1#1"),
        present("gateway-0#1"),
    ]
    assert decide(Reconciler(), TWO_AND_TWO, *there) == [Start("decode-2#1", DECODE)]


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ([present("decode-0#1", 3), present("decode-1#1", 1), present("decode-2#1", 2)], "decode-1#1"),
        ([present("decode-0#1"), present("decode-1#1"), present("decode-2#1")], "decode-2#1"),
        ([present("decode-0#1", 0, "loading"), present("decode-1#1"), present("decode-2#1", 1)], "decode-0#1"),
        ([present("decode-0#1", 9, "suspect"), present("decode-1#1"), present("decode-2#1")], "decode-0#1"),
        ([present("decode-0#1", 9), present("prefill-0#1", role=DECODE), present("decode-1#1", 2)], "prefill-0#1"),
    ],
    ids=["least burden", "highest number", "loading", "suspect", "of another birth role"],
)
def test_a_pool_that_shrinks_drains_whom_it_costs_least(there: list[Present], expected: str) -> None:
    desired = DesiredState({DECODE: 2})
    assert decide(Reconciler(), desired, *there, present("gateway-0#1")) == [Drain(expected)]


def test_a_gateways_successor_waits_until_its_name_is_free() -> None:
    one = DesiredState({})
    assert decide(Reconciler(), one, present("gateway-0#1", is_going=True, state="draining")) == []
    assert decide(Reconciler(), one, gateway_0=1) == [Start("gateway-0#2", None)]
    three = [present(f"gateway-{i}#1") for i in range(3)]
    assert decide(Reconciler(), one, *three) == [Drain("gateway-2#1"), Drain("gateway-1#1")]


def test_who_ends_soon_waits_longer_each_time_and_no_other_name_takes_its_place() -> None:
    reconciler, now_s, waits = Reconciler(), 0.0, []
    desired = DesiredState({DECODE: 1}, gateways=0)
    for birth in range(1, 10):
        assert decide(reconciler, desired, now_s=now_s, decode_0=birth - 1) == [Start(f"decode-0#{birth}", DECODE)]
        reconciler.ended("decode-0", "its process has ended", 0.0, now_s)
        began_s = now_s
        while not decide(reconciler, desired, now_s=now_s, decode_0=birth):
            now_s += 1.0
        waits.append(now_s - began_s)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert reconciler.why_failing(3) == "decode-0 could not be started, 9 times: its process has ended"


@pytest.mark.parametrize(("reason", "served_s"), [("its process has ended", 10.1), ("", 0.0)])
def test_who_has_served_or_ended_in_order_is_replaced_at_once(reason: str, served_s: float) -> None:
    reconciler, desired = Reconciler(), DesiredState({DECODE: 1}, gateways=0)
    for _ in range(4):
        reconciler.ended("decode-0", "its process has ended", 0.0, 0.0)
    reconciler.ended("decode-0", reason, served_s, 0.0)
    assert decide(reconciler, desired, decode_0=5) == [Start("decode-0#6", DECODE)]
    assert reconciler.why_failing(1) == ""
    reconciler.ended("decode-0", "its process has ended", 9.9, 0.0)
    assert decide(reconciler, desired, now_s=0.9, decode_0=6) == []
    assert decide(reconciler, desired, now_s=1.0, decode_0=6) == [Start("decode-0#7", DECODE)]
