"""How soon a cluster serves, and how soon it serves again when its only worker was killed in the middle of a stream.

One mixed worker. The start counts from the command to its ready line, the return by the longest gap between two tokens
of the stream: it has to wait for the successor. On a host that has compiled nothing the first start compiles.

    python -m benchmarks.comeback --output benchmarks/results/comeback-h200.json
    python -m benchmarks.comeback --model tiny --kv-cache-gib 0.1
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import phasewise
from benchmarks.cluster import Cluster, write_config
from benchmarks.offline import Rows, device_name, local_device

MUST_S = 10.0
"""For a worker of the 8b shape on a host that has compiled before."""
PROMPT = list(range(5, 300))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="8b", help="8b, tiny, or what model.path takes")
    parser.add_argument("--kv-cache-gib", type=float, default=20.0)
    parser.add_argument("--token-budget", type=int, default=2048)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = Rows(arguments.output, device_name(local_device()), ["torch", "ray"])
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder), arguments)
        begin_s = time.monotonic()
        with Cluster(config) as cluster:
            rows.add("a cluster from the command to ready", "s", time.monotonic() - begin_s)
            with phasewise.Client(cluster.grpc, max_retries=0, timeout_s=300) as client:
                measure(cluster, client, arguments.kills, rows)


def measure(cluster: Cluster, client: phasewise.Client, num_kills: int, rows: Rows) -> None:
    undisturbed, _ = stream(client, kill=None)
    for number in range(num_kills):
        pid = int(status(cluster)["workers"][0]["pid"])
        tokens, gap_s = stream(client, kill=pid)
        if len(tokens) != len(undisturbed):
            sys.exit(f"a stream had {len(tokens)} tokens instead of {len(undisturbed)}")
        rows.add(f"kill -9 of the only worker, number {number + 1}: longest gap of its stream", "s", gap_s, must=MUST_S)


def stream(client: phasewise.Client, kill: int | None) -> tuple[list[int], float]:
    """The tokens of a stream, and the longest gap between two of them, in seconds. `kill`: at the first token."""
    tokens: list[int] = []
    last_s, gap_s = None, 0.0
    for delta in client.stream(token_ids=PROMPT, max_tokens=400, temperature=0.0, ignore_eos=True):
        now_s = time.monotonic()
        if last_s is not None:
            gap_s = max(gap_s, now_s - last_s)
        elif kill is not None:
            os.kill(kill, signal.SIGKILL)
        last_s = now_s
        tokens += delta.token_ids
    return tokens, gap_s


def status(cluster: Cluster) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://{cluster.admin}/status", timeout=10) as response:
        report: dict[str, Any] = json.load(response)
    return report


if __name__ == "__main__":
    main()
