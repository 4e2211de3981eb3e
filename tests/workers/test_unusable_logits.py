"""Requests whose logits are not usable, because NaN is in their KV: they end, and nobody else does."""

from __future__ import annotations

import pytest

from engine.batch import DeviceLost
from engine.sequence import Sequence
from tests.support.scripted_engine import SPEC, expected_tokens
from tests.support.worker_box import WorkerBox


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [(seed * 7919 + i * 31) % 1000 for i in range(length)]


def mixed_box(**sections: object) -> WorkerBox:
    return WorkerBox({"mixed-0": "mixed"}, **sections)


def sequences_of(box: WorkerBox, request_id: str, worker_id: str = "mixed-0") -> list[Sequence]:
    """Those that hold blocks on the worker."""
    parts = box.workers[worker_id].rounds.parts
    prompts, decodes = parts.prefill.scheduler, parts.decode.scheduler
    found = [job.sequence for job in (*prompts.waiting, *prompts.running, *prompts.handing_off)]
    found += decodes.job_of
    return [sequence for sequence in found if sequence.request_id == request_id and sequence.block_table]


def poison(box: WorkerBox, sequence: Sequence, worker_id: str = "mixed-0", block: int = 0) -> None:
    """Writes NaN over the first token of one of its blocks."""
    box.caches[worker_id].storage[:, :, sequence.block_table[block] * SPEC.block_size] = float("nan")


def assert_failed_alone(box: WorkerBox, *request_ids: str) -> None:
    assert set(box.failures) == set(request_ids)
    for failure in box.failures.values():
        assert failure.code == "internal"
        assert "NaN or infinite logits" in failure.message


@pytest.mark.parametrize("num_tokens_before", [1, 2, 9])
def test_a_decode_fails_and_the_others_go_on(num_tokens_before: int) -> None:
    box = mixed_box()
    for i in range(3):
        box.submit(f"r{i}", prompt_of(20 + 9 * i, i), "mixed-0", "mixed-0", max_tokens=30)
    box.run_until(lambda: len(box.tokens[("r1", 0)]) >= num_tokens_before)
    (sequence,) = sequences_of(box, "r1")
    poison(box, sequence)
    box.run()
    assert_failed_alone(box, "r1")
    for i in (0, 2):
        assert box.output(f"r{i}") == expected_tokens(prompt_of(20 + 9 * i, i), 30)
    right = expected_tokens(prompt_of(29, 1), 30)
    assert box.output("r1") == right[: len(box.output("r1"))]
    assert ("r1", 0) not in box.finish
    box.assert_empty()


def test_a_prompt_fails_with_its_last_chunk() -> None:
    box = mixed_box(scheduler={"token_budget": 32})
    box.submit("other", prompt_of(20, 1), "mixed-0", "mixed-0", max_tokens=40)
    box.run_until(lambda: box.tokens[("other", 0)])
    box.submit("r", prompt_of(150), "mixed-0", "mixed-0", max_tokens=5)
    box.run_until(lambda: box.workers["mixed-0"].load().counters["prompt_tokens"] >= 80)
    (sequence,) = sequences_of(box, "r")
    poison(box, sequence, block=1)
    box.run()
    assert_failed_alone(box, "r")
    assert not box.tokens[("r", 0)]
    assert box.output("other") == expected_tokens(prompt_of(20, 1), 40)
    box.assert_empty()


def test_one_sample_takes_its_request_with_it() -> None:
    box = mixed_box()
    box.submit("r", prompt_of(20), "mixed-0", "mixed-0", max_tokens=30, n=3)
    box.submit("other", prompt_of(20, 1), "mixed-0", "mixed-0", max_tokens=30, n=2)
    box.run_until(lambda: len(box.tokens[("r", 1)]) >= 5)
    sequence = next(s for s in sequences_of(box, "r") if s.sample_index == 1)
    poison(box, sequence, block=-1)  # its own: the first one is shared
    box.run()
    assert_failed_alone(box, "r")
    for index in range(2):
        assert box.output("other", index) == expected_tokens(prompt_of(20, 1), 30, index)
    box.assert_empty()


def test_nobody_finds_the_damaged_blocks_afterwards() -> None:
    box = mixed_box()
    for name in ("a", "b"):  # the second finds the first one's prompt in the prefix cache: both have the damage
        box.submit(name, prompt_of(100), "mixed-0", "mixed-0", max_tokens=60)
        box.run_until(lambda name=name: len(box.tokens[(name, 0)]) >= 2)
    (sequence,) = sequences_of(box, "a")
    assert sequence.block_table[0] == sequences_of(box, "b")[0].block_table[0]
    poison(box, sequence)
    box.run_until(lambda: {"a", "b"} <= set(box.failures))
    num_hits = box.workers["mixed-0"].load().counters["prefix_hit_tokens"]
    box.submit("same", prompt_of(100), "mixed-0", "mixed-0", max_tokens=60)
    box.run()
    assert_failed_alone(box, "a", "b")
    assert box.workers["mixed-0"].load().counters["prefix_hit_tokens"] == num_hits
    assert box.output("same") == expected_tokens(prompt_of(100), 60)
    box.assert_empty()


@pytest.mark.parametrize("damaged", ["prefill-0", "decode-0"])
def test_on_either_side_of_a_handoff(damaged: str) -> None:
    sections = {"scheduler": {"token_budget": 64}, "transfer": {"layerwise_threshold_tokens": 64}}
    box = WorkerBox({"prefill-0": "prefill", "decode-0": "decode"}, **sections)
    box.submit("other", prompt_of(50, 1), "prefill-0", "decode-0", max_tokens=30)
    box.submit("r", prompt_of(200), "prefill-0", "decode-0", max_tokens=30)
    box.run_until(lambda: any(s.num_computed_tokens for s in sequences_of(box, "r", damaged)))
    (sequence,) = sequences_of(box, "r", damaged)
    poison(box, sequence, damaged)
    box.run()
    assert_failed_alone(box, "r")
    assert len(box.tokens[("r", 0)]) == 0 if damaged == "prefill-0" else len(box.tokens[("r", 0)]) > 0
    assert box.output("other") == expected_tokens(prompt_of(50, 1), 30)
    box.assert_empty()


def test_while_others_are_preempted() -> None:
    num_preempted = 0
    for num_rounds in range(10, 60):
        box = mixed_box(num_blocks=8, scheduler={"reserve_headroom": 0.0})
        for i in range(3):
            box.submit(f"r{i}", prompt_of(30, i), "mixed-0", "mixed-0", max_tokens=60)
        for _ in range(num_rounds):
            box.round()
        damaged = sequences_of(box, f"r{num_rounds % 3}")
        for sequence in damaged:
            poison(box, sequence)
        box.run()
        assert_failed_alone(box, *(sequence.request_id for sequence in damaged))
        for i in range(3):
            if f"r{i}" not in box.failures:
                assert box.output(f"r{i}") == expected_tokens(prompt_of(30, i), 60)
        num_preempted += box.workers["mixed-0"].load().counters["preemptions"] > 0
        box.assert_empty()
    assert num_preempted


def test_a_lost_device_ends_the_loop_so_that_the_worker_is_lost() -> None:
    box = WorkerBox({"mixed-0": "mixed"})
    box.submit("r", prompt_of(40), "mixed-0", "mixed-0", max_tokens=20)
    box.run_until(lambda: box.tokens[("r", 0)])
    box.runners["mixed-0"].is_device_lost = True
    with pytest.raises(DeviceLost):
        box.run()
    assert not box.failures, "the gateway moves its requests when it hears of the loss"


def test_a_handoff_that_shares_blocks_with_a_damaged_request_does_not_bring_them_back() -> None:
    box = WorkerBox({"prefill-0": "prefill", "decode-0": "decode"})
    prefill, decode = box.workers["prefill-0"], box.workers["decode-0"]
    box.submit("a", prompt_of(100), "prefill-0", "decode-0", max_tokens=60)
    box.run_until(lambda: len(box.tokens[("a", 0)]) >= 3)
    box.submit("b", [*prompt_of(64), *prompt_of(40, 3)], "prefill-0", "decode-0", max_tokens=60)
    box.run_until(lambda: bool(box.incoming("decode-0").reservations))
    (damaged,) = sequences_of(box, "a", "decode-0")
    for _ in range(6):
        prefill.round()
    poison(box, damaged, "decode-0", block=4)
    shared = set(damaged.block_table[:4])
    for _ in range(2 + WorkerBox.num_steps_ahead):
        decode.round()
    assert set(box.failures) == {"a"} and sequences_of(box, "b", "decode-0")
    assert not shared & set(decode.rounds.parts.blocks._hash_by_block)
