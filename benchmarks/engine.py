# ruff: noqa: E402
"""The engine alone on one GPU: decode steps, prefill, offline throughput, start; beside the floor and vLLM's figures.

Llama-3.1-8B shape, random bf16 weights, greedy. The floors are bytes that must move over 3.0 TB/s, or operations over
782 TFLOP/s, as measured on an H100 80 GB; vLLM is 0.23.0 on the same kind of card.

    python benchmarks/engine.py --output benchmarks/results/engine-h100.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shlex
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# This file's folder comes first on the path when it is run as a script, and this file has the engine's name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import torch

if not torch.cuda.is_available():
    sys.exit("benchmarks/engine.py needs an NVIDIA GPU; benchmarks/engine_cpu.py is for CPUs")

from engine.batch import ScheduledBatch, ScheduledSequence
from engine.cuda.runner import CudaModelRunner
from engine.kv_cache import PagedKVCache
from engine.loader import LoadedModel, load_model
from engine.sequence import Sequence
from phasewise.core.clock import MonotonicClock
from phasewise.core.config import build_config
from phasewise.core.messages import PrefillTask, WorkerInfo, WorkerLoad, WorkerMessage, WorkerOutput
from phasewise.core.model_source import ModelSource
from phasewise.core.placement import Placement, WorkerRole
from phasewise.core.profile import DeviceProfile
from phasewise.core.request import Request, SamplingParams
from workers.build import Ports, assemble
from workers.worker import Worker

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
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

    def __init__(self, loaded: LoadedModel, num_blocks: int) -> None:
        self.loaded = loaded
        self.cache = PagedKVCache(loaded.kv_cache_spec(BLOCK), num_blocks, "cuda")
        self.cache.storage.normal_()
        self.runner = CudaModelRunner(loaded, self.cache, 9216, max_batch=512)
        self.runner.warm_up(TOKEN_BUDGET)
        self.rows: list[dict[str, Any]] = []

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

    def _step_ms(self, steps: list[ScheduledBatch], repeats: int) -> float:
        """The steps' time one after the other, in a row of them, each given to the device before the last has ended."""

        def submit() -> None:
            for step in steps:
                self.runner.submit(step)

        return _median_ms(submit, repeats)

    def offline(self) -> None:
        for (count, prompt, output), figures in OFFLINE.items():
            seconds = offline_seconds(self, count, prompt, output)
            self.add(f"offline {count} x {prompt} -> {output}", "tokens/s", count * output / seconds, figures, "high")

    def _sequence(self, num_tokens: int, num_computed: int, first_block: int) -> Sequence:
        table = list(range(first_block, first_block + -(-num_tokens // BLOCK)))
        random.Random(first_block).shuffle(table)
        ids = [random.randrange(128_000) for _ in range(num_tokens)]
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


class OfflineLoad:
    """Ports of one mixed worker without a cluster: counts what comes out."""

    def __init__(self) -> None:
        self.num_tokens = 0

    def send(self, worker_id: str, message: WorkerMessage) -> None:
        raise AssertionError("a mixed worker has nobody to talk to")

    def send_part(self, *_: object) -> None:
        raise AssertionError("nothing is handed off")

    def deliver(self, gateway_id: str, output: WorkerOutput) -> None:
        assert not output.failures, output.failures
        self.num_tokens += sum(len(chunk.tokens) for chunk in output.chunks)

    def report(self, load: WorkerLoad) -> None: ...


def mixed_worker(bench: Bench, load: OfflineLoad) -> Worker:
    """A real worker around the engine: scheduler, blocks, step loop."""
    spec = bench.loaded.kv_cache_spec(BLOCK)
    info = WorkerInfo(
        "mixed-0",
        WorkerRole.MIXED,
        0,
        "",
        "cuda",
        "bfloat16",
        1,
        spec,
        bench.cache.num_blocks,
        9216,
        DeviceProfile.linear(0, 0, 0, 0),
    )
    config = build_config(
        {"scheduler": {"token_budget": TOKEN_BUDGET, "max_running": 512}, "cache": {"prefix_caching": False}},
        source="benchmark",
    )
    return assemble(info, bench.runner, bench.cache, config, Ports(load, load, load, load), MonotonicClock())


def post_prompts(worker: Worker, count: int, prompt: int, output: int) -> None:
    rng = random.Random(0)
    for i in range(count):
        ids = tuple(rng.randrange(128_000) for _ in range(prompt))
        request = Request(f"r{i}", ids, SamplingParams(temperature=0.0, max_tokens=output))
        worker.post(PrefillTask(request, Placement(f"r{i}", "mixed-0", "mixed-0"), "gateway", 1e6))


def offline_seconds(bench: Bench, count: int, prompt: int, output: int) -> float:
    """All requests at once."""
    load = OfflineLoad()
    worker = mixed_worker(bench, load)
    post_prompts(worker, count, prompt, output)
    start = time.perf_counter()
    while load.num_tokens < count * output:
        worker.round()
    return time.perf_counter() - start


def loop_step_ms(bench: Bench, batch: int, context: int, num_steps: int) -> float:
    """A decode step's time in the loop, once every prompt has its first token."""
    load = OfflineLoad()
    worker = mixed_worker(bench, load)
    post_prompts(worker, batch, context, num_steps + 40)
    while worker.load().num_waiting or load.num_tokens < 10 * batch:
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
    parser.add_argument("--cases", default="decode,prefill,mixed,offline")
    parser.add_argument("--num-blocks", type=int, default=24_000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(SHAPE))
        loaded = load_model(
            ModelSource("random", config, "8b"), dtype="bfloat16", device="cuda", seed=0, progress=lambda share: None
        )
    torch.cuda.synchronize()
    loaded_s = time.perf_counter() - begin
    bench = Bench(loaded, arguments.num_blocks)
    torch.cuda.synchronize()
    start_s = time.perf_counter() - begin
    print(f"weights {loaded_s:.1f} s, cache, graphs and warm-up {start_s - loaded_s:.1f} s", flush=True)
    bench.add("start without the interpreter's imports", "s", start_s, (None, 80, 40, 25), "low")
    with torch.inference_mode():
        for case in arguments.cases.split(","):
            getattr(bench, case)()
    if arguments.output:
        versions = {}
        for package in ("phasewise", "torch", "triton"):
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                versions[package] = "source tree"
        result = {
            "device": torch.cuda.get_device_name(),
            "versions": versions,
            "command": shlex.join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "rows": bench.rows,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
