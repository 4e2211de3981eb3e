"""Runs a virtual cluster in a process that has neither torch nor ray, grpc nor asyncio, and says how it went, as JSON.

python -m tests.virtual_cluster --trace code --requests 10000 --seed 1
python -m tests.virtual_cluster --trace conv --faults
"""

from __future__ import annotations

import argparse
import gc
import importlib.abc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.machinery import ModuleSpec
from types import ModuleType

FORBIDDEN = frozenset(("torch", "ray", "grpc", "asyncio"))


class ForbiddenImport(BaseException):
    """Something imports what a decision must do without. No `except ImportError` hides it."""


class ImportBlocker(importlib.abc.MetaPathFinder):
    """Raises for the first import of a forbidden package."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.split(".")[0] in FORBIDDEN:
            raise ForbiddenImport(name)
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", choices=("code", "conv"), default="code")
    parser.add_argument("--requests", type=int, default=10_000, help="a shorter trace begins again behind its end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", type=float, default=1.0, help="how many times faster than recorded requests come")
    parser.add_argument("--blocks", type=int, default=1024, help="KV blocks of each worker")
    parser.add_argument("--faults", action="store_true", help="two workers die, links break, messages are late")
    arguments = parser.parse_args()

    already = FORBIDDEN & {name.split(".")[0] for name in sys.modules}
    assert not already, already
    sys.meta_path.insert(0, ImportBlocker())
    from tests.virtual_cluster.cluster import Faults, VirtualCluster
    from tests.virtual_cluster.network import Latency
    from tests.virtual_cluster.scenario import ROUGH, faults_for, read_requests, shape_of

    requests = read_requests(arguments.trace, arguments.requests)
    faults = faults_for(requests, arguments.speed, arguments.seed) if arguments.faults else Faults()
    latency = ROUGH if arguments.faults else Latency()
    cluster = VirtualCluster(shape_of(arguments.blocks), seed=arguments.seed, latency=latency, faults=faults)
    gc.set_threshold(50_000)  # nothing here is garbage in circles, and looking for it takes a fifth of the time
    start_s = time.process_time()
    cluster.run(requests, arguments.speed)
    spent_s = time.process_time() - start_s
    events = cluster.time.num_events
    result = {
        "num_requests": len(requests),
        **asdict(cluster.gateway.ends),
        "lost_workers": cluster.lost,
        "num_broken_transfers": cluster.num_broken_transfers,
        "virtual_s": round(cluster.time.now_s(), 3),
        "num_events": events,
        "digest": cluster.time.digest,
        "cpu_s": round(spent_s, 3),
        "us_per_event": round(spent_s / events * 1e6, 2),
        "events_per_s": round(events / spent_s),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
