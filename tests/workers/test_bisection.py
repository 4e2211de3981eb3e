"""A step that breaks ends nobody but its cause: the pure halving, and whole workers under random causes."""

from __future__ import annotations

import random
from collections.abc import Collection
from math import ceil, log2
from typing import Any

import pytest

from engine.batch import ScheduledBatch, ScheduledSequence
from phasewise.core.messages import KVAbort
from tests.support.scripted_engine import expected_tokens
from tests.support.worker_box import WorkerBox
from workers.bisection import Bisection


def causes_found(names: list[str], causes: Collection[str]) -> tuple[list[str], int, set[str]]:
    """Steps of these requests break while a cause is in them: causes found, number of trials, and who was cleared."""
    bisection, found, cleared, num_trials = Bisection(), [], set[str](), 0
    assert bisection.broke(dict.fromkeys(names, 3)) is None
    while (trial := bisection.next_trial()) is not None:
        assert trial.token_budget == 3 * len(trial.requests)
        num_trials += 1
        bisection.begin()
        assert bisection.is_trying
        if set(trial.requests) & set(causes):
            if (cause := bisection.broke(trial.num_tokens)) is not None:
                found.append(cause)
        else:
            cleared |= set(trial.requests)
            bisection.passed()
    assert not bisection.is_trying
    return found, num_trials, cleared


@pytest.mark.parametrize("num_requests", [1, 2, 3, 7, 64])
def test_the_cause_is_found_alone_and_all_others_are_cleared(num_requests: int) -> None:
    names = [f"r{i}" for i in range(num_requests)]
    for name in names:
        found, num_trials, cleared = causes_found(names, {name})
        assert found == [name]
        assert cleared == set(names) - {name}
        assert num_trials <= max(2 * ceil(log2(num_requests)), 1)


def test_several_causes_are_all_found_and_none_is_made_up() -> None:
    names = [f"r{i}" for i in range(20)]
    rng = random.Random(1)
    for _ in range(50):
        causes = set(rng.sample(names, rng.randrange(6)))
        found, _, cleared = causes_found(names, causes)
        assert sorted(found) == sorted(causes)
        assert cleared == set(names) - causes


def test_a_step_that_breaks_beside_a_bisection_that_waits_adds_its_own_suspects() -> None:
    bisection = Bisection()
    bisection.broke({"a": 1, "b": 1})  # could not be submitted
    bisection.broke({"c": 5})  # the step before, which was in flight
    order = []
    while (trial := bisection.next_trial()) is not None:
        bisection.begin()
        order.append(set(trial.requests))
        bisection.passed()
    assert order == [{"c"}, {"a"}, {"b"}]


# ---- whole workers


def prompt_of(length: int, seed: int) -> list[int]:
    return [(seed * 7919 + i * 31) % 1000 for i in range(length)]


class Causes:
    """Which batches break an engine: those that compute a cause's token at or behind its place, and some by chance."""

    def __init__(self, rng: random.Random, places: dict[str, int], chance: float) -> None:
        self._rng = rng
        self._places = places
        self._chance = chance
        self._num_quiet = 0  # so many batches do not break by chance: one that is tried alone is no cause then
        self.num_broken = 0

    def breaks(self, batch: ScheduledBatch) -> str:
        self._num_quiet -= 1
        is_chance = self._num_quiet < 0 and self._rng.random() < self._chance
        if not is_chance and not any(self._is_cause(item) for item in batch.items):
            return ""
        self.num_broken += 1
        self._num_quiet = max(self._num_quiet, 3 * len(batch.items))
        return self._rng.choice(["early", "late"])

    def _is_cause(self, item: ScheduledSequence) -> bool:
        place = self._places.get(item.sequence.request_id)
        return place is not None and item.start + item.num_tokens > place


def box_of(shape: str, rng: random.Random) -> tuple[WorkerBox, str, str]:
    sections: dict[str, Any] = {
        "scheduler": {"token_budget": rng.choice([24, 64]), "reserve_headroom": 0.0},
        "transfer": {"layerwise_threshold_tokens": rng.choice([1, 40, 10**6]), "layers_per_part": rng.choice([1, 2])},
    }
    num_blocks = rng.choice([24, 64])
    if shape == "mixed":
        return WorkerBox({"mixed-0": "mixed"}, num_blocks=num_blocks, **sections), "mixed-0", "mixed-0"
    roles = {"prefill-0": "prefill", "decode-0": "decode"}
    return WorkerBox(roles, num_blocks=num_blocks, **sections), "prefill-0", "decode-0"


@pytest.mark.parametrize("shape", ["mixed", "pair"])
@pytest.mark.parametrize("seed", range(25))
def test_random_causes_in_random_batches_end_alone(shape: str, seed: int) -> None:
    rng = random.Random(f"{shape} {seed}")
    box, prefill, decode = box_of(shape, rng)
    requests: dict[str, tuple[list[int], int, int]] = {}
    for i in range(rng.randrange(2, 12)):
        requests[f"r{i}"] = prompt_of(rng.randrange(1, 120), i), rng.randrange(1, 40), rng.choice([1, 1, 1, 2])
    places = {
        name: rng.randrange(len(requests[name][0]) + requests[name][1])
        for name in rng.sample(list(requests), rng.randrange(len(requests) // 2 + 1))
    }
    causes = Causes(rng, places, chance=0.1)
    for runner in box.runners.values():
        runner.breaks = causes.breaks
    for name, (prompt, max_tokens, num_samples) in requests.items():
        box.submit(name, prompt, prefill, decode, max_tokens=max_tokens, n=num_samples)
        for _ in range(rng.randrange(4)):
            box.round()
    box.run()
    box.assert_empty()
    for name, (prompt, max_tokens, num_samples) in requests.items():
        last_computed = len(prompt) + max_tokens - 1  # the last token sampled is not computed
        for index in range(num_samples):
            output, right = box.output(name, index), expected_tokens(prompt, max_tokens, index)
            assert output == right[: len(output)]
            if name not in box.failures:
                assert output == right
        if name in places and places[name] < last_computed:
            assert box.failures[name].code == "internal"
        else:
            assert name not in box.failures, box.failures[name]
    num_counted = sum(worker.load().counters["broken_steps"] for worker in box.workers.values())
    assert num_counted == causes.num_broken or box.num_steps_ahead  # ahead, one may break behind another


def test_kv_that_left_with_a_broken_step_is_never_decoded() -> None:
    box = WorkerBox(
        {"prefill-0": "prefill", "decode-0": "decode"},
        scheduler={"token_budget": 32},
        transfer={"layerwise_threshold_tokens": 1, "layers_per_part": 1},
    )
    prompt, breaks = prompt_of(150, 1), iter(["", "", "early", "", "late", "", ""])
    box.runners["prefill-0"].breaks = lambda batch: next(breaks, "")
    box.submit("r", prompt, "prefill-0", "decode-0", max_tokens=12)
    box.run()
    assert box.output("r") == expected_tokens(prompt, 12)
    assert sum(isinstance(message, KVAbort) for _, message in box.sent) == 1
    assert box.workers["prefill-0"].load().counters["broken_steps"] == 2
    box.assert_empty()


def test_a_request_that_breaks_a_step_by_chance_is_tried_again_even_if_it_was_alone() -> None:
    box = WorkerBox({"mixed-0": "mixed"})
    box.runners["mixed-0"].fail_next = True
    box.submit("r", prompt_of(20, 1), "mixed-0", "mixed-0", max_tokens=5)
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(20, 1), 5)
    box.assert_empty()


def test_a_chunk_is_not_made_larger_when_it_is_tried_again() -> None:
    box = WorkerBox({"mixed-0": "mixed"}, num_blocks=64, scheduler={"token_budget": 100})
    runner = box.runners["mixed-0"]
    runner.breaks = lambda batch: "early" if batch.num_tokens > 60 else ""  # more than the device holds
    for i in range(2):
        box.submit(f"r{i}", prompt_of(55, i), "mixed-0", "mixed-0", max_tokens=5)
    box.run()
    for i in range(2):
        assert box.output(f"r{i}") == expected_tokens(prompt_of(55, i), 5)
    box.assert_empty()


def test_others_arrive_and_leave_while_the_cause_is_looked_for() -> None:
    box = WorkerBox({"mixed-0": "mixed"})
    for i in range(8):
        box.submit(f"r{i}", prompt_of(20, i), "mixed-0", "mixed-0", max_tokens=30)
    box.run_until(lambda: all(len(box.tokens[(f"r{i}", 0)]) > 3 for i in range(8)))
    box.runners["mixed-0"].breaks = lambda batch: (
        "late" if any(item.sequence.request_id == "r5" for item in batch.items) else ""
    )
    box.round()
    box.abort("r1")
    box.submit("new", prompt_of(20, 9), "mixed-0", "mixed-0", max_tokens=5)
    box.run()
    assert set(box.failures) == {"r5"}
    for i in (0, 2, 3, 4, 6, 7):
        assert box.output(f"r{i}") == expected_tokens(prompt_of(20, i), 30)
    assert box.output("new") == expected_tokens(prompt_of(20, 9), 5)
    box.assert_empty()
