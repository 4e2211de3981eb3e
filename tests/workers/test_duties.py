"""A worker that drains, and one that changes its role: what it gives back, what it finishes, and what it takes."""

from __future__ import annotations

import pytest

from kv_transfer.plan import WIRE_VERSION
from phasewise.core.messages import ChangeRole, Drain, KVAccepted, KVOffer, KVRefused
from phasewise.core.placement import WorkerRole, WorkerState
from phasewise.core.request import Request, SamplingParams
from tests.support.gateway_box import GatewayBox
from tests.support.pure_worker import SPEC, PureWorker
from tests.support.scripted_engine import expected_tokens

NEVER = Drain(float("inf"))


def offer_of(name: str, num_tokens: int) -> KVOffer:
    request = Request(name, tuple(range(num_tokens)), SamplingParams(max_tokens=4))
    return KVOffer(f"{name}#1", WIRE_VERSION, "prefill-0", SPEC, request, "gateway-0", 60.0)


def failures(worker: PureWorker) -> list[tuple[str, str]]:
    worker.flush()
    return [(failure.request_id, failure.code) for failure in worker.failures]


def test_a_drain_gives_back_what_waits_and_finishes_what_runs() -> None:
    worker = PureWorker()
    worker.ask("runs", 6, max_tokens=5)
    worker.end(worker.begin())  # type: ignore[arg-type]
    worker.ask("waits", 6, max_tokens=5)
    worker.rounds.take(NEVER)
    worker.ask("late", 6)
    assert failures(worker) == [("waits", "unavailable"), ("late", "unavailable")]
    load = worker.rounds.load()
    assert load.state is WorkerState.DRAINING and not load.is_empty
    worker.run()
    assert worker.output("runs") == [6, 7, 8, 9, 10]
    assert worker.rounds.load().is_empty
    worker.assert_empty()


def test_what_runs_when_the_drain_time_is_over_is_given_back() -> None:
    worker = PureWorker()
    worker.ask("r", 6, max_tokens=50, n=2)
    worker.end(worker.begin())  # type: ignore[arg-type]
    worker.rounds.take(Drain(5.0))
    assert worker.rounds.next_deadline_s() <= worker.clock.now_s() + 5.0
    worker.clock.advance(4.9)
    worker.end(worker.begin())  # type: ignore[arg-type]
    assert failures(worker) == []
    worker.clock.advance(0.1)
    assert worker.begin() is None
    assert failures(worker) == [("r", "unavailable")]
    worker.assert_empty()
    assert worker.rounds.next_deadline_s() > worker.clock.now_s(), "a time that is over wakes nobody"


def test_a_second_word_may_shorten_the_drain_time_and_not_lengthen_it() -> None:
    worker = PureWorker()
    worker.ask("r", 6, max_tokens=50)
    worker.end(worker.begin())  # type: ignore[arg-type]
    for message in (NEVER, Drain(2.0), Drain(100.0)):
        worker.rounds.take(message)
    worker.clock.advance(2.0)
    assert worker.begin() is None
    assert failures(worker) == [("r", "unavailable")]


def test_offers_are_given_back_to_their_senders() -> None:
    worker = PureWorker("decode", num_blocks=4)
    worker.rounds.take(offer_of("reserved", 12))
    worker.begin()
    worker.rounds.take(offer_of("waiting", 12))
    worker.rounds.take(Drain(5.0))
    worker.rounds.take(offer_of("late", 4))
    assert len(worker.said(KVAccepted)) == 1
    refused = worker.said(KVRefused)
    assert [message.transfer_id for message in refused] == ["waiting#1", "late#1"]
    worker.clock.advance(5.0)
    worker.begin()
    assert [message.transfer_id for message in worker.said(KVRefused)][2:] == ["reserved#1"]
    assert all(message.others_may for message in worker.said(KVRefused))
    worker.assert_empty()


@pytest.mark.parametrize("role", [WorkerRole.DECODE, WorkerRole.MIXED])
def test_a_prefill_worker_becomes_another(role: WorkerRole) -> None:
    worker = PureWorker("prefill")
    worker.ask("waits", 6, max_tokens=5)
    worker.rounds.take(ChangeRole(role))
    worker.rounds.take(offer_of("offered", 6))
    worker.begin()
    load = worker.rounds.load()
    assert (load.role, load.state) == (role, WorkerState.READY)
    assert worker.rounds.info.role is WorkerRole.PREFILL, "that it was born with"
    assert failures(worker) == ([] if role.can_prefill else [("waits", "unavailable")])
    assert len(worker.said(KVAccepted)) == 1


def test_what_runs_in_a_phase_that_is_lost_goes_on_to_its_end() -> None:
    worker = PureWorker("mixed")
    worker.ask("r", 6, max_tokens=5)
    worker.end(worker.begin())  # type: ignore[arg-type]
    worker.rounds.take(ChangeRole(WorkerRole.PREFILL))
    worker.rounds.take(offer_of("late", 6))
    assert [message.transfer_id for message in worker.said(KVRefused)] == ["late#1"]
    worker.run()
    assert len(worker.output("r")) == 5
    worker.assert_empty()


def test_a_worker_that_drains_goes_on_draining_in_another_role() -> None:
    worker = PureWorker("prefill")
    worker.rounds.take(NEVER)
    worker.rounds.take(ChangeRole(WorkerRole.MIXED))
    worker.ask("r", 6)
    assert failures(worker) == [("r", "unavailable")]
    assert worker.rounds.load().state is WorkerState.DRAINING


PAIRS = {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode", "decode-1": "decode"}


@pytest.mark.parametrize("drained", PAIRS)
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
async def test_no_stream_notices_a_drain(drained: str, num_tokens: int) -> None:
    """The drain time is over at once: whatever the worker has goes on elsewhere."""
    box = GatewayBox(PAIRS)
    prompts = {f"r{i}": list(range(20 + i)) for i in range(4)}
    for name, prompt in prompts.items():
        await box.ask(name, prompt, max_tokens=20)
    await box.until(lambda: all(len(box.ids[(name, 0)]) >= num_tokens for name in prompts))
    box.scheduler.worker_changed(drained, WorkerRole(PAIRS[drained]), WorkerState.DRAINING)
    box.workers[drained].post(Drain(0.0))
    for name, prompt in prompts.items():
        await box.answer(name)
        assert box.ids[(name, 0)] == expected_tokens(prompt, 20)
    assert box.workers[drained].load().is_empty
    await box.assert_nothing_left()
