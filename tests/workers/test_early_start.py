"""Prompts that begin before the decode worker has answered their offer."""

from __future__ import annotations

import pytest

from phasewise.core.lifecycle import Stage
from phasewise.core.messages import KVAbort, KVAccepted, KVCommit, KVOffer, KVRefused, WorkerMessage
from tests.support.scripted_engine import expected_tokens
from tests.support.worker_box import WorkerBox
from tests.workers.test_interleavings import hold_first
from tests.workers.test_request_life import PAIR, prompt_of

LAYERWISE = {"layerwise_threshold_tokens": 32, "layers_per_part": 1}


def sent(box: WorkerBox, kind: type) -> int:
    return sum(isinstance(message, kind) for _, message in box.sent)


@pytest.mark.parametrize("transfer", [{}, LAYERWISE])
def test_the_first_token_does_not_wait_for_the_answer_and_the_kv_does(transfer: dict[str, int]) -> None:
    box = WorkerBox(PAIR, transfer=transfer)
    kept, deliver = hold_first(box, KVAccepted)
    box.submit("r", prompt_of(100), "prefill-0", "decode-0", max_tokens=8, n=2)
    for _ in range(5):
        box.round()
    assert len(box.tokens[("r", 0)]) == len(box.tokens[("r", 1)]) == 1
    assert kept and not sent(box, KVCommit)
    assert box.workers["prefill-0"].load().counters["handoff_bytes_out"] == 0
    assert box.stages["r"][-1] is Stage.FIRST_TOKEN
    deliver(*kept[0])
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(100), 8) and len(box.output("r", 1)) == 8
    assert [s for s in box.stages["r"] if s in (Stage.RESERVED, Stage.HANDOFF_START, Stage.HANDOFF_END)] == [
        Stage.RESERVED,
        Stage.HANDOFF_START,
        Stage.HANDOFF_END,
    ]
    box.assert_empty()


def test_what_the_receiver_has_already_is_not_sent_though_it_said_so_late() -> None:
    box = WorkerBox(PAIR)
    for request_id in ("a", "b"):
        box.submit(request_id, prompt_of(100), "prefill-0", "decode-0", max_tokens=4)
        box.run()
    part_bytes = box.loads["decode-0"].counters["handoff_bytes_in"]
    assert box.output("b") == expected_tokens(prompt_of(100), 4)
    assert part_bytes < 1.5 * box.caches["decode-0"].spec.bytes_per_token * 100


def test_a_handoffs_time_begins_with_the_answer() -> None:
    box = WorkerBox(PAIR)
    kept, deliver = hold_first(box, KVAccepted)
    box.submit("r", prompt_of(100), "prefill-0", "decode-0", max_tokens=8, time_left_s=600)
    for _ in range(5):
        box.round()
    box.clock.advance(100)  # more than transfer.timeout_s
    for _ in range(5):
        box.round()
    assert not sent(box, KVAbort)
    deliver(*kept[0])
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(100), 8)
    box.assert_empty()


def test_only_one_begins_and_others_pass_while_it_waits() -> None:
    box = WorkerBox({**PAIR, "decode-1": "decode"})
    kept, deliver = hold_first(box, KVAccepted)
    box.submit("waits", prompt_of(100), "prefill-0", "decode-0", max_tokens=8)
    for _ in range(5):
        box.round()
    assert kept and box.tokens[("waits", 0)]
    box.submit("same", prompt_of(90), "prefill-0", "decode-0", max_tokens=8)
    box.submit("other", prompt_of(80), "prefill-0", "decode-1", max_tokens=8)
    box.run_until(lambda: ("other", 0) in box.finish)
    assert not box.tokens[("same", 0)]
    assert sent(box, KVOffer) == 2, "nobody asks for the room that a computed prompt waits for"
    deliver(*kept[0])
    box.run()
    assert box.output("same") == expected_tokens(prompt_of(90), 8)
    box.assert_empty()


def test_a_prompt_that_takes_most_of_the_cache_waits_for_the_answer() -> None:
    box = WorkerBox(PAIR, num_blocks=20)
    kept, deliver = hold_first(box, KVAccepted)
    box.submit("r", prompt_of(200), "prefill-0", "decode-0", max_tokens=8)
    for _ in range(5):
        box.round()
    assert kept and not box.tokens[("r", 0)]
    deliver(*kept[0])
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(200), 8)
    box.assert_empty()


def test_a_refusal_behind_the_first_token_ends_the_request() -> None:
    box = WorkerBox(PAIR)
    kept, _ = hold_first(box, KVAccepted)
    box.submit("r", prompt_of(100), "prefill-0", "decode-0", max_tokens=8)
    for _ in range(5):
        box.round()
    (_, accepted), *_ = kept
    assert isinstance(accepted, KVAccepted)
    box.workers["prefill-0"].post(KVRefused(accepted.transfer_id, "the test says no"))
    box.abort("r")  # as the gateway does
    box.run()
    assert "the test says no" in box.failures["r"].message
    box.assert_empty()


def test_parts_go_on_leaving_while_a_step_computes() -> None:
    """What is held back must not wait for the step's end: it may be that of other prompts, and a long one."""
    box = WorkerBox(PAIR, transfer=LAYERWISE)
    box.num_steps_ahead = 1
    prefill, decode, runner = box.workers["prefill-0"], box.workers["decode-0"], box.runners["prefill-0"]
    runner.num_steps_ahead = 1
    outgoing = box.outgoing("prefill-0")
    outgoing.window.num_bytes = 1  # a part at a time
    box.submit("r", prompt_of(100), "prefill-0", "decode-0", max_tokens=8)
    sent_inside: list[float] = []

    def on_look() -> bool:
        decode.round()
        box.abort("somebody else")
        sent_inside.append(prefill.load().counters["handoff_bytes_out"])
        return not outgoing.is_held_back

    runner.on_look = on_look
    box.run()
    assert len(set(sent_inside)) > 1, "parts left between two looks at a step that was not done"
    assert box.output("r") == expected_tokens(prompt_of(100), 8)
    box.assert_empty()


def test_those_behind_a_prompt_that_waits_for_a_computed_ones_blocks_pass_it() -> None:
    """Else both prefill workers wait: each for room that a prompt of the other has, which stands behind such a one."""
    two = {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode", "decode-1": "decode"}
    box = WorkerBox(two, num_blocks=64)
    held: list[tuple[str, WorkerMessage]] = []
    deliver = box.send

    def send(worker_id: str, message: WorkerMessage) -> None:
        if isinstance(message, KVOffer) and message.request.request_id.startswith("computed"):
            held.append((worker_id, message))
        else:
            deliver(worker_id, message)

    box.send = send  # type: ignore[method-assign]
    for i in (0, 1):
        here, there, other = f"prefill-{i}", f"decode-{i}", f"decode-{1 - i}"
        box.submit(f"computed-{i}", prompt_of(500, i), here, there, max_tokens=4)
        box.submit(f"too-large-{i}", prompt_of(600, i), here, there, max_tokens=1)
        box.submit(f"has-room-{i}", prompt_of(500, i + 2), here, other, max_tokens=4)
    for _ in range(3):
        box.round()
    for entry in held:
        deliver(*entry)
    box.run()
    assert not box.failures and len(box.finish) == 6
    box.assert_empty()


def test_small_prompts_do_not_pass_a_large_one_for_ever() -> None:
    box = WorkerBox(PAIR, num_blocks=64, scheduler={"token_budget": 1024})
    box.submit("first", prompt_of(300), "prefill-0", "decode-0", max_tokens=40)
    for _ in range(6):
        box.round()
    box.submit("large", prompt_of(700), "prefill-0", "decode-0", max_tokens=4)
    for i in range(100):
        if i % 4 == 0:
            box.submit(f"small-{i}", prompt_of(100, i), "prefill-0", "decode-0", max_tokens=12)
        box.round()
    assert ("large", 0) in box.finish
    box.run()
    box.assert_empty()


def test_a_sample_that_ends_while_the_commit_waits_for_room_is_not_decoded() -> None:
    box = WorkerBox(PAIR, num_blocks=20)
    box.submit("fills", prompt_of(200), "prefill-0", "decode-0", max_tokens=40)
    for _ in range(6):
        box.round()
    box.submit("r", prompt_of(100, 1), "prefill-0", "decode-0", max_tokens=8, n=2)
    box.run_until(lambda: box.tokens[("r", 1)])
    assert ("fills", 0) not in box.finish
    box.abort("r", 1)
    box.run()
    assert len(box.output("r")) == 8 and len(box.output("r", 1)) == 1
    box.assert_empty()


def test_the_wait_for_the_answer_is_no_part_of_a_handoffs_time() -> None:
    box = WorkerBox(PAIR)
    kept, deliver = hold_first(box, KVAccepted)
    box.submit("r", prompt_of(100), "prefill-0", "decode-0", max_tokens=8)
    for _ in range(5):
        box.round()
    box.clock.advance(20)
    deliver(*kept[0])
    box.run()
    (end,) = [e for output in box.outputs for e in output.events if e.stage is Stage.HANDOFF_END]
    assert end.duration_s < 1
