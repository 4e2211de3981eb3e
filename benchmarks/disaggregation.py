"""Whether disaggregation pays: 1 prefill + 1 decode worker against 2 mixed ones on the same two devices.

Replays a window of the Azure conversation and code traces at rising rates, with the trace's own bursts (its arrivals,
stretched to the rate), and counts requests that meet an SLO: TTFT, and the 99th percentile of the request's own gaps
between tokens. Goodput is such requests per second of the window. Each cluster is started once, for all points; both
run at once where there are four GPUs.

    python -m benchmarks.disaggregation --traces ../shared/traces --output benchmarks/results/disaggregation-h200x2.json
    python -m benchmarks.disaggregation --traces ../shared/traces --quick
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cluster import Cluster
from benchmarks.link_cluster import cluster_config
from benchmarks.offline import Rows, device_name
from cli.bench.load import LoadRun, warm_up_requests
from cli.bench.points import Point
from cli.bench.summary import RequestRow, Slo, distribution
from cli.bench.target import Target
from cli.bench.traces import read_trace
from cli.bench.workload import PromptBuilder, RequestSpec, clip, with_scaled_arrivals

POOLS = {
    "1 prefill + 1 decode": {"prefill": 1, "decode": 1, "mixed": 0},
    "2 mixed": {"prefill": 0, "decode": 0, "mixed": 2},
}
OURS, PEER = POOLS
TRACES = {"conversation": "AzureLLMInferenceTrace_conv_2023.csv", "code": "AzureLLMInferenceTrace_code_2023.csv"}
RATES = {"conversation": (8.0, 20.0, 32.0), "code": (4.0, 10.0, 18.0)}
SLOS = {
    "tight": Slo(ttft_s=0.4, tbt_s=0.015),
    "middle": Slo(ttft_s=1.0, tbt_s=0.025),
    "loose": Slo(ttft_s=2.0, tbt_s=0.1),
}
QUICK_SLOS = {
    "tight": Slo(ttft_s=0.5, tbt_s=0.1),
    "middle": Slo(ttft_s=2.0, tbt_s=0.25),
    "loose": Slo(ttft_s=10.0, tbt_s=1.0),
}
ATTAINED = 0.9
"""The share of requests that must meet an SLO for a rate to count as served."""
Entry = dict[str, Any]
"""What was measured at one point: cluster, trace, rate, latencies; by SLO goodput, share, and why others missed it."""


# ---- arithmetic


def window(requests: Sequence[RequestSpec], rate: float, duration_s: float, seed: int) -> list[RequestSpec]:
    """round(rate * duration_s) requests of a trace in a row, from a place that the seed decides, stretched to the rate.

    The same place for every rate: a lower one has the first requests of a higher one. Raises ValueError when the trace
    is too short.
    """
    count = round(rate * duration_s)
    if not 1 < count <= len(requests) // 2:
        raise ValueError(f"{rate:g}/s for {duration_s:g} s are {count} requests; a trace of {len(requests)} gives half")
    first = random.Random(seed).randrange(len(requests) // 2)
    picked = with_scaled_arrivals(requests[first : first + count], 1.0)
    last_s = picked[-1].arrival_s or 1e-9
    scale = duration_s * (count - 1) / count / last_s
    return [replace(r, index=i, arrival_s=(r.arrival_s or 0.0) * scale) for i, r in enumerate(picked)]


def entry_of(
    cluster: str, trace: str, rate: float, duration_s: float, rows: Sequence[RequestRow], slos: Mapping[str, Slo]
) -> Entry:
    """The numbers of one point. What failed meets no SLO."""
    good = [row for row in rows if not row.error]
    met = {name: sum(slo.met_by(row) for row in rows) for name, slo in slos.items()}
    late = {name: sum(not Slo(ttft_s=slo.ttft_s).met_by(row) for row in rows) for name, slo in slos.items()}
    slow = {name: sum(not Slo(tbt_s=slo.tbt_s).met_by(row) for row in good) for name, slo in slos.items()}
    return {
        "cluster": cluster,
        "trace": trace,
        "rate": rate,
        "requests": len(rows),
        "failed": len(rows) - len(good),
        "goodput": {name: count / duration_s for name, count in met.items()},
        "met": met,
        "share": {name: count / len(rows) for name, count in met.items()},
        "missed_ttft": {name: count / len(rows) for name, count in late.items()},
        "missed_tbt": {name: count / len(rows) for name, count in slow.items()},
        "ttft_s": distribution(row.ttft_s for row in good),
        "tbt_s": distribution(gap for row in good for gap in row.gaps_s),
        "second_token_s": distribution(row.gaps_s[0] for row in good if row.gaps_s),
        "e2e_s": distribution(row.e2e_s for row in good),
        "output_tokens_per_s": sum(row.num_output_tokens for row in good) / max(row.end_s for row in rows),
        "lateness_p99_s": distribution(row.lateness_s for row in rows)["p99"],
    }


def best(entries: Sequence[Entry], slo: str) -> Entry:
    """The point with the highest goodput."""
    return max(entries, key=lambda entry: entry["goodput"][slo])


def served_rate(entries: Sequence[Entry], slo: str) -> float:
    """The highest rate up to which at least ATTAINED of the requests meet the SLO; 0 when not even the lowest."""
    served = 0.0
    for entry in sorted(entries, key=lambda entry: entry["rate"]):
        if entry["share"][slo] < ATTAINED:
            break
        served = entry["rate"]
    return served


def verdict(trace: str, slo: str, limits: Slo, ours: Sequence[Entry], peer: Sequence[Entry]) -> str:
    """Who wins, and which limit was missed at the highest rate.

    A difference within the square root of the two counts is none: as large as that of two equal random processes.
    """
    one, other = best(ours, slo), best(peer, slo)
    counts = one["met"][slo], other["met"][slo]
    if abs(counts[0] - counts[1]) <= (counts[0] + counts[1]) ** 0.5:
        result = "no difference"
    else:
        result = "disaggregation pays" if one["goodput"][slo] > other["goodput"][slo] else "mixed workers are better"
    missed = []
    for name, entries in ((OURS, ours), (PEER, peer)):
        entry = max(entries, key=lambda entry: entry["rate"])
        shares = (100 * entry[what][slo] for what in ("missed_ttft", "missed_tbt"))
        missed.append("{}: TTFT missed by {:.0f} %, TBT by {:.0f} %".format(name, *shares))
    return (
        f"{trace}, {slo} (TTFT {limits.ttft_s:g} s, TBT p99 {1000 * (limits.tbt_s or 0):g} ms): {result}. "
        f"Goodput {one['goodput'][slo]:.2f} against {other['goodput'][slo]:.2f} requests/s; {100 * ATTAINED:.0f} % "
        f"served up to {served_rate(ours, slo):g} against {served_rate(peer, slo):g}/s. "
        f"At the highest rate {'; '.join(missed)}"
    )


def add_rows(rows: Rows, entries: Sequence[Entry], slos: Mapping[str, Slo]) -> list[str]:
    """Rows that have both clusters, and the verdicts."""
    verdicts = []
    for trace in TRACES:
        ours, peer = ([e for e in entries if (e["cluster"], e["trace"]) == (name, trace)] for name in POOLS)
        for one in ours:
            other = next((e for e in peer if e["rate"] == one["rate"]), None)
            if other is None:
                continue
            for what, label in (("ttft_s", "TTFT"), ("tbt_s", "TBT")):
                for tail in ("p50", "p99"):
                    if one[what]["count"] and other[what]["count"]:
                        pair = (1000 * e[what][tail] for e in (one, other))
                        rows.add(f"{trace} at {one['rate']:g}/s: {label} {tail}", "ms", next(pair), peer=next(pair))
        if not ours or not peer:
            continue
        for slo, limits in slos.items():
            goodput = [best(e, slo)["goodput"][slo] for e in (ours, peer)]
            rows.add(f"{trace}: goodput, {slo} SLO", "req/s", goodput[0], peer=goodput[1], better="high")
            served = [served_rate(e, slo) for e in (ours, peer)]
            case = f"{trace}: highest rate with {100 * ATTAINED:.0f} % within the {slo} SLO"
            rows.add(case, "req/s", served[0], peer=served[1], better="high")
            verdicts.append(verdict(trace, slo, limits, ours, peer))
    return verdicts


# ---- measuring


async def measure(
    http: str, arguments: argparse.Namespace, cluster: str, slos: Mapping[str, Slo], done: Callable[[Entry], None]
) -> None:
    """All traces and rates on a cluster that is up, one after the other."""
    duration_s = arguments.duration_s
    async with Target(http, headers={}, timeout_s=arguments.timeout_s, extra={}) as target:
        served = await target.discover(model=None, vocab_size=None)
        for trace, file in TRACES.items():
            if trace not in arguments.only:
                continue
            requests = [
                clip(request, arguments.max_prompt_tokens, arguments.max_output_tokens)
                for request in read_trace(arguments.traces / file).requests
            ]
            for number, rate in enumerate(arguments.rates or RATES[trace]):
                picked = window(requests, rate, duration_s, arguments.seed)
                point = Point(f"{trace} {rate:g}/s", "open", rate, picked, None, None, len(picked))
                run = LoadRun(target, PromptBuilder(served.token_ids, seed=f"{trace}/{number}"), lambda row: None)
                if number == 0:
                    await run.warm_up(warm_up_requests(point, 3))
                begin_s = time.perf_counter()
                seen = await run.run(point)
                entry = entry_of(cluster, trace, rate, duration_s, seen, slos)
                entry["errors"] = dict(target.error_details)
                target.error_details.clear()
                print(line(entry, time.perf_counter() - begin_s), flush=True)
                done(entry)


def run_cluster(
    name: str, gpus: str, arguments: argparse.Namespace, slos: Mapping[str, Slo], done: Callable[[Entry | str], None]
) -> None:
    """In a process of its own: starts a cluster and measures it; its name comes last."""
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    context = arguments.max_prompt_tokens + arguments.max_output_tokens
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = cluster_config(
                Path(folder), "cluster", POOLS[name], arguments.model, arguments.kv_cache_gib, max_model_len=context
            )
            with Cluster(config) as cluster:
                asyncio.run(measure(cluster.http, arguments, name, slos, done))
    finally:
        done(name)


def run_clusters(num_gpus: int, arguments: argparse.Namespace, slos: Mapping[str, Slo], rows: Rows) -> None:
    """Each point is written as it is done."""
    context = multiprocessing.get_context("spawn")
    done: multiprocessing.Queue[Entry | str] = context.Queue()
    rounds = [list(POOLS)] if num_gpus >= 4 else [[name] for name in POOLS]
    for at_once in rounds:
        processes = {
            name: context.Process(
                target=run_cluster,
                args=(name, f"{2 * place},{2 * place + 1}" if num_gpus >= 4 else "", arguments, slos, done.put),
            )
            for place, name in enumerate(at_once)
        }
        for process in processes.values():
            process.start()
        running = set(processes)
        while running:
            what = done.get()
            if isinstance(what, str):
                running.remove(what)
            else:
                rows.more["points"].append(what)
                rows.write()
        for process in processes.values():
            process.join()


def line(entry: Entry, took_s: float) -> str:
    shares = " ".join(f"{name} {100 * share:.0f} %" for name, share in entry["share"].items())
    tails = " ".join(
        f"{name.removesuffix('_s')} {1000 * entry[name]['p50']:.0f}/{1000 * entry[name]['p99']:.0f}"
        for name in ("ttft_s", "tbt_s")
        if entry[name]["count"]
    )
    return (
        f"{entry['cluster']:22} {entry['trace']:12} {entry['rate']:6g}/s {entry['requests']:5} requests, "
        f"{entry['failed']} failed; met: {shares}; ms p50/p99: {tails}; {took_s:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, help=f"folder with {', '.join(TRACES.values())}")
    parser.add_argument("--only", nargs="+", choices=list(TRACES), default=list(TRACES))
    parser.add_argument("--rates", nargs="+", type=float, help="requests/s; default: by trace")
    parser.add_argument("--duration-s", type=float, default=40.0, help="of each point, in which requests are sent")
    parser.add_argument("--timeout-s", type=float, default=30.0, help="after which a request has failed")
    parser.add_argument("--model", default="8b", help="8b, tiny, or what model.path takes")
    parser.add_argument("--kv-cache-gib", type=float, default=60.0)
    parser.add_argument("--max-prompt-tokens", type=int, default=8192)
    parser.add_argument("--max-output-tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="for a CPU: the built-in model, two rates, slower SLOs")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    slos = SLOS
    if arguments.quick:
        slos = QUICK_SLOS
        arguments.model, arguments.kv_cache_gib = "smollm2-135m", 1.0
        arguments.rates = arguments.rates or [0.5, 1.0]
        arguments.duration_s, arguments.timeout_s = 15.0, 60.0
        arguments.max_prompt_tokens, arguments.max_output_tokens = 256, 32
    num_gpus = torch.cuda.device_count()
    device = f"{num_gpus} x {device_name('cuda')}" if num_gpus else device_name("cpu")
    rows = Rows(arguments.output, device, ("phasewise", "torch", "ray", "grpcio"))
    rows.more |= {"slos": {name: slo.as_json() for name, slo in slos.items()}, "verdicts": [], "points": []}
    run_clusters(num_gpus, arguments, slos, rows)
    rows.more["verdicts"] = add_rows(rows, rows.more["points"], slos)
    rows.write()
    print("\n".join(rows.more["verdicts"]))
    if {entry["cluster"] for entry in rows.more["points"] if entry["failed"] < entry["requests"]} != set(POOLS):
        sys.exit("a cluster served no request")


if __name__ == "__main__":
    main()
