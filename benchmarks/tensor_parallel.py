# ruff: noqa: E402
"""Tensor parallelism on the GPUs of one host: sums by size and method, and decode steps beside one GPU's and the floor.

Random bf16 weights in the shapes of Llama-3.1-8B and -70B, greedy, captured graphs, context 1088. The floor is the
bytes that a GPU must read in a step over the bandwidth that a copy reaches on it. Each part runs in processes of its
own, so that one that fails leaves the others' rows.

    python benchmarks/tensor_parallel.py --output benchmarks/results/tensor-parallel-h200x2.json
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# This file's folder comes first on the path when it is run as a script; its names must not hide the packages.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.offline import write_result
from engine.cuda.all_reduce import FastReduce
from engine.cuda.decode_attention import DecodeAttention
from engine.cuda.decoder import CudaDecoder
from engine.cuda.products import skinny_product
from engine.kv_cache import PagedKVCache
from engine.loader import LoadedModel, load_model
from engine.models.llama import LlamaModel
from engine.sharding import Shard
from engine.tensor_parallel import Group
from phasewise.core.model_source import ModelSource

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
BLOCK, CONTEXT = 16, 1088
SUMS = ((1, 4096), (1, 8192), (16, 4096), (64, 4096), (64, 8192), (256, 4096), (512, 8192), (2048, 4096), (8192, 4096))

Report = Callable[..., None]
"""(case, unit, value, floor=, must=, goal=) for one row."""


# ---- in a rank's process


def sums(group: Group, device: torch.device, report: Report) -> None:
    """Microseconds of a sum, in a graph of 40 in a row."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    name = group.process_group.group_name
    reduce = FastReduce.connect(group, device)
    for num_rows, hidden in SUMS:
        x = torch.zeros(num_rows, hidden, dtype=torch.bfloat16, device=device)
        num_bytes = x.numel() * 2
        symmetric = symmetric_memory.empty(x.numel(), dtype=torch.bfloat16, device=device)
        symmetric_memory.rendezvous(symmetric, group.process_group)
        symmetric.zero_()
        turn = [0]

        def fused(x: torch.Tensor = x, turn: list[int] = turn) -> None:
            partial = reduce.partial(x, turn[0])
            reduce.add(x, partial, turn[0], 1e-5)
            turn[0] ^= 1

        def one_shot(symmetric: torch.Tensor = symmetric) -> None:
            torch.ops.symm_mem.one_shot_all_reduce(symmetric, "sum", name)

        def two_shot(symmetric: torch.Tensor = symmetric) -> None:
            torch.ops.symm_mem.two_shot_all_reduce_(symmetric, "sum", name)

        methods: list[tuple[str, Callable[[], Any]]] = [
            (f"x += sum and 1/rms, ours ({reduce.method(num_bytes)})", fused),
            ("torch one shot", one_shot),
            ("torch two shots", two_shot),
            ("NCCL", lambda x=x: dist.all_reduce(x)),  # type: ignore[misc]
        ]
        for label, call in methods:
            if label.startswith("torch one") and num_bytes > 8 << 20:
                continue
            floor = num_bytes / 370e9 * 1e6 * 2 * (group.size - 1) / group.size
            us = _graph_ms(call, 40, device) / 40 * 1000
            report(f"{num_bytes >> 10} KiB: {label}", "us", us, floor=floor)


def products(group: Group, device: torch.device, report: Report) -> None:
    """The products of 8B on one of two GPUs at 64 tokens: cuBLAS and our kernel, over weights that no cache holds."""
    for rows, columns in ((3072, 4096), (4096, 2048), (14336, 4096), (4096, 7168), (64128, 4096)):
        x = torch.randn(64, columns, dtype=torch.bfloat16, device=device)
        out = torch.empty(64, rows, dtype=torch.bfloat16, device=device)
        num_copies = max(2, (400 << 20) // (rows * columns * 2))  # several times a cache of 60 MB
        weights = torch.randn(num_copies, rows, columns, dtype=torch.bfloat16, device=device)
        floor = rows * columns * 2 / 4.3e12 * 1e6

        def all_copies(product: Callable[[torch.Tensor], Any], weights: torch.Tensor = weights) -> None:
            for weight in weights:
                product(weight)

        def by_cublas(weight: torch.Tensor, x: torch.Tensor = x, out: torch.Tensor = out) -> None:
            torch.mm(x, weight.t(), out=out)

        us = _graph_ms(lambda: all_copies(by_cublas), 1, device) / num_copies * 1000
        report(f"64 x {columns} -> {rows}: cuBLAS", "us", us, floor=floor)
        for tile in ((32, 256, 6), (32, 128, 8), (64, 128, 6), (128, 128, 4)):

            def by_tile(
                weight: torch.Tensor, x: torch.Tensor = x, out: torch.Tensor = out, tile: tuple[int, int, int] = tile
            ) -> None:
                skinny_product(x, weight, out, tile, adds=False)

            shared_bytes = tile[2] * tile[1] * (tile[0] + 64) * 2  # weight and x of every stage
            if rows % tile[0] == 0 and columns % tile[1] == 0 and shared_bytes <= 232_448:
                us = _graph_ms(lambda: all_copies(by_tile), 1, device) / num_copies * 1000
                report(f"64 x {columns} -> {rows}: tile {tile}", "us", us, floor=floor)


def decode_8b(group: Group, device: torch.device, report: Report, single: dict[int, float]) -> None:
    loaded = _load("8B", group, device)
    for batch in (1, 16, 64, 256):
        step_ms, floor = _decode_ms(loaded, batch, device), _floor_ms(loaded, batch, device)
        report(f"8B decode step, TP={group.size}, batch {batch}", "ms", step_ms, floor=floor)
        if batch in single:
            must = 0.65 if batch == 64 else None
            report(
                f"8B decode step, TP={group.size} / TP=1, batch {batch}", "ratio", step_ms / single[batch], must=must
            )
    report(f"8B prefill 1 x 2048, TP={group.size}", "ms", _prefill_ms(loaded, 2048, device))


def decode_70b(group: Group, device: torch.device, report: Report, single: dict[int, float]) -> None:
    loaded = _load("70B", group, device)
    for batch in (1, 64):
        step_ms, floor = _decode_ms(loaded, batch, device), _floor_ms(loaded, batch, device)
        must = 1.25 * floor if batch == 1 else None
        report(f"70B decode step, TP={group.size}, batch {batch}", "ms", step_ms, floor=floor, must=must)


def _load(shape: str, group: Group, device: torch.device) -> LoadedModel:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps({**LLAMA, **SHAPES[shape]}))
        return load_model(
            ModelSource("random", config, shape),
            dtype="bfloat16",
            device=str(device),
            seed=0,
            progress=lambda share: None,
            group=group,
        )


@functools.lru_cache(maxsize=1)
def _decoder(model: LlamaModel) -> CudaDecoder:
    with torch.inference_mode():
        return CudaDecoder(model, 9216)


@torch.inference_mode()
def _decode_ms(loaded: LoadedModel, batch: int, device: torch.device) -> float:
    """A whole step: embedding, layers, head, the largest logits' ids."""
    config, decoder = loaded.config, _decoder(loaded.model)
    per_sequence = -(-CONTEXT // BLOCK)
    cache = PagedKVCache(loaded.kv_cache_spec(BLOCK), batch * per_sequence, device)
    cache.storage.normal_()
    attention = DecodeAttention(config.num_heads, config.num_kv_heads, config.head_dim, BLOCK, batch, device)
    order = torch.randperm(batch * per_sequence, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    tables = order.view(batch, per_sequence).to(device)
    contexts = torch.full((batch,), CONTEXT, dtype=torch.int32, device=device)
    positions = contexts.long() - 1
    slots = tables[:, -1].long() * BLOCK + BLOCK - 1
    ids = torch.arange(batch, device=device)

    def attend(layer: int, qkv: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return attention(qkv.view(batch, -1), cache.storage[layer], tables, contexts, out)

    def step() -> None:
        x = decoder.run_layers(decoder.embed(ids), 0, config.num_layers, positions, slots, cache.storage, attend)
        ids.copy_(decoder.largest(decoder.partial_logits(x)))

    return _graph_ms(step, 1, device)


@torch.inference_mode()
def _prefill_ms(loaded: LoadedModel, length: int, device: torch.device) -> float:
    """One prompt without earlier context, kernel by kernel."""
    torch.backends.cuda.enable_flash_sdp(False)  # cuDNN's is faster
    config, decoder = loaded.config, _decoder(loaded.model)
    cache = PagedKVCache(loaded.kv_cache_spec(BLOCK), length // BLOCK, device)
    positions = torch.arange(length, device=device)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)

    def attend(layer: int, qkv: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        queries, keys, values = qkv.unsqueeze(0).transpose(1, 2).split(heads, dim=1)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return out.copy_(attended[0].transpose(0, 1))

    def step() -> None:
        x = decoder.embed(positions)
        x = decoder.run_layers(x, 0, config.num_layers, positions, positions, cache.storage, attend)
        decoder.largest(decoder.partial_logits(x[-1:]))

    return _median_ms(step, 10, device)


def _floor_ms(loaded: LoadedModel, batch: int, device: torch.device) -> float:
    """Weights of this rank but for the embedding, and its KV, over the bandwidth of a copy."""
    model = loaded.model
    weights = sum(view.numel() * view.element_size() for view in model.weight_views().values())
    weights -= model.embedding.numel() * model.embedding.element_size()
    kv = batch * CONTEXT * loaded.kv_cache_spec(BLOCK).bytes_per_token
    source = torch.empty(2 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = _median_ms(lambda: target.copy_(source), 10, device)
    return (weights + kv) / (2 * source.numel()) * copy_ms


def _graph_ms(call: Callable[[], Any], count: int, device: torch.device) -> float:
    """Milliseconds of a graph of `count` calls."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # Threads of NCCL and of the symmetric memory may call CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(count):
            call()
    return _median_ms(graph.replay, 25, device)


def _median_ms(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))[repeats // 2]


def _rank_main(part: str, rank: int, size: int, store: str, single: dict[int, float], results: Any) -> None:
    device, group = torch.device("cuda", rank), Group(Shard(rank, size))

    def report(case: str, unit: str, ours: float, **figures: float | None) -> None:
        if rank == 0:
            results.put((case, unit, ours, figures))

    try:
        torch.cuda.set_device(device)
        if size > 1:
            group.connect(store, device)
        if part in ("sums", "products"):
            (sums if part == "sums" else products)(group, device, report)
        else:
            (decode_8b if part == "8B" else decode_70b)(group, device, report, single)
        torch.cuda.synchronize(device)
        results.put(None)
    except Exception:
        results.put(f"{part}, rank {rank} of {size}: {traceback.format_exc()}")


# ---- the parent


def run_part(part: str, size: int, limit_s: float, single: dict[int, float], rows: list[dict[str, Any]]) -> None:
    """Runs one part in `size` processes and adds its rows, as they come."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank_main, args=(part, rank, size, f"{folder}/store", single, results), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        open_ranks = size
        while open_ranks:
            left_s = limit_s - (time.monotonic() - start_s)
            try:
                entry = results.get(timeout=max(left_s, 0.0))
            except queue.Empty:
                print(f"{part}, TP={size}: not done within {limit_s:.0f} s", flush=True)
                break
            if entry is None:
                open_ranks -= 1
            elif isinstance(entry, str):
                print(entry, flush=True)
                break
            else:
                _add(rows, *entry)
        for process in processes:
            if not open_ranks:
                process.join(5.0)
            process.kill()
            process.join()
    print(f"-- {part}, TP={size}: {time.monotonic() - start_s:.0f} s", flush=True)


def _add(rows: list[dict[str, Any]], case: str, unit: str, ours: float, figures: dict[str, float | None]) -> None:
    rounded = {key: None if figures.get(key) is None else round(figures[key], 3) for key in ("floor", "must", "goal")}  # type: ignore[arg-type]
    row = {"case": case, "unit": unit, "ours": round(ours, 3), "floor": rounded["floor"], "peer": None}
    rows.append({**row, "must": rounded["must"], "goal": rounded["goal"], "better": "low"})
    print(_line(rows[-1]), flush=True)


def _line(row: dict[str, Any]) -> str:
    must = row["must"]
    verdict = "" if must is None else "must" if row["ours"] <= must else "MISSED"
    return f"{row['case']:58} {row['ours']:10.3f} {row['unit']:5} floor {row['floor']} must {must} {verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="sums,8B,70B", help="also: products")
    parser.add_argument("--size", type=int, default=2, help="GPUs")
    parser.add_argument("--limit-s", type=float, default=150.0, help="per part")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if torch.cuda.device_count() < arguments.size:
        sys.exit(
            f"benchmarks/tensor_parallel.py needs {arguments.size} NVIDIA GPUs, there are {torch.cuda.device_count()}"
        )
    rows: list[dict[str, Any]] = []
    for part in arguments.parts.split(","):
        single: dict[int, float] = {}
        if part == "8B":
            run_part(part, 1, arguments.limit_s, {}, rows)
            single = {
                int(row["case"].rpartition(" ")[2]): row["ours"] for row in rows if "step, TP=1, batch" in row["case"]
            }
        run_part(part, 1 if part == "products" else arguments.size, arguments.limit_s, single, rows)
    print("\n" + "\n".join(map(_line, rows)))
    if arguments.output:
        device = f"{arguments.size} x {torch.cuda.get_device_name()}"
        write_result(arguments.output, device, ("phasewise", "torch", "triton"), rows)


if __name__ == "__main__":
    main()
