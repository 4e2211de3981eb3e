"""What the virtual cluster is run with: recorded requests, measured workers, and what goes wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

from cli.bench.traces import read_trace
from cli.bench.workload import RequestSpec
from phasewise.core.config import build_config
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.placement import WorkerRole
from phasewise.core.profile import DeviceProfile
from tests.virtual_cluster.cluster import Faults
from tests.virtual_cluster.link import LinkSpeed
from tests.virtual_cluster.network import Latency
from tests.virtual_cluster.worker import WorkerShape

_TRACES = Path(__file__).parent / "traces"
_PROFILE = Path(__file__).parents[2] / "benchmarks/results/profile-llama-8b-h100.json"
_GAP_S = 1.0


def read_requests(trace: Literal["code", "conv"], count: int) -> list[RequestSpec]:
    """Requests of an Azure trace (traces/README.md). Where it has fewer it begins again, a second behind its end."""
    found = read_trace(_TRACES / f"azure_{trace}_2023.csv.gz").requests
    arrivals = [request.arrival_s for request in found if request.arrival_s is not None]
    length_s = arrivals[-1] + _GAP_S
    repeated = ((i // len(found) * length_s, request) for i, request in enumerate(cycle(found)))
    return [
        replace(request, index=index, arrival_s=offset_s + (request.arrival_s or 0.0))
        for index, (offset_s, request) in enumerate(islice(repeated, count))
    ]


def shape_of(num_blocks: int) -> WorkerShape:
    """Workers as measured: Llama 8B on an H100, with KV blocks of its shape, and links of 25 GB/s."""
    spec = KVCacheSpec(32, 8, 128, block_size=64, dtype="bfloat16", model_fingerprint="virtual")
    values = {
        "pools": {"prefill": {"workers": 2}, "decode": {"workers": 2}},
        "scheduler": {"token_budget": 2048},
        "health": {"overdue_s": 5.0},
        "transfer": {"layers_per_part": 16},
    }
    config = build_config(values, source="virtual cluster")
    return WorkerShape(config, spec, DeviceProfile.read(_PROFILE), num_blocks, LinkSpeed(25e9))


ROUGH = Latency(straggler_share=0.02, straggler_s=0.5)
"""Of the messages that come while something goes wrong: many are overtaken by hundreds of others."""


def faults_for(requests: Sequence[RequestSpec], speed: float, seed: int) -> Faults:
    """A prefill and a decode worker die, after a third and two thirds of the time; links break often."""
    rng = random.Random(f"faults {seed}")
    length_s = (requests[-1].arrival_s or 0.0) / speed
    deaths = ((length_s / 3, WorkerRole.PREFILL), (length_s * 2 / 3, WorkerRole.DECODE))
    return Faults(deaths, tuple(rng.uniform(0.0, length_s) for _ in range(max(10, len(requests) // 100))))
