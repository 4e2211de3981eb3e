"""Times tiles of the skinny product for the 8B shape's products on one of two GPUs (half a layer), beside cuBLAS.

    python -m benchmarks.product_tiles --output tiles.json [--tokens 64 16 32] [--limit-s 240]

The fastest go into `skinny_tile` (engine/cuda/products.py) by hand. Compiles in many processes first: a tile takes a
second or two. Weights are several times as large as the L2 cache, and each result is compared with float64.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from engine.cuda import products

SHAPES = {"qkv": (3072, 4096), "o": (4096, 2048), "gate_up": (14336, 4096), "down": (4096, 7168), "head": (64128, 4096)}
SHARED_BYTES = 232_448


def tiles(num_tokens: int, rows: int, columns: int) -> list[tuple[int, int, int, int]]:
    """(rows, columns, stages, warps) that fit."""
    padded = max(16, num_tokens)
    found = [
        (r, c, s, w)
        for r in (32, 64, 128)
        for c in (64, 128, 256, 512)
        for s in (3, 4, 6, 8)
        for w in (4, 8)
        if s * c * (r + padded) * 2 <= SHARED_BYTES and rows % r == 0 and columns % c == 0 and not (w == 8 and r == 32)
    ]
    # Too few bytes in flight cannot fill the memory's pipe.
    return [(r, c, s, w) for r, c, s, w in found if (s - 1) * c * r * 2 >= 24_576]


def launch(x, weight, out, tile):
    rows, columns = weight.shape
    tile_rows, tile_columns, stages, warps = tile
    products._skinny_product_kernel[(rows // tile_rows,)](
        x,
        weight,
        out,
        len(x),
        rows,
        columns,
        max(16, triton.next_power_of_2(len(x))),
        tile_rows,
        tile_columns,
        False,
        num_warps=warps,
        num_stages=stages,
    )


def compile_one(job) -> None:
    num_tokens, rows, columns, (tile_rows, tile_columns, stages, warps) = job
    bf16 = torch.bfloat16
    products._skinny_product_kernel.warmup(
        bf16,
        bf16,
        bf16,
        num_tokens,
        rows,
        columns,
        max(16, triton.next_power_of_2(num_tokens)),
        tile_rows,
        tile_columns,
        False,
        num_warps=warps,
        num_stages=stages,
        grid=(rows // tile_rows,),
    )


def graph_us(calls, repeats: int = 12) -> float:
    """Microseconds of one call, of a graph of all `calls`: median."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2] / len(calls) * 1000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 16, 32])
    parser.add_argument("--limit-s", type=float, default=240.0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    start_s = time.monotonic()
    jobs = [
        (n, rows, columns, tile)
        for n in arguments.tokens
        for rows, columns in SHAPES.values()
        for tile in tiles(n, rows, columns)
    ]
    print(f"{len(jobs)} kernels", flush=True)
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), mp_context=get_context("spawn")) as pool:
        failed = sum(not ok for ok in pool.map(_tried, jobs, chunksize=4))
    print(f"compiled in {time.monotonic() - start_s:.0f} s, {failed} failed", flush=True)
    results = []
    for n in arguments.tokens:
        for name, (rows, columns) in SHAPES.items():
            if time.monotonic() - start_s > arguments.limit_s:
                print("out of time", flush=True)
                break
            x = torch.randn(n, columns, dtype=torch.bfloat16, device="cuda")
            out = torch.empty(n, rows, dtype=torch.bfloat16, device="cuda")
            copies = max(2, (400 << 20) // (rows * columns * 2))  # several times what a cache of 60 MB holds
            weights = torch.randn(copies, rows, columns, dtype=torch.bfloat16, device="cuda")
            found = {"cuBLAS": graph_us([partial(torch.mm, x, w.t(), out=out) for w in weights])}
            wanted = (x.double() @ weights[-1].double().t()).float()
            for tile in tiles(n, rows, columns):
                try:
                    us = graph_us([partial(launch, x, w, out, tile) for w in weights])
                except Exception as error:
                    print(name, n, tile, type(error).__name__, flush=True)
                    continue
                error = ((out.float() - wanted).norm() / wanted.norm()).item()
                assert error < 1e-2, (name, n, tile, error)
                found[str(tile)] = us
            now = products.skinny_tile(n, rows, columns, torch.bfloat16)
            floor = rows * columns * 2 / 4.3e12 * 1e6
            best = sorted(found.items(), key=lambda item: item[1])[:4]
            ours = found.get(str((*now, 4))) if now else None
            print(
                f"{n:3} x {name:8} floor {floor:6.1f} cuBLAS {found['cuBLAS']:6.1f} now {now} {ours} best "
                + "  ".join(f"{tile} {us:.1f}" for tile, us in best),
                flush=True,
            )
            results.append({"tokens": n, "product": name, "floor_us": floor, "now": now, "us": found})
            del weights
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1))


def _tried(job) -> bool:
    try:
        compile_one(job)
        return True
    except Exception:
        return False


if __name__ == "__main__":
    main()
