"""What is measured: which steps, how often, within which time; a clock that only steps move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from engine.batch import ComputedStep, ScheduledBatch, StepResult
from engine.kv_cache import PagedKVCache
from kv_transfer.cache_port import CachePort
from phasewise.core.clock import ManualClock
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.profile import ProfileFacts
from workers.profiler import (
    Grid,
    PreparedEngine,
    full_grid,
    made_up_step,
    measure_profile,
    measure_rates,
    start_up_grid,
    warm_up,
)

GRID = Grid((4, 8, 32), (0, 64), (1, 2, 16), (8, 24), 3)


class TimedRunner:
    """Takes 1 s and 10 ms per token, and 1 ms per token of context, of a clock that it sets."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self.batches: list[ScheduledBatch] = []

    num_steps_ahead = 0

    def submit(
        self,
        batch: ScheduledBatch,
        on_layers_done: Callable[[int, int], None] | None = None,
        layers_per_group: int = 0,
    ) -> ComputedStep:
        self.batches.append(batch)
        context = sum(item.sequence.num_computed_tokens for item in batch.items)
        self._clock.advance(1.0 + 0.01 * batch.num_tokens + 0.001 * context)
        return ComputedStep(StepResult((), ()))


def engine(num_blocks: int = 32, max_model_len: int = 128) -> tuple[PreparedEngine, TimedRunner, ManualClock]:
    clock = ManualClock()
    runner = TimedRunner(clock)
    cache = PagedKVCache(KVCacheSpec(2, 1, 4, 8, "float32"), num_blocks, "cpu")
    port = CachePort(cache, cache.spec)
    return PreparedEngine(runner, cache, port, max_model_len, 100, ProfileFacts(device="d")), runner, clock


def test_every_step_that_fits_is_measured_once_not_counted_and_then_thrice() -> None:
    subject, runner, clock = engine()
    profile = measure_profile(subject, GRID, clock)
    measured = {(p.size, p.context_tokens) for p in profile.prefill.points}
    assert measured == {(t, c) for t in (4, 8, 32) for c in (0, 64)}
    assert {(p.size, p.context_tokens) for p in profile.decode.points} == {
        *((b, 8 * b) for b in (1, 2, 16)),  # 16 sequences of 9 tokens: all 32 blocks
        *((b, 24 * b) for b in (1, 2)),
    }
    assert len(runner.batches) == 4 * 11
    assert profile.prefill_s(32, 64) == pytest.approx(1 + 0.32 + 0.064)
    assert profile.decode_step_s(2, 48) == pytest.approx(1.068)
    assert profile.facts == subject.facts


def test_steps_are_such_as_the_scheduler_makes() -> None:
    subject, runner, clock = engine()
    warm_up(subject, GRID, clock)
    for batch in runner.batches:
        blocks = [b for item in batch.items for b in item.sequence.block_table]
        assert len(blocks) == len(set(blocks)) and max(blocks) < 32
        for item in batch.items:
            sequence = item.sequence
            assert item.num_tokens == sequence.num_unscheduled_tokens and item.num_samples == 1
            assert len(sequence.block_table) == -(-sequence.num_tokens // 8)
            assert sequence.is_prefilling == (item.num_tokens > 1)


def test_time_is_kept_and_small_steps_come_first() -> None:
    subject, _, clock = engine()
    profile = measure_profile(subject, GRID, clock, budget_s=16.0)
    assert clock.now_s() < 16.0 + 4
    assert (4, 0) in {(p.size, p.context_tokens) for p in profile.prefill.points}
    assert len(profile.prefill.points) < 6
    assert profile.decode.points


def test_a_tiny_cache_is_measured_with_what_fits() -> None:
    subject, _, clock = engine(num_blocks=2, max_model_len=16)
    profile = measure_profile(subject, Grid((96,), (0,), (8,), (12,), 1), clock)
    assert [(p.size, p.context_tokens) for p in profile.prefill.points] == [(16, 0)]
    assert [(p.size, p.context_tokens) for p in profile.decode.points] == [(1, 15)]


def test_grids_follow_the_limits() -> None:
    assert start_up_grid("cpu", 128, 256) == Grid((12, 96), (0,), (1, 8), (12,), 5)
    assert start_up_grid("cuda", 2048, 32).batches == (1, 16, 32)
    grid = full_grid(3000, 48)
    assert grid.prompts == (16, 32, 64, 128, 256, 512, 1024, 2048, 3000)
    assert grid.batches == (1, 2, 4, 8, 16, 32, 48)


def test_rates_of_a_cache_of_one_layer_and_of_several() -> None:
    for num_layers in (1, 3):
        subject, _, _ = engine()
        cache = PagedKVCache(KVCacheSpec(num_layers, 1, 4, 8, "float32"), 8, "cpu", num_swap_blocks=9)
        clock = _Ticking()
        facts = measure_rates(replace(subject, cache=cache), clock)
        assert facts.memory_bytes_per_s == 2 * cache.storage[0].nbytes // (1 if num_layers > 1 else 2)
        assert facts.kv_to_host_bytes_per_s == cache.storage.nbytes


class _Ticking(ManualClock):
    """A second passes between any two looks."""

    def now_s(self) -> float:
        self.advance(1.0)
        return super().now_s()


def test_a_shared_block_stands_for_all() -> None:
    step = made_up_step([(1, 1), (40, 8)], 8, 100, shared_block=True)
    assert [item.sequence.block_table for item in step.items] == [[0], [0] * 6]
