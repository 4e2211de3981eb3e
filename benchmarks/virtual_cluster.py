"""What a cluster in virtual time (tests/virtual_cluster/) takes per event: processor time of a run in one process.

    python -m benchmarks.virtual_cluster --output benchmarks/results/virtual-cluster-cpu.json

Each case is run several times, in a process of its own; the quickest counts. Prompt hashing, block lists and the like
are the real ones, so an event of a long prompt costs more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CASES = {
    "code trace, 10,000 requests": ("--trace", "code", "--requests", "10000"),
    "code trace, 10,000 requests, 4 times as fast": ("--trace", "code", "--requests", "10000", "--speed", "4"),
    "conversation trace, 2,000 requests": ("--trace", "conv", "--requests", "2000"),
    "code trace, 2,000 requests, with faults": ("--trace", "code", "--requests", "2000", "--speed", "4", "--faults"),
}


def run(arguments: tuple[str, ...]) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.virtual_cluster", *arguments]
    return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows, runs = [], {}
    for case, flags in CASES.items():
        runs[case] = found = min((run(flags) for _ in range(arguments.repeats)), key=lambda result: result["cpu_s"])
        print(
            f"{case}: {found['us_per_event']:.1f} us per event, {found['events_per_s']} events/s; {found['num_events']}"
            f" events, {found['cpu_s']:.1f} s for {found['virtual_s']:.0f} s of virtual time"
        )
        row = {"unit": "us per event", "floor": None, "peer": None, "must": None, "goal": None, "better": "low"}
        rows.append({"case": case, "ours": found["us_per_event"], **row})
    if arguments.output:
        from benchmarks.offline import device_name, write_result

        write_result(arguments.output, device_name("cpu"), ("phasewise",), rows, runs=runs)


if __name__ == "__main__":
    main()
