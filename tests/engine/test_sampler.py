"""Sampling: semantics against transformers' logits processors, distribution, determinism, log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from engine.random_numbers import _mix, uniforms
from engine.sampler import SampleRow, _cutoff, apply_bias_and_penalties, sample
from engine.sequence import Sequence
from phasewise.core.request import SamplingParams

VOCAB = 61


def row(
    params: SamplingParams, *, logits_row: int = 0, sample_index: int = 0, output: list[int] | None = None
) -> SampleRow:
    tokens = [1, 2, 3, 3, *(output or [])]
    return SampleRow(Sequence("request", params, tokens, 4), sample_index, logits_row)


def test_the_hash_is_splitmix64() -> None:
    assert _mix(np.array([0], dtype=np.uint64))[0] == np.uint64(0xE220A8397B1DCDAF)  # its published first output


def test_uniforms_are_uniform_and_independent() -> None:
    n = 20_000
    base = uniforms([5] * n, [0] * n, list(range(n)))
    assert base.min() >= 0 and base.max() < 1
    assert abs(base.mean() - 0.5) < 0.01 and abs(base.var() - 1 / 12) < 0.002
    others = [
        uniforms([6] * n, [0] * n, list(range(n))),
        uniforms([5] * n, [1] * n, list(range(n))),
        uniforms([5] * n, [0] * n, list(range(1, n + 1))),
        uniforms([-5] * n, [0] * n, list(range(n))),
    ]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.03
    assert uniforms([2**70 + 3], [0], [0]) == uniforms([3], [0], [0])  # any integer is a seed


def test_greedy_takes_the_largest() -> None:
    logits = torch.randn(5, VOCAB)
    rows = [row(SamplingParams(temperature=0.0), logits_row=i) for i in (4, 0, 0, 2)]
    assert [token.token_id for token in sample(logits, rows)] == logits.argmax(-1)[[4, 0, 0, 2]].tolist()
    assert sample(logits, []) == []


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=5),
        SamplingParams(top_k=10**6),
        SamplingParams(top_p=0.3),
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=0.0),
        SamplingParams(min_p=0.1),
        SamplingParams(top_k=20, top_p=0.8, min_p=0.02, temperature=0.7),
        SamplingParams(top_k=3, top_p=0.99, temperature=2.0),
    ],
)
def test_the_same_tokens_survive_as_in_transformers(params: SamplingParams, seed: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(1, 3000, dtype=torch.float64) * 3
    scaled = logits[0] / params.temperature
    scaled = scaled - scaled.max()
    warpers = [transformers.TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        warpers.append(transformers.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(transformers.MinPLogitsWarper(params.min_p))
    expected = logits.clone()
    for warper in warpers:
        expected = warper(torch.zeros(1, 1, dtype=torch.int64), expected)
    assert torch.equal(scaled >= _cutoff(scaled, params), expected[0].isfinite())


def test_the_distribution_is_the_filtered_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, VOCAB) * 2
    params = SamplingParams(temperature=0.8, top_k=30, top_p=0.95, seed=11)
    scaled = logits[0].double() / 0.8
    scaled -= scaled.max()
    expected = torch.where(scaled >= _cutoff(scaled, params), scaled.exp(), 0.0)
    expected /= expected.sum()
    n = 20_000
    counts = torch.zeros(VOCAB, dtype=torch.float64)
    for start in range(0, n, 2000):
        rows = [row(params, output=[0] * 3, sample_index=start + i) for i in range(2000)]
        for token in sample(logits, rows):
            counts[token.token_id] += 1
    assert (counts[expected == 0] == 0).all()
    assert 0.5 * (counts / n - expected).abs().sum() < 0.02


def test_a_sample_depends_on_seed_index_and_position_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, VOCAB)
    rows = [
        row(
            SamplingParams(seed=i % 5, top_p=0.9 if i % 2 else 1.0),
            logits_row=i,
            sample_index=i % 3,
            output=[7] * (i % 7),
        )
        for i in range(64)
    ]
    together = sample(logits, rows)
    assert together == [sample(logits, [one])[0] for one in rows]
    assert together == sample(logits, rows[::-1])[::-1]
    many = [row(SamplingParams(seed=1), output=[7] * position) for position in range(50)]
    assert len({token.token_id for token in sample(logits[:1], many)}) > 10


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=3),
        SamplingParams(seed=4, frequency_penalty=1.5, presence_penalty=0.5, repetition_penalty=1.3),
        SamplingParams(temperature=0.0, presence_penalty=2.0, logprobs=2),
    ],
)
def test_output_of_an_earlier_attempt_counts_as_output(params: SamplingParams) -> None:
    torch.manual_seed(1)
    prompt, output = [1, 2, 3, 3], [8, 9, 9, 30, 8]
    whole = Sequence("request", params, prompt + output, len(prompt), 2)
    resumed = [
        Sequence("request", params, prompt + output, len(prompt) + num, 2, num_resumed_tokens=num) for num in (1, 3, 5)
    ]
    for logits in torch.randn(40, 1, VOCAB):
        expected = sample(logits, [SampleRow(whole, 2, 0)])
        assert sample(logits, [SampleRow(sequence, 2, 0) for sequence in resumed]) == expected * 3
    assert {(s.num_output_tokens, s.first_output, s.finish_reason()) for s in (whole, *resumed)} == {(5, 4, None)}


def test_tiny_temperature_is_greedy_and_finite() -> None:
    logits = torch.randn(1, VOCAB) * 50
    assert sample(logits, [row(SamplingParams(temperature=1e-6))])[0].token_id == logits.argmax().item()


def test_penalties() -> None:
    torch.manual_seed(0)
    logits = torch.randn(VOCAB)
    output = [5, 6, 6, 9]
    params = SamplingParams(
        repetition_penalty=1.7, frequency_penalty=0.5, presence_penalty=-0.3, logit_bias=((5, 2.0), (60, -100.0))
    )
    sequence = row(params, output=output).sequence
    expected = logits.clone()
    expected[5] += 2.0
    expected[60] -= 100.0
    processor: Any = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    expected = processor(torch.tensor([sequence.token_ids]), expected.unsqueeze(0))[0]
    for token in {5, 6, 9}:
        expected[token] -= 0.5 * output.count(token) - 0.3
    actual = logits.clone()
    apply_bias_and_penalties(actual, sequence)
    torch.testing.assert_close(actual, expected)


def test_bias_decides_but_logprobs_are_the_models_own() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    worst = logits[0].argmin().item()
    params = SamplingParams(temperature=0.0, logit_bias=((worst, 100.0),), logprobs=3)
    chosen, plain = sample(logits, [row(params), row(SamplingParams(temperature=0.0), logits_row=1)])
    logprobs = before[0].log_softmax(-1)
    assert chosen.token_id == worst
    assert chosen.logprob == pytest.approx(logprobs[worst].item())
    assert [token for token, _ in chosen.top_logprobs] == logprobs.topk(3).indices.tolist()
    assert plain.token_id == logits[1].argmax().item() and plain.logprob is None and plain.top_logprobs == ()
    assert torch.equal(logits, before)
    (zero,) = sample(logits, [row(SamplingParams(temperature=0.0, logprobs=0))])
    assert zero.logprob == pytest.approx(logprobs.max().item()) and zero.top_logprobs == ()


def test_a_forbidden_token_is_never_drawn() -> None:
    logits = torch.full((1, 4), -math.inf)
    logits[0, 2] = 0.0
    rows = [row(SamplingParams(seed=seed)) for seed in range(200)]
    assert {token.token_id for token in sample(logits, rows)} == {2}


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(top_p=0.5, top_k=9, logprobs=2)])
def test_a_row_without_a_largest_logit_has_no_token_and_others_do(params: SamplingParams) -> None:
    logits = torch.randn(5, VOCAB)
    right = sample(logits, [row(params, logits_row=i) for i in range(5)])
    logits[1, 7] = math.nan
    logits[2] = -math.inf
    logits[3, 9] = math.inf
    tokens = sample(logits, [row(params, logits_row=i) for i in (4, 3, 2, 1, 0, 1)])
    assert tokens == [right[4], None, None, None, right[0], None]
    assert sample(logits[1:2], [row(params)]) == [None]
