"""Arrivals, lengths and prompts: decided by the seed, right in distribution, exact in length."""

from __future__ import annotations

import math
from itertools import islice

import pytest

from cli.bench.workload import (
    HASH_BLOCK_TOKENS,
    LengthRange,
    PromptBuilder,
    RequestSpec,
    SyntheticRequests,
    clip,
    parse_length_range,
    parse_numbers,
    poisson_arrivals_s,
    with_poisson_arrivals,
    with_scaled_arrivals,
)


def test_poisson_arrivals_have_the_rate_and_an_exponential_gap() -> None:
    times_s = list(islice(poisson_arrivals_s(4.0, seed=1), 20_000))
    gaps_s = [late - early for early, late in zip([0.0, *times_s], times_s, strict=False)]
    mean_s = sum(gaps_s) / len(gaps_s)
    assert mean_s == pytest.approx(0.25, rel=0.03)
    variance = sum((gap - mean_s) ** 2 for gap in gaps_s) / len(gaps_s)
    assert math.sqrt(variance) == pytest.approx(mean_s, rel=0.03)  # an exponential's deviation is its mean
    assert sum(gap > mean_s for gap in gaps_s) / len(gaps_s) == pytest.approx(math.exp(-1), rel=0.05)
    assert min(gaps_s) >= 0


def test_the_seed_decides() -> None:
    first = list(islice(poisson_arrivals_s(2.0, seed=3), 50))
    assert first == list(islice(poisson_arrivals_s(2.0, seed=3), 50))
    assert first != list(islice(poisson_arrivals_s(2.0, seed=4), 50))
    assert list(islice(poisson_arrivals_s(math.inf, seed=0), 3)) == [0.0, 0.0, 0.0]


def test_synthetic_requests_repeat_and_longer_runs_begin_alike() -> None:
    requests = SyntheticRequests(LengthRange(4, 9), LengthRange(2, 2), seed=5, count=200)
    found = list(requests)
    assert found == list(requests)
    assert found == list(islice(SyntheticRequests(LengthRange(4, 9), LengthRange(2, 2), seed=5), 200))
    assert {request.num_prompt_tokens for request in found} == set(range(4, 10))
    assert {request.num_output_tokens for request in found} == {2}
    assert [request.index for request in found] == list(range(200))


def test_arrivals_are_laid_over_requests_in_order() -> None:
    requests = list(SyntheticRequests(LengthRange(1, 9), LengthRange(1, 1), seed=0, count=5))
    arriving = list(with_poisson_arrivals(requests, 10.0, seed=2))
    assert [request.arrival_s for request in arriving] == list(islice(poisson_arrivals_s(10.0, seed=2), 5))
    assert [request.num_prompt_tokens for request in arriving] == [request.num_prompt_tokens for request in requests]


def test_scaled_arrivals_start_at_zero_in_order() -> None:
    requests = [RequestSpec(0, 1, 1, 105.0), RequestSpec(1, 1, 1, 100.0), RequestSpec(2, 1, 1, 103.0)]
    scaled = with_scaled_arrivals(requests, 0.5)
    assert [(request.index, request.arrival_s) for request in scaled] == [(1, 0.0), (2, 1.5), (0, 2.5)]
    with pytest.raises(ValueError, match="no arrival times; give a rate"):
        with_scaled_arrivals([RequestSpec(0, 1, 1)], 1.0)


def test_random_prompts_are_exact_repeatable_and_of_the_given_ids() -> None:
    builder = PromptBuilder([3, 5, 7], seed=1)
    prompt = builder.build(RequestSpec(4, 1000, 1))
    assert len(prompt) == 1000
    assert set(prompt) == {3, 5, 7}
    assert prompt == PromptBuilder([3, 5, 7], seed=1).build(RequestSpec(4, 1000, 9))
    assert prompt != builder.build(RequestSpec(5, 1000, 1))
    assert prompt != PromptBuilder([3, 5, 7], seed=2).build(RequestSpec(4, 1000, 1))
    with pytest.raises(ValueError, match="no token ids"):
        PromptBuilder([], seed=0)


def test_a_shared_prefix_is_shared_and_the_rest_is_not() -> None:
    builder = PromptBuilder(range(1000), seed=1, shared_prefix=64)
    one, two = (builder.build(RequestSpec(index, 100, 1)) for index in (0, 1))
    assert one[:64] == two[:64]
    assert one[64:] != two[64:]
    assert len(one) == len(two) == 100
    assert builder.build(RequestSpec(2, 10, 1)) == one[:10]


def test_equal_hash_ids_are_equal_blocks_also_where_a_prompt_ends_in_one() -> None:
    builder = PromptBuilder(range(1000), seed=1)
    whole = builder.build(RequestSpec(0, 3 * HASH_BLOCK_TOKENS, 1, hash_ids=(8, 9, 10)))
    part = builder.build(RequestSpec(1, 2 * HASH_BLOCK_TOKENS + 100, 1, hash_ids=(8, 11, 10)))
    assert len(whole) == 3 * HASH_BLOCK_TOKENS
    assert len(part) == 2 * HASH_BLOCK_TOKENS + 100
    assert whole[:HASH_BLOCK_TOKENS] == part[:HASH_BLOCK_TOKENS]
    assert whole[HASH_BLOCK_TOKENS : 2 * HASH_BLOCK_TOKENS] != part[HASH_BLOCK_TOKENS : 2 * HASH_BLOCK_TOKENS]
    assert part[-100:] == whole[2 * HASH_BLOCK_TOKENS :][:100]


def test_ids_of_another_model_are_folded_into_the_vocabulary() -> None:
    builder = PromptBuilder(range(100), seed=1)
    assert builder.build(RequestSpec(0, 3, 1, token_ids=(5, 105, 250, 7))) == [5, 5, 50]


def test_clip() -> None:
    assert clip(RequestSpec(0, 10, 20), 4, None) == RequestSpec(0, 4, 20)
    assert clip(RequestSpec(0, 10, 20), None, 30) == RequestSpec(0, 10, 20)


@pytest.mark.parametrize(("text", "expected"), [("128", (128, 128)), ("1:9", (1, 9))])
def test_length_ranges(text: str, expected: tuple[int, int]) -> None:
    found = parse_length_range(text, flag="--x")
    assert (found.low, found.high) == expected
    assert str(found) == text


@pytest.mark.parametrize("text", ["", "a", "0", "9:1", "1:", "-1", "1.5", "1:2:3", "²"])
def test_bad_length_ranges_name_the_flag(text: str) -> None:
    with pytest.raises(ValueError, match="--x must be"):
        parse_length_range(text, flag="--x")


def test_numbers_of_a_sweep() -> None:
    assert parse_numbers("1, 2,4", flag="--c", whole=True) == [1, 2, 4]
    assert parse_numbers("0.5,inf", flag="--r", whole=False) == [0.5, math.inf]
    for text, whole in (("0", True), ("-1", False), ("nan", False), ("1.5", True), ("", True), ("1,,2", False)):
        with pytest.raises(ValueError, match="--c must be"):
            parse_numbers(text, flag="--c", whole=whole)
