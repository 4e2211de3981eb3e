"""The fast backend against the plain one, over random ragged batches and a cache whose unused slots are NaN."""

from __future__ import annotations

import random

import pytest
import torch

from engine.attention.merge import merge_partials
from engine.attention.reference import ReferenceAttention
from engine.attention.sdpa_cpu import SdpaCpuAttention
from engine.attention.select import select_backend
from engine.batch import ScheduledBatch, ScheduledSequence
from engine.forward_inputs import ForwardInputs, build_forward_inputs
from engine.kv_cache import PagedKVCache
from engine.sequence import Sequence
from phasewise.core.errors import ConfigError
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.request import SamplingParams

NUM_BLOCKS = 160


def make_cache(num_kv_heads: int, head_dim: int, block_size: int, dtype: str = "float32") -> PagedKVCache:
    return PagedKVCache(KVCacheSpec(2, num_kv_heads, head_dim, block_size, dtype), NUM_BLOCKS, "cpu")


def ragged_inputs(cache: PagedKVCache, rng: random.Random, work: list[tuple[int, int]]) -> ForwardInputs:
    """(context, new tokens) per sequence, over scattered blocks. Slots of earlier tokens are filled, all others NaN."""
    free = list(range(NUM_BLOCKS))
    rng.shuffle(free)
    cache.storage.fill_(torch.nan)
    items = []
    for context, num_new in work:
        table = [free.pop() for _ in range(-(-context // cache.block_size))]
        for position in range(context - num_new):
            slot = table[position // cache.block_size] * cache.block_size + position % cache.block_size
            cache.storage[:, :, slot].normal_()
        sequence = Sequence("r", SamplingParams(), [0] * context, context, block_table=table)
        sequence.num_computed_tokens = context - num_new
        items.append(ScheduledSequence(sequence, num_new, 0))
    return build_forward_inputs(ScheduledBatch(tuple(items)), cache.block_size, 10_000, cache.device)


def random_work(rng: random.Random) -> list[tuple[int, int]]:
    work = []
    for _ in range(rng.randint(1, 9)):
        context = rng.choice([1, 2, 7, 8, 9, 16, 31, 64, 100, 133])
        kind = rng.random()
        num_new = 1 if kind < 0.5 else context if kind < 0.75 else rng.randint(1, context)
        work.append((context, num_new))
    return work


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 16), (6, 1, 8)])
def test_fast_equals_plain(num_heads: int, num_kv_heads: int, head_dim: int, window: int | None) -> None:
    rng = random.Random(num_heads)
    for round_number in range(12):
        torch.manual_seed(round_number)
        fast_cache = make_cache(num_kv_heads, head_dim, rng.choice([8, 16]))
        inputs = ragged_inputs(fast_cache, rng, random_work(rng))
        plain_cache = make_cache(num_kv_heads, head_dim, fast_cache.block_size)
        plain_cache.storage.copy_(fast_cache.storage)
        windows = (None, window)
        fast, plain = SdpaCpuAttention(fast_cache, windows), ReferenceAttention(plain_cache, windows)
        fast.plan(inputs)
        plain.plan(inputs)
        for layer in range(2):
            queries = torch.randn(len(inputs.input_ids), num_heads, head_dim)
            keys_values = torch.randn(len(inputs.input_ids), 2, num_kv_heads, head_dim)
            expected, expected_lse = plain.run_with_lse(layer, queries, keys_values)
            assert not expected.isnan().any()
            output, lse = fast.run_with_lse(layer, queries, keys_values)
            torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(lse, expected_lse, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(fast.run(layer, queries, keys_values), expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(fast_cache.storage, plain_cache.storage, equal_nan=True, atol=0, rtol=0)


def test_bfloat16_is_as_good_as_its_rounding() -> None:
    rng = random.Random(0)
    cache = make_cache(2, 32, 16, "bfloat16")
    inputs = ragged_inputs(cache, rng, [(100, 1), (33, 1), (50, 50), (70, 20)])
    fast, plain = SdpaCpuAttention(cache, (None, None)), ReferenceAttention(cache, (None, None))
    queries = torch.randn(72, 4, 32).bfloat16()
    keys_values = torch.randn(72, 2, 2, 32).bfloat16()
    fast.plan(inputs)
    plain.plan(inputs)
    torch.testing.assert_close(
        fast.run(0, queries, keys_values), plain.run(0, queries, keys_values), atol=2e-2, rtol=2e-2
    )


def test_a_plan_holds_for_its_step_only() -> None:
    """The workspace grows and is reused: a large step between two equal ones changes nothing."""
    rng = random.Random(1)
    cache = make_cache(2, 16, 8)
    backend = SdpaCpuAttention(cache, (None, None))
    small = ragged_inputs(cache, rng, [(20, 1), (17, 1)])
    content = cache.storage.clone()
    queries, keys_values = torch.randn(2, 4, 16), torch.randn(2, 2, 2, 16)
    backend.plan(small)
    first = backend.run(0, queries, keys_values).clone()
    large = ragged_inputs(cache, rng, [(300, 1), (290, 1), (280, 40)])
    backend.plan(large)
    backend.run(0, torch.randn(42, 4, 16), torch.randn(42, 2, 2, 16))
    cache.storage.copy_(content)
    backend.plan(small)
    torch.testing.assert_close(backend.run(0, queries, keys_values), first, atol=0, rtol=0)


def test_merged_parts_are_the_whole() -> None:
    torch.manual_seed(0)
    scores, values = torch.randn(3, 4, 50), torch.randn(50, 8)
    whole = scores.softmax(-1) @ values
    bounds = [(0, 10), (10, 11), (11, 50)]
    outputs = torch.stack([scores[..., a:b].softmax(-1) @ values[a:b] for a, b in bounds])
    lses = torch.stack([scores[..., a:b].logsumexp(-1) for a, b in bounds])
    output, lse = merge_partials(outputs, lses)
    torch.testing.assert_close(output, whole)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    empty = torch.full_like(outputs[:1], torch.nan), torch.full_like(lses[:1], -torch.inf)
    output, _ = merge_partials(torch.cat((outputs, empty[0])), torch.cat((lses, empty[1])))
    torch.testing.assert_close(output, whole)


def test_an_unknown_backend_is_named() -> None:
    cache = make_cache(1, 8, 8)
    with pytest.raises(ConfigError, match="'flash' is unknown; known: auto, sdpa_cpu, reference"):
        select_backend("flash", cache, (None, None))
    assert isinstance(select_backend("auto", cache, (None, None)), SdpaCpuAttention)
    assert isinstance(select_backend("reference", cache, (None, None)), ReferenceAttention)
