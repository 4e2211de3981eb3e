"""Sampling on a GPU: tokens against the plain twin, the distribution, pending tokens, and no wait for the device."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from engine.random_numbers import uniforms
from engine.sampler import SampleRow, apply_bias_and_penalties, draw_cutoff, sample
from engine.sequence import Sequence
from phasewise.core.request import SampledToken, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore"),  # of other versions of torch and Triton than the pinned ones
]

DEVICE = "cuda"
NEAR = 1e-5  # of the whole probability: where the twin's float64 and the kernel's float32 may part


def draw_all(logits: torch.Tensor, rows: list, newest: torch.Tensor | None = None) -> list[SampledToken | None]:
    from engine.cuda.sampling import draw

    before = logits.clone()
    drawn = draw(logits, rows, newest)
    drawn.start_copy()
    result = drawn.result()
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))
    tokens = [-1 if token is None else token.token_id for token in result]
    assert drawn.tokens.tolist() == tokens and drawn.tokens.dtype == torch.int64
    return result


def draw_row(sequence: Sequence, logits_row: int = 0, sample_index: int = 0, pending: int = -1):
    from engine.cuda.sampling import DrawRow

    num_outputs = sequence.num_output_tokens + int(pending >= 0)
    return DrawRow(sequence, sample_index, logits_row, num_outputs, pending)


def random_params(rng: random.Random, vocab_size: int) -> SamplingParams:
    bias = rng.sample(range(vocab_size), rng.choice([0, 0, 3]))
    ends = rng.sample(range(vocab_size), rng.choice([0, 1, 5]))
    tiny = rng.choice([5e-324, 1e-308, 1e-45, 1e-38, 1e-10, 1e-5])
    return SamplingParams(
        temperature=rng.choice([0.0, tiny, 1e-6, 0.3, 0.7, 1.0, 1.0, 1.0, 2.0, 5.0]),
        top_k=rng.choice([0, 0, 0, 1, 2, 16, 50, 1000, 4096, 4097, 20_000, 10**6]),
        top_p=rng.choice([1.0, 1.0, 1.0, 0.0, 5e-324, 0.2, 0.8, 0.9, 0.95, 0.999, 1 - 1e-7]),
        min_p=rng.choice([0.0, 0.0, 0.0, 5e-324, 0.003, 0.05, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.7]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.4, -1.1]),
        presence_penalty=rng.choice([0.0, 0.0, 0.9, -0.2]),
        logit_bias=tuple((token, rng.choice([-100.0, 100.0, 1.5, -0.7])) for token in sorted(bias)),
        min_tokens=rng.choice([0, 0, 1, 26, 100]),
        stop_token_ids=tuple(ends),
        seed=rng.randrange(-(2**40), 2**70),
    )


def random_sequence(rng: random.Random, params: SamplingParams, vocab_size: int) -> Sequence:
    few = [rng.randrange(vocab_size) for _ in range(12)]
    prompt, outputs = rng.choices(few, k=rng.randrange(1, 30)), rng.choices(few, k=rng.choice([0, 1, 25]))
    num_resumed = len(outputs) // 2
    return Sequence("request", params, prompt + outputs, len(prompt) + num_resumed, num_resumed_tokens=num_resumed)


def random_logits(rng: random.Random, num_rows: int, vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Flat and peaked rows; some with ties, some with tokens that are not possible at all."""
    generator = torch.Generator().manual_seed(rng.randrange(2**60))
    logits = torch.randn(num_rows, vocab_size, generator=generator)
    for row in logits:
        row *= rng.choice([0.1, 1.0, 3.0, 10.0])
        kind = rng.randrange(4)
        if kind == 0:
            row.round_()
        elif kind == 1:
            row[torch.randperm(vocab_size, generator=generator)[: vocab_size // 3]] = -math.inf
        elif kind == 2:
            row += 40.0
    return logits.to(dtype)


def assert_as_the_twin(drawn: list[SampledToken | None], logits: torch.Tensor, rows: list) -> None:
    """Equal tokens, but where the random number is next to a boundary of the twin's cumulative distribution."""
    logits = logits.float().cpu()
    wanted = sample(logits, [SampleRow(row.sequence, row.sample_index, row.logits_row) for row in rows])
    for ours, twins, row in zip(drawn, wanted, rows, strict=True):
        assert ours is not None and twins is not None
        params, token = row.sequence.sampling, ours.token_id
        if token == twins.token_id:
            continue
        assert params.temperature > 0, params
        values = logits[row.logits_row].clone()
        apply_bias_and_penalties(values, row.sequence)
        scaled = values.double()
        scaled = (scaled - scaled.max()) / params.temperature
        cumulative = torch.where(scaled >= draw_cutoff(scaled, params), scaled.exp(), 0.0).cumsum(0)
        cumulative /= cumulative[-1].item()
        number = uniforms([params.seed], [row.sample_index], [row.num_outputs])[0]
        start = cumulative[token - 1].item() if token else 0.0
        assert start - NEAR < number < cumulative[token].item() + NEAR, (params, token, twins.token_id, number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "num_calls"), [(17, 6), (5000, 6), (128_256, 3)])
def test_tokens_are_those_of_the_plain_twin(vocab_size: int, num_calls: int, dtype: torch.dtype) -> None:
    for call in range(num_calls):
        rng = random.Random(f"{vocab_size} {dtype} {call}")
        logits = random_logits(rng, 12, vocab_size, dtype)
        rows = []
        for _ in range(80 if call == 0 else 40):  # 80: more adjusted rows than fit into one copy of the logits
            sequence = random_sequence(rng, random_params(rng, vocab_size), vocab_size)
            if call == 0 and sequence.sampling.repetition_penalty == 1.0:
                sequence.sampling = dataclasses.replace(sequence.sampling, repetition_penalty=1.1)
            rows.append(draw_row(sequence, rng.randrange(12), rng.randrange(3)))
        drawn = draw_all(logits.to(DEVICE), rows)
        assert_as_the_twin(drawn, logits, rows)
        assert draw_all(logits.to(DEVICE), rows[30:10:-1]) == drawn[30:10:-1]  # whoever shares the batch


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(top_k=50),
        SamplingParams(top_k=6000),
        SamplingParams(top_p=0.9),
        SamplingParams(min_p=0.05),
        SamplingParams(top_k=50, top_p=0.9, min_p=0.01, temperature=0.8),
        SamplingParams(top_p=0.9, temperature=0.8, frequency_penalty=0.5),
    ],
)
def test_each_parameter_alone_with_many_random_numbers(params: SamplingParams) -> None:
    rng = random.Random(5)
    logits = random_logits(rng, 8, 20_000, torch.float32)
    rows = []
    for i in range(200):
        sequence = random_sequence(rng, dataclasses.replace(params, seed=i), 20_000)
        rows.append(draw_row(sequence, i % 8))
    assert_as_the_twin(draw_all(logits.to(DEVICE), rows), logits, rows)


def test_the_distribution_is_the_filtered_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 61) * 2
    params = SamplingParams(temperature=0.8, top_k=30, top_p=0.95, seed=11)
    scaled = logits[0].double() / 0.8
    scaled -= scaled.max()
    expected = torch.where(scaled >= draw_cutoff(scaled, params), scaled.exp(), 0.0)
    expected /= expected.sum()
    n = 20_000
    sequence = Sequence("request", params, [1, 2, 3], 2)
    drawn = draw_all(logits.to(DEVICE), [draw_row(sequence, sample_index=i) for i in range(n)])
    counts = torch.bincount(torch.tensor([token.token_id for token in drawn if token]), minlength=61)
    assert counts.sum() == n and (counts[expected == 0] == 0).all()
    assert 0.5 * (counts / n - expected).abs().sum() < 0.02


def test_rows_without_a_largest_logit_fail_alone() -> None:
    logits = torch.randn(5, 5000)
    logits[1, 4321] = math.nan
    logits[2] = -math.inf
    logits[3, 123] = math.inf
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=3, logprobs=2),
        SamplingParams(top_p=0.5),
        SamplingParams(repetition_penalty=1.2),
    ]
    for params in kinds:
        rows = [draw_row(Sequence("request", params, [1, 2, 3], 2), i) for i in range(5)]
        drawn = draw_all(logits.to(DEVICE), rows)
        assert drawn[1:4] == sample(logits, [SampleRow(row.sequence, 0, row.logits_row) for row in rows[1:4]])
        assert drawn[1:4] == [None, None, None]
        assert_as_the_twin([drawn[0], drawn[4]], logits, [rows[0], rows[4]])


def test_pending_tokens_count_as_if_the_host_knew_them() -> None:
    rng = random.Random(3)
    logits = random_logits(rng, 6, 300, torch.float32).to(DEVICE)
    newest = [rng.randrange(300) for _ in range(20)]
    known, pending = [], []
    for i in range(60):
        sequence = random_sequence(rng, random_params(rng, 300), 300)
        place = rng.randrange(20)
        if rng.random() < 0.5:  # else most pending tokens would be new ones
            newest[place] = rng.choice(sequence.token_ids)
        pending.append((sequence, i % 6, place))
    for sequence, logits_row, place in pending:
        longer = dataclasses.replace(sequence, token_ids=[*sequence.token_ids, newest[place]])
        known.append(draw_row(longer, logits_row))
    rows = [draw_row(sequence, logits_row, pending=place) for sequence, logits_row, place in pending]
    with_pending = draw_all(logits, rows, torch.tensor(newest, device=DEVICE))
    assert with_pending == draw_all(logits, known)
    assert_as_the_twin(with_pending, logits, known)
    with pytest.raises(ValueError, match="newest"):
        draw_all(logits, rows)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bias", [0.0, 100.0])
def test_nothing_that_ends_a_sample_is_drawn_before_min_tokens(temperature: float, bias: float) -> None:
    ends = (7, 3, 250)
    params = SamplingParams(
        temperature=temperature,
        min_tokens=3,
        stop_token_ids=ends,
        logit_bias=tuple((token, bias) for token in sorted(ends) if bias),
        logprobs=1,
    )
    logits = torch.randn(40, 300)
    logits[:, list(ends)] += 9.0  # nearly always the likeliest
    newest = torch.full((1,), 8, device=DEVICE)
    for num_outputs in range(5):
        rows, known = [], []
        for i in range(40):  # half of them with the newest token on the device alone
            own = dataclasses.replace(params, seed=i)
            known.append(draw_row(Sequence("request", own, [1, 2] + [8] * num_outputs, 2), i))
            is_pending = bool(num_outputs and i % 2)
            sequence = Sequence("request", own, [1, 2] + [8] * (num_outputs - is_pending), 2)
            rows.append(draw_row(sequence, i, pending=0 if is_pending else -1))
        drawn = draw_all(logits.to(DEVICE), rows, newest)
        assert_as_the_twin(drawn, logits, known)
        chosen = {token.token_id for token in drawn if token is not None}
        assert bool(chosen & set(ends)) == (num_outputs >= 3)
        best = logits.argmax(-1).tolist()  # alternatives are the model's own
        assert [token.top_logprobs[0][0] for token in drawn if token is not None] == best


def test_a_row_of_which_only_ends_are_possible_has_no_token() -> None:
    logits = torch.full((2, 300), -math.inf)
    logits[:, :5] = 1.0
    logits[1, 9] = 0.0
    for changes in ({"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 2}, {"logprobs": 2}):
        params = SamplingParams(min_tokens=1, stop_token_ids=(0, 1, 2, 3, 4), **changes)
        rows = [draw_row(Sequence("request", params, [1, 2], 2), i) for i in (0, 1, 0)]
        drawn = draw_all(logits.to(DEVICE), rows)
        assert [token and token.token_id for token in drawn] == [None, 9, None]
        assert drawn[::2] == sample(logits, [SampleRow(row.sequence, 0, row.logits_row) for row in rows])[::2]


def test_log_probabilities_are_the_models_own() -> None:
    rng = random.Random(9)
    logits = random_logits(rng, 80, 4000, torch.float32)
    rows = []
    for i in range(80):
        params = dataclasses.replace(random_params(rng, 4000), logprobs=rng.choice([None, 0, 1, 5, 20]))
        rows.append(draw_row(random_sequence(rng, params, 4000), i))
    drawn = draw_all(logits.to(DEVICE), rows)
    assert_as_the_twin(drawn, logits, rows)
    logprobs = logits.log_softmax(-1)
    for token, row in zip(drawn, rows, strict=True):
        assert token is not None
        count = row.sequence.sampling.logprobs
        if count is None:
            assert token == SampledToken(token.token_id)
            continue
        own = logprobs[row.logits_row]
        assert token.logprob == pytest.approx(own[token.token_id].item(), abs=1e-5)
        assert len(token.top_logprobs) == count
        for (token_id, value), best in zip(token.top_logprobs, own.topk(count).values.tolist(), strict=True):
            assert value == pytest.approx(best, abs=1e-5) == pytest.approx(own[token_id].item(), abs=1e-5)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device() -> None:
    from engine.cuda.sampling import draw

    rng = random.Random(1)
    logits = random_logits(rng, 40, 5000, torch.bfloat16).to(DEVICE)
    newest = torch.randint(5000, (40,), device=DEVICE)
    rows = []
    for i in range(40):
        params = dataclasses.replace(random_params(rng, 5000), logprobs=rng.choice([None, 3]))
        rows.append(draw_row(random_sequence(rng, params, 5000), i, pending=i if i % 3 else -1))
    with no_waiting():
        drawn = draw(logits, rows, newest)
        drawn.start_copy()
    assert len(drawn.result()) == 40


def test_the_result_must_have_been_asked_for() -> None:
    from engine.cuda.sampling import draw, warm_up

    warm_up(torch.randn(2, 50, device=DEVICE))
    drawn = draw(torch.randn(2, 50, device=DEVICE), [])
    with pytest.raises(ValueError, match="start_copy"):
        drawn.result()
    drawn.start_copy()
    assert drawn.result() == []


def test_the_largest_logits_in_a_captured_graph() -> None:
    from engine.cuda.sampling import greedy

    logits = torch.randn(5, 5000, device=DEVICE).bfloat16()  # rounded: there are ties
    logits[3, 17], logits[0, 5] = math.nan, math.inf
    wanted = logits.float().argmax(-1).tolist()
    wanted[3] = wanted[0] = -1
    assert greedy(logits).tolist() == wanted
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = greedy(logits)
    logits.copy_(logits.flip(0))
    graph.replay()
    wanted = logits.float().argmax(-1).tolist()
    wanted[1] = wanted[4] = -1
    assert tokens.tolist() == wanted and tokens.dtype == torch.int64
