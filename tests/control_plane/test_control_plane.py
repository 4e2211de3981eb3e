"""What the control plane waits for, over members that end when a test says so. No time passes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from control_plane.control_plane import ControlPlane
from phasewise.core.clock import ManualClock, MonotonicClock
from phasewise.core.config import ServingConfig, build_config
from phasewise.core.errors import Overloaded, Unavailable
from phasewise.core.messages import GatewayLost, PeerLost
from tests.control_plane.test_link_survey import Workers
from tests.support.members import EndingMembers, worker_info


class Started:
    """A control plane that workers and a gateway have joined."""

    def __init__(self, asker: Workers | None = None) -> None:
        self.clock = ManualClock()
        self.members = EndingMembers()
        self.config = ServingConfig()
        self.plane = ControlPlane(self.config, self.members, asker or Workers(), self.clock)

    async def join(self, *worker_ids: str) -> None:
        """Returns when each is watched."""
        for worker_id in worker_ids:
            self.plane.join(worker_info(worker_id))
        self.plane.join_gateway("gateway-0")
        await until(lambda: self.members.watched == {*worker_ids, "gateway-0"})


async def until(condition: Callable[[], bool]) -> None:
    """Turns of the event loop until it holds; the ways below need few."""
    for _ in range(100):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it does not come")


@pytest.fixture
async def started() -> AsyncIterator[Started]:
    started = Started()
    yield started
    started.plane.stop()
    for member in started.members.watched:
        started.members.end(member)


async def test_the_end_of_a_worker_is_a_loss_and_of_the_last_of_a_pool_the_end(started: Started) -> None:
    await started.join("prefill-0", "decode-0", "decode-1")
    unservable = asyncio.create_task(started.plane.wait_unservable())
    started.members.end("decode-0", "ActorDiedError")
    await until(lambda: bool(started.members.killed))
    expected = [("prefill-0", PeerLost("decode-0")), ("decode-1", PeerLost("decode-0")), ("gateway-0", "decode-0")]
    assert started.members.take_told() == expected
    assert [load.state.value for _, load in started.plane.snapshot()] == ["ready", "lost", "ready"]
    assert not unservable.done(), "another decode worker is there"
    started.members.end("decode-1")  # in order, but nobody had asked for it
    reason = "no decode worker is ready: decode-1 was lost (its loop ended), and lost workers do not come back"
    assert await asyncio.wait_for(unservable, 5) == await started.plane.wait_unservable() == reason


async def test_the_end_of_a_gateway_is_told_to_the_workers(started: Started) -> None:
    await started.join("prefill-0", "decode-0")
    started.members.end("gateway-0", "ActorDiedError")
    await until(lambda: len(started.members.told) == 2)
    assert started.members.told == [(name, GatewayLost("gateway-0")) for name in ("prefill-0", "decode-0")]


async def test_a_cluster_that_is_stopped_does_not_end_for_want_of_workers(started: Started) -> None:
    await started.join("prefill-0", "decode-0")
    unservable, closed = (
        asyncio.create_task(wait()) for wait in (started.plane.wait_unservable, started.plane.wait_closed)
    )
    await asyncio.sleep(0)
    assert not closed.done()
    started.plane.stop()
    assert await asyncio.wait_for(unservable, 5) == ""
    await asyncio.wait_for(closed, 5)
    started.members.end("decode-0")
    await until(lambda: "decode-0" not in started.members.watched)
    await asyncio.sleep(0)
    assert (started.members.killed, started.members.told) == ([], [])


async def test_workers_that_load_for_long_are_not_silent_and_no_pause(started: Started) -> None:
    """The control plane is made before workers load their models, and first ticks a heartbeat after the last has."""
    started.clock.advance(60.0)
    await started.join("prefill-0", "decode-0")
    started.plane.start_health_checks()
    started.clock.advance(started.config.health.heartbeat_s)
    assert started.plane.scheduler.tick() == []
    assert not started.plane.scheduler.listened.is_behind_pause, "a warning would be logged"


async def test_workers_that_never_report_are_found_by_the_health_checks() -> None:
    config = build_config({"health": {"heartbeat_s": 0.005, "overdue_s": 0.02}}, source="test")
    members = EndingMembers()
    plane = ControlPlane(config, members, Workers(), MonotonicClock())
    for worker_id in ("prefill-0", "decode-0"):
        plane.join(worker_info(worker_id))
    unservable = asyncio.create_task(plane.wait_unservable())
    plane.start_health_checks()
    assert "silent for 0.02 s" in await asyncio.wait_for(unservable, 10)
    assert members.killed == ["prefill-0", "decode-0"]
    plane.stop()


async def test_the_links_are_probed_by_one_at_a_time() -> None:
    has_begun, may_go_on = asyncio.Event(), asyncio.Event()

    class Slow(Workers):
        async def probe(self, *arguments: Any) -> Any:
            has_begun.set()
            await may_go_on.wait()
            return await super().probe(*arguments)

    plane = Started(Slow()).plane
    for info, _ in Workers().members():
        plane.scheduler.worker_joined(info)
    first = asyncio.create_task(plane.probe_links([32], 10.0))
    await asyncio.wait_for(has_begun.wait(), 10)
    with pytest.raises(Overloaded):
        await plane.probe_links([32], 10.0)
    assert len((await plane.links()).pairs) == 4, "looking is always allowed"
    may_go_on.set()
    survey = await asyncio.wait_for(first, 10)
    assert [pair.probes[0].seconds for pair in survey.pairs] == [0.5] * 4
    assert len((await plane.probe_links([32], 10.0)).pairs) == 4


async def test_a_worker_that_does_not_answer_ends_the_look_and_frees_the_place() -> None:
    class Silent(Workers):
        async def links(self, *_: Any) -> Any:
            raise Unavailable("worker prefill-0 does not answer")

    plane = Started(Silent()).plane
    plane.scheduler.worker_joined(worker_info("prefill-0"))
    for attempt in (plane.links(), plane.probe_links([32], 1.0), plane.probe_links([32], 1.0)):
        with pytest.raises(Unavailable, match="does not answer"):
            await attempt
