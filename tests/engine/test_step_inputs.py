"""Rows of decoding sequences: what the device reads through them, over random histories of a batch. No GPU."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from decode_workers.scheduler import DecodeJob, DecodeScheduler
from engine.batch import ScheduledSequence
from engine.block_manager import BlockManager
from engine.cuda.step_inputs import DecodeInputs, DecodeRows, RowAssignment, TokenRows, prompt_rows
from engine.sequence import Sequence
from phasewise.core.request import SamplingParams

MAX_ROWS, MAX_BLOCKS = 16, 32
GARBAGE = 10**6  # what padding rows sample


class Device:
    """DecodeRows, and what `prepare_step` and a step do with them."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._assignment = RowAssignment(block_size)
        self._rows = DecodeRows(MAX_ROWS, MAX_BLOCKS, torch.device("cpu"))
        self._tables = self._rows.tables.fill_(-1).numpy()
        self._newest = np.full(MAX_ROWS, GARBAGE)
        self.num_changed = 0

    def step(self, items: list[ScheduledSequence], num_rows: int, sampled: list[int]) -> None:
        """Raises AssertionError when an item would read another token than its last, or other blocks than its own."""
        inputs = self._assignment.assign(items, num_rows)
        self.num_changed += len(inputs.changed)
        before = self._tables.copy()
        self._rows.write_tables(inputs)
        before[inputs.changed, : inputs.tables.shape[1]] = inputs.tables
        assert np.array_equal(self._tables, before), "rows that did not change hands"
        sources, positions, slots = inputs.tokens.sources, inputs.tokens.positions, inputs.tokens.slots
        ids = [source if source >= 0 else self._newest[-1 - source] for source in sources.tolist()]
        for row in np.flatnonzero(slots >= 0):
            self._tables[row, positions[row] // self._block_size] = slots[row] // self._block_size
        assert len(set(inputs.rows.tolist())) == len(items)
        assert sorted(inputs.rows) == np.flatnonzero(slots >= 0).tolist() == np.flatnonzero(inputs.contexts).tolist()
        for row, item in zip(inputs.rows, items, strict=True):
            table = item.sequence.block_table
            assert ids[row] == ([*item.sequence.token_ids, LAST[item.sequence]])[item.start]
            assert (positions[row], inputs.contexts[row]) == (item.start, item.start + 1)
            assert (
                slots[row] == table[item.start // self._block_size] * self._block_size + item.start % self._block_size
            )
            count = item.start // self._block_size + 1
            assert self._tables[row, :count].tolist() == table[:count]
        self._newest[:num_rows] = GARBAGE
        self._newest[inputs.rows] = sampled

    def break_step(self, items: list[ScheduledSequence], num_rows: int) -> None:
        """The step is planned and never reaches the device."""
        self._assignment.assign(items, num_rows)
        self._assignment.forget()


LAST: dict[Sequence, int] = {}
"""The token that a sequence sampled last."""


@pytest.mark.parametrize("breaks", [0.0, 0.1], ids=["whole", "broken"])
@pytest.mark.parametrize("seed", range(8))
def test_random_histories_a_step_ahead(seed: int, breaks: float) -> None:
    rng = random.Random(seed)
    size = rng.choice([2, 4, 8])
    blocks = BlockManager(rng.randrange(90, 180) // size, size, prefix_caching=False)
    scheduler, device = DecodeScheduler(blocks, max_running=MAX_ROWS), Device(size)
    flight: list[tuple[DecodeJob, ScheduledSequence, int]] = []
    num_preempted = num_items = 0
    for _ in range(800):
        if rng.random() < 0.3:
            arrive(scheduler, blocks, rng)
        for job in list(scheduler.jobs()):
            if rng.random() < 0.01:
                scheduler.remove(job)  # aborted, whatever is in flight
        plan = scheduler.schedule()
        num_preempted += len(plan.swap_out)
        items = [ScheduledSequence(job.sequence, 1, 1) for job in plan.jobs]
        sampled = [rng.randrange(1000) for _ in items]
        is_broken = bool(items) and rng.random() < breaks
        if is_broken:
            device.break_step(items, MAX_ROWS)
        elif items:
            device.step(items, rng.choice([len(items), MAX_ROWS, min(len(items) + 2, MAX_ROWS)]), sampled)
            num_items += len(items)
        before, flight = flight, [] if is_broken else list(zip(plan.jobs, items, sampled, strict=True))
        for job, _, token in flight:
            job.sequence.begin_step(1)
            LAST[job.sequence] = token
        if before and not is_broken and rng.random() < breaks:
            # Found out late: what was built on it is dropped, too.
            for _, item, _ in before + flight:
                item.sequence.revoke_step(1)
            before, flight = [], []
        for job, item, token in before:
            item.sequence.end_step(1)
            item.sequence.token_ids.append(token)
            if job in set(scheduler.jobs()) and (item.sequence.finish_reason() or rng.random() < 0.02):
                scheduler.remove(job)  # a stop token, found out a step late
        blocks.check()
    assert num_preempted > 10 and num_items > 1000
    assert breaks or device.num_changed < num_items / 2, "tables are sent again and again"


def arrive(scheduler: DecodeScheduler, blocks: BlockManager, rng: random.Random) -> None:
    """A prompt with its first tokens, one or more samples that share its blocks."""
    length, num_samples = rng.randrange(1, 20), rng.choice([1, 1, 2, 3])
    is_full = scheduler.preempted or len(scheduler.running) + num_samples > MAX_ROWS
    if is_full or blocks.blocks_for(length) > blocks.num_free_blocks:
        return
    table, prompt = blocks.allocate(blocks.blocks_for(length)), [rng.randrange(1000) for _ in range(length)]
    params = SamplingParams(max_tokens=rng.randrange(2, 25))
    for index in range(num_samples):
        tokens = [*prompt, rng.randrange(1000)]
        blocks.share(table)
        sequence = Sequence("r", params, tokens, length, index, num_computed_tokens=length, block_table=list(table))
        LAST[sequence] = tokens[-1]
        scheduler.add(sequence, "g", 1e9)
    blocks.release(table)


def decode(tokens: list[int], num_computed: int, table: list[int], num_in_flight: int = 0) -> ScheduledSequence:
    sequence = Sequence("r", SamplingParams(), tokens, 1, num_computed_tokens=num_computed, block_table=table)
    sequence.begin_step(num_in_flight)
    return ScheduledSequence(sequence, 1, 1)


def test_what_a_scheduler_must_not_ask_for() -> None:
    rows = RowAssignment(4)
    with pytest.raises(ValueError, match="token 3 is neither here nor on the device"):
        rows.assign([decode([1, 2, 3], 2, [0], num_in_flight=1)], 1)
    with pytest.raises(ValueError, match="request r has 1 blocks, needs 2"):
        rows.assign([decode([1, 2, 3, 4, 5], 4, [0])], 1)
    prompt = Sequence("p", SamplingParams(), [1, 2, 3, 4, 5], 5, block_table=[3])
    with pytest.raises(ValueError, match="request p has 5 tokens, 0 computed, and 1 blocks"):
        prompt_rows([ScheduledSequence(prompt, 5, 1)], 0, 4)


def test_rows_of_prompts() -> None:
    first = Sequence("a", SamplingParams(), [11, 12, 13, 14, 15, 16], 6, num_computed_tokens=2, block_table=[5, 2, 9])
    second = Sequence("b", SamplingParams(), [21], 1, block_table=[7])
    chunks, tokens = prompt_rows([ScheduledSequence(first, 3, 0), ScheduledSequence(second, 1, 1)], 2, 4)
    assert [(c.first, c.num_queries, c.context, c.num_earlier, c.table.tolist()) for c in chunks] == [
        (2, 3, 5, 2, [5, 2]),
        (5, 1, 1, 0, [7]),
    ]
    assert tokens.sources.tolist() == [13, 14, 15, 21]
    assert tokens.positions.tolist() == [2, 3, 4, 0]
    assert tokens.slots.tolist() == [22, 23, 8, 28]


def test_tables_of_rows_in_any_order_go_to_their_rows() -> None:
    rows = DecodeRows(8, 4, torch.device("cpu"))
    changed = np.asarray([3, 2, 6, 7], dtype=np.int64)
    tables = np.asarray([[1, 1], [2, 2], [3, 0], [4, 0]], dtype=np.int32)
    rows.write_tables(DecodeInputs(changed, TokenRows.padding(8), np.zeros(8, np.int32), changed, tables))
    assert rows.tables[:, 0].tolist() == [0, 0, 2, 1, 0, 0, 3, 4]
