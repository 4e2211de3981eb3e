"""What happens between a worker's mailbox, its rounds and its engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.batch import DeviceLost, ScheduledBatch, StepResult
from phasewise.core.messages import KVAccepted, KVOffer, KVPartAck, PrefillTask, WorkerMessage
from phasewise.core.placement import Placement, WorkerState
from phasewise.core.request import Request, SampledToken, SamplingParams
from tests.support.pure_worker import SPEC, PureWorker
from workers.driver import WorkerDriver

LAYERWISE = {"layerwise_threshold_tokens": 1, "layers_per_part": 1}


class Engine:
    """Computes at once. `on_look` is asked whether a step is done, `on_layer` hears of each layer behind its KV."""

    num_steps_ahead = 0

    def __init__(self) -> None:
        self.batches: list[ScheduledBatch] = []
        self.on_look: Callable[[], bool] = lambda: True
        self.on_layer: Callable[[], None] = lambda: None
        self.error: Exception | None = None

    def submit(
        self,
        batch: ScheduledBatch,
        on_layers_done: Callable[[int, int], None] | None = None,
        layers_per_group: int = 0,
    ) -> Engine:
        self.batches.append(batch)
        step = layers_per_group or SPEC.num_layers
        for first_layer in range(0, SPEC.num_layers, step):
            if on_layers_done is not None:
                on_layers_done(first_layer, step)
                self.on_layer()
        return self

    def is_done(self) -> bool:
        return self.on_look()

    def collect(self) -> StepResult:
        if self.error is not None:
            raise self.error
        items = self.batches[-1].items
        return StepResult(tuple((SampledToken(1),) * item.num_samples for item in items), ((),) * len(items))


def driven(worker: PureWorker, layers_per_part: int | None = 1) -> tuple[WorkerDriver, Engine]:
    engine = Engine()
    return WorkerDriver(worker.rounds, engine, worker.clock, layers_per_part), engine


def task(name: str, num_tokens: int, decode: str = "decode-0") -> PrefillTask:
    request = Request(name, tuple(range(num_tokens)), SamplingParams(max_tokens=4))
    return PrefillTask(request, Placement(name, "prefill-0", decode), "gateway-0", 60.0)


def held_back() -> tuple[PureWorker, WorkerDriver, Engine, str]:
    """A worker whose link has one buffer, and the id of a transfer whose second part waits for it in the next step."""
    worker = PureWorker("prefill", transfer=LAYERWISE, scheduler={"token_budget": 16})
    worker.link.num_buffers = 1
    driver, engine = driven(worker)
    driver.post(task("r", 32))
    driver.round()
    (offer,) = worker.said(KVOffer)
    driver.post(KVAccepted(offer.transfer_id, 0, SPEC.dtype))
    return worker, driver, engine, offer.transfer_id


def test_inside_a_step_only_the_word_of_arrived_parts_is_taken_and_nothing_else_is_lost() -> None:
    worker, driver, engine, transfer_id = held_back()
    inside: list[WorkerMessage] = [task("a", 8), task("b", 8), KVPartAck(transfer_id, 0)]
    seen: list[tuple[int, int]] = []

    def on_look() -> bool:
        seen.append((worker.rounds.load().num_waiting, len(worker.link.parts)))
        if len(seen) == 3:
            worker.link.num_buffers = 100
        driver.post(inside[len(seen) - 1])
        return False

    engine.on_look = on_look
    driver.round()
    assert seen == [(0, 1)] * 3
    assert len(worker.link.parts) == 4, "two layers of two chunks: the rest left behind the part that had arrived"
    driver.round()
    assert [offer.request.request_id for offer in worker.said(KVOffer)] == ["r", "a", "b"]


def test_a_step_whose_kv_has_left_is_not_looked_at() -> None:
    worker = PureWorker()
    driver, engine = driven(worker)
    engine.on_look = lambda: pytest.fail("nothing is held back")
    driver.post(task("r", 8, decode="prefill-0"))
    driver.round()
    assert engine.batches


def test_stop_inside_a_step_ends_the_loop_behind_the_round() -> None:
    worker, driver, engine, _ = held_back()

    looks = iter((False, True))

    def on_look() -> bool:
        driver.stop()
        driver.post(task("later", 8))
        return next(looks)

    engine.on_look = on_look
    driver.run()
    assert worker.loads[-1].state is WorkerState.STOPPED
    assert len(engine.batches) == 2 and not worker.rounds.load().num_waiting


@pytest.mark.parametrize(("layers_per_part", "expected"), [(1, [1, 2]), (2, [2]), (0, [2]), (None, [0])])
def test_kv_leaves_behind_each_group_of_layers_or_behind_the_step(
    layers_per_part: int | None, expected: list[int]
) -> None:
    worker = PureWorker("prefill", transfer={"layerwise_threshold_tokens": 1}, scheduler={"token_budget": 16})
    driver, engine = driven(worker, layers_per_part)
    driver.post(task("r", 32))
    driver.round()
    (offer,) = worker.said(KVOffer)
    driver.post(KVAccepted(offer.transfer_id, 0, SPEC.dtype))
    seen: list[int] = []

    def layers_sent() -> int:
        return sum(part.num_layers for part in worker.link.parts if part.first_token >= 16)

    engine.on_layer = lambda: seen.append(layers_sent())
    driver.round()
    assert seen == expected
    assert layers_sent() == SPEC.num_layers


def test_a_lost_device_ends_the_loop_and_another_failure_its_requests() -> None:
    worker = PureWorker()
    driver, engine = driven(worker)
    driver.post(task("r", 8, decode="prefill-0"))
    engine.error = RuntimeError("one batch was too much")
    driver.round()
    assert not worker.failures, "it is tried once more"
    driver.round()
    assert [failure.request_id for failure in worker.failures] == ["r"]
    driver.post(task("s", 8, decode="prefill-0"))
    engine.error = DeviceLost("gone")
    with pytest.raises(DeviceLost):
        driver.run()
    assert [failure.request_id for failure in worker.failures] == ["r"]
