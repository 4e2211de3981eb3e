"""Hours of use in minutes: random requests through one mixed worker; does memory stay flat and is every block found?

Poisson arrivals; prompts and outputs of random length, half of the prompts with a shared beginning; all sampling
parameters, n > 1, stop tokens, deadlines that pass, aborts of requests and of single samples. The cache is small, so
that sequences are preempted, too. Every few seconds, between two steps: resident memory, the GPU's memory, and whether
free + cached + used blocks are all blocks. At the end: everything drained, no block in use, no KV swapped out, and the
growth of memory, that is the median slope after the first quarter, times the time. Exits with 1 when a bound is broken.

    python -m benchmarks.soak --minutes 10 --output benchmarks/results/soak-h100.json
    python -m benchmarks.soak --model tiny --minutes 1 --kv-cache-gib 0.0004 --rate 60 --max-prompt 300 --max-output 100
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.offline import LoneWorker, device_name, load_lone_engine, local_device, model_path, write_result
from phasewise.core.config import ServingConfig, build_config
from phasewise.core.messages import AbortRequest, WorkerLoad, WorkerOutput
from phasewise.core.model_source import model_facts, resolve_model
from phasewise.core.request import Request, SamplingParams

EXPECTED_FAILURES = {"deadline_exceeded", "overloaded"}
# On a CPU oneDNN keeps the kernels of the last 1024 shapes of a product, and so does torch: for minutes new sizes of a
# step add up to some 0.8 GiB, in which a leak would not show. Caches so small are full in seconds.
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}
DRAIN_TIMEOUT_S = 180.0
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """What is seen at one moment. `device_…` is what torch has of the GPU's memory; 0 on a CPU."""

    at_s: float
    open: int
    waiting: int
    running: int
    preempted: int
    used_blocks: int
    cached_blocks: int
    tokens_per_s: float
    resident_mib: float
    device_allocated_mib: float
    device_reserved_mib: float


@dataclass
class OpenRequest:
    """A request that is not over: samples that are, and how many tokens of each have come."""

    sampling: SamplingParams
    num_tokens: dict[int, int] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)


class RequestMix:
    """Random requests of one model."""

    def __init__(self, vocab_size: int, max_prompt: int, max_output: int) -> None:
        self._rng = random.Random(0)
        self._vocab_size = vocab_size
        self._max_prompt = max_prompt
        self._max_output = max_output
        self._count = itertools.count()
        self._prefixes = [self._tokens(self._length(max_prompt)) for _ in range(8)]

    def request(self) -> Request:
        rng = self._rng
        prompt = self._tokens(self._length(self._max_prompt))
        if rng.random() < 0.5:
            prompt = (rng.choice(self._prefixes) + prompt)[: self._max_prompt]
        salt = "other" if rng.random() < 0.1 else ""
        return Request(f"r{next(self._count)}", tuple(prompt), self._sampling(), salt)

    def time_left_s(self) -> float:
        return self._rng.uniform(0.05, 2.0) if self._rng.random() < 0.02 else 600.0

    def abort_after_s(self) -> float | None:
        return self._rng.expovariate(1.0) if self._rng.random() < 0.15 else None

    def aborted_sample(self, n: int) -> int | None:
        return self._rng.randrange(n) if n > 1 and self._rng.random() < 0.5 else None

    def gap_s(self, rate: float) -> float:
        return self._rng.expovariate(rate)

    def _length(self, most: int) -> int:
        """1 … most, as often short as long."""
        return round(math.exp(self._rng.uniform(0.0, math.log(most))))

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(self._vocab_size) for _ in range(count)]

    def _sampling(self) -> SamplingParams:
        rng = self._rng
        sampling = SamplingParams(
            n=rng.choices((1, 2, 4), (8, 1, 1))[0],
            max_tokens=self._length(self._max_output),
            temperature=0.0,
            seed=rng.getrandbits(63),
            stop_token_ids=tuple(self._tokens(64)) if rng.random() < 0.2 else (),
        )
        if rng.random() < 0.4:
            return sampling
        given: dict[str, Any] = {
            "temperature": rng.uniform(0.1, 2.0),
            "top_p": rng.uniform(0.1, 1.0),
            "top_k": rng.randrange(1, 100),
            "min_p": rng.uniform(0.0, 0.3),
            "presence_penalty": rng.uniform(-2.0, 2.0),
            "frequency_penalty": rng.uniform(-2.0, 2.0),
            "repetition_penalty": rng.uniform(0.5, 2.0),
            "logit_bias": tuple(sorted((token, rng.uniform(-100.0, 100.0)) for token in set(self._tokens(4)))),
            "logprobs": rng.randrange(6),
            "prompt_logprobs": rng.randrange(3),
        }
        rare = {"prompt_logprobs": 0.05, "temperature": 0.9}
        return replace(sampling, **{k: v for k, v in given.items() if rng.random() < rare.get(k, 0.25)})


class Soak:
    """The load, the answers and the measurements. `samples` and `faults` are complete after `run`.

    Its two threads share this state, so it has more than 15 attributes.
    """

    def __init__(self, config: ServingConfig, arguments: argparse.Namespace) -> None:
        settings, engine = load_lone_engine(config)
        self.device = settings.device
        self._arguments = arguments
        vocab_size = model_facts(resolve_model(config.model.path)).vocab_size
        self._mix = RequestMix(vocab_size, arguments.max_prompt, arguments.max_output)
        self._lone = LoneWorker(settings, engine, self._on_output, self._on_load)
        self._blocks = self._lone.worker.rounds.parts.blocks
        self._decode = self._lone.worker.rounds.parts.decode
        self._lock = threading.Lock()  # guards the requests that are open
        self._open: dict[str, OpenRequest] = {}
        self._is_sending = True
        self._drained = threading.Event()
        self._start_s = time.perf_counter()
        self._last_s = self._start_s
        self._num_new_tokens = 0
        self.samples: list[Sample] = []
        self.faults: list[str] = []
        self.counts = dict.fromkeys(("requests", "tokens", "aborts", *sorted(EXPECTED_FAILURES)), 0)
        self.counters: dict[str, float] = {}

    def run(self) -> None:
        print(" ".join(f"{name:>{len(name)}}" for name in Sample.__dataclass_fields__), flush=True)
        loop = threading.Thread(target=self._run_worker, name="worker")
        loop.start()
        self._start_s = self._last_s = time.perf_counter()
        self._send()
        with self._lock:
            self._is_sending = False
        if not self._drained.wait(DRAIN_TIMEOUT_S):
            self.faults.append(f"not drained after {DRAIN_TIMEOUT_S:g} s: {len(self._open)} requests are open")
        self._lone.worker.stop()
        loop.join()
        if self._blocks.num_used_blocks:
            self.faults.append(f"{self._blocks.num_used_blocks} blocks are in use after the end")
        if self._decode._swapped:
            self.faults.append(f"{len(self._decode._swapped)} sequences are swapped out after the end")

    def growth_mib(self, name: str) -> float:
        """Of a column of the samples."""
        steady = [s for s in self.samples if s.at_s >= self.samples[-1].at_s / 4]
        pairs = itertools.combinations([(s.at_s, getattr(s, name)) for s in steady], 2)
        slopes = [(b - a) / (at_b - at_a) for (at_a, a), (at_b, b) in pairs]
        return statistics.median(slopes) * self.samples[-1].at_s if slopes else 0.0

    # ---- the load's thread

    def _send(self) -> None:
        """Requests and aborts, each at its time, until the end or until the worker breaks."""
        end_s = self._start_s + 60 * self._arguments.minutes
        next_s, aborts = self._start_s, []
        while (now_s := time.perf_counter()) < end_s:
            if next_s <= now_s:
                request = self._mix.request()
                with self._lock:
                    self._open[request.request_id] = OpenRequest(request.sampling)
                self.counts["requests"] += 1
                self._lone.generate(request, self._mix.time_left_s())
                after_s = self._mix.abort_after_s()
                if after_s is not None:
                    aborts.append((now_s + after_s, request.request_id, request.sampling.n))
                next_s += self._mix.gap_s(self._arguments.rate)
            for abort in [abort for abort in aborts if abort[0] <= now_s]:
                aborts.remove(abort)
                self._abort(abort[1], self._mix.aborted_sample(abort[2]))
            due_s = min([next_s, end_s, *(abort[0] for abort in aborts)])
            if self._drained.wait(max(due_s - time.perf_counter(), 0.0)):
                return

    def _abort(self, request_id: str, sample_index: int | None) -> None:
        with self._lock:
            record = self._open.get(request_id)
            if record is None:
                return
            if sample_index is not None:
                record.ended.add(sample_index)
            if sample_index is None or len(record.ended) == record.sampling.n:
                del self._open[request_id]
        self.counts["aborts"] += 1
        self._lone.worker.post(AbortRequest(request_id, sample_index))

    # ---- the worker's thread

    def _run_worker(self) -> None:
        try:
            self._lone.worker.run()
        except BaseException as error:
            self.faults.append(f"the worker's loop broke: {error!r}")
            raise
        finally:
            self._drained.set()

    def _on_output(self, output: WorkerOutput) -> None:
        with self._lock:
            for chunk in output.chunks:
                record = self._open.get(chunk.request_id)
                if record is None or chunk.sample_index in record.ended:
                    continue  # aborted
                come = record.num_tokens.get(chunk.sample_index, 0)
                if chunk.position != come:
                    self.faults.append(f"{chunk.request_id}: token {chunk.position} came after {come} tokens")
                record.num_tokens[chunk.sample_index] = chunk.position + len(chunk.tokens)
                self._num_new_tokens += len(chunk.tokens)
                if chunk.finish_reason is not None:
                    record.ended.add(chunk.sample_index)
                    if len(record.ended) == record.sampling.n:
                        del self._open[chunk.request_id]
            for failure in output.failures:
                self._open.pop(failure.request_id, None)
                if failure.code in EXPECTED_FAILURES:
                    self.counts[failure.code] += 1
                else:
                    self.faults.append(f"{failure.request_id} failed: {failure.code}: {failure.message}")

    def _on_load(self, load: WorkerLoad) -> None:
        """Between two steps: takes a sample when one is due, and notices the end."""
        now_s = time.perf_counter()
        self.counters = load.counters
        if now_s - self._last_s >= self._arguments.interval_s:
            self._sample(load, now_s)
        held = (load.num_waiting, load.num_running, load.num_preempted, load.num_used_blocks)
        with self._lock:
            if not self._is_sending and not self._open and held == (0, 0, 0, 0):
                self._drained.set()

    def _sample(self, load: WorkerLoad, now_s: float) -> None:
        try:
            self._blocks.check()
        except AssertionError as error:
            self.faults.append(f"at {now_s - self._start_s:.0f} s: {error}")
        is_gpu = self.device == "cuda"
        sample = Sample(
            at_s=round(now_s - self._start_s, 2),
            open=len(self._open),
            waiting=load.num_waiting,
            running=load.num_running,
            preempted=load.num_preempted,
            used_blocks=load.num_used_blocks,
            cached_blocks=load.num_cached_blocks,
            tokens_per_s=round(self._num_new_tokens / (now_s - self._last_s), 1),
            resident_mib=round(resident_bytes() / MIB, 2),
            device_allocated_mib=round(torch.cuda.memory_allocated() / MIB, 2) if is_gpu else 0.0,
            device_reserved_mib=round(torch.cuda.memory_reserved() / MIB, 2) if is_gpu else 0.0,
        )
        self.counts["tokens"] += self._num_new_tokens
        self._num_new_tokens = 0
        self._last_s = now_s
        self.samples.append(sample)
        print(" ".join(f"{value:>{len(name)}}" for name, value in asdict(sample).items()), flush=True)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="8b", help="8b, tiny, or what model.path takes")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=20.0, help="mean number of requests per second")
    parser.add_argument("--max-prompt", type=int, default=2048)
    parser.add_argument("--max-output", type=int, default=512)
    parser.add_argument("--kv-cache-gib", type=float, default=3.0)
    parser.add_argument("--interval-s", type=float, default=5.0)
    parser.add_argument("--max-growth-mib", type=float, default=64.0, help="of each kind of memory, over the whole run")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    os.environ.update(KERNEL_CACHES)  # read at the first product
    with tempfile.TemporaryDirectory() as folder:
        nobody = {"workers": 0}
        values = {
            "model": {
                "path": model_path(arguments.model, Path(folder)),
                "device": local_device(),
                "max_model_len": arguments.max_prompt + arguments.max_output,
            },
            "pools": {"prefill": nobody, "decode": nobody, "mixed": {"workers": 1}},
            "cache": {"kv_cache_gib": arguments.kv_cache_gib},
        }
        soak = Soak(build_config(values, source="soak"), arguments)
        soak.run()
    sys.exit(report(soak, arguments))


def report(soak: Soak, arguments: argparse.Namespace) -> int:
    """Prints and writes what was seen; the exit code."""
    bound = arguments.max_growth_mib
    rows: list[dict[str, Any]] = []
    empty = {"floor": 0, "peer": None, "goal": 0, "better": "low"}
    for name in ("resident_mib", "device_allocated_mib", "device_reserved_mib"):
        growth = round(soak.growth_mib(name), 2)
        if growth > bound:
            soak.faults.append(f"{name} grew by {growth} MiB; at most {bound} are allowed")
        case = f"growth of {name.removesuffix('_mib').replace('_', ' ')} memory in {arguments.minutes:g} min"
        rows.append({"case": case, "unit": "MiB", "ours": growth, "must": bound, **empty})
        print(f"{case}: {growth} MiB")
    if not soak.samples:
        soak.faults.append("no sample was taken; run for longer or lower --interval-s")
    rows.append({"case": "faults", "unit": "number", "ours": len(soak.faults), "must": 0, **empty})
    print("load:", json.dumps(soak.counts))
    print("worker:", json.dumps({name: count for name, count in soak.counters.items() if count}))
    for fault in soak.faults[:20]:
        print(f"FAULT {fault}")
    if arguments.output is not None:
        more = {"counts": soak.counts, "counters": soak.counters, "samples": [asdict(s) for s in soak.samples]}
        packages = ("phasewise", "torch", "triton")
        write_result(arguments.output, device_name(soak.device), packages, rows, faults=soak.faults[:20], **more)
    return 1 if soak.faults else 0


if __name__ == "__main__":
    main()
