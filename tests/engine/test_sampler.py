"""Sampling: semantics against transformers' logits processors, distribution, determinism, log-probabilities."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from engine.random_numbers import splitmix64, uniforms
from engine.sampler import SampleRow, apply_bias_and_penalties, draw_cutoff, sample
from engine.sequence import Sequence
from phasewise.core.request import SamplingParams

VOCAB = 61


def row(
    params: SamplingParams, *, logits_row: int = 0, sample_index: int = 0, output: list[int] | None = None
) -> SampleRow:
    tokens = [1, 2, 3, 3, *(output or [])]
    return SampleRow(Sequence("request", params, tokens, 4), sample_index, logits_row)


def test_the_hash_is_splitmix64() -> None:
    assert splitmix64(np.array([0], dtype=np.uint64))[0] == np.uint64(0xE220A8397B1DCDAF)  # its published first output


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
    assert torch.equal(scaled >= draw_cutoff(scaled, params), expected[0].isfinite())


def test_the_distribution_is_the_filtered_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, VOCAB) * 2
    params = SamplingParams(temperature=0.8, top_k=30, top_p=0.95, seed=11)
    scaled = logits[0].double() / 0.8
    scaled -= scaled.max()
    expected = torch.where(scaled >= draw_cutoff(scaled, params), scaled.exp(), 0.0)
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


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-45, 1e-38, 1e-10, 1e-6, 1e-5])
@pytest.mark.parametrize("scale", [1.0, 50.0, 1e4])
def test_tiny_temperature_is_greedy_and_finite(temperature: float, scale: float) -> None:
    torch.manual_seed(4)
    logits = torch.randn(8, VOCAB).mul(scale).round(decimals=2)
    logits[1] -= 1e4
    logits[2, ::2] = -math.inf
    best = logits.argmax(-1).tolist()
    for changes in ({}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.5, "top_k": 3, "min_p": 1.0}):
        params = SamplingParams(temperature=temperature, **changes)
        tokens = sample(logits, [row(params, logits_row=i, sample_index=i) for i in range(8)])
        assert [token.token_id for token in tokens] == best


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=0.01, frequency_penalty=-2.0, presence_penalty=-2.0),
        SamplingParams(repetition_penalty=100.0, frequency_penalty=2.0, presence_penalty=2.0),
        SamplingParams(logit_bias=tuple((token, -100.0) for token in range(VOCAB))),
        SamplingParams(logit_bias=tuple((token, 100.0) for token in range(VOCAB)), temperature=1e-5),
        SamplingParams(top_p=5e-324, min_p=5e-324),
        SamplingParams(top_p=1 - 2**-53, min_p=1.0, top_k=VOCAB),
        SamplingParams(top_k=2**63, seed=-(2**63)),
        SamplingParams(seed=2**63 - 1, temperature=2.0),
    ],
)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_the_ends_of_every_range_give_a_token(params: SamplingParams, scale: float) -> None:
    torch.manual_seed(5)
    logits = torch.randn(6, VOCAB) * scale
    rows = [row(params, logits_row=i, sample_index=i, output=[5] * 300 + [6]) for i in range(6)]
    assert all(token is not None and 0 <= token.token_id < VOCAB for token in sample(logits, rows))


# ---- min_tokens

ENDS = (7, 3, 40)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=2, top_p=0.9),
        SamplingParams(seed=2, top_k=4, min_p=0.05),
        SamplingParams(temperature=0.0, logit_bias=((3, 100.0), (7, 100.0), (40, 100.0))),
        SamplingParams(seed=1, repetition_penalty=0.5, frequency_penalty=-2.0, presence_penalty=-2.0),
    ],
)
def test_nothing_that_ends_a_sample_is_drawn_before_min_tokens(params: SamplingParams) -> None:
    torch.manual_seed(1)
    params = dataclasses.replace(params, min_tokens=3, stop_token_ids=ENDS)
    free = dataclasses.replace(params, min_tokens=0)
    logits = torch.randn(40, VOCAB)
    logits[:, list(ENDS)] += 6.0  # nearly always the likeliest
    for output in ([], [8], [8, 7], [8, 7, 3], [8, 7, 3, 9]):
        rows = [row(params, logits_row=i, sample_index=i, output=output) for i in range(40)]
        tokens = [token.token_id for token in sample(logits, rows)]
        if len(output) < 3:
            assert not set(tokens) & set(ENDS)
            without = logits.clone()
            without[:, list(ENDS)] = -math.inf
        else:
            assert set(tokens) & set(ENDS)
            without = logits
        # As if the model had found them impossible, and nothing else is different.
        rows = [row(free, logits_row=i, sample_index=i, output=output) for i in range(40)]
        assert tokens == [token.token_id for token in sample(without, rows)]


def test_min_tokens_masks_what_transformers_masks() -> None:
    torch.manual_seed(2)
    prompt, output = [1, 2, 3, 3], [8, 9]
    params = SamplingParams(min_tokens=3, stop_token_ids=ENDS)
    for num_outputs in (0, 1, 2, 3):
        ids = (prompt + output + [10])[: len(prompt) + num_outputs]
        processor: Any = transformers.MinNewTokensLengthLogitsProcessor(len(prompt), 3, list(ENDS), device="cpu")
        logits = torch.randn(1, VOCAB)
        expected = processor(torch.tensor([ids]), logits.clone())[0]
        apply_bias_and_penalties(logits[0], Sequence("request", params, ids, len(prompt)))
        assert torch.equal(logits[0], expected)


def test_min_tokens_counts_the_output_of_an_earlier_attempt() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=3, stop_token_ids=(7,))
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 9] = 2.0, 1.0
    for num_outputs, wanted in ((1, 9), (2, 9), (3, 7), (4, 7)):
        ids = [1, 2] + [5] * num_outputs
        for num_resumed in range(num_outputs + 1):
            sequence = Sequence("request", params, ids, 2 + num_resumed, num_resumed_tokens=num_resumed)
            assert sample(logits, [SampleRow(sequence, 0, 0)])[0].token_id == wanted


def test_log_probabilities_do_not_know_of_min_tokens() -> None:
    torch.manual_seed(3)
    logits = torch.randn(1, VOCAB)
    logits[0, 7] = 9.0
    (token,) = sample(logits, [row(SamplingParams(temperature=0.0, min_tokens=1, stop_token_ids=(7,), logprobs=2))])
    logprobs = logits[0].log_softmax(-1)
    assert token.token_id == logits[0].topk(2).indices[1] and token.logprob == pytest.approx(logprobs[token.token_id])
    assert token.top_logprobs[0] == (7, pytest.approx(logprobs[7]))


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(top_p=0.5, logprobs=1)])
def test_a_row_of_which_only_ends_are_possible_has_no_token(params: SamplingParams) -> None:
    params = dataclasses.replace(params, min_tokens=1, stop_token_ids=ENDS)
    logits = torch.full((2, VOCAB), -math.inf)
    logits[:, list(ENDS)] = 1.0
    logits[1, 9] = 0.0
    tokens = sample(logits, [row(params, logits_row=i) for i in (0, 1, 0)])
    assert [token and token.token_id for token in tokens] == [None, 9, None]
    (ended,) = sample(logits, [row(params, output=[5])])
    assert ended is not None and ended.token_id in ENDS


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
