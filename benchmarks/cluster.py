"""The whole of Phasewise against its engine alone: the same offline load through gateway, one mixed worker and SDK.

The engine runs first, in a process of its own that ends before `phasewise serve` starts on the same device with the
same configuration. Tokens/s count from the first request sent to the last token received; the best round of each
counts. Beside them: the CPU time that each process took, as a share of one core while the load ran. On a CPU engine
and gateway share the cores, so there the share says little and the CPU time all.

    python -m benchmarks.cluster --output benchmarks/results/cluster-h100.json
    python -m benchmarks.cluster --model tiny --loads 512x32x32 --kv-cache-gib 0.1
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import phasewise
from benchmarks.offline import (
    Load,
    device_name,
    load_lone_engine,
    local_device,
    model_path,
    offline_seconds,
    write_result,
)
from phasewise.core.config import load_config
from phasewise.core.model_source import model_facts, resolve_model

MUST, GOAL = 0.95, 0.98  # of the engine alone
PEER = {"offline 512 x 512 -> 128": 6811, "offline 256 x 1024 -> 256": 5635}
"""Tokens/s of vLLM 0.23.0 alone on an H100 80 GB with the 8b shape."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="8b", help="8b, tiny, or what model.path takes")
    parser.add_argument("--loads", nargs="+", default=["512x512x128", "256x1024x256"], metavar="REQUESTSxPROMPTxOUTPUT")
    parser.add_argument("--kv-cache-gib", type=float, default=46.9)
    parser.add_argument("--token-budget", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--engine-alone", type=Path, help=argparse.SUPPRESS)  # the configuration; how it calls itself
    arguments = parser.parse_args()
    loads = [Load.parse(text) for text in arguments.loads]
    if arguments.engine_alone:
        measure_engine(arguments.engine_alone, loads, arguments.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder), arguments)
        engine = run_engine_alone(config, arguments)
        with Cluster(config) as cluster:
            whole = {load.name: asyncio.run(measure_cluster(cluster, load, arguments.rounds)) for load in loads}
    report(loads, engine, whole, PEER if arguments.model == "8b" else {}, arguments.output)


def write_config(folder: Path, arguments: argparse.Namespace) -> Path:
    """The configuration file that both sides read."""
    file = folder / "cluster.yaml"
    nobody = {"workers": 0}
    values = {
        "model": {"path": model_path(arguments.model, folder), "device": local_device(), "max_model_len": 9216},
        "pools": {"prefill": nobody, "decode": nobody, "mixed": {"workers": 1}},
        "cache": {"kv_cache_gib": arguments.kv_cache_gib, "prefix_caching": False},
        "scheduler": {"token_budget": arguments.token_budget, "max_running": 512},
        "gateway": {"http": "127.0.0.1:0", "grpc": "127.0.0.1:0"},
        "admin": {"http": "127.0.0.1:0"},
    }
    file.write_text(json.dumps(values))
    return file


def measure_engine(config: Path, loads: list[Load], rounds: int) -> None:
    """Prints, for the parent, the device and the seconds of every round of every load."""
    settings, engine = load_lone_engine(load_config(config))
    vocab_size = model_facts(resolve_model(settings.config.model.path)).vocab_size
    seconds = {
        load.name: [offline_seconds(settings, engine, load, vocab_size) for _ in range(rounds)] for load in loads
    }
    print(json.dumps({"device": device_name(settings.device), "seconds": seconds}))


def run_engine_alone(config: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `measure_engine` prints, from a process that gives the device back."""
    command = [sys.executable, "-m", "benchmarks.cluster", "--engine-alone", str(config)]
    command += ["--loads", *arguments.loads, "--rounds", str(arguments.rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def addresses_in(line: str) -> tuple[str, str, str]:
    """The addresses for HTTP, gRPC and the admin API in the line that says that a cluster serves."""
    found = re.search(r" at http://(\S+) and grpc (\S+) \(admin (\S+)\)", line)
    assert found is not None, line
    http, grpc, admin = found.groups()
    return http, grpc, admin


class Cluster:
    """A `phasewise serve` process and all that it has started. Leaving it stops them."""

    def __init__(self, config: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "serve", "--config", str(config)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        line = next((line for line in self._process.stdout if " and grpc " in line), None)
        if line is None:
            sys.exit("the cluster did not start; its log is above")
        self.http, self.grpc, self.admin = addresses_in(line)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()

    def cpu_seconds(self) -> Counter[str]:
        """CPU time so far of each of its processes, by name, and of this one."""
        parents, processes = {}, {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    fields = (folder / "stat").read_text().rpartition(")")[2].split()
                    name = (folder / "cmdline").read_text().replace("\0", " ").split()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                pid, ticks = int(folder.name), int(fields[11]) + int(fields[12])
                parents[pid] = int(fields[1])
                processes[pid] = (name[0] if name and name[0].startswith("ray::") else "others", ticks)
        seconds = Counter({"client": time.process_time()})
        for pid, (name, ticks) in processes.items():
            ancestor = pid
            while ancestor in parents and ancestor != self._process.pid:
                ancestor = parents[ancestor]
            if ancestor == self._process.pid:
                seconds[name.removeprefix("ray::").partition(".")[0]] += ticks / os.sysconf("SC_CLK_TCK")
        return seconds


async def measure_cluster(cluster: Cluster, load: Load, rounds: int) -> dict[str, Any]:
    """Seconds of every round; of the best one, seconds to its first token and the cores that each process kept busy."""
    async with phasewise.AsyncClient(cluster.grpc) as client:
        prompts = load.prompts((await client.model()).vocab_size)
        best: tuple[float, float, dict[str, float]] = (float("inf"), 0.0, {})
        seconds = []
        for _ in range(rounds):
            before = cluster.cpu_seconds()
            start_s = time.perf_counter()
            firsts = await asyncio.gather(*(one_request(client, prompt, load.num_output_tokens) for prompt in prompts))
            seconds.append(time.perf_counter() - start_s)
            used = cluster.cpu_seconds() - before
            busy = {name: used[name] / seconds[-1] for name in sorted(used)}
            best = min(best, (seconds[-1], min(firsts) - start_s, busy), key=lambda measured: measured[0])
    return {"seconds": seconds, "first_token_s": best[1], "busy_cores": best[2]}


async def one_request(client: phasewise.AsyncClient, prompt: list[int], num_tokens: int) -> float:
    """The moment of its first token."""
    first_s = float("inf")
    count = 0
    async for delta in client.stream(token_ids=prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True):
        first_s = min(first_s, time.perf_counter())
        count += len(delta.token_ids)
    if count != num_tokens:
        raise SystemExit(f"a request gave {count} tokens instead of {num_tokens}")
    return first_s


def report(
    loads: list[Load], engine: dict[str, Any], whole: dict[str, Any], peer: dict[str, int], output: Path | None
) -> None:
    rows, rounds, busy = [], {}, {}
    for load in loads:
        ours, alone = whole[load.name]["seconds"], engine["seconds"][load.name]
        rates = [load.total_output_tokens / min(seconds) for seconds in (ours, alone)]
        share = 100 * rates[0] / rates[1]
        verdict = "goal" if share >= 100 * GOAL else "must" if share >= 100 * MUST else "MISSED"
        print(f"{load.name}: {rates[0]:.0f} tokens/s, the engine alone {rates[1]:.0f}: {share:.1f} % {verdict}")
        first_s = whole[load.name]["first_token_s"]
        print(f"  rounds, s: {_rounded(ours)}, the engine alone {_rounded(alone)}; first token after {first_s:.3f} s")
        print("  busy cores: " + ", ".join(f"{k} {v:.2f}" for k, v in whole[load.name]["busy_cores"].items()))
        row = {"case": load.name, "unit": "tokens/s", "ours": round(rates[0], 1), "floor": round(rates[1], 1)}
        figures = {"must": round(MUST * rates[1], 1), "goal": round(GOAL * rates[1], 1), "better": "high"}
        rows.append({**row, "peer": peer.get(load.name), **figures})
        row = {"case": f"{load.name}, share of the engine alone", "unit": "%", "ours": round(share, 2), "floor": 100}
        rows.append({**row, "peer": None, "must": 100 * MUST, "goal": 100 * GOAL, "better": "high"})
        rounds[load.name] = {"cluster": _rounded(ours), "engine alone": _rounded(alone)}
        busy[load.name] = {name: round(cores, 3) for name, cores in whole[load.name]["busy_cores"].items()}
    if output is not None:
        packages = ("phasewise", "torch", "ray", "grpcio")
        write_result(output, engine["device"], packages, rows, rounds_s=rounds, busy_cores=busy)


def _rounded(seconds: list[float]) -> list[float]:
    return [round(value, 3) for value in seconds]


if __name__ == "__main__":
    main()
