"""Workers or gateways lost under a stream of a real model: tokens and log-probabilities are those of the request
undisturbed.

The cluster is that of tests/test_disaggregated_tokens.py; a lost worker's thread is cut off from everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from control_plane.gateway.service import GenerateInput, SampleSoFar, SamplingInput, TokenInfo
from control_plane.gateway.streams import OpenStream
from phasewise.core.request import FinishReason
from tests.support.generated_stream import deltas_of
from tests.support.local_cluster import LocalCluster, local_cluster
from tests.support.tiny_model import save_tiny_model

PAIRS = {"prefill": {"workers": 2, "threads": 1}, "decode": {"workers": 3, "threads": 1}}
MIXED = {"prefill": {"workers": 0}, "decode": {"workers": 0}, "mixed": {"workers": 3, "threads": 1}}
WAYS: dict[str, dict[str, Any]] = {
    "handoff by layers and chunks": {
        "pools": PAIRS,
        "scheduler": {"token_budget": 16},
        "transfer": {"layerwise_threshold_tokens": 8, "layers_per_part": 1},
    },
    "mixed, no prefix cache": {"pools": MIXED, "cache": {"prefix_caching": False, "kv_cache_gib": 0.02}},
}
PROMPT = tuple(random.Random(5).randrange(256) for _ in range(45))
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
DRAWN: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "top_k": 8, "seed": 77, "ignore_eos": True}
REQUESTS: dict[str, SamplingInput] = {
    "greedy": SamplingInput(max_tokens=60, **GREEDY),
    "greedy, penalties": SamplingInput(
        max_tokens=60, frequency_penalty=0.7, presence_penalty=0.4, repetition_penalty=1.1, **GREEDY
    ),
    "drawn": SamplingInput(max_tokens=60, **DRAWN),
    "drawn, penalties, log-probabilities": SamplingInput(
        max_tokens=60, frequency_penalty=0.9, repetition_penalty=1.2, logprobs=3, prompt_logprobs=1, **DRAWN
    ),
    "drawn, min_tokens": SamplingInput(  # nearly every token would end it before, and after
        max_tokens=60, min_tokens=40, stop_token_ids=tuple(range(0, 320, 2))[:160], **DRAWN
    ),
    "three samples": SamplingInput(max_tokens=40, n=3, logprobs=0, presence_penalty=0.5, **DRAWN),
}


THE_PROMPT_ALONE = SamplingInput(max_tokens=0, prompt_logprobs=2, n=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return folder


@dataclass
class Answer:
    ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[TokenInfo]] = field(default_factory=dict)
    reasons: dict[int, FinishReason] = field(default_factory=dict)
    prompt_tokens: tuple[TokenInfo, ...] = ()
    num_output_tokens: int = 0
    attempt: int = 0


async def run(cluster: LocalCluster, sampling: SamplingInput, losses: tuple[tuple[int, int], ...] = ()) -> Answer:
    """The answer; `losses`: (output tokens so far, 0 for the prefill or 1 for the decode worker), when to lose whom."""
    due = list(losses)
    stream: OpenStream = await cluster.service.generate(GenerateInput(token_ids=PROMPT, sampling=sampling))
    record = stream.record

    def lose_if_due() -> None:
        if due and record.num_output_tokens >= due[0][0] and record.attempts:
            placement = next(iter(record.attempts.values())).placement
            if placement is not None:
                _, side = due.pop(0)
                cluster.lose((placement.prefill_worker, placement.decode_worker)[side])

    cluster.after_deliver = lose_if_due
    answer = Answer()
    await read(cluster, stream, answer)
    assert not due, "the request ended before its worker was lost"
    return answer


async def read(cluster: LocalCluster, stream: OpenStream, answer: Answer, until: int | None = None) -> None:
    """Adds what comes to `answer`; leaves the stream when there are `until` tokens."""
    answer.prompt_tokens = stream.prompt_tokens or answer.prompt_tokens
    async with contextlib.aclosing(deltas_of(stream)) as deltas:
        async for delta in deltas:
            answer.ids.setdefault(delta.sample_index, []).extend(delta.token_ids)
            answer.text[delta.sample_index] = answer.text.get(delta.sample_index, "") + delta.text
            answer.tokens.setdefault(delta.sample_index, []).extend(delta.tokens)
            answer.prompt_tokens = stream.prompt_tokens or answer.prompt_tokens
            if delta.finish_reason is not None:
                assert delta.sample_index not in answer.reasons
                answer.reasons[delta.sample_index] = delta.finish_reason
            if until is not None and sum(map(len, answer.ids.values())) >= until:
                break
    stream.close()
    answer.num_output_tokens = stream.usage.num_output_tokens
    if stream.placement is not None:
        answer.attempt = stream.placement.attempt
    await asyncio.wait_for(cluster.until_empty(), 30)


async def run_at_gateways(model: Path, sampling: SamplingInput, breaks: tuple[int | None, ...]) -> Answer:
    """The answer that goes on at another gateway, with other workers, after so many tokens each time."""
    answer = Answer()
    for until in breaks:
        async with local_cluster(model, pools=PAIRS) as cluster:
            so_far = [SampleSoFar(i, ids, answer.reasons.get(i)) for i, ids in answer.ids.items()]
            given = GenerateInput(token_ids=PROMPT, sampling=sampling, resume_after=so_far)
            await read(cluster, await cluster.service.generate(given), answer, until)
    return answer


def assert_same(answer: Answer, undisturbed: Answer) -> None:
    assert answer.ids == undisturbed.ids
    assert answer.text == undisturbed.text
    assert answer.reasons == undisturbed.reasons
    assert answer.num_output_tokens == undisturbed.num_output_tokens
    pairs = [(answer.prompt_tokens, undisturbed.prompt_tokens)]
    pairs += [(tuple(tokens), tuple(undisturbed.tokens[i])) for i, tokens in answer.tokens.items()]
    for ours, theirs in pairs:
        assert [t.token_id for t in ours] == [t.token_id for t in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [top[0] for top in a.top_logprobs] == [top[0] for top in b.top_logprobs]


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> dict[str, Answer]:
    async def answers() -> dict[str, Answer]:
        async with local_cluster(model, pools=MIXED) as cluster:
            answers = {name: await run(cluster, sampling) for name, sampling in REQUESTS.items()}
            return answers | {"the prompt alone": await run(cluster, THE_PROMPT_ALONE)}

    return asyncio.run(answers())


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("way", WAYS)
async def test_lost_twice_and_nobody_can_tell(way: str, name: str, model: Path, undisturbed: dict[str, Answer]) -> None:
    sampling = REQUESTS[name]
    num_samples = sampling.n or 1
    async with local_cluster(model, **WAYS[way]) as cluster:
        answer = await run(cluster, sampling, ((3 * num_samples, 1), (20 * num_samples, 1)))
    assert min(map(len, answer.ids.values())) > (sampling.min_tokens or 0)
    assert_same(answer, undisturbed[name])
    assert answer.attempt == 2 or num_samples > 1


@pytest.mark.parametrize("way", WAYS)
async def test_a_prefill_worker_lost_before_the_first_token(
    way: str, model: Path, undisturbed: dict[str, Answer]
) -> None:
    name = "drawn, penalties, log-probabilities"
    async with local_cluster(model, **WAYS[way]) as cluster:
        answer = await run(cluster, REQUESTS[name], ((0, 0),))
    assert_same(answer, undisturbed[name])


async def test_a_prefill_worker_lost_under_a_request_without_output(
    model: Path, undisturbed: dict[str, Answer]
) -> None:
    async with local_cluster(model, **WAYS["handoff by layers and chunks"]) as cluster:
        answer = await run(cluster, THE_PROMPT_ALONE, ((0, 0),))
    assert_same(answer, undisturbed["the prompt alone"])
    assert answer.ids == {0: [], 1: []} and len(answer.prompt_tokens) == len(PROMPT) and answer.attempt == 1


async def test_samples_that_end_at_different_times(model: Path, undisturbed: dict[str, Answer]) -> None:
    whole = undisturbed["three samples"]
    stop_ids = (whole.ids[0][6], whole.ids[2][25])
    sampling = SamplingInput(max_tokens=40, n=3, presence_penalty=0.5, stop_token_ids=stop_ids, **DRAWN)
    async with local_cluster(model, pools=PAIRS) as cluster:
        expected = await run(cluster, sampling)
        assert len({len(ids) for ids in expected.ids.values()}) > 1
        num_tokens = expected.num_output_tokens
        answer = await run(cluster, sampling, ((num_tokens // 3, 1), (2 * num_tokens // 3, 1)))
    assert_same(answer, expected)


@pytest.mark.parametrize("name", REQUESTS)
async def test_an_answer_goes_on_at_another_gateway(name: str, model: Path, undisturbed: dict[str, Answer]) -> None:
    num_samples = REQUESTS[name].n or 1
    answer = await run_at_gateways(model, REQUESTS[name], (2 * num_samples, 31 * num_samples, None))
    assert_same(answer, undisturbed[name])


async def test_an_answer_with_a_stop_string_goes_on_behind_every_token(
    model: Path, undisturbed: dict[str, Answer]
) -> None:
    text = undisturbed["drawn"].text[0]
    stop = next(text[i : i + 4] for i in range(8, len(text)) if text.index(text[i : i + 4]) == i)
    sampling = SamplingInput(max_tokens=60, stop=(stop, "never"), logprobs=0, **DRAWN)
    async with local_cluster(model, pools=PAIRS) as cluster:
        expected = await run(cluster, sampling)
        assert expected.reasons == {0: FinishReason.STOP} and stop not in expected.text[0]
        for num_tokens in range(1, len(expected.ids[0]) + 1):
            answer = Answer()
            for until in (num_tokens, None):
                so_far = [SampleSoFar(i, ids, answer.reasons.get(i)) for i, ids in answer.ids.items()]
                given = GenerateInput(token_ids=PROMPT, sampling=sampling, resume_after=so_far)
                await read(cluster, await cluster.service.generate(given), answer, until)
            assert_same(answer, expected)
