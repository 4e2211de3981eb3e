"""A request's life through real workers, phases, blocks and handoffs; the engine is arithmetic over real KV."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.batch import ScheduledBatch
from engine.sequence import Sequence
from kv_transfer.codec import CHECKSUM_BYTES
from phasewise.core.lifecycle import Stage
from phasewise.core.messages import AbortRequest, GatewayLost, KVCommit, KVDone, KVOffer, KVPart, PeerLost
from phasewise.core.request import FinishReason
from tests.support.scripted_engine import expected_tokens
from tests.support.worker_box import WorkerBox, arrived, corrupt

PAIR = {"prefill-0": "prefill", "decode-0": "decode"}
DECODE_FIRST = {"decode-0": "decode", "prefill-0": "prefill"}  # what prefill says is heard a round later


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed * 100_003 + length)
    return [rng.randrange(50_000) for _ in range(length)]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40, 127, 128, 129, 300])
def test_handoff_gives_the_tokens_of_a_run_without_cache(length: int) -> None:
    box = WorkerBox(PAIR)
    box.submit("r", prompt_of(length), "prefill-0", "decode-0", max_tokens=20)
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(length), 20)
    assert box.finish[("r", 0)] is FinishReason.LENGTH
    box.assert_empty()


@pytest.mark.parametrize("length", [7, 33, 300])
def test_mixed_worker_gives_the_same_tokens_without_a_transfer(length: int) -> None:
    box = WorkerBox({"mixed-0": "mixed"})
    box.submit("r", prompt_of(length), "mixed-0", "mixed-0", max_tokens=20)
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(length), 20)
    assert box.sent == []
    box.assert_empty()


def test_long_prompts_go_layer_group_by_layer_group_and_chunk_by_chunk() -> None:
    parts: list[KVPart] = []

    def watch(part: KVPart, wire: torch.Tensor) -> torch.Tensor:
        parts.append(part)
        return wire

    box = WorkerBox(PAIR, fault=watch, transfer={"layers_per_part": 2, "layerwise_threshold_tokens": 200})
    box.submit("long", prompt_of(300), "prefill-0", "decode-0", max_tokens=3)
    box.run()
    cells = [(p.first_layer, p.num_layers, p.first_token, p.num_tokens) for p in parts]
    chunks = [(0, 128), (128, 128), (256, 44)]
    assert cells == [(layer, 2, *chunk) for chunk in chunks for layer in (0, 2)]
    parts.clear()
    box.submit("short", prompt_of(199), "prefill-0", "decode-0", max_tokens=3)
    box.run()
    assert [(p.num_layers, p.num_tokens) for p in parts] == [(4, 199)]
    box.assert_empty()


def test_timeline_has_every_stage_once_in_order() -> None:
    box = WorkerBox(PAIR)
    box.submit("ahead", prompt_of(600), "prefill-0", "decode-0", max_tokens=4)
    box.submit("r", prompt_of(600), "prefill-0", "decode-0", max_tokens=4)
    box.run()
    assert box.stages["r"] == [
        Stage.WAITING,
        Stage.RESERVE_ASKED,
        Stage.RESERVED,
        Stage.PREFILL_START,
        Stage.HANDOFF_START,
        Stage.PREFILL_END,
        Stage.FIRST_TOKEN,
        Stage.HANDOFF_END,
        Stage.DECODE_START,
    ]


def test_first_token_leaves_from_prefill_before_the_handoff_ends() -> None:
    box = WorkerBox(DECODE_FIRST)
    box.submit("r", prompt_of(100), "prefill-0", "decode-0", max_tokens=4)
    box.run_until(lambda: box.tokens[("r", 0)])
    assert box.outputs[-1].worker_id == "prefill-0"
    assert Stage.HANDOFF_END not in box.stages["r"]


def test_nothing_is_decoded_before_the_commit() -> None:
    box = WorkerBox(DECODE_FIRST)
    box.submit("r", prompt_of(100), "prefill-0", "decode-0", max_tokens=8)
    box.run_until(lambda: any(isinstance(m, KVCommit) for _, m in box.sent))
    assert box.runners["decode-0"].batches == []
    box.run()
    assert len(box.runners["decode-0"].batches) == 7


def test_a_prompt_that_ends_with_its_first_token_never_travels() -> None:
    box = WorkerBox(PAIR)
    box.submit("one", prompt_of(50), "prefill-0", "decode-0", max_tokens=1)
    stop = expected_tokens(prompt_of(60), 1)[0]
    box.submit("stop", prompt_of(60), "prefill-0", "decode-0", max_tokens=9, stop_token_ids=(stop,))
    box.run()
    assert box.finish == {("one", 0): FinishReason.LENGTH, ("stop", 0): FinishReason.STOP}
    assert not any(isinstance(m, KVCommit) for _, m in box.sent)
    box.assert_empty()


def test_n_samples_are_prefilled_once_and_handed_off_once() -> None:
    box = WorkerBox(PAIR)
    box.submit("r", prompt_of(70), "prefill-0", "decode-0", max_tokens=12, n=5)
    box.run()
    for i in range(5):
        assert box.output("r", i) == expected_tokens(prompt_of(70), 12, i)
    assert sum(isinstance(m, KVCommit) for _, m in box.sent) == 1
    assert sum(i.num_tokens for b in box.runners["prefill-0"].batches for i in b.items) == 70
    box.assert_empty()


def test_n_samples_on_a_mixed_worker_share_the_prompt_and_part_at_the_first_write() -> None:
    box = WorkerBox({"mixed-0": "mixed"}, num_blocks=16)
    box.submit("r", prompt_of(70), "mixed-0", "mixed-0", max_tokens=12, n=4)
    box.run()
    for i in range(4):
        assert box.output("r", i) == expected_tokens(prompt_of(70), 12, i)
    box.assert_empty()


def test_prefix_cache_on_both_sides_and_only_the_rest_travels() -> None:
    box = WorkerBox(PAIR)
    first = prompt_of(64)
    box.submit("a", first, "prefill-0", "decode-0", max_tokens=4)
    box.run()
    sent_before = box.workers["prefill-0"].load().counters["handoff_bytes_out"]
    longer = first + prompt_of(40, seed=1)
    box.submit("b", longer, "prefill-0", "decode-0", max_tokens=6)
    box.run()
    assert box.output("b") == expected_tokens(longer, 6)
    counters = box.workers["prefill-0"].load().counters
    assert counters["prefix_hit_tokens"] == 64
    bytes_per_token = box.workers["prefill-0"].info.kv_spec.bytes_per_token
    assert counters["handoff_bytes_out"] - sent_before == 40 * bytes_per_token + CHECKSUM_BYTES
    box.assert_empty()


@pytest.mark.parametrize("roles", [PAIR, {"mixed-0": "mixed"}])
def test_no_token_waits_for_its_prompt_to_be_hashed(roles: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes 2 us a block; while the engine computes, nobody waits for it."""
    seen: list[tuple[str, int]] = []
    box = WorkerBox(roles)
    for worker_id, worker in box.workers.items():
        runner = box.runners[worker_id]

        def submit(batch: ScheduledBatch, *arguments: Any, submit: Any = runner.submit) -> Any:
            seen.extend(("submit", len(item.sequence.block_hashes)) for item in batch.items)
            return submit(batch, *arguments)

        def publish(sequence: Sequence, publish: Any = worker.rounds.parts.blocks.publish) -> None:
            seen.append(("publish", len(sequence.block_hashes)))
            publish(sequence)
            assert len(sequence.block_hashes) == seen[-1][1]

        monkeypatch.setattr(runner, "submit", submit)
        monkeypatch.setattr(worker.rounds.parts.blocks, "publish", publish)
    prefill, decode = next(iter(roles)), list(roles)[-1]
    box.submit("r", prompt_of(100), prefill, decode, max_tokens=3)
    box.run()
    assert [number for name, number in seen if name == "submit"] == [0, 6, 6]
    assert {number for name, number in seen if name == "publish"} == {6}


@pytest.mark.parametrize("last", ["commit", "part", "abort"])
def test_a_worker_without_work_sleeps_until_there_may_be_some(last: str) -> None:
    """That is when a handoff is whole, whatever comes last of it; not at each of its parts."""
    # Who sleeps for no message does not wake up here.
    hours = {"heartbeat_s": 3600.0, "suspect_s": 36_000.0, "overdue_s": 36_000.0}
    box = WorkerBox(PAIR, transfer={"layerwise_threshold_tokens": 1, "layers_per_part": 1}, health=hours)
    prefill, decode = box.workers["prefill-0"], box.workers["decode-0"]
    box.submit("r", prompt_of(60), "prefill-0", "decode-0", max_tokens=4, time_left_s=7200.0)
    box.run_until(lambda: bool(box.incoming("decode-0").reservations))
    came: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(box.links["prefill-0"].mailboxes, "decode-0", lambda *entry: came.append(entry))
        patch.setattr(box, "send", lambda worker_id, message: came.append((message,)))
        for _ in range(4):
            prefill.round()
    assert len(came) == 5
    if last == "abort":
        decode.post(AbortRequest("x"))
    else:
        for entry in came if last == "commit" else (came[-1], *came[:-1]):
            decode.post(*entry)
    sleeper = threading.Thread(target=decode.wait, daemon=True)
    sleeper.start()
    sleeper.join(20.0)
    assert not sleeper.is_alive(), "it sleeps although there may be work"
    assert box.incoming("decode-0").has_ended == (last != "abort")
    if last == "abort":
        for entry in came:
            decode.post(*entry)
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(60), 4)


def test_a_handoff_is_found_by_the_next_offer_and_when_it_ends_before_its_first_step() -> None:
    box = WorkerBox(PAIR)
    prefill, decode = box.workers["prefill-0"], box.workers["decode-0"]
    box.submit("a", prompt_of(100), "prefill-0", "decode-0", max_tokens=4)
    box.run_until(lambda: bool(box.incoming("decode-0").reservations))
    for _ in range(6):
        prefill.round()
    box.submit("b", [*prompt_of(100)[:96], 7, 7, 7], "prefill-0", "decode-0", max_tokens=4)
    for _ in range(2):
        prefill.round()
    decode.post(AbortRequest("a"))
    decode.round()
    (reservation,) = box.incoming("decode-0").reservations
    assert reservation.num_cached_tokens == 96


def test_prefix_known_to_prefill_alone_still_travels_when_pushed_layer_wise() -> None:
    roles = {**PAIR, "decode-1": "decode"}
    box = WorkerBox(roles, transfer={"layerwise_threshold_tokens": 64, "layers_per_part": 1})
    prompt = prompt_of(200)
    box.submit("a", prompt, "prefill-0", "decode-0", max_tokens=4)
    box.run()
    box.submit("b", prompt, "prefill-0", "decode-1", max_tokens=4)
    box.run()
    assert box.output("b") == box.output("a") == expected_tokens(prompt, 4)


def test_cache_salt_keeps_prefixes_apart() -> None:
    box = WorkerBox(PAIR)
    from phasewise.core.messages import PrefillTask
    from phasewise.core.placement import Placement
    from phasewise.core.request import Request, SamplingParams

    for request_id, salt in (("a", "tenant-1"), ("b", "tenant-2")):
        request = Request(request_id, tuple(prompt_of(64)), SamplingParams(max_tokens=3), cache_salt=salt)
        placement = Placement(request_id, "prefill-0", "decode-0")
        box.workers["prefill-0"].post(PrefillTask(request, placement, "gateway-0", 60.0))
        box.run()
    assert box.workers["prefill-0"].load().counters["prefix_hit_tokens"] == 0


def test_preemption_when_blocks_run_out_changes_no_token() -> None:
    box = WorkerBox(PAIR, num_blocks=12, scheduler={"reserve_headroom": 0.0})
    for i in range(4):
        box.submit(f"r{i}", prompt_of(40, seed=i), "prefill-0", "decode-0", max_tokens=60)
    box.run()
    for i in range(4):
        assert box.output(f"r{i}") == expected_tokens(prompt_of(40, seed=i), 60)
    assert box.workers["decode-0"].load().counters["preemptions"] > 0
    assert Stage.PREEMPTED not in box.stages["r0"], "the oldest must never be preempted"
    box.assert_empty()


def test_without_swap_space_the_youngest_fails_clearly_and_the_others_finish() -> None:
    box = WorkerBox({"mixed-0": "mixed"}, num_blocks=8, cache={"swap_gib": 0}, scheduler={"reserve_headroom": 0.0})
    for i in range(2):
        box.submit(f"r{i}", prompt_of(40, seed=i), "mixed-0", "mixed-0", max_tokens=60)
    box.run()
    assert box.output("r0") == expected_tokens(prompt_of(40, seed=0), 60)
    assert box.failures["r1"].code == "overloaded"
    box.assert_empty()


def test_full_decode_pool_holds_prompts_back_in_the_prefill_queue() -> None:
    box = WorkerBox({**PAIR, "decode-1": "decode"}, num_blocks=8)
    for i in range(5):
        box.submit(f"r{i}", prompt_of(100, seed=i), "prefill-0", "decode-0", max_tokens=10)
    box.submit("other", prompt_of(30), "prefill-0", "decode-1", max_tokens=3)
    box.run_until(lambda: ("other", 0) in box.finish)
    load = box.workers["prefill-0"].load()
    assert load.num_waiting >= 2
    box.run()
    for i in range(5):
        assert box.output(f"r{i}") == expected_tokens(prompt_of(100, seed=i), 10)
    box.assert_empty()


def test_bounded_queue_refuses_at_once() -> None:
    box = WorkerBox(PAIR, scheduler={"max_waiting": 2})
    for i in range(4):
        box.submit(f"r{i}", prompt_of(20, seed=i), "prefill-0", "decode-0", max_tokens=3)
    box.run()
    assert {r: f.code for r, f in box.failures.items()} == {"r2": "overloaded", "r3": "overloaded"}
    assert len(box.finish) == 2
    box.assert_empty()


ABORT_POINTS = [Stage.WAITING, Stage.RESERVE_ASKED, Stage.RESERVED, Stage.PREFILL_START, Stage.FIRST_TOKEN]
ABORT_POINTS += [Stage.HANDOFF_START, Stage.HANDOFF_END, Stage.DECODE_START]


@pytest.mark.parametrize("stage", ABORT_POINTS)
def test_abort_in_every_state_frees_everything_on_both_sides(stage: Stage) -> None:
    box = WorkerBox(PAIR, transfer={"layerwise_threshold_tokens": 100, "layers_per_part": 1})
    box.submit("r", prompt_of(300), "prefill-0", "decode-0", max_tokens=50)
    box.run_until(lambda: stage in box.stages["r"])
    box.abort("r")
    box.run()
    assert ("r", 0) not in box.finish
    box.assert_empty()
    box.submit("again", prompt_of(300), "prefill-0", "decode-0", max_tokens=5)
    box.run()
    assert box.output("again") == expected_tokens(prompt_of(300), 5)


@pytest.mark.parametrize("stage", ABORT_POINTS)
def test_deadline_in_every_state_ends_with_its_error(stage: Stage) -> None:
    box = WorkerBox(PAIR)
    box.submit("r", prompt_of(300), "prefill-0", "decode-0", max_tokens=50, time_left_s=5.0)
    box.run_until(lambda: stage in box.stages["r"])
    box.clock.advance(6.0)
    box.run()
    assert box.failures["r"].code == "deadline_exceeded"
    box.assert_empty()


def test_abort_while_preempted_frees_the_swapped_copy() -> None:
    box = WorkerBox({"mixed-0": "mixed"}, num_blocks=8)
    for i in range(2):
        box.submit(f"r{i}", prompt_of(40, seed=i), "mixed-0", "mixed-0", max_tokens=60)
    box.run_until(lambda: Stage.PREEMPTED in box.stages["r1"])
    box.abort("r1")
    box.run()
    assert box.output("r0") == expected_tokens(prompt_of(40, seed=0), 60)
    box.assert_empty()
    assert not box.workers["mixed-0"].rounds.parts.decode.scheduler.job_of
    assert box.caches["mixed-0"].swap.num_free == box.num_swap_blocks


def test_abort_of_one_sample_leaves_the_others() -> None:
    box = WorkerBox(PAIR)
    box.submit("r", prompt_of(30), "prefill-0", "decode-0", max_tokens=20, n=3)
    box.run_until(lambda: len(box.tokens[("r", 1)]) >= 1)
    box.abort("r", 1)  # before the handoff ends: the sample must not begin on the decode worker
    box.run()
    assert box.output("r", 0) == expected_tokens(prompt_of(30), 20, 0)
    assert box.output("r", 2) == expected_tokens(prompt_of(30), 20, 2)
    assert len(box.output("r", 1)) < 20
    box.assert_empty()


def test_corrupt_part_is_retried_and_never_decoded() -> None:
    hits = []

    def once(part: KVPart, wire: torch.Tensor) -> torch.Tensor:
        if hits:
            return wire
        hits.append(part)
        return corrupt(wire)

    box = WorkerBox(PAIR, fault=once)
    box.submit("r", prompt_of(100), "prefill-0", "decode-0", max_tokens=8)
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(100), 8)
    assert box.workers["decode-0"].load().counters["checksum_failures"] == 1
    assert box.workers["prefill-0"].load().counters["handoff_failures"] == 1
    box.assert_empty()


@pytest.mark.parametrize("length", [100, 600])
def test_always_corrupt_ends_with_transfer_failed(length: int) -> None:
    box = WorkerBox(PAIR, fault=lambda part, wire: corrupt(wire))
    box.submit("r", prompt_of(length), "prefill-0", "decode-0", max_tokens=8)
    box.run()
    assert box.failures["r"].code == "transfer_failed"
    assert len(box.tokens[("r", 0)]) == 1, "only the first token, from prefill"
    box.assert_empty()


def test_lost_part_ends_at_the_time_out_and_late_parts_are_fenced() -> None:
    kept: list[tuple[KVPart, torch.Tensor]] = []

    def lose(part: KVPart, wire: torch.Tensor) -> Any:
        kept.append((part, wire))

    box = WorkerBox(PAIR, fault=lose)
    box.submit("r", prompt_of(100), "prefill-0", "decode-0", max_tokens=8)
    box.run_until(lambda: any(isinstance(m, KVCommit) for _, m in box.sent))
    box.clock.advance(31.0)  # transfer.timeout_s
    box.run_until(lambda: len(kept) == 2)
    box.clock.advance(31.0)
    box.run()
    assert box.failures["r"].code in ("transfer_failed", "deadline_exceeded")
    box.assert_empty()
    for part, wire in kept:
        box.workers["decode-0"].post(part, arrived(wire))
    box.round()
    assert box.workers["decode-0"].load().counters["late_parts"] == 2
    box.assert_empty()


def test_parts_that_overtake_each_other_and_the_commit_are_put_together() -> None:
    held: list[tuple[KVPart, torch.Tensor]] = []

    def hold(part: KVPart, wire: torch.Tensor) -> Any:
        held.append((part, wire))

    box = WorkerBox(PAIR, fault=hold, transfer={"layerwise_threshold_tokens": 16, "layers_per_part": 1})
    box.submit("r", prompt_of(200), "prefill-0", "decode-0", max_tokens=6)
    box.run_until(lambda: any(isinstance(m, KVCommit) for _, m in box.sent))
    box.round()
    assert len(held) == 8
    for part, wire in reversed(held):
        box.workers["decode-0"].post(part, arrived(wire))
        box.workers["decode-0"].post(part, arrived(wire))  # twice: the second is ignored
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(200), 6)
    box.assert_empty()


def test_window_holds_parts_back_and_drops_none() -> None:
    in_flight: list[int] = []
    acks = []

    def watch(part: KVPart, wire: torch.Tensor) -> torch.Tensor:
        in_flight.append(part.num_bytes)
        acks.append(box.outgoing("prefill-0").window.num_bytes_in_flight)
        return wire

    box = WorkerBox(PAIR, num_blocks=512, fault=watch)
    outgoing = box.outgoing("prefill-0")
    outgoing.window.num_bytes = 20_000
    for i in range(6):
        box.submit(f"r{i}", prompt_of(200, seed=i), "prefill-0", "decode-0", max_tokens=5)
    box.run()
    assert max(acks) <= 20_000
    for i in range(6):
        assert box.output(f"r{i}") == expected_tokens(prompt_of(200, seed=i), 5)
    assert outgoing.window.num_bytes_in_flight == 0
    box.assert_empty()


@pytest.mark.parametrize("stage", [Stage.RESERVED, Stage.PREFILL_START, Stage.FIRST_TOKEN])
def test_loss_of_the_decode_worker_ends_its_requests_at_prefill(stage: Stage) -> None:
    box = WorkerBox({**PAIR, "decode-1": "decode"})
    box.submit("r", prompt_of(300), "prefill-0", "decode-0", max_tokens=50)
    box.submit("s", prompt_of(40), "prefill-0", "decode-1", max_tokens=5)
    box.run_until(lambda: stage in box.stages["r"])
    box.lost.add("decode-0")
    box.workers["prefill-0"].post(PeerLost("decode-0"))
    box.run()
    assert box.failures["r"].code == "worker_lost"
    assert box.output("s") == expected_tokens(prompt_of(40), 5)
    box.assert_empty()


@pytest.mark.parametrize("stage", [Stage.RESERVED, Stage.PREFILL_START, Stage.FIRST_TOKEN])
def test_loss_of_the_prefill_worker_frees_its_reservations(stage: Stage) -> None:
    box = WorkerBox(PAIR)
    box.submit("r", prompt_of(300), "prefill-0", "decode-0", max_tokens=50)
    box.run_until(lambda: stage in box.stages["r"])
    box.lost.add("prefill-0")
    box.workers["decode-0"].post(PeerLost("prefill-0"))
    box.run()
    box.assert_empty()


def test_loss_of_the_gateway_cancels_its_orphans() -> None:
    box = WorkerBox(PAIR)
    for i in range(4):
        box.submit(f"r{i}", prompt_of(200, seed=i), "prefill-0", "decode-0", max_tokens=100)
    box.run_until(lambda: Stage.DECODE_START in box.stages["r0"])
    for worker in box.workers.values():
        worker.post(GatewayLost("gateway-0"))
    box.run()
    box.assert_empty()


def test_engine_failure_ends_the_request_that_causes_it_and_the_worker_lives_on() -> None:
    box = WorkerBox(PAIR)
    box.submit("r", prompt_of(50), "prefill-0", "decode-0", max_tokens=20)
    box.run_until(lambda: Stage.DECODE_START in box.stages["r"])
    box.runners["decode-0"].breaks = lambda batch: (
        "early" if any(item.sequence.request_id == "r" for item in batch.items) else ""
    )
    box.run()
    assert box.failures["r"].code == "internal"
    box.submit("s", prompt_of(50, seed=1), "prefill-0", "decode-0", max_tokens=20)
    box.run()
    assert box.output("s") == expected_tokens(prompt_of(50, seed=1), 20)
    box.assert_empty()


def test_roles_refuse_what_is_not_theirs() -> None:
    box = WorkerBox(PAIR)
    box.submit("wrong", prompt_of(10), "decode-0", "decode-0", max_tokens=3)
    box.run()
    assert box.failures["wrong"].code == "unavailable"
    box.submit("r", prompt_of(10), "prefill-0", "prefill-0", max_tokens=3)
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(10), 3), "a placement decides, not the role's name"


def test_an_offer_of_other_weights_is_refused_saying_what_differs() -> None:
    box = WorkerBox(PAIR)

    box.submit("r", prompt_of(10), "prefill-0", "decode-0", max_tokens=3)
    real_send = box.send

    def other_weights(worker_id: str, message: Any) -> None:
        if isinstance(message, KVOffer):
            message = replace(message, spec=replace(message.spec, model_fingerprint="other"))
        real_send(worker_id, message)

    box.send = other_weights  # type: ignore[method-assign]
    box.run()
    assert "KV caches differ: model_fingerprint: scripted here, other there" in box.failures["r"].message
    box.assert_empty()


def test_prompt_logprobs_come_once_and_whole_though_the_prompt_is_chunked() -> None:
    box = WorkerBox(PAIR)
    box.submit("a", prompt_of(300), "prefill-0", "decode-0", max_tokens=2)
    box.run()
    box.submit("r", prompt_of(300), "prefill-0", "decode-0", max_tokens=2, prompt_logprobs=0)
    box.run()
    (logprobs,) = [p for output in box.outputs for p in output.prompt_logprobs]
    assert [t.token_id for t in logprobs.tokens] == prompt_of(300)
    assert logprobs.tokens[0].logprob is None
    assert all(t.logprob == -1.0 for t in logprobs.tokens[1:])


def test_two_hundred_random_requests_leave_nothing_and_lose_nothing() -> None:
    rng = random.Random(7)
    roles = {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode", "mixed-0": "mixed"}
    box = WorkerBox(roles, num_blocks=48, transfer={"layerwise_threshold_tokens": 100, "layers_per_part": 3})
    expected: dict[tuple[str, int], list[int]] = {}
    for i in range(200):
        prompt = prompt_of(rng.randrange(1, 250), seed=rng.randrange(40))
        n, max_tokens = rng.choice([1, 1, 1, 3]), rng.randrange(1, 40)
        pair = rng.choice([("prefill-0", "decode-0"), ("prefill-0", "decode-1"), ("mixed-0", "mixed-0")])
        box.submit(f"r{i}", prompt, *pair, max_tokens=max_tokens, n=n, time_left_s=1e6)
        for sample in range(n):
            expected[(f"r{i}", sample)] = expected_tokens(prompt, max_tokens, sample)
        if rng.random() < 0.3:
            box.round()
    aborted = {f"r{i}" for i in rng.sample(range(200), 40)}
    for request_id in aborted:
        box.round()
        box.abort(request_id)
    box.run(20_000)
    assert box.failures == {}
    for (request_id, sample), tokens in expected.items():
        if request_id not in aborted:
            assert box.output(request_id, sample) == tokens
    box.assert_empty()


def test_done_is_answered_before_prefill_lets_go_of_its_blocks() -> None:
    box = WorkerBox(DECODE_FIRST)
    box.submit("r", prompt_of(100), "prefill-0", "decode-0", max_tokens=8)
    box.run_until(lambda: any(isinstance(m, KVCommit) for _, m in box.sent))
    assert not any(isinstance(m, KVDone) for _, m in box.sent)
    assert box.workers["prefill-0"].load().num_used_blocks == 7
    box.run()
    box.assert_empty()
