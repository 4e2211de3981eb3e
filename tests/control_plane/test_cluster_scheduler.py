"""Placement and the ledger: events in, decisions out."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from control_plane.cluster_scheduler import ClusterScheduler
from phasewise.core.clock import ManualClock
from phasewise.core.errors import Overloaded, Unavailable
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import PlaceRequest, WorkerRole, WorkerState
from phasewise.core.profile import DeviceProfile, Point, ProfileFacts, StepTimes

SPEC = KVCacheSpec(2, 1, 4, 16, "float32")
FAST = DeviceProfile.linear(0.0, 0.001, 0.01, 0.001)
SLOW = DeviceProfile.linear(0.0, 0.003, 0.03, 0.003)


def make(workers: dict[str, DeviceProfile], *, max_waiting: int = 100, num_blocks: int = 1000) -> ClusterScheduler:
    """Profiles without a named device are of as many kinds as they are different."""
    scheduler = ClusterScheduler(ManualClock(), max_waiting=max_waiting)
    for worker_id, profile in workers.items():
        role = WorkerRole(worker_id.split("-")[0])
        if not profile.facts.device:
            profile = replace(profile, facts=ProfileFacts(f"{profile.prefill.points} {profile.decode.points}"))
        info = WorkerInfo(worker_id, role, 1, "h", "cpu", "float32", 1, SPEC, num_blocks, 4096, profile)
        scheduler.worker_joined(info)
    return scheduler


def test_equal_workers_share_equal_work() -> None:
    scheduler = make({"prefill-0": FAST, "prefill-1": FAST, "decode-0": FAST, "decode-1": FAST})
    placements = [scheduler.place(PlaceRequest(f"r{i}", 100, 1, 64)) for i in range(40)]
    for name in ("prefill-0", "prefill-1"):
        assert sum(p.prefill_worker == name for p in placements) == 20
    for name in ("decode-0", "decode-1"):
        assert sum(p.decode_worker == name for p in placements) == 20


def test_equal_workers_share_equal_work_whatever_noise_their_measurements_have() -> None:
    facts = ProfileFacts("H100", "8B", "bfloat16")
    right = replace(FAST, facts=facts)
    first, second = (DeviceProfile.linear(0.0, 0.001, base, slope) for base, slope in ((0.011, 0.004), (0.09, 0.0011)))
    noisy = {"decode-0": replace(first, facts=facts), "decode-1": replace(second, facts=facts)}
    scheduler = make({"prefill-0": right, **noisy})
    placements = [scheduler.place(PlaceRequest(f"r{i}", 100, 1, 64)) for i in range(40)]
    assert sum(p.decode_worker == "decode-0" for p in placements) == 20


def test_an_fp8_cache_makes_another_kind_of_worker() -> None:
    facts = ProfileFacts("H100", "8B", "bfloat16")
    scheduler = make({"prefill-0": replace(FAST, facts=facts)})
    for worker_id, times, dtype in (("decode-0", FAST, "fp8_e4m3"), ("decode-1", SLOW, "bfloat16")):
        info = WorkerInfo(
            worker_id, WorkerRole.DECODE, 1, "h", "cuda", "bfloat16", 1, replace(SPEC, dtype=dtype), 1000, 4096,
            replace(times, facts=facts),
        )  # fmt: skip
        scheduler.worker_joined(info)
    placements = [scheduler.place(PlaceRequest(f"r{i}", 100, 1, 64)) for i in range(40)]
    assert sum(p.decode_worker == "decode-0" for p in placements) > 25, "the other one is three times as slow"


def test_a_slow_gpu_gets_its_share_and_no_more() -> None:
    scheduler = make({"prefill-0": FAST, "prefill-1": SLOW, "decode-0": FAST, "decode-1": SLOW})
    placements = [scheduler.place(PlaceRequest(f"r{i}", 100, 1, 64)) for i in range(80)]
    assert sum(p.prefill_worker == "prefill-0" for p in placements) == pytest.approx(60, abs=2)
    assert sum(p.decode_worker == "decode-0" for p in placements) > 50


def profile(prefill: dict[tuple[int, int], float], decode: dict[tuple[int, int], float]) -> DeviceProfile:
    """From (size, context tokens) → seconds."""
    tables = (StepTimes(tuple(Point(*key, s) for key, s in table.items())) for table in (prefill, decode))
    return DeviceProfile(*tables)


# Equal for short prompts and contexts; only a measured context tells them apart.
WIDE = profile({(64, 0): 0.01, (64, 4096): 0.01}, {(1, 128): 0.01, (1, 4096): 0.01, (8, 1024): 0.012})
NARROW = profile({(64, 0): 0.01, (64, 4096): 0.05}, {(1, 128): 0.01, (1, 4096): 0.05, (8, 1024): 0.02})


def test_another_table_is_another_placement() -> None:
    for num_tokens in (100, 3000):
        scheduler = make({"prefill-0": NARROW, "prefill-1": WIDE, "decode-0": NARROW, "decode-1": WIDE})
        long = scheduler.place(PlaceRequest("long", 3000, 1, 64))
        assert (long.prefill_worker, long.decode_worker) == ("prefill-1", "decode-1"), "faster behind much context"
        swapped = make({"prefill-0": WIDE, "prefill-1": NARROW, "decode-0": WIDE, "decode-1": NARROW})
        long = swapped.place(PlaceRequest("long", num_tokens, 1, 64))
        assert (long.prefill_worker, long.decode_worker) == ("prefill-0", "decode-0")


def test_contexts_of_what_decodes_already_count() -> None:
    scheduler = make({"prefill-0": WIDE, "decode-0": WIDE, "decode-1": WIDE})
    scheduler.place(PlaceRequest("long", 4000, 1, 64))
    equal = {scheduler.place(PlaceRequest(f"r{i}", 10, 1, 8)).decode_worker for i in range(2)}
    assert equal == {"decode-1", "decode-0"}, "one more sequence costs the same on both"
    scheduler = make({"prefill-0": NARROW, "decode-0": NARROW, "decode-1": NARROW})
    first = scheduler.place(PlaceRequest("long", 4000, 1, 64)).decode_worker
    others = {scheduler.place(PlaceRequest(f"r{i}", 10, 1, 8)).decode_worker for i in range(3)}
    assert others == {"decode-0", "decode-1"} - {first}, "a step beside the long one is slower"


def test_short_prompts_that_share_a_step_are_no_long_queue() -> None:
    one_step = profile({(16, 0): 0.05, (1024, 0): 0.06}, {(1, 128): 0.01})
    scheduler = make({"prefill-0": one_step, "prefill-1": one_step, "decode-0": FAST})
    for _ in range(2):
        long = scheduler.place(PlaceRequest("long", 900, 1, 8)).prefill_worker
        scheduler.finished("long", 8)
    scheduler.place(PlaceRequest("long", 900, 1, 8))
    short = [scheduler.place(PlaceRequest(f"r{i}", 8, 1, 8)).prefill_worker for i in range(20)]
    assert short.count(long) > 0, "twenty prompts of 8 tokens are one step, as the long one is"


def test_the_queue_is_measured_in_work_not_in_requests() -> None:
    scheduler = make({"prefill-0": FAST, "prefill-1": FAST, "decode-0": FAST})
    long = scheduler.place(PlaceRequest("long", 3000, 1, 8)).prefill_worker
    others = {scheduler.place(PlaceRequest(f"s{i}", 100, 1, 8)).prefill_worker for i in range(20)}
    assert others == {"prefill-0", "prefill-1"} - {long}


def test_work_leaves_the_ledger_at_first_token_and_at_the_end() -> None:
    scheduler = make({"prefill-0": FAST, "prefill-1": FAST, "decode-0": FAST})
    first = scheduler.place(PlaceRequest("a", 3000, 1, 8)).prefill_worker
    scheduler.first_token("a")
    assert scheduler.place(PlaceRequest("b", 10, 1, 8)).prefill_worker != first, "equal again: the less used is next"
    scheduler.finished("b", 5)
    scheduler.finished("a", 5)
    scheduler.finished("a", 5)  # told twice: no harm
    assert scheduler.num_open == 0
    assert all(
        (w.num_pending_prompts, w.num_pending_prompt_tokens, w.num_decoding, w.num_pledged_tokens) == (0, 0, 0, 0)
        for w in scheduler.candidates.values()
    )


def test_ledger_is_empty_after_any_history() -> None:
    rng = random.Random(1)
    scheduler = make({"prefill-0": FAST, "decode-0": FAST, "decode-1": SLOW, "mixed-0": FAST})
    open_ids: list[str] = []
    for i in range(500):
        open_ids.append(f"r{i}")
        scheduler.place(PlaceRequest(f"r{i}", rng.randrange(1, 2000), rng.randrange(1, 5), rng.randrange(1, 500)))
        if rng.random() < 0.5:
            scheduler.first_token(rng.choice(open_ids))
        if rng.random() < 0.6:
            scheduler.finished(open_ids.pop(rng.randrange(len(open_ids))), rng.randrange(300))
    for request_id in open_ids:
        scheduler.finished(request_id, 1)
    for work in scheduler.candidates.values():
        assert (work.num_pending_prompts, work.num_pending_prompt_tokens, work.num_decoding) == (0, 0, 0)
        assert work.num_pledged_tokens == pytest.approx(0.0, abs=1e-6)


def test_mixed_workers_take_whole_requests() -> None:
    scheduler = make({"mixed-0": FAST, "mixed-1": FAST})
    placements = [scheduler.place(PlaceRequest(f"r{i}", 100, 1, 64)) for i in range(10)]
    assert all(p.is_local for p in placements)
    assert sum(p.prefill_worker == "mixed-0" for p in placements) == 5


def test_full_kv_sends_work_elsewhere() -> None:
    scheduler = make({"prefill-0": FAST, "decode-0": FAST, "decode-1": SLOW}, num_blocks=100)
    placements = [scheduler.place(PlaceRequest(f"r{i}", 700, 1, 100)) for i in range(8)]
    assert {p.decode_worker for p in placements} == {"decode-0", "decode-1"}


def test_an_end_that_overtakes_its_placement_leaves_nothing_in_the_ledger() -> None:
    scheduler = make({"prefill-0": FAST, "decode-0": FAST}, max_waiting=1)
    scheduler.finished("late", 0)  # its client left, and calls to an actor have no order
    with pytest.raises(Unavailable, match="ended"):
        scheduler.place(PlaceRequest("late", 100, 1, 64))
    assert scheduler.num_open == 0
    scheduler.place(PlaceRequest("next", 100, 1, 64))  # the one place in the queue is free


def test_bounds() -> None:
    scheduler = make({"prefill-0": FAST, "decode-0": FAST}, max_waiting=3)
    for i in range(3):
        scheduler.place(PlaceRequest(f"r{i}", 10, 1, 8))
    with pytest.raises(Overloaded) as caught:
        scheduler.place(PlaceRequest("r3", 10, 1, 8))
    assert caught.value.retry_after_s
    scheduler.first_token("r0")
    scheduler.place(PlaceRequest("r3", 10, 1, 8))


def test_a_lost_worker_gets_nothing_and_an_empty_pool_is_said() -> None:
    scheduler = make({"prefill-0": FAST, "decode-0": FAST, "decode-1": FAST})
    assert scheduler.worker_lost("decode-0")
    assert not scheduler.worker_lost("decode-0"), "news only once"
    assert {scheduler.place(PlaceRequest(f"r{i}", 10, 1, 8)).decode_worker for i in range(5)} == {"decode-1"}
    scheduler.worker_load(WorkerLoad("decode-0", WorkerRole.DECODE, WorkerState.READY))
    assert scheduler.place(PlaceRequest("late", 10, 1, 8)).decode_worker == "decode-1", "the dead stay dead"
    scheduler.worker_lost("decode-1")
    with pytest.raises(Unavailable, match="no decode worker is ready"):
        scheduler.place(PlaceRequest("r", 10, 1, 8))


def test_a_further_attempt_is_not_refused_for_full_queues_and_its_work_is_counted() -> None:
    scheduler = make({"prefill-0": FAST, "decode-0": FAST, "decode-1": FAST}, max_waiting=1)
    first = scheduler.place(PlaceRequest("r~1", 100, 1, 64))
    with pytest.raises(Overloaded):
        scheduler.place(PlaceRequest("new", 100, 1, 64))
    scheduler.worker_lost(first.decode_worker)
    second = scheduler.place(PlaceRequest("r~2", 130, 1, 34, attempt=1))
    assert second.attempt == 1
    assert second.decode_worker != first.decode_worker
    for request_id, num_tokens in (("r~1", 0), ("r~2", 64)):
        scheduler.finished(request_id, num_tokens)
    assert scheduler.num_open == 0
    assert all(
        work.num_pending_prompts == work.num_pending_prompt_tokens == work.num_decoding == 0
        for work in scheduler.candidates.values()
    )


@pytest.mark.parametrize(
    ("workers", "avoid", "pairs"),
    [
        (("prefill-0", "prefill-1", "decode-0", "decode-1"), ("prefill-0", "decode-1"), {("prefill-1", "decode-0")}),
        (("prefill-0", "decode-0", "decode-1"), ("prefill-0", "decode-0"), {("prefill-0", "decode-1")}),
        (("prefill-0", "decode-0", "mixed-0"), ("prefill-0", "decode-0"), {("mixed-0", "mixed-0")}),
        (("prefill-0", "decode-0"), ("prefill-0", "decode-0"), {("prefill-0", "decode-0")}),
        (("mixed-0",), ("mixed-0",), {("mixed-0", "mixed-0")}),
    ],
)
def test_workers_to_avoid_are_the_last_resort(
    workers: tuple[str, ...], avoid: tuple[str, ...], pairs: set[tuple[str, str]]
) -> None:
    scheduler = make(dict.fromkeys(workers, FAST))
    placed = [scheduler.place(PlaceRequest(f"r{i}", 100, 1, 64, attempt=1, avoid=frozenset(avoid))) for i in range(6)]
    assert {(p.prefill_worker, p.decode_worker) for p in placed} == pairs


def test_a_report_that_a_newer_one_overtook_is_ignored() -> None:
    scheduler = make({"prefill-0": FAST, "decode-0": FAST})
    scheduler.worker_load(WorkerLoad("decode-0", WorkerRole.DECODE, WorkerState.READY, num_running=3, number=7))
    scheduler.worker_load(WorkerLoad("decode-0", WorkerRole.DECODE, WorkerState.READY, num_running=9, number=6))
    loads = {member.load.worker_id: member.load for member in scheduler.registry.members()}
    assert loads["decode-0"].num_running == 3
