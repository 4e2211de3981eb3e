"""Interleavings that once broke something: messages that overtake each other, retries, ends in odd moments."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from phasewise.core.errors import ERROR_BY_CODE, TransferFailed
from phasewise.core.lifecycle import Stage
from phasewise.core.messages import (
    AbortRequest,
    GatewayLost,
    KVAbort,
    KVAccepted,
    KVCommit,
    KVDone,
    KVOffer,
    KVPart,
    WorkerMessage,
)
from tests.support.scripted_engine import expected_tokens
from tests.support.worker_box import WorkerBox, corrupt
from tests.workers.test_request_life import PAIR, prompt_of


def corrupt_once() -> Callable[[KVPart, torch.Tensor], torch.Tensor]:
    hits: list[KVPart] = []

    def fault(part: KVPart, wire: torch.Tensor) -> torch.Tensor:
        if hits:
            return wire
        hits.append(part)
        return corrupt(wire)

    return fault


def hold_first(
    box: WorkerBox, kind: type, transfer: str = ""
) -> tuple[list[tuple[str, WorkerMessage]], Callable[..., None]]:
    """Keeps the first message of a kind back, or that of a transfer; (what was kept, how to deliver it)."""
    kept: list[tuple[str, WorkerMessage]] = []
    real = box.send

    def send(worker_id: str, message: WorkerMessage) -> None:
        if isinstance(message, kind) and not kept and transfer in ("", getattr(message, "transfer_id", "")):
            kept.append((worker_id, message))
        else:
            real(worker_id, message)

    box.send = send  # type: ignore[method-assign]
    return kept, real


@pytest.mark.parametrize("message", [AbortRequest("r"), GatewayLost("gateway-0")])
def test_an_abort_behind_the_commit_in_one_drain(message: WorkerMessage) -> None:
    box = WorkerBox(PAIR)
    box.submit("r", prompt_of(60), "prefill-0", "decode-0", max_tokens=50)
    prefill, decode = box.workers["prefill-0"], box.workers["decode-0"]
    prefill.round()
    decode.round()
    while not any(isinstance(m, KVCommit) for _, m in box.sent):
        prefill.round()
    for worker in (decode, prefill):
        worker.post(message)
    for _ in range(3):
        box.round()
    box.assert_empty()


def test_an_abort_of_one_sample_behind_the_commit_in_one_drain() -> None:
    box = WorkerBox(PAIR)
    box.submit("r", prompt_of(60), "prefill-0", "decode-0", max_tokens=50, n=2)
    prefill, decode = box.workers["prefill-0"], box.workers["decode-0"]
    prefill.round()
    decode.round()
    prefill.round()
    box.abort("r", 1)
    box.run()
    assert len(box.tokens[("r", 1)]) < 50
    assert box.output("r") == expected_tokens(prompt_of(60), 50)


def test_an_abort_that_overtakes_its_task() -> None:
    box = WorkerBox(PAIR)
    box.abort("r")
    box.round()
    box.submit("r", prompt_of(60), "prefill-0", "decode-0", max_tokens=50)
    box.run()
    assert box.tokens == {}
    box.assert_empty()


def test_an_abort_that_overtakes_the_offer() -> None:
    box = WorkerBox(PAIR)
    kept, deliver = hold_first(box, KVOffer)
    box.submit("r", prompt_of(60), "prefill-0", "decode-0", max_tokens=5, time_left_s=600)
    box.round()
    box.abort("r")
    box.round()
    deliver(*kept[0])
    box.run()
    box.assert_empty()


def test_a_window_freed_by_a_failure_is_used_at_once() -> None:
    lost: list[KVPart] = []

    def fault(part: KVPart, wire: torch.Tensor) -> Any:
        if part.transfer_id.startswith("a#"):
            lost.append(part)
            return None
        return wire

    box = WorkerBox({**PAIR, "decode-1": "decode"}, fault=fault)
    outgoing = box.outgoing("prefill-0")
    outgoing.window.num_bytes = 7000
    box.submit("a", prompt_of(100, 1), "prefill-0", "decode-1", max_tokens=5)
    box.run_until(lambda: lost)
    box.submit("b", prompt_of(100, 2), "prefill-0", "decode-0", max_tokens=5)
    for _ in range(10):
        box.round()
    box.abort("a")
    box.run()
    assert outgoing.window.num_bytes_in_flight == 0
    assert box.output("b") == expected_tokens(prompt_of(100, 2), 5)


def test_a_retry_and_a_reservation_do_not_wait_for_each_other() -> None:
    box = WorkerBox(PAIR, num_blocks=8, fault=corrupt_once())
    for name, seed in (("x", 1), ("y", 2)):
        box.submit(name, prompt_of(100, seed), "prefill-0", "decode-0", max_tokens=5)
    box.run()
    assert box.output("x") == expected_tokens(prompt_of(100, 1), 5)
    assert box.output("y") == expected_tokens(prompt_of(100, 2), 5)
    box.assert_empty()


def test_a_retry_that_nobody_answers_does_not_hold_other_prompts_back_for_ever() -> None:
    """While a computed prompt is offered again, no other asks for room; so that has an end."""
    box = WorkerBox({**PAIR, "decode-1": "decode"}, fault=corrupt_once())
    box.submit("x", prompt_of(100, 1), "prefill-0", "decode-0", max_tokens=5, time_left_s=600)
    box.run_until(lambda: box.workers["decode-0"].load().counters["checksum_failures"])
    box.lost.add("decode-0")  # it hangs, and nobody has noticed yet
    box.submit("y", prompt_of(100, 2), "prefill-0", "decode-1", max_tokens=5, time_left_s=600)
    for _ in range(10):
        box.round()
    box.clock.advance(31)  # transfer.timeout_s
    box.run()
    assert box.output("y") == expected_tokens(prompt_of(100, 2), 5)
    assert box.failures["x"].code == TransferFailed.code
    box.assert_empty()


def test_a_retry_remembers_samples_that_ended() -> None:
    box = WorkerBox(PAIR, fault=corrupt_once())
    box.submit("r", prompt_of(60), "prefill-0", "decode-0", max_tokens=50, n=2)
    prefill, decode = box.workers["prefill-0"], box.workers["decode-0"]
    for worker in (prefill, decode, prefill, decode):  # the first token is out, the part was corrupt
        worker.round()
    box.abort("r", 1)
    box.run()
    assert len(box.tokens[("r", 1)]) < 50
    assert box.output("r") == expected_tokens(prompt_of(60), 50)


def test_a_full_decode_worker_does_not_hold_prompts_for_an_idle_one() -> None:
    box = WorkerBox({**PAIR, "decode-1": "decode"}, num_blocks=32)
    box.submit("long", prompt_of(40), "prefill-0", "decode-0", max_tokens=450)
    box.run_until(lambda: Stage.DECODE_START in box.stages["long"])
    box.submit("big", prompt_of(480, 3), "prefill-0", "decode-0", max_tokens=3)  # waits for room at decode-0
    box.round()
    box.submit("other", prompt_of(30), "prefill-0", "decode-1", max_tokens=3)
    box.run_until(lambda: ("other", 0) in box.finish, max_rounds=100)
    assert ("long", 0) not in box.finish
    box.run()


def test_max_running_bounds_a_mixed_worker() -> None:
    box = WorkerBox({"mixed-0": "mixed"}, num_blocks=128, scheduler={"max_running": 4})
    for i in range(8):
        box.submit(f"r{i}", prompt_of(10, i), "mixed-0", "mixed-0", max_tokens=20, n=1 + i % 3)
    most = 0
    while len(box.finish) < sum(1 + i % 3 for i in range(8)):
        box.round()
        most = max(most, len(box.workers["mixed-0"].rounds.parts.decode.scheduler.running))
    assert most <= 4
    box.assert_empty()


def test_max_running_bounds_prompts_that_stay_and_handoffs_together() -> None:
    box = WorkerBox({"prefill-0": "prefill", "mixed-0": "mixed"}, num_blocks=128, scheduler={"max_running": 2})
    for i in range(6):
        box.submit(f"in{i}", prompt_of(30, i), "prefill-0", "mixed-0", max_tokens=20)
        box.submit(f"own{i}", prompt_of(30, 10 + i), "mixed-0", "mixed-0", max_tokens=20)
    most = 0
    while len(box.finish) < 12:
        box.round()
        most = max(most, len(box.workers["mixed-0"].rounds.parts.decode.scheduler.running))
    assert most == 2
    box.run()
    box.assert_empty()


def test_a_lease_does_not_outlive_the_request() -> None:
    box = WorkerBox(PAIR, num_blocks=8)
    box.submit("a", prompt_of(100, 1), "prefill-0", "decode-0", max_tokens=20, time_left_s=1000)
    box.run_until(lambda: Stage.DECODE_START in box.stages["a"])
    box.submit("b", prompt_of(100, 2), "prefill-0", "decode-0", max_tokens=20, time_left_s=60)
    box.round()
    box.round()
    end_s = box.clock.now_s() + 60
    box.clock.advance(50)
    incoming = box.incoming("decode-0")
    box.run_until(lambda: incoming.reservations)
    (reservation,) = incoming.reservations
    assert reservation.offer.request.request_id == "b"
    assert reservation.lease_end_s <= end_s + 0.1
    box.run()


def test_a_lost_done_repeats_no_token_and_frees_prefill() -> None:
    box = WorkerBox(PAIR)
    kept, _ = hold_first(box, KVDone)
    box.submit("r", prompt_of(60), "prefill-0", "decode-0", max_tokens=300, time_left_s=600)
    box.run_until(lambda: kept)
    box.clock.advance(31)  # transfer.timeout_s: prefill offers again what decode has had for long
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(60), 300)
    assert box.failures == {}
    box.assert_empty()


def test_a_second_offer_behind_the_commit_in_one_drain() -> None:
    """The sender gave up what had just become whole, while the receiver was inside a step."""
    box = WorkerBox(PAIR)
    kept, _ = hold_first(box, KVDone, "r#prefill-0.1")
    box.submit("r", prompt_of(60), "prefill-0", "decode-0", max_tokens=50, time_left_s=600)
    prefill, decode = box.workers["prefill-0"], box.workers["decode-0"]
    prefill.round()
    decode.round()
    while not any(isinstance(m, KVCommit) for _, m in box.sent):
        prefill.round()
    box.clock.advance(31)  # transfer.timeout_s
    prefill.round()
    assert sum(isinstance(m, KVOffer) for _, m in box.sent) == 2
    box.run()
    assert kept and box.output("r") == expected_tokens(prompt_of(60), 50)
    assert box.loads["decode-0"].counters["handoffs_in"] == 1
    box.assert_empty()


def test_small_parts_do_not_keep_a_large_one_out_of_the_window() -> None:
    box = WorkerBox(PAIR, num_blocks=512)
    outgoing, decode = box.outgoing("prefill-0"), box.workers["decode-0"]
    on_the_way: list[tuple[Any, Any]] = []
    names: list[str] = []

    def post(part: KVPart, arrived: Any) -> None:
        on_the_way.append((part, arrived))
        names.append(part.transfer_id.partition("#")[0])

    box.links["prefill-0"].mailboxes["decode-0"] = post  # type: ignore[assignment]
    outgoing.window.num_bytes = 130 * box.workers["prefill-0"].info.kv_spec.bytes_per_token

    def submit(name: str, length: int) -> None:
        box.submit(name, prompt_of(length, len(names)), "prefill-0", "decode-0", max_tokens=2)
        for _ in range(6):
            box.round()

    submit("small0", 40), submit("small1", 40), submit("large", 100)
    for i in range(2, 8):  # there is always a small one that would fit where one has arrived
        submit(f"small{i}", 40)
        decode.post(*on_the_way.pop(0))
        box.round()
    assert names[2] == "large", names


def test_what_can_never_fit_is_offered_once_and_is_not_retry_safe() -> None:
    box = WorkerBox(PAIR, scheduler={"max_running": 2})
    box.submit("r", prompt_of(60), "prefill-0", "decode-0", max_tokens=3, n=3)
    box.run()
    assert sum(isinstance(m, KVOffer) for _, m in box.sent) == 1
    assert not ERROR_BY_CODE[box.failures["r"].code].retry_safe


@pytest.mark.parametrize("seed", range(20))
def test_swap_space_is_given_back_and_no_request_fails_twice(seed: int) -> None:
    rng = random.Random(seed)
    num_blocks, num_swap = rng.randrange(6, 14), rng.randrange(1, 14)
    box = WorkerBox(
        {"mixed-0": "mixed"},
        num_blocks=num_blocks,
        cache={"swap_gib": num_swap * 1024 / 2**30},
        scheduler={"reserve_headroom": 0.0},
    )
    assert box.caches["mixed-0"].swap.num_free == num_swap
    for i in range(rng.randrange(1, 4)):
        prompt, max_tokens = prompt_of(rng.randrange(5, 60), i), rng.randrange(2, num_blocks * 16 - 60)
        box.submit(f"r{i}", prompt, "mixed-0", "mixed-0", max_tokens=max_tokens, n=rng.choice([1, 3, 4, 5]))
    box.run(5000)
    assert box.caches["mixed-0"].swap.num_free == num_swap
    assert len([f for output in box.outputs for f in output.failures]) == len(box.failures)
    box.assert_empty()


@pytest.mark.parametrize("seed", range(20))
def test_a_worker_that_says_it_is_idle_has_nothing_to_do(seed: int) -> None:
    rng = random.Random(seed)
    num_blocks = rng.randrange(6, 14)
    roles = rng.choice([{"mixed-0": "mixed"}, PAIR])
    pair = ("mixed-0", "mixed-0") if len(roles) == 1 else ("prefill-0", "decode-0")
    swap = {"swap_gib": rng.randrange(14) * 1024 / 2**30}
    box = WorkerBox(roles, num_blocks=num_blocks, cache=swap, scheduler={"reserve_headroom": 0.0})
    for i in range(rng.randrange(2, 6)):
        prompt, max_tokens = prompt_of(rng.randrange(5, 60), i), rng.randrange(2, num_blocks * 16 - 60)
        box.submit(f"r{i}", prompt, *pair, max_tokens=max_tokens, n=rng.choice([1, 1, 3]))
    for _ in range(3000):
        for worker in box.workers.values():
            if not worker.round():
                before = len(box.sent)
                assert not worker.round(), "it slept although there was work"
                assert len(box.sent) == before
        if not any(box.holds(name) for name in roles):
            return
    raise AssertionError("still busy")


@pytest.mark.parametrize("seed", range(25))
def test_random_order_corruption_and_aborts_leave_nothing_and_change_no_token(seed: int) -> None:
    rng = random.Random(seed)
    roles = {f"{role}-{i}": role for role, i in (("prefill", 0), ("prefill", 1), ("decode", 0), ("decode", 1))}
    roles["mixed-0"] = "mixed"
    box = WorkerBox(
        roles,
        num_blocks=rng.choice([24, 48, 64]),
        fault=lambda part, wire: corrupt(wire) if rng.random() < 0.01 else wire,
        transfer={"layerwise_threshold_tokens": 60, "layers_per_part": rng.choice([1, 3])},
        scheduler={"reserve_headroom": rng.choice([0.0, 0.05]), "token_budget": rng.choice([16, 64, 128])},
    )
    for worker_id in box.workers:
        box.outgoing(worker_id).window.num_bytes = rng.choice([2000, 20000, 1 << 30])
    pairs = [(p, d) for p in ("prefill-0", "prefill-1") for d in ("decode-0", "decode-1", "mixed-0")]
    pairs.append(("mixed-0", "mixed-0"))
    expected: dict[tuple[str, int], list[int]] = {}
    aborted = set()
    for i in range(60):
        prompt, n = prompt_of(rng.randrange(1, 200), rng.randrange(20)), rng.choice([1, 1, 2, 4])
        max_tokens = rng.randrange(1, 60)
        box.submit(f"r{i}", prompt, *rng.choice(pairs), max_tokens=max_tokens, n=n, time_left_s=1e6)
        for sample in range(n):
            expected[(f"r{i}", sample)] = expected_tokens(prompt, max_tokens, sample)
        for _ in range(rng.randrange(4)):
            box.workers[rng.choice(list(roles))].round()
        if rng.random() < 0.3:
            victim = f"r{rng.randrange(i + 1)}"
            aborted.add(victim)
            box.abort(victim, rng.choice([None, 0]))
    for _ in range(3000):
        box.workers[rng.choice(list(roles))].round()
    box.run(5000)
    box.assert_empty()
    for worker_id in box.workers:
        assert box.outgoing(worker_id).window.num_bytes_in_flight == 0
        assert box.outgoing(worker_id).transfer_ids == []
        assert box.caches[worker_id].swap.num_free == box.num_swap_blocks
    for (request_id, sample), tokens in expected.items():
        if request_id not in aborted and request_id not in box.failures:
            assert box.output(request_id, sample) == tokens


@pytest.mark.parametrize("is_reserved", [True, False], ids=["reserved", "waiting"])
def test_a_first_offer_that_becomes_whole_beside_the_second(is_reserved: bool) -> None:
    """Commit and abort are late: the sender gives up, and its second offer is here before them."""
    box = WorkerBox(PAIR, num_blocks=8)
    late: list[tuple[str, WorkerMessage]] = []
    real = box.send

    def send(worker_id: str, message: WorkerMessage) -> None:
        is_late = isinstance(message, KVCommit | KVAbort) and message.transfer_id.endswith(".1")
        late.append((worker_id, message)) if is_late else real(worker_id, message)

    box.send = send  # type: ignore[method-assign]
    num_blocks = 3 if is_reserved else 5  # of 8: beside the first, there is no room for a second of five
    prompt = prompt_of(16 * num_blocks)
    box.submit("r", prompt, "prefill-0", "decode-0", max_tokens=20, time_left_s=600)
    box.run_until(lambda: late)
    box.clock.advance(31)  # transfer.timeout_s
    box.run_until(lambda: sum(isinstance(m, KVOffer) for _, m in box.sent) == 2)
    box.workers["decode-0"].round()
    assert sum(isinstance(m, KVAccepted) for _, m in box.sent) == (2 if is_reserved else 1)
    for worker_id, message in sorted(late, key=lambda sent: isinstance(sent[1], KVAbort)):
        real(worker_id, message)
    box.run()
    assert box.output("r") == expected_tokens(prompt, 20)
    assert box.workers["decode-0"].load().counters["handoffs_in"] == 1
    box.assert_empty()
