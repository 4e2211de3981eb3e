"""Workers that die under a request in every state: its stream goes on with the tokens that it would have had."""

from __future__ import annotations

import asyncio

import pytest
import torch

from phasewise.core.errors import (
    DeadlineExceeded,
    InternalError,
    RequestCancelled,
    TransferFailed,
    Unavailable,
    WorkerLost,
)
from phasewise.core.lifecycle import RequestStatus, Stage
from phasewise.core.messages import (
    AbortRequest,
    KVCommit,
    KVDone,
    KVPart,
    NewTokens,
    RequestFailed,
    WorkerOutput,
)
from phasewise.core.placement import Placement, PlaceRequest
from phasewise.core.request import FinishReason, SampledToken
from tests.support.gateway_box import GatewayBox
from tests.support.scripted_engine import expected_tokens
from tests.support.worker_box import corrupt
from tests.workers.test_request_life import prompt_of

PAIRS = {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode", "decode-1": "decode"}
DECODE_FIRST = dict(reversed(PAIRS.items()))  # what prefill says is heard a round later
MIXED = {"mixed-0": "mixed", "mixed-1": "mixed"}
LAYERWISE = {"layerwise_threshold_tokens": 100, "layers_per_part": 1}
STAGES = [Stage.WAITING, Stage.RESERVE_ASKED, Stage.RESERVED, Stage.PREFILL_START, Stage.HANDOFF_START]
STAGES += [Stage.PREFILL_END, Stage.FIRST_TOKEN, Stage.HANDOFF_END, Stage.DECODE_START]


def workers_of(box: GatewayBox, request_id: str) -> tuple[str, str]:
    placement = box.streams[request_id].placement
    return placement.prefill_worker, placement.decode_worker


def recoveries(box: GatewayBox) -> dict[str, int]:
    return dict(box.metrics._recoveries)


@pytest.mark.parametrize("gateway_first", [True, False], ids=["gateway-first", "workers-first"])
@pytest.mark.parametrize("roles", [PAIRS, DECODE_FIRST], ids=["prefill-first", "decode-first"])
@pytest.mark.parametrize("side", [0, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize("stage", STAGES)
async def test_a_worker_lost_in_every_state(
    stage: Stage, side: int, roles: dict[str, str], gateway_first: bool
) -> None:
    box = GatewayBox(roles, transfer=LAYERWISE)
    prompt = prompt_of(300)
    await box.ask("r", prompt, max_tokens=30)
    await box.ask("other", prompt_of(40, seed=1), max_tokens=30)
    await box.until(lambda: stage in box.stages_of("r"))
    box.lose(workers_of(box, "r")[side], gateway_first=gateway_first)
    await box.answer("r")
    await box.answer("other")
    assert box.ids[("r", 0)] == expected_tokens(prompt, 30)
    assert box.ids[("other", 0)] == expected_tokens(prompt_of(40, seed=1), 30)
    stream = box.streams["r"]
    assert (stream.usage.num_prompt_tokens, stream.usage.num_output_tokens) == (300, 30)
    stages = box.stages_of("r")
    if stream.placement.attempt == 0:  # decode had all of it before the gateway heard
        assert side == 0
        assert Stage.HANDOFF_END in stages
        is_early = stage not in (Stage.HANDOFF_END, Stage.DECODE_START)
        assert not (is_early and gateway_first and roles is DECODE_FIRST)
    else:
        assert stages.count(Stage.RECOVERING) == stream.placement.attempt == 1
        assert stages.count(Stage.PLACED) == 2
        assert recoveries(box)["worker_lost"] >= 1
    await box.assert_nothing_left()


@pytest.mark.parametrize("before", ["commit", "done"])
@pytest.mark.parametrize("side", [0, 1], ids=["prefill", "decode"])
async def test_a_worker_lost_before_the_commit_or_the_word_that_it_came(side: int, before: str) -> None:
    box = GatewayBox(PAIRS)
    kind = {"commit": KVCommit, "done": KVDone}[before]
    real, lost = box.send, []

    def send(worker_id: str, message: object) -> None:
        if isinstance(message, kind) and not lost:  # the message dies with the worker
            lost.append(workers_of(box, "r")[side])
            box.lost.add(lost[0])
        else:
            real(worker_id, message)  # type: ignore[arg-type]

    box.send = send  # type: ignore[method-assign]
    await box.ask("r", prompt_of(50), max_tokens=20)
    await box.until(lambda: bool(lost))
    box.lose(lost[0])
    await box.answer("r")
    assert box.ids[("r", 0)] == expected_tokens(prompt_of(50), 20)
    await box.assert_nothing_left()


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 17, 29])
async def test_a_mixed_worker_lost_after_some_tokens(num_tokens: int) -> None:
    box = GatewayBox(MIXED)
    await box.ask("r", prompt_of(40), max_tokens=30)
    await box.until(lambda: len(box.ids[("r", 0)]) >= num_tokens)
    box.lose(workers_of(box, "r")[0])
    await box.answer("r")
    assert box.ids[("r", 0)] == expected_tokens(prompt_of(40), 30)
    await box.assert_nothing_left()


async def test_samples_of_different_lengths_go_on_each_by_itself() -> None:
    box = GatewayBox({**PAIRS, "decode-2": "decode"})
    prompt = prompt_of(70)
    expected = [expected_tokens(prompt, 40, i) for i in range(4)]
    stops = (expected[1][4], expected[3][0])  # sample 1 ends after five tokens, sample 3 with its first
    await box.ask("r", prompt, max_tokens=40, n=4, stop_token_ids=stops)
    await box.until(lambda: len(box.ids[("r", 2)]) >= 9)
    assert len(box.ids[("r", 1)]) == 5
    box.lose(workers_of(box, "r")[1])
    await box.turn()
    tasks = [task.request for _, task in box.tasks()[1:]]
    assert [(t.sample_index, t.sampling.n) for t in tasks] == [(0, 1), (2, 1)]
    assert all(t.num_resumed_tokens >= 9 and t.prompt_token_ids[:70] == tuple(prompt) for t in tasks)
    await box.until(lambda: len(box.ids[("r", 2)]) >= 20)
    box.lose(workers_of(box, "r")[1])  # the worker of one of the two, or of both
    await box.answer("r")
    assert [box.ids[("r", i)] for i in range(4)] == [expected[0], expected[1][:5], expected[2], expected[3][:1]]
    assert box.streams["r"].usage.num_output_tokens == 40 + 5 + 40 + 1
    assert box.streams["r"].record.status is RequestStatus.FINISHED
    await box.assert_nothing_left()


async def test_samples_without_a_token_begin_again_together() -> None:
    box = GatewayBox(PAIRS)
    await box.ask("r", prompt_of(200), max_tokens=6, n=3, prompt_logprobs=0)
    await box.until(lambda: Stage.PREFILL_START in box.stages_of("r"))
    box.lose("prefill-0")
    await box.answer("r")
    assert [task.request.sampling.n for _, task in box.tasks()] == [3, 3]
    assert [box.ids[("r", i)] for i in range(3)] == [expected_tokens(prompt_of(200), 6, i) for i in range(3)]
    assert [token.token_id for token in box.streams["r"].prompt_tokens] == prompt_of(200)
    await box.assert_nothing_left()


async def test_the_prompt_is_described_once() -> None:
    box = GatewayBox(PAIRS)
    stream = await box.ask("r", prompt_of(60), max_tokens=20, prompt_logprobs=0)
    await box.until(lambda: len(box.ids[("r", 0)]) >= 5)
    known = stream.prompt_tokens
    box.lose("decode-0")
    await box.answer("r")
    assert box.tasks()[-1][1].request.sampling.prompt_logprobs is None
    assert stream.prompt_tokens is known and len(known) == 60
    assert box.ids[("r", 0)] == expected_tokens(prompt_of(60), 20)


async def test_many_requests_move_at_once_past_the_bound_of_the_queue() -> None:
    box = GatewayBox(PAIRS, num_blocks=200, max_waiting=6, scheduler={"max_waiting": 6})
    for i in range(12):
        await box.ask(f"r{i}", prompt_of(30, seed=i), max_tokens=60)
        await box.until(lambda i=i: len(box.ids[(f"r{i}", 0)]) >= 1)  # type: ignore[misc]
    box.lose("prefill-1")
    box.lose("decode-0")
    for i in range(12):
        await box.answer(f"r{i}")
        assert box.ids[(f"r{i}", 0)] == expected_tokens(prompt_of(30, seed=i), 60)
    await box.assert_nothing_left()


async def test_lost_twice() -> None:
    box = GatewayBox(PAIRS | MIXED)
    await box.ask("r", prompt_of(40), max_tokens=30)
    for num_tokens in (5, 15):
        await box.until(lambda n=num_tokens: len(box.ids[("r", 0)]) >= n)  # type: ignore[misc]
        box.lose(workers_of(box, "r")[1])
    await box.answer("r")
    assert box.ids[("r", 0)] == expected_tokens(prompt_of(40), 30)
    assert box.streams["r"].placement.attempt == 2
    await box.assert_nothing_left()


async def test_a_fourth_attempt_is_not_made() -> None:
    box = GatewayBox({f"mixed-{i}": "mixed" for i in range(4)})
    await box.ask("r", prompt_of(40), max_tokens=30)
    for i in range(3):
        await box.until(lambda i=i: len(box.ids[("r", 0)]) >= 5 * (i + 1))  # type: ignore[misc]
        last = workers_of(box, "r")[0]
        box.lose(last)
    with pytest.raises(WorkerLost, match=last):
        await box.answer("r")
    assert recoveries(box) == {"worker_lost": 2}
    assert box.ids[("r", 0)] == expected_tokens(prompt_of(40), 30)[: len(box.ids[("r", 0)])]
    await box.assert_nothing_left()


@pytest.mark.parametrize("worker_id", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("gateway_first", [True, False])
async def test_an_empty_pool_ends_the_request_at_once(worker_id: str, gateway_first: bool) -> None:
    box = GatewayBox({"prefill-0": "prefill", "decode-0": "decode"}, transfer=LAYERWISE)
    await box.ask("r", prompt_of(300), max_tokens=30)
    await box.until(lambda: Stage.PREFILL_START in box.stages_of("r"))
    box.lose(worker_id, gateway_first=gateway_first)
    await box.turn()
    with pytest.raises(WorkerLost, match=f"worker {worker_id} was lost"):
        await box.answer("r")
    await box.assert_nothing_left()


async def test_a_mixed_worker_takes_over_from_a_pair() -> None:
    box = GatewayBox({"prefill-0": "prefill", "decode-0": "decode"})
    await box.ask("r", prompt_of(30), max_tokens=20)
    await box.until(lambda: len(box.ids[("r", 0)]) >= 4)
    helper = GatewayBox({"mixed-0": "mixed"})
    box.workers["mixed-0"] = helper.workers["mixed-0"]
    box.scheduler.worker_joined(helper.workers["mixed-0"].info)
    helper.deliver = box.deliver  # type: ignore[method-assign]
    box.lose("decode-0")
    await box.answer("r")
    assert box.ids[("r", 0)] == expected_tokens(prompt_of(30), 20)
    assert workers_of(box, "r") == ("mixed-0", "mixed-0")


async def test_a_handoff_that_fails_twice_goes_another_way() -> None:
    def fault(part: KVPart, payload: torch.Tensor) -> torch.Tensor:
        return corrupt(payload) if "#prefill-0." in part.transfer_id else payload

    box = GatewayBox(PAIRS, fault=fault)
    await box.ask("r", prompt_of(100), max_tokens=20)
    assert workers_of(box, "r") == ("prefill-0", "decode-0")
    await box.answer("r")
    assert workers_of(box, "r") == ("prefill-1", "decode-1")
    assert box.ids[("r", 0)] == expected_tokens(prompt_of(100), 20)
    assert recoveries(box) == {"transfer_failed": 1}
    await box.assert_nothing_left()


async def test_handoffs_that_always_fail_end_with_their_error() -> None:
    box = GatewayBox({"prefill-0": "prefill", "decode-0": "decode"}, fault=lambda part, payload: corrupt(payload))
    await box.ask("r", prompt_of(100), max_tokens=20)
    with pytest.raises(TransferFailed):
        await box.answer("r")
    assert recoveries(box) == {"transfer_failed": 2}
    assert box.ids[("r", 0)] == expected_tokens(prompt_of(100), 3), "each attempt's prefill gives the next token"
    await box.assert_nothing_left()


async def test_a_worker_that_takes_no_prompts_is_gone_around() -> None:
    box = GatewayBox(PAIRS)
    stream = await box.ask("r", prompt_of(20), max_tokens=5)
    failure = RequestFailed(stream.record.request_id, Unavailable.code, "worker prefill-0 takes no prompts now")
    box.loop.deliver(WorkerOutput("prefill-0", failures=(failure,)))
    await box.answer("r")
    assert workers_of(box, "r")[0] == "prefill-1"
    assert box.ids[("r", 0)] == expected_tokens(prompt_of(20), 5)
    await box.assert_nothing_left()


async def test_faults_of_the_engine_are_not_tried_again() -> None:
    box = GatewayBox(PAIRS)
    await box.ask("r", prompt_of(20), max_tokens=5)
    box.runners["prefill-0"].breaks = lambda batch: "early"
    with pytest.raises(InternalError):
        await box.answer("r")
    assert recoveries(box) == {}
    await box.assert_nothing_left()


async def test_late_words_of_a_lost_attempt_reach_nobody() -> None:
    box = GatewayBox(PAIRS)
    stream = await box.ask("r", prompt_of(20), max_tokens=20)
    await box.until(lambda: len(box.ids[("r", 0)]) >= 5)
    old = stream.record.request_id
    num_tokens = len(stream.record.samples[0].token_ids)
    box.loop.deliver(WorkerOutput("decode-0", chunks=(NewTokens(old, 0, num_tokens + 1, (SampledToken(1),)),)))
    box.lose("decode-0")
    wrong = tuple(NewTokens(old, 0, num_tokens + i, (SampledToken(7),), FinishReason.STOP) for i in range(4))
    failure = RequestFailed(old, InternalError.code, "an old fault")
    box.loop.deliver(WorkerOutput("decode-0", chunks=wrong, failures=(failure,)))
    await box.answer("r")
    assert box.ids[("r", 0)] == expected_tokens(prompt_of(20), 20)
    survivors = {worker_id for worker_id, m in box.sent if m == AbortRequest(old)}
    assert survivors == {"prefill-0", "decode-0"}
    await box.assert_nothing_left()


async def test_a_stop_string_across_the_cut() -> None:
    box = GatewayBox(MIXED)
    expected = expected_tokens(prompt_of(40), 30)
    stop = f"{expected[9]}><{expected[10]}><{expected[11]}"
    await box.ask("r", prompt_of(40), max_tokens=30, stop=(stop,))
    lost: list[str] = []

    def watch(output: WorkerOutput) -> None:
        if any(chunk.position == 11 for chunk in output.chunks) and not lost:
            lost.append(output.worker_id)
            box.lose(output.worker_id)  # the token that would complete the stop string is on its way

    box.before_deliver = watch
    await box.answer("r")
    assert lost
    assert box.text[("r", 0)] == "".join(f"<{token}>" for token in expected[:9]) + "<"
    assert box.ids[("r", 0)] == expected[:12]
    assert box.streams["r"].usage.num_output_tokens == 12
    await box.assert_nothing_left()


async def test_a_recovered_prompt_finds_the_prefix_cache() -> None:
    box = GatewayBox(PAIRS)
    first = await box.ask("a", prompt_of(64), max_tokens=40)
    await box.answer("a")
    assert first.placement.prefill_worker == "prefill-0"
    box.lose("prefill-1")
    stream = await box.ask("b", [*prompt_of(64), 1, 2, 3], max_tokens=40)
    await box.until(lambda: len(box.ids[("b", 0)]) >= 20)
    box.lose(stream.placement.decode_worker)
    await box.answer("b")
    assert box.ids[("b", 0)] == expected_tokens([*prompt_of(64), 1, 2, 3], 40)
    assert stream.usage.num_cached_tokens == 64, "of the client's prompt, not of what was computed again"
    await box.assert_nothing_left()


async def test_the_last_token_alone_is_missing() -> None:
    box = GatewayBox(PAIRS)
    lost: list[str] = []

    def watch(output: WorkerOutput) -> None:
        if any(chunk.finish_reason is not None for chunk in output.chunks) and not lost:
            lost.append(output.worker_id)
            box.lose(output.worker_id)

    box.before_deliver = watch
    await box.ask("r", prompt_of(30), max_tokens=10)
    await box.answer("r")
    assert lost == ["decode-0"]
    assert box.ids[("r", 0)] == expected_tokens(prompt_of(30), 10)
    assert box.tasks()[-1][1].request.max_new_tokens == 1
    await box.assert_nothing_left()


async def test_a_preempted_request_is_moved() -> None:
    box = GatewayBox({**MIXED, "mixed-2": "mixed"}, num_blocks=8)
    box.lose("mixed-1")
    box.lose("mixed-2")
    for i in range(2):
        await box.ask(f"r{i}", prompt_of(40, seed=i), max_tokens=60)
    await box.until(lambda: Stage.PREEMPTED in box.stages_of("r1"))
    spare = GatewayBox({"mixed-3": "mixed"}, num_blocks=64)
    box.workers["mixed-3"] = spare.workers["mixed-3"]
    spare.deliver = box.deliver  # type: ignore[method-assign]
    box.scheduler.worker_joined(spare.workers["mixed-3"].info)
    box.lose("mixed-0")
    for i in range(2):
        await box.answer(f"r{i}")
        assert box.ids[(f"r{i}", 0)] == expected_tokens(prompt_of(40, seed=i), 60)
    await box.assert_nothing_left()


async def test_cancelled_and_expired_while_recovering() -> None:
    box = GatewayBox(PAIRS)
    await box.ask("left", prompt_of(30), max_tokens=20)
    await box.until(lambda: len(box.ids[("left", 0)]) >= 3)
    box.lose("decode-0")  # the new placement is a task that has not run yet
    assert box.streams["left"].record.status is RequestStatus.RECOVERING
    box.streams["left"].close()
    with pytest.raises(RequestCancelled):
        await box.answer("left")
    assert box.streams["left"].record.status is RequestStatus.CANCELLED
    late = await box.ask("late", prompt_of(30), timeout_s=1.0, max_tokens=20)
    await box.until(lambda: len(box.ids[("late", 0)]) >= 3)
    is_over, place = asyncio.Event(), box.place

    async def place_after_the_end(request: PlaceRequest, timeout_s: float) -> Placement:
        await is_over.wait()
        return await place(request, timeout_s)

    box.place = place_after_the_end  # type: ignore[method-assign]
    failure = RequestFailed(late.record.request_id, WorkerLost.code, "gone")
    box.loop.deliver(WorkerOutput(late.placement.decode_worker, failures=(failure,)))
    async with asyncio.timeout(10):
        while not late.record.is_over:  # noqa: ASYNC110 (the deadline is a timer)
            await asyncio.sleep(0.01)
    is_over.set()
    with pytest.raises(DeadlineExceeded):
        await box.answer("late")
    await box.assert_nothing_left()
