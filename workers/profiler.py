"""Measures a worker's cost model: a handful of points when a worker starts, a grid for `phasewise profile`.

The runs warm the engine up as well. They overwrite the KV blocks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.batch import ScheduledBatch, ScheduledSequence
from engine.kv_cache import PagedKVCache
from engine.model_config import ModelConfig
from engine.sequence import Sequence
from kv_transfer.cache_port import CachePort
from kv_transfer.cache_protocol import KVPlace
from kv_transfer.codec import Codec, part_layout
from kv_transfer.plan import PartSpan
from phasewise.core.clock import Clock
from phasewise.core.profile import DeviceProfile, Point, ProfileFacts, StepTimes
from phasewise.core.request import SamplingParams
from workers.driver import Runner

_COPY_BYTES = 256 * 2**20
_HOST_COPY_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class PreparedEngine:
    """A model in memory with its cache, before anything was measured."""

    runner: Runner
    cache: PagedKVCache
    port: CachePort
    max_model_len: int
    vocab_size: int
    facts: ProfileFacts


@dataclass(frozen=True, slots=True)
class Grid:
    """Which steps are measured: every pair that fits into the cache.

    Attributes:
        prompts: tokens of a chunk. Where the cache is smaller than all of them, one that fits is taken instead.
        prompt_contexts: tokens before it.
        batches: sequences of a decode step.
        decode_contexts: tokens of each sequence.
        repeats: runs of each step after one that does not count, when time allows; their median is taken.
    """

    prompts: tuple[int, ...]
    prompt_contexts: tuple[int, ...]
    batches: tuple[int, ...]
    decode_contexts: tuple[int, ...]
    repeats: int


def start_up_grid(device: str, token_budget: int, max_running: int) -> Grid:
    """Few and small enough for every start. A worker on a busy machine measures itself slower than it is, which is
    what a router should believe at that moment."""
    if device == "cpu":
        return Grid((12, 96), (0,), (1, 8), (12,), 5)  # other workers start on the same cores: one run says nothing
    prompts = _up_to(token_budget, (16, 256, token_budget))
    return Grid(prompts, (0, 4096), _up_to(max_running, (1, 16, 64, max_running)), (256, 2048), 3)


def full_grid(token_budget: int, max_running: int) -> Grid:
    """For a profile that is kept."""
    prompts = _up_to(token_budget, (*(2**i for i in range(4, 20)), token_budget))
    batches = _up_to(max_running, (*(2**i for i in range(20)), max_running))
    contexts = (512, 2048, 8192, 32768)
    return Grid(prompts, (0, *contexts), batches, (128, *contexts), 7)


def measure_profile(engine: PreparedEngine, grid: Grid, clock: Clock, budget_s: float = 1e9) -> DeviceProfile:
    """Measures the steps of `grid`, smaller ones first; at most half of `budget_s` goes to prefill.

    A step that would not end in its time, as the points so far predict it, is left out; each phase has one point at
    least.
    """
    timer = _StepTimer(engine, clock)
    end_s = clock.now_s() + budget_s
    prompts = _measure(timer.prefill_s, timer.prefill_cells(grid), grid.repeats, clock, end_s - budget_s / 2)
    decodes = _measure(timer.decode_s, timer.decode_cells(grid), grid.repeats, clock, end_s)
    decodes = [Point(p.size, p.size * p.context_tokens, p.seconds) for p in decodes]
    return DeviceProfile(StepTimes(tuple(prompts)), StepTimes(tuple(decodes)), engine.facts)


def warm_up(engine: PreparedEngine, grid: Grid, clock: Clock) -> None:
    """Runs each step of `grid` once: kernels are compiled, libraries set up."""
    timer = _StepTimer(engine, clock)
    for size, context in timer.prefill_cells(grid):
        timer.prefill_s(size, context)
    for size, context in timer.decode_cells(grid):
        timer.decode_s(size, context)


def measure_rates(engine: PreparedEngine, clock: Clock) -> ProfileFacts:
    """The facts with the two rates: a copy on the device, and KV blocks into host memory. Overwrites the cache, and
    its swap space, which must be free."""
    cache = engine.cache
    layers = cache.storage.flatten(1)
    num_layers = max(min(len(layers) // 2, _COPY_BYTES // layers[0].nbytes), 1)
    pieces = layers if len(layers) > 1 else layers.view(2, -1)  # a cache of one layer: its keys onto its values
    source, target = pieces[:num_layers], pieces[-num_layers:]
    source.fill_(1.0)  # on a CPU, pages that were never written are all one page

    def copy() -> None:
        target.copy_(source)
        if cache.device.type == "cuda":
            torch.cuda.synchronize(cache.device)

    num_blocks = min(cache.num_blocks, cache.swap.num_free, max(_HOST_COPY_BYTES // cache.spec.bytes_per_block, 1))
    blocks = list(range(num_blocks))

    def swap_out() -> None:
        cache.swap.write(blocks, blocks)
        if cache.device.type == "cuda":
            torch.cuda.synchronize(cache.device)

    copy_s = _median_s(copy, clock)
    host_s = _median_s(swap_out, clock)
    return replace(
        engine.facts,
        memory_bytes_per_s=round(2 * source.nbytes / copy_s),
        kv_to_host_bytes_per_s=round(num_blocks * cache.spec.bytes_per_block / host_s),
    )


def measure_codec(port: CachePort, codec: Codec, clock: Clock) -> float:
    """KV bytes per second, before the codec, that this device packs with it. 0.0 for none. Reads the cache."""
    if codec is Codec.NONE:
        return 0.0
    spec = port.spec
    span = PartSpan(0, spec.num_layers, 0, max(min(_HOST_COPY_BYTES // spec.bytes_per_token, spec.block_size), 1))
    layout = part_layout(spec, span, spec.dtype, codec)
    wire = torch.empty(layout.num_bytes, dtype=torch.uint8, device=port.device)

    def pack() -> None:
        port.pack(KVPlace([0]), span, layout, wire)
        if wire.is_cuda:
            torch.cuda.synchronize(wire.device)

    return spec.bytes_per_token * span.num_tokens / _median_s(pack, clock)


def device_name(device: str, num_threads: int) -> str:
    """What a profile is measured on: the GPU's name, or the CPU's and the number of threads."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {num_threads} threads"


def model_shape(config: ModelConfig) -> str:
    """What the time of a step depends on, in words. The weights' values are no part of it."""
    windows = {window for window in config.windows if window is not None}
    return (
        f"{config.architecture.removesuffix('ForCausalLM')}, {config.num_layers} layers of {config.hidden_size}, "
        f"{config.num_heads}/{config.num_kv_heads} heads of {config.head_dim}, MLP {config.intermediate_size}, "
        f"vocabulary {config.vocab_size}" + "".join(f", window {window}" for window in sorted(windows))
    )


class _StepTimer:
    """Runs made-up steps on an engine, one at a time, and times them."""

    def __init__(self, engine: PreparedEngine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._block_size = engine.cache.block_size
        self._num_blocks = engine.cache.num_blocks

    def prefill_s(self, num_tokens: int, context: int) -> float:
        return self._seconds([(context, num_tokens)])

    def decode_s(self, batch: int, context: int) -> float:
        return self._seconds([(context, 1)] * batch)

    def prefill_cells(self, grid: Grid) -> list[tuple[int, int]]:
        """(tokens, context) of the steps that fit, by growing work."""
        cells = [(t, c) for t in grid.prompts for c in grid.prompt_contexts if self._fits(1, t + c)]
        return sorted(cells, key=lambda cell: (sum(cell), cell)) or [(self._longest(), 0)]

    def decode_cells(self, grid: Grid) -> list[tuple[int, int]]:
        """(sequences, tokens of each) of the steps that fit, by growing work."""
        cells = [(b, c) for b in grid.batches for c in grid.decode_contexts if self._fits(b, c + 1)]
        return sorted(cells, key=lambda cell: (cell[0] * cell[1], cell)) or [(1, self._longest() - 1)]

    def _longest(self) -> int:
        return min(self._num_blocks * self._block_size, self._engine.max_model_len)

    def _fits(self, num_sequences: int, num_tokens: int) -> bool:
        num_blocks = num_sequences * -(-num_tokens // self._block_size)
        return num_tokens <= self._engine.max_model_len and num_blocks <= self._num_blocks

    def _seconds(self, items: list[tuple[int, int]]) -> float:
        step = made_up_step(items, self._block_size, self._engine.vocab_size)
        start_s = self._clock.now_s()
        self._engine.runner.submit(step).collect()  # ends when the tokens are on the host
        return self._clock.now_s() - start_s


def _measure(
    seconds: Callable[[int, int], float],
    cells: list[tuple[int, int]],
    repeats: int,
    clock: Clock,
    end_s: float,
) -> list[Point]:
    """Points (size, context, median seconds) of `cells`, as far as the time until `end_s` goes."""
    points: list[Point] = []
    for number, (size, context) in enumerate(cells):
        left_s = end_s - clock.now_s()
        if points and 2 * StepTimes(tuple(points)).seconds(size, context) > left_s:
            continue
        first_s = seconds(size, context)
        share_s = (end_s - clock.now_s()) / (len(cells) - number)
        affordable = share_s / max(first_s, 1e-9)
        num_runs = repeats if affordable >= repeats else max(int(affordable), 1)
        median_s = statistics.median(seconds(size, context) for _ in range(num_runs))
        points.append(Point(size, context, round(median_s, 7)))
    return points


def made_up_step(
    items: list[tuple[int, int]],
    block_size: int,
    vocab_size: int,
    *,
    sampling: SamplingParams | None = None,
    shared_block: bool = False,
) -> ScheduledBatch:
    """A step over sequences given as (tokens computed before, tokens to compute), each with blocks of its own.

    `shared_block`: all are in block 0 instead, which takes the memory of such a step but not the cache for it.
    """
    scheduled, next_block = [], 0
    for num_computed, num_tokens in items:
        total = num_computed + num_tokens
        num_blocks = -(-total // block_size)
        sequence = Sequence(
            request_id="profile",
            sampling=sampling or SamplingParams(temperature=0.0),
            token_ids=[position % vocab_size for position in range(total)],
            num_prompt_tokens=num_computed if num_tokens == 1 and num_computed else total,
            num_computed_tokens=num_computed,
            block_table=[0] * num_blocks if shared_block else list(range(next_block, next_block + num_blocks)),
        )
        next_block += num_blocks
        scheduled.append(ScheduledSequence(sequence, num_tokens, 1))
    return ScheduledBatch(tuple(scheduled))


def _median_s(call: Callable[[], object], clock: Clock) -> float:
    times = []
    for _ in range(6):
        start_s = clock.now_s()
        call()
        times.append(clock.now_s() - start_s)
    return max(statistics.median(times[1:]), 1e-9)


def _up_to(most: int, values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({value for value in values if value <= most}))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "cpu"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")
