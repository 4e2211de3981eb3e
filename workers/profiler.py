"""Measures a worker's cost model when it starts; the runs warm the engine up as well."""

from __future__ import annotations

from engine.batch import ScheduledBatch, ScheduledSequence
from engine.sequence import Sequence
from phasewise.core.clock import Clock
from phasewise.core.profile import DeviceProfile
from phasewise.core.request import SamplingParams
from workers.worker import Runner

_LONG_PROMPT = 96
_BATCH = 8


def measure_profile(runner: Runner, block_size: int, num_blocks: int, vocab_size: int, clock: Clock) -> DeviceProfile:
    """Two prompt lengths and two batch sizes give the four numbers of the linear model. Leaves garbage in the blocks.

    Sizes shrink where the cache is very small. A worker on a busy machine measures itself slower than it is, which is
    what a router should believe at that moment.
    """
    capacity = num_blocks * block_size
    long_prompt = min(_LONG_PROMPT, capacity - 1)
    short_prompt = max(long_prompt // 8, 1)
    batch = max(min(_BATCH, num_blocks // (short_prompt // block_size + 1)), 1)

    def seconds(items: list[tuple[int, int]]) -> float:
        step = _step(items, block_size, vocab_size)
        start_s = clock.now_s()
        runner.run(step)
        return clock.now_s() - start_s

    for first_use in ([(0, short_prompt)], [(short_prompt, 1)]):
        seconds(first_use)
    short_s, long_s = seconds([(0, short_prompt)]), seconds([(0, long_prompt)])
    one_s, many_s = seconds([(short_prompt, 1)]), seconds([(short_prompt, 1)] * batch)
    token_s = max(long_s - short_s, 0.0) / max(long_prompt - short_prompt, 1)
    sequence_s = max(many_s - one_s, 0.0) / max(batch - 1, 1)
    return DeviceProfile.linear(
        prefill_base_s=max(short_s - short_prompt * token_s, 0.0),
        prefill_token_s=token_s,
        decode_base_s=max(one_s - sequence_s, 0.0),
        decode_sequence_s=sequence_s,
    )


def _step(items: list[tuple[int, int]], block_size: int, vocab_size: int) -> ScheduledBatch:
    """A step over sequences given as (tokens computed before, tokens to compute)."""
    scheduled, next_block = [], 0
    for num_computed, num_tokens in items:
        total = num_computed + num_tokens
        num_blocks = -(-total // block_size)
        sequence = Sequence(
            request_id="profile",
            sampling=SamplingParams(temperature=0.0),
            token_ids=[position % vocab_size for position in range(total)],
            num_prompt_tokens=num_computed or total,
            num_computed_tokens=num_computed,
            block_table=list(range(next_block, next_block + num_blocks)),
        )
        next_block += num_blocks
        scheduled.append(ScheduledSequence(sequence, num_tokens, 1))
    return ScheduledBatch(tuple(scheduled))
