"""Steps that are in flight while something else happens to their sequences."""

from __future__ import annotations

import pytest

from phasewise.core.request import FinishReason
from tests.support.scripted_engine import expected_tokens
from tests.support.worker_box import WorkerBox


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [(seed * 7919 + i * 31) % 1000 for i in range(length)]


def mixed_box(**sections: object) -> WorkerBox:
    return WorkerBox({"mixed-0": "mixed"}, **sections)


def submit(box: WorkerBox, request_id: str, prompt: list[int], **sampling: object) -> None:
    box.submit(request_id, prompt, "mixed-0", "mixed-0", **sampling)


def test_a_stop_token_ends_the_stream_though_a_step_more_was_computed() -> None:
    box = mixed_box()
    right = expected_tokens(prompt_of(20), 10)
    submit(box, "r", prompt_of(20), max_tokens=50, stop_token_ids=(right[5],))
    submit(box, "other", prompt_of(33), max_tokens=40)
    box.run()
    assert box.output("r") == right[: right.index(right[5]) + 1]
    assert box.finish[("r", 0)] is FinishReason.STOP
    assert box.output("other") == expected_tokens(prompt_of(33), 40)
    box.assert_empty()


def test_no_step_is_computed_beyond_the_last_token() -> None:
    box = mixed_box()
    submit(box, "r", prompt_of(20), max_tokens=6)
    box.run()
    assert len(box.output("r")) == 6
    assert len(box.runners["mixed-0"].batches) == 6  # the prompt, which gives the first token, and five decodes


def break_steps_of(box: WorkerBox, request_id: str) -> None:
    """From now on, when they are collected."""
    box.runners["mixed-0"].breaks = lambda batch: (
        "late" if any(item.sequence.request_id == request_id for item in batch.items) else ""
    )


@pytest.mark.parametrize("num_tokens_before", [0, 1, 7])
def test_a_request_whose_steps_fail_when_collected_ends_and_no_other(num_tokens_before: int) -> None:
    box = mixed_box()
    submit(box, "r", prompt_of(20), max_tokens=30)
    box.run_until(lambda: len(box.tokens[("r", 0)]) >= num_tokens_before)
    break_steps_of(box, "r")
    box.run_until(lambda: "r" in box.failures)
    submit(box, "next", prompt_of(40, 1), max_tokens=10)
    box.run()
    assert box.output("next") == expected_tokens(prompt_of(40, 1), 10)
    assert ("r", 0) not in box.finish
    box.assert_empty()


def test_a_prompt_is_cancelled_while_its_chunk_is_in_flight() -> None:
    box = mixed_box(scheduler={"token_budget": 32})
    submit(box, "r", prompt_of(200), max_tokens=5)
    box.round()
    box.abort("r")
    submit(box, "next", prompt_of(150, 1), max_tokens=10)
    box.run()
    assert not box.tokens[("r", 0)]
    assert box.output("next") == expected_tokens(prompt_of(150, 1), 10)
    box.assert_empty()


def test_sequences_preempted_with_a_token_in_flight_lose_nothing() -> None:
    box = mixed_box(num_blocks=8, scheduler={"reserve_headroom": 0.0})
    for i in range(3):
        submit(box, f"r{i}", prompt_of(30, i), max_tokens=60)
    box.run()
    assert box.workers["mixed-0"].load().counters["preemptions"] > 0
    for i in range(3):
        assert box.output(f"r{i}") == expected_tokens(prompt_of(30, i), 60)
    box.assert_empty()


def test_nobody_is_pushed_out_while_a_last_token_is_in_flight() -> None:
    box = mixed_box(num_blocks=5, cache={"swap_gib": 0.0}, scheduler={"reserve_headroom": 0.0})
    submit(box, "a", prompt_of(20, 1), max_tokens=60)
    submit(box, "b", prompt_of(30, 2), max_tokens=13)  # its last token is on its way when a needs the block that b has
    box.run()
    assert box.failures == {}
    assert box.output("a") == expected_tokens(prompt_of(20, 1), 60)
    assert box.output("b") == expected_tokens(prompt_of(30, 2), 13)
    box.assert_empty()


def test_a_step_that_cannot_begin_takes_nobody_with_it() -> None:
    num_preempted = 0
    for num_rounds in range(10, 60):
        box = mixed_box(num_blocks=8, scheduler={"reserve_headroom": 0.0})
        for i in range(3):
            submit(box, f"r{i}", prompt_of(30, i), max_tokens=60)
        for _ in range(num_rounds):
            box.round()
        runner = box.runners["mixed-0"]
        num_batches, runner.fail_next = len(runner.batches), True
        box.run()
        broken = {item.sequence.request_id for item in runner.batches[num_batches].items}
        num_preempted += len(broken) < 3
        assert not box.failures
        for i in range(3):
            assert box.output(f"r{i}") == expected_tokens(prompt_of(30, i), 60)
        box.assert_empty()
    assert num_preempted


def test_what_a_failed_request_computed_is_not_shared() -> None:
    box = mixed_box(scheduler={"token_budget": 64})
    submit(box, "r", prompt_of(200), max_tokens=5)
    box.run_until(lambda: box.workers["mixed-0"].load().counters["prompt_tokens"] >= 64)
    break_steps_of(box, "r")
    box.run_until(lambda: "r" in box.failures)
    submit(box, "same", prompt_of(200), max_tokens=5)
    box.run()
    assert box.workers["mixed-0"].load().counters["prefix_hit_tokens"] == 0
    assert box.output("same") == expected_tokens(prompt_of(200), 5)
    box.assert_empty()
