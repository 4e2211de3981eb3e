"""What a handoff costs on a CPU: one prefill + one decode worker against one mixed worker, concurrency 1.

Starts both clusters as a user would, with the same number of threads per worker, and asks them in turn for the same
requests (fresh random prompts, so no prefix is cached). Says where the time goes from the requests' own timelines.

    python -m benchmarks.disaggregation_cpu --output benchmarks/results/disaggregation-cpu.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import phasewise
from benchmarks.cluster import addresses_in

PHASEWISE = str(Path(sys.executable).parent / "phasewise")
CLUSTERS = {
    "disaggregated": {"prefill": 1, "decode": 1, "mixed": 0},
    "mixed": {"prefill": 0, "decode": 0, "mixed": 1},
}


@dataclass
class Sample:
    """One request, in seconds. `stages` are differences between neighbouring moments of its timeline."""

    ttft_s: float
    e2e_s: float
    stages: dict[str, float] = field(default_factory=dict)


class Cluster:
    """A `phasewise serve` process."""

    def __init__(self, shape: dict[str, int], threads: int, folder: Path) -> None:
        config = folder / f"cluster-{shape['mixed']}.yaml"
        pools = {name: {"workers": count, "threads": threads} for name, count in shape.items()}
        gateway = {"http": "127.0.0.1:0", "grpc": "127.0.0.1:0"}
        config.write_text(json.dumps({"pools": pools, "gateway": gateway, "admin": {"http": "127.0.0.1:0"}}))
        self._process = subprocess.Popen(
            [PHASEWISE, "serve", "--config", str(config)], stdout=subprocess.PIPE, stderr=sys.stderr, text=True
        )
        assert self._process.stdout is not None
        line = next(line for line in self._process.stdout if " and grpc " in line)
        self.client = phasewise.Client(addresses_in(line)[1], timeout_s=300)

    def stop(self) -> None:
        self.client.close()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()


def measure(client: phasewise.Client, prompt: list[int], num_tokens: int) -> Sample:
    start_s = time.perf_counter()
    ttft_s = None
    stream = client.stream(token_ids=prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True, timeline=True)
    count = 0
    for delta in stream:
        if ttft_s is None:
            ttft_s = time.perf_counter() - start_s
        count += len(delta.token_ids)
    end_s = time.perf_counter()
    assert count == num_tokens
    assert ttft_s is not None
    done = stream.completion()
    assert done.usage.num_cached_tokens == 0
    at = {event.stage: event.at_unix_s for event in done.timeline}
    order = sorted(at, key=lambda stage: at[stage])
    stages = {f"{a} → {b}": at[b] - at[a] for a, b in itertools.pairwise(order)}
    return Sample(ttft_s, end_s - start_s, stages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    samples: dict[str, list[Sample]] = {name: [] for name in CLUSTERS}
    with tempfile.TemporaryDirectory() as folder:
        clusters = {n: Cluster(shape, arguments.threads, Path(folder)) for n, shape in CLUSTERS.items()}
        try:
            rng = random.Random(0)
            for repeat in range(arguments.repeats + 1):
                for name, cluster in clusters.items():
                    prompt = [rng.randrange(1000, 40_000) for _ in range(arguments.prompt_tokens)]
                    sample = measure(cluster.client, prompt, arguments.output_tokens)
                    if repeat:  # the first is warm-up
                        samples[name].append(sample)
        finally:
            for cluster in clusters.values():
                cluster.stop()
    report(samples, arguments)


def report(samples: dict[str, list[Sample]], arguments: argparse.Namespace) -> None:
    shape = f"{arguments.prompt_tokens} → {arguments.output_tokens}, concurrency 1"
    rows = []
    for case, attribute, must in (("TTFT", "ttft_s", 1.05), ("E2E", "e2e_s", 1.10)):
        medians = {n: statistics.median(getattr(s, attribute) for s in samples[n]) for n in CLUSTERS}
        print(
            f"{case} {shape}: disaggregated {medians['disaggregated']:.3f} s, mixed {medians['mixed']:.3f} s, "
            f"ratio {medians['disaggregated'] / medians['mixed']:.3f} (must ≤ {must})"
        )
        rows.append(
            {
                "case": f"{case} {shape}",
                "unit": "s",
                "ours": medians["disaggregated"],
                "floor": medians["mixed"],
                "peer": None,
                "must": medians["mixed"] * must,
                "goal": medians["mixed"],
                "better": "low",
            }
        )
    stages = {}
    for name in CLUSTERS:
        print(f"{name}: where the time goes (median ms)")
        for stage in samples[name][0].stages:
            values = [s.stages[stage] for s in samples[name] if stage in s.stages]
            stages[f"{name}: {stage}"] = statistics.median(values) * 1000
            print(f"  {stage:40} {stages[f'{name}: {stage}']:9.2f}")
    if arguments.output:
        result = {
            "device": f"{platform.machine()} CPU, {os.cpu_count()} cores, {arguments.threads} thread(s) per worker",
            "versions": {p: version(p) for p in ("phasewise", "torch", "ray", "grpcio")},
            "command": shlex.join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "rows": rows,
            "stages_ms": stages,
        }
        arguments.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
