"""What a request sees of its handoff: one prefill + one decode worker beside one mixed worker, one request at a time.

Both clusters are up at once, on the same devices, and are asked in turn for fresh random prompts.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import phasewise
from benchmarks.cluster import Cluster
from benchmarks.offline import Rows, local_device, model_path
from phasewise.core.lifecycle import Stage

POOLS = {"disaggregated": {"prefill": 1, "decode": 1, "mixed": 0}, "mixed": {"prefill": 0, "decode": 0, "mixed": 1}}
ALLOWED_MS = 3.0
"""How much longer than a decode step the second token may take, by the workers' clocks."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One request: when its tokens came, in seconds since it was sent, and its timeline (stage → seconds)."""

    token_times_s: tuple[float, ...]
    timeline: dict[str, float]

    @property
    def ttft_ms(self) -> float:
        return 1000 * self.token_times_s[0]

    @property
    def second_ms(self) -> float:
        return 1000 * (self.token_times_s[1] - self.token_times_s[0])

    @property
    def step_ms(self) -> float:
        """The mean gap between later tokens."""
        later = self.token_times_s[1:]
        return 1000 * (later[-1] - later[0]) / (len(later) - 1)

    @property
    def handover_ms(self) -> float:
        """From prefill's first token to the end of decode's first step, by the workers' clocks."""
        return 1000 * (self.timeline[Stage.DECODE_START] - self.timeline[Stage.FIRST_TOKEN])


def cluster_config(
    folder: Path, name: str, pools: dict[str, int], model: str, kv_cache_gib: float, max_model_len: int = 9216
) -> Path:
    """The file for `phasewise serve`."""
    file = folder / f"{name}.json"
    values: dict[str, object] = {
        "model": {"path": model_path(model, folder), "device": local_device(), "max_model_len": max_model_len},
        "pools": {pool: {"workers": count} for pool, count in pools.items()},
        "cache": {"kv_cache_gib": kv_cache_gib, "prefix_caching": False},
        "gateway": {"http": "127.0.0.1:0", "grpc": "127.0.0.1:0"},
        "admin": {"http": "127.0.0.1:0"},
        "transfer": {"link": "nccl" if local_device() == "cuda" else "tcp"},
    }
    file.write_text(json.dumps(values))
    return file


def compare_clusters(rows: Rows, quick: bool) -> None:
    model, gib, prompt, output, repeats = ("tiny", 0.1, 256, 16, 3) if quick else ("8b", 8, 2048, 64, 15)
    seen: dict[str, list[Seen]] = {name: [] for name in POOLS}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        clients = {}
        for name, pools in POOLS.items():
            cluster = stack.enter_context(Cluster(cluster_config(Path(folder), name, pools, model, gib)))
            clients[name] = stack.enter_context(phasewise.Client(cluster.grpc, timeout_s=300))
        rng, vocab_size = random.Random(0), clients["mixed"].model().vocab_size
        for turn in range(repeats + 2):
            for name, client in clients.items():
                ids = [rng.randrange(vocab_size) for _ in range(prompt)]
                one = ask(client, ids, output)
                if turn > 1:  # the first are warm-up
                    seen[name].append(one)
    add_rows(rows, seen, prompt)


def ask(client: phasewise.Client, prompt: Sequence[int], num_tokens: int) -> Seen:
    start_s = time.perf_counter()
    stream = client.stream(
        token_ids=list(prompt), max_tokens=num_tokens, temperature=0.0, ignore_eos=True, timeline=True
    )
    times: list[float] = []
    for delta in stream:
        times += [time.perf_counter() - start_s] * len(delta.token_ids)
    if len(times) != num_tokens:
        raise RuntimeError(f"a request gave {len(times)} tokens instead of {num_tokens}")
    return Seen(tuple(times), {event.stage: event.at_unix_s for event in stream.completion().timeline})


def add_rows(rows: Rows, seen: dict[str, list[Seen]], prompt: int) -> None:
    def median(name: str, what: str) -> float:
        return statistics.median(getattr(one, what) for one in seen[name])

    step, case = median("disaggregated", "step_ms"), f"prompt {prompt}, one request at a time"
    ttft, mixed_ttft = median("disaggregated", "ttft_ms"), median("mixed", "ttft_ms")
    second = median("disaggregated", "second_ms")
    rows.add(f"decode step (mean gap of later tokens), {case}", "ms", step)
    handover = median("disaggregated", "handover_ms")
    rows.add(f"handover, first token to second: {case}", "ms", handover, floor=step, must=step + ALLOWED_MS)
    rows.add(f"TTFT, {case}", "ms", ttft, floor=mixed_ttft)
    rows.add(f"TTFT longer than a mixed worker's, {case}", "%", 100 * (ttft / mixed_ttft - 1), floor=0, must=3)
    rows.add(f"second token after the first, {case}", "ms", second, floor=step, peer=median("mixed", "second_ms"))
    rows.add(f"second token over the mean gap, {case}", "%", 100 * (second / step - 1), floor=0, peer=16.5, must=10)
    rows.more["stages_ms"] = {name: stages_ms(values) for name, values in seen.items()}
    rows.write()


def stages_ms(seen: Sequence[Seen]) -> dict[str, float]:
    """Median moment of each stage since the request was received."""
    stages = sorted(seen[0].timeline, key=lambda stage: seen[0].timeline[stage])
    return {
        stage: round(statistics.median(1000 * (s.timeline[stage] - s.timeline[Stage.RECEIVED]) for s in seen), 3)
        for stage in stages
        if all(stage in s.timeline for s in seen)
    }
