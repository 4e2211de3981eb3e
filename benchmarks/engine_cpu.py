"""The engine on a CPU against transformers: SmolLM2-135M, float32, the same GGUF weights, the same number of threads.

    python -m benchmarks.engine_cpu [--rounds 3] [--threads 1 2]

Ours and theirs run in turns and the best round of each counts, because other work on the machine disturbs both. The
floor of a step is the larger of its bytes over the measured read bandwidth and its operations over the measured rate.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.batch import ScheduledBatch, ScheduledSequence
from engine.kv_cache import PagedKVCache
from engine.layers.linear import Linear
from engine.loader import LoadedModel, load_model
from engine.model_runner import ModelRunner
from engine.sequence import Sequence
from phasewise.core.model_source import resolve_model
from phasewise.core.request import SamplingParams

BATCH, PROMPT, OUTPUT, BLOCK = 8, 64, 64, 16
RESULTS = Path(__file__).parent / "results" / "engine-cpu.json"


@dataclass(frozen=True)
class Row:
    """One line of the result: `must` is what we promise, `goal` what we aim at, `floor` what the hardware allows."""

    case: str
    unit: str
    ours: float
    floor: float | None
    peer: float | None
    must: float | None
    goal: float | None
    better: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    source = resolve_model("smollm2-135m")
    torch.set_num_threads(2)
    load_s, loaded = min((timed(lambda: load_model_once(source)) for _ in range(4)), key=lambda pair: pair[0])
    rows = [Row("load smollm2-135m, ready to compute", "s", load_s, None, None, 5.0, 3.0, "low")]
    peer = load_peer(source.path)
    for threads in args.threads:
        torch.set_num_threads(threads)
        rows += measure(loaded, peer, threads, args.rounds)
    report(rows)


def load_model_once(source: Any) -> LoadedModel:
    return load_model(source, dtype="float32", device="cpu", seed=0, progress=lambda _: None)


def load_peer(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    peer.generation_config.eos_token_id = None
    peer.generation_config.pad_token_id = 0
    return peer.eval()


def measure(loaded: LoadedModel, peer: Any, threads: int, rounds: int) -> list[Row]:
    """Interleaved rounds of every case; checks that both sides wrote the same tokens."""
    prompts = [[(7919 * (row + 1) * (i + 3)) % 40000 + 100 for i in range(PROMPT)] for row in range(BATCH)]
    best: dict[tuple[str, int], list[float]] = {}
    bandwidth, rate = 0.0, 0.0
    for _ in range(rounds):
        bandwidth, rate = max(bandwidth, read_bandwidth()), max(rate, multiply_rate())
        for batch in (1, BATCH):
            ours = run_ours(loaded, prompts[:batch])
            theirs = run_theirs(peer, prompts[:batch])
            if ours[2] != theirs[2]:
                raise SystemExit("ours and transformers wrote different tokens: the comparison would mean nothing")
            for name, (prefill_s, decode_s, _) in (("ours", ours), ("peer", theirs)):
                old = best.get((name, batch), [float("inf")] * 3)
                new = [prefill_s, decode_s / (OUTPUT - 1), prefill_s + decode_s]
                best[name, batch] = [min(a, b) for a, b in zip(old, new, strict=True)]
    rows = []
    label = f"{threads} thread{'s' if threads > 1 else ''}"
    for batch in (1, BATCH):
        (prefill, step, total), (peer_prefill, peer_step, peer_total) = best["ours", batch], best["peer", batch]
        tokens = batch * OUTPUT
        floors = [floor_s(loaded, n, batch, bandwidth, rate) for n in (batch * PROMPT, batch)]
        case = f"batch {batch}, {PROMPT} -> {OUTPUT}, {label}"
        floor_total = floors[0] + (OUTPUT - 1) * floors[1]
        rows += [
            row_of(f"{case}: output", "tokens/s", tokens / total, tokens / floor_total, tokens / peer_total, "high"),
            row_of(f"{case}: prefill", "ms", prefill * 1e3, floors[0] * 1e3, peer_prefill * 1e3, "low"),
            row_of(f"{case}: decode step", "ms", step * 1e3, floors[1] * 1e3, peer_step * 1e3, "low"),
        ]
    return rows


def row_of(case: str, unit: str, ours: float, floor: float, peer: float, better: str) -> Row:
    goal = peer * 2 if better == "high" else peer / 2
    return Row(case, unit, ours, floor, peer, peer, goal, better)


def run_ours(loaded: LoadedModel, prompts: list[list[int]]) -> tuple[float, float, list[list[int]]]:
    """(seconds to the first tokens, seconds for the rest, tokens)"""
    per_sequence = -(-(PROMPT + OUTPUT) // BLOCK)
    cache = PagedKVCache(loaded.kv_cache_spec(BLOCK), per_sequence * len(prompts), "cpu")
    runner = ModelRunner(loaded, cache, loaded.config.max_position_embeddings)
    greedy = SamplingParams(temperature=0.0)
    sequences = [
        # Blocks of one sequence lie apart, as they do after some hours of serving.
        Sequence("r", greedy, list(prompt), PROMPT, block_table=[i + j * len(prompts) for j in range(per_sequence)])
        for i, prompt in enumerate(prompts)
    ]

    def step() -> None:
        items = tuple(ScheduledSequence(sequence, sequence.num_unscheduled_tokens, 1) for sequence in sequences)
        for item, (token,) in zip(items, runner.run(ScheduledBatch(items)).tokens, strict=True):
            item.sequence.num_computed_tokens += item.num_tokens
            item.sequence.token_ids.append(token.token_id)

    prefill_s, _ = timed(step)
    decode_s, _ = timed(lambda: [step() for _ in range(OUTPUT - 1)])
    return prefill_s, decode_s, [sequence.token_ids[PROMPT:] for sequence in sequences]


def run_theirs(peer: Any, prompts: list[list[int]]) -> tuple[float, float, list[list[int]]]:
    ids = torch.tensor(prompts)

    def generate(num_tokens: int) -> Any:
        with torch.inference_mode():
            return peer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
            )

    prefill_s, _ = timed(lambda: generate(1))
    total_s, output = timed(lambda: generate(OUTPUT))
    return prefill_s, total_s - prefill_s, output[:, PROMPT:].tolist()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def read_bandwidth() -> float:
    """Bytes/s of reading memory that no cache holds."""
    memory = torch.ones(1 << 27, dtype=torch.float32)
    return memory.nbytes / min(timed(memory.sum)[0] for _ in range(8))


@torch.inference_mode()
def multiply_rate() -> float:
    """Floating-point operations/s of a large product, with the kernel that the engine uses."""
    size = 2048
    linear = Linear(size, size, bias=False, dtype=torch.float32, device=torch.device("cpu"))
    linear.rows(0, size).normal_()
    linear.finish_loading()
    x = torch.randn(size, size)
    return 2 * size**3 / min(timed(lambda: linear(x))[0] for _ in range(6))


def floor_s(loaded: LoadedModel, num_tokens: int, num_logits: int, bandwidth: float, rate: float) -> float:
    config = loaded.config
    attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    layers = config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    head = config.vocab_size * config.hidden_size
    operations = 2 * (layers * num_tokens + head * num_logits)
    return max(4 * (layers + head) / bandwidth, operations / rate)


def report(rows: list[Row]) -> None:
    names = ("ours", "floor", "peer", "must", "goal")
    print("| case | unit | " + " | ".join(names) + " | better |")
    print("|---" * 8 + "|")
    for row in rows:
        numbers = ["" if (value := getattr(row, name)) is None else f"{value:.1f}" for name in names]
        print(f"| {row.case} | {row.unit} | " + " | ".join(numbers) + f" | {row.better} |")
    result = {
        "device": f"{cpu_name()}, {torch.get_num_threads()} of its cores, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "command": " ".join(["python", "-m", "benchmarks.engine_cpu", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
