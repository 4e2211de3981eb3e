"""What the step loop itself costs: microseconds of processor time per round, with an engine that computes nothing.

A prefill and a decode worker are joined by the in-process link, in one thread, over tiny KV caches. Their engine
answers at once. Measured are rounds of

    the decode worker    with 1, 16, 64 and 256 running sequences: planning, taking tokens, one message to the gateway
    the prefill worker   with prompts of 512 tokens, four in a step, from their task to their handoff's end: messages,
                         offers, planning, packing of (tiny) KV, first tokens, commits

Of a turn's chunks of rounds the quickest count (of the prompts the quickest tenth): what else a machine does only adds.

With `--before`, the same is measured on another checkout, in alternating turns, each in a process of its own.

    python -m benchmarks.step_loop_cpu --before ../before --output benchmarks/results/step-loop-cpu.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.alternating import OWN_TREE, alternate, check_tree, rows_of, run_turn, show

BATCHES = (1, 16, 64, 256)
NUM_CHUNKS, CHUNK_ROUNDS = 20, 20
NUM_BLOCKS = 20_000
PROMPT_TOKENS, PROMPTS_AT_ONCE, NUM_WAVES = 512, 4, 60


class Engine:
    """A runner whose steps are over at once: each token is 7. Layer groups are announced as a real engine does."""

    num_steps_ahead = 1

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers

    def submit(
        self, batch: Any, on_layers_done: Callable[[int, int], None] | None = None, layers_per_group: int = 0
    ) -> Any:
        from engine.batch import ComputedStep, StepResult
        from phasewise.core.request import SampledToken

        if on_layers_done is not None:
            step = layers_per_group or self._num_layers
            for first in range(0, self._num_layers, step):
                on_layers_done(first, min(step, self._num_layers - first))
        tokens = tuple((SampledToken(7),) * item.num_samples for item in batch.items)
        return ComputedStep(StepResult(tokens, ((),) * len(batch.items)))


class Ports:
    """Everything that workers send to: peers get their messages, gateways and the control plane keep nothing."""

    def __init__(self) -> None:
        self.workers: dict[str, Any] = {}

    def send(self, worker_id: str, message: Any) -> None:
        self.workers[worker_id].post(message)

    def deliver(self, gateway_id: str, output: Any) -> None:
        assert not output.failures, output.failures

    def report(self, load: Any) -> None: ...


def make_pair(engine_of: Callable[[str], tuple[Any, Any, Any]], **sections: Any) -> Ports:
    """Workers `prefill-0` and `decode-0`. `engine_of(worker id)` gives runner, PagedKVCache and spec.

    The one place that knows how a worker is put together, in this checkout and in earlier ones.
    """
    try:
        from workers import assemble as wiring
    except ImportError:  # before the wiring had a file of its own
        from workers import build as wiring  # type: ignore[no-redef]
    from kv_transfer.cache_port import CachePort
    from kv_transfer.loopback_link import LoopbackLink
    from phasewise.core.clock import MonotonicClock
    from phasewise.core.config import build_config
    from phasewise.core.messages import WorkerInfo
    from phasewise.core.placement import WorkerRole
    from phasewise.core.profile import DeviceProfile

    config = build_config(sections, source="benchmark")
    ports, mailboxes, clock = Ports(), {}, MonotonicClock()
    for role in (WorkerRole.PREFILL, WorkerRole.DECODE):
        worker_id = f"{role.value}-0"
        runner, cache, spec = engine_of(worker_id)
        num_tokens = cache.num_blocks * spec.block_size
        profile = DeviceProfile.linear(0.0, 0.001, 0.0, 0.001)
        info = WorkerInfo(worker_id, role, 1, "here", "cpu", "float32", 1, spec, cache.num_blocks, num_tokens, profile)
        link = LoopbackLink(worker_id, mailboxes)
        worker = wiring.assemble(
            info, runner, CachePort(cache, spec), config, wiring.Ports(ports, ports, ports, link), clock
        )
        ports.workers[worker_id], mailboxes[worker_id] = worker, worker.post
    return ports


def submit(ports: Ports, name: str, prompt: list[int], max_tokens: int) -> None:
    from phasewise.core.messages import PrefillTask
    from phasewise.core.placement import Placement
    from phasewise.core.request import Request, SamplingParams

    request = Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, temperature=0.0))
    ports.send("prefill-0", PrefillTask(request, Placement(name, "prefill-0", "decode-0"), "gateway-0", 1e6))


def scripted_pair() -> Ports:
    """Workers with engines that compute nothing, over KV of 4 layers and 2 values."""
    from engine.kv_cache import PagedKVCache
    from phasewise.core.kv_spec import KVCacheSpec

    spec = KVCacheSpec(4, 1, 2, 16, "float32", "scripted")
    return make_pair(
        lambda worker_id: (Engine(spec.num_layers), PagedKVCache(spec, NUM_BLOCKS, "cpu"), spec),
        scheduler={"token_budget": PROMPT_TOKENS * PROMPTS_AT_ONCE},
    )


def measure_decode(batch: int) -> float:
    """Microseconds of a decode worker's round with `batch` running sequences."""
    ports, rng = scripted_pair(), random.Random(batch)
    prefill, decode = ports.workers["prefill-0"], ports.workers["decode-0"]
    for i in range(batch):
        submit(ports, f"r{i}", [rng.randrange(50_000) for _ in range(32)], NUM_CHUNKS * CHUNK_ROUNDS + 100)
    while decode.load().num_running < batch:
        prefill.round()
        decode.round()
    for _ in range(20):
        decode.round()
    chunks = []
    for _ in range(NUM_CHUNKS):
        start_s = time.process_time()
        for _ in range(CHUNK_ROUNDS):
            decode.round()
        chunks.append(time.process_time() - start_s)
    assert decode.load().num_running == batch, "all sequences run to the end of the measurement"
    return min(chunks) / CHUNK_ROUNDS * 1e6


def measure_prefill() -> float:
    """Microseconds of a prefill worker's rounds per step; a step has four prompts, and all are handed off."""
    ports, rng = scripted_pair(), random.Random(0)
    prefill, decode = ports.workers["prefill-0"], ports.workers["decode-0"]
    waves = []
    for wave in range(NUM_WAVES + 5):
        for i in range(PROMPTS_AT_ONCE):
            submit(ports, f"r{wave}.{i}", [rng.randrange(50_000) for _ in range(PROMPT_TOKENS)], 2)
        wave_s, steps_before = 0.0, prefill.load().counters["steps"]
        while True:
            start_s = time.process_time()
            prefill.round()
            wave_s += time.process_time() - start_s
            decode.round()
            load = prefill.load()
            if not (load.num_waiting or load.num_running or load.num_handoffs_out):
                break
        if wave >= 5:  # those before are warm-up
            waves.append(wave_s / (prefill.load().counters["steps"] - steps_before))
    assert prefill.load().counters["handoffs_out"] == (NUM_WAVES + 5) * PROMPTS_AT_ONCE
    return statistics.quantiles(waves, n=10)[0] * 1e6


def turn(tree: Path) -> dict[str, float]:
    import torch

    import workers

    check_tree(tree, workers)
    torch.set_num_threads(1)
    found = {f"decode worker, {batch} running: round": measure_decode(batch) for batch in BATCHES}
    found[f"prefill worker, {PROMPTS_AT_ONCE} prompts of {PROMPT_TOKENS} handed off: per step"] = measure_prefill()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="root of the checkout to compare with")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)  # the process of one turn
    arguments = parser.parse_args()
    if arguments.turn:
        print(json.dumps(turn(arguments.turn)))
        return
    trees = {"now": OWN_TREE, **({"before": arguments.before.resolve()} if arguments.before else {})}
    values = alternate(trees, arguments.turns, lambda tree: run_turn("benchmarks.step_loop_cpu", tree))
    rows = rows_of(values, "us", 0.0)
    show(rows)
    if arguments.output:
        from benchmarks.offline import device_name, write_result

        write_result(arguments.output, device_name("cpu"), ("phasewise", "torch"), rows, turns=values)


if __name__ == "__main__":
    main()
