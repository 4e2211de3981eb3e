"""The engine alone on one GPU: decode steps, prefill, offline throughput, start; beside the floor and vLLM's figures.

Llama-3.1-8B shape, random bf16 weights, greedy. The floors are bytes that must move over 3.0 TB/s, or operations over
782 TFLOP/s, as measured on an H100 80 GB; vLLM is 0.23.0 on the same kind of card.

    python -m benchmarks.engine --output benchmarks/results/engine-h100.json
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    sys.exit("benchmarks.engine needs an NVIDIA GPU; benchmarks.engine_cpu is for CPUs")

from benchmarks.offline import Load, LoneWorker, device_name, model_path, offline_seconds, write_result
from engine.batch import ScheduledBatch, ScheduledSequence
from engine.cuda.runner import CudaModelRunner
from engine.kv_cache import PagedKVCache
from engine.loader import load_model
from engine.sequence import Sequence
from kv_transfer.cache_port import CachePort
from phasewise.core.config import build_config
from phasewise.core.messages import WorkerOutput
from phasewise.core.model_source import resolve_model
from phasewise.core.placement import WorkerRole
from phasewise.core.profile import DeviceProfile
from phasewise.core.request import Request, SamplingParams
from workers.build import LoadedEngine
from workers.settings import WorkerSettings

# case: (floor, vLLM 0.23.0, must, goal)
DECODE = {
    1: (5.1, 6.34, 6.0, 5.8),
    16: (5.8, 7.14, 6.8, 6.4),
    64: (8.1, 9.85, 9.3, 8.9),
    128: (11.1, 13.54, 12.8, 12.2),
    256: (17.2, 21.26, 20.1, 19.0),
}
PREFILL = {
    (1, 512): (9.2, 15.9, 13.5, 12.5),
    (1, 2048): (38.0, 50.3, 47.5, 46.0),
    (16, 2048): (608.0, 772.8, 730.0, 690.0),
    (4, 8192): (675.0, 860.9, 815.0, 780.0),
}
OFFLINE = {(512, 512, 128): (None, 6811, 7150, 7500), (256, 1024, 256): (None, 5635, 5900, 6300)}
BLOCK = 16
TOKEN_BUDGET = 16_384  # of the offline loads: fewer, larger steps of prompts


class Bench:
    """A loaded engine and the rows measured on it."""

    def __init__(self, num_blocks: int, weights: str = "auto", kv_dtype: str = "auto") -> None:
        with tempfile.TemporaryDirectory() as folder:
            source = resolve_model(model_path("8b", Path(folder)))
            loaded = load_model(
                source, dtype="bfloat16", device="cuda", seed=0, weights=weights, progress=lambda share: None
            )
        self.vocab_size = loaded.config.vocab_size
        self.cache = PagedKVCache(loaded.kv_cache_spec(BLOCK, kv_dtype), num_blocks, "cuda")
        for layer in self.cache.storage:
            layer.copy_(torch.randn(layer.shape, device="cuda"))
        self.runner = CudaModelRunner(loaded, self.cache, 9216, max_batch=512)
        self.runner.warm_up(TOKEN_BUDGET)
        self.rows: list[dict[str, Any]] = []
        config = build_config(
            {"scheduler": {"token_budget": TOKEN_BUDGET, "max_running": 512}, "cache": {"prefix_caching": False}},
            source="benchmark",
        )
        self.settings = WorkerSettings("mixed-0", WorkerRole.MIXED, "cuda", 1, config)
        port = CachePort(self.cache, self.cache.spec)
        profile = DeviceProfile.linear(0, 0, 0, 0)
        self.engine = LoadedEngine(self.runner, self.cache, port, 9216, profile, "bfloat16")

    def add(self, case: str, unit: str, ours: float, figures: tuple[Any, ...], better: str) -> None:
        floor, peer, must, goal = figures
        row = {"case": case, "unit": unit, "ours": round(ours, 3), "floor": floor, "peer": peer}
        self.rows.append({**row, "must": must, "goal": goal, "better": better})
        verdict = (
            ""
            if must is None
            else ("goal" if _meets(ours, goal, better) else "must" if _meets(ours, must, better) else "MISSED")
        )
        print(
            f"{case:42} {ours:10.3f} {unit:9} floor {floor} vLLM {peer} must {must} goal {goal} {verdict}", flush=True
        )

    def decode(self) -> None:
        """A whole step at context 1088, sampling and copies included; and how long the device waits for the host."""
        for batch, figures in DECODE.items():
            step = self._decode_batch(batch, 1088)
            self.add(f"decode step, batch {batch}", "ms", self._step_ms([step], 40), figures, "low")
        device_ms = next(r["ours"] for r in self.rows if r["case"] == "decode step, batch 64")
        idle = 100 * (1 - device_ms / loop_step_ms(self, batch=64, context=1024, num_steps=128))
        self.add("device idle between decode steps, batch 64", "%", idle, (0, None, 3, 1), "low")

    def prefill(self) -> None:
        """From the step's submission to its token on the host, nothing else running."""
        for (count, length), figures in PREFILL.items():
            step = self._prefill_batch(count, length)
            ours = _median_ms(partial(self.runner.run, step), 5 if count > 1 else 15)
            self.add(f"prefill {count} x {length}", "ms", ours, figures, "low")

    def mixed(self) -> None:
        """64 decodes beside a 2048-token prompt, in the two chunks that the scheduler cuts it into."""
        decodes = self._decode_batch(64, 1024).items
        first, second = 1792, 256
        chunks = (
            ScheduledSequence(self._sequence(2048, 0, first_block=64 * 72), first, 0),
            ScheduledSequence(self._sequence(2048, first, first_block=64 * 72), second, 1),
        )
        ours = self._step_ms([ScheduledBatch((*decodes, chunk)) for chunk in chunks], 10)
        floor = 2 * 8.1 + 38.0
        figures = (floor, None, floor * 1.2, floor * 1.1)
        self.add("two steps: 64 decodes + 2048-token prompt", "ms", ours, figures, "low")

    def fp8(self) -> None:
        """Must be the last: the other weights and their cache make room."""
        ours = next(row["ours"] for row in self.rows if row["case"] == "decode step, batch 64")
        num_blocks = self.cache.num_blocks
        del self.engine, self.cache, self.runner
        gc.collect()
        torch.cuda.empty_cache()
        bench = Bench(num_blocks, "fp8", "fp8_e4m3")
        step = bench._decode_batch(64, 1088)
        faster = ours / bench._step_ms([step], 40)
        self.add("fp8 weights and KV, batch 64: times as fast", "x", faster, (None, None, 1.4, 1.6), "high")
        for count, length in ((1, 512), (1, 2048)):
            ours = _median_ms(partial(bench.runner.run, bench._prefill_batch(count, length)), 15)
            self.add(f"fp8 weights, prefill {count} x {length}", "ms", ours, (None,) * 4, "low")

    def _step_ms(self, steps: list[ScheduledBatch], repeats: int) -> float:
        """The steps' time one after the other, in a row of them, each given to the device before the last has ended."""

        def submit() -> None:
            for step in steps:
                self.runner.submit(step)

        return _median_ms(submit, repeats)

    def offline(self) -> None:
        for (count, prompt, output), figures in OFFLINE.items():
            seconds = offline_seconds(self.settings, self.engine, Load(count, prompt, output), self.vocab_size)
            self.add(f"offline {count} x {prompt} -> {output}", "tokens/s", count * output / seconds, figures, "high")

    def _sequence(self, num_tokens: int, num_computed: int, first_block: int) -> Sequence:
        table = list(range(first_block, first_block + -(-num_tokens // BLOCK)))
        random.Random(first_block).shuffle(table)
        ids = [random.randrange(self.vocab_size) for _ in range(num_tokens)]
        prompt = num_computed if num_tokens == num_computed + 1 else num_tokens
        return Sequence(
            "r",
            SamplingParams(temperature=0.0, max_tokens=10**6),
            ids,
            prompt,
            num_computed_tokens=num_computed,
            block_table=table,
        )

    def _decode_batch(self, batch: int, context: int) -> ScheduledBatch:
        sequences = [self._sequence(context, context - 1, i * 72) for i in range(batch)]
        return ScheduledBatch(tuple(ScheduledSequence(s, 1, 1) for s in sequences))

    def _prefill_batch(self, count: int, length: int) -> ScheduledBatch:
        sequences = [self._sequence(length, 0, i * (length // BLOCK)) for i in range(count)]
        return ScheduledBatch(tuple(ScheduledSequence(s, length, 1) for s in sequences))


def loop_step_ms(bench: Bench, batch: int, context: int, num_steps: int) -> float:
    """A decode step's time in a worker's loop, once every prompt has its first token."""
    num_tokens = 0

    def on_output(output: WorkerOutput) -> None:
        nonlocal num_tokens
        num_tokens += sum(len(chunk.tokens) for chunk in output.chunks)

    lone = LoneWorker(bench.settings, bench.engine, on_output)
    sampling = SamplingParams(temperature=0.0, max_tokens=num_steps + 40)
    for i, prompt in enumerate(Load(batch, context, 1).prompts(bench.vocab_size)):
        lone.generate(Request(f"r{i}", tuple(prompt), sampling))
    worker = lone.worker
    while worker.load().num_waiting or num_tokens < 10 * batch:
        worker.round()
    start = time.perf_counter()
    for _ in range(num_steps):
        worker.round()
    elapsed_ms = 1000 * (time.perf_counter() - start)
    while worker.round():
        pass
    return elapsed_ms / num_steps


def _meets(value: float, bar: float, better: str) -> bool:
    return value <= bar if better == "low" else value >= bar


def _median_ms(call: Any, repeats: int) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="decode,prefill,mixed,offline,fp8")
    parser.add_argument("--num-blocks", type=int, default=24_000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    bench = Bench(arguments.num_blocks)
    torch.cuda.synchronize()
    start_s = time.perf_counter() - begin
    bench.add("start without the interpreter's imports", "s", start_s, (None, 80, 40, 25), "low")
    with torch.inference_mode():
        for case in arguments.cases.split(","):
            getattr(bench, case)()
    if arguments.output:
        write_result(arguments.output, device_name("cuda"), ("phasewise", "torch", "triton"), bench.rows)


if __name__ == "__main__":
    main()
