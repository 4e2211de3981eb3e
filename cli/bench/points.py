"""From flags to the points of a load test: one point is one run at one concurrency, rate or replay speed. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from cli.bench.traces import Trace, read_trace
from cli.bench.workload import (
    RequestSpec,
    SyntheticRequests,
    clip,
    parse_length_range,
    parse_numbers,
    with_poisson_arrivals,
    with_scaled_arrivals,
)

DEFAULT_NUM_REQUESTS = 100


@dataclass(frozen=True, slots=True)
class WorkloadFlags:
    """The flags that decide what is sent and when, as the user gave them; None means "not given"."""

    concurrency: str | None = None
    rate: str | None = None
    trace: str | None = None
    time_scale: float | None = None
    limit: int | None = None
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    prompt_tokens: str | None = None
    output_tokens: str | None = None
    shared_prefix_tokens: int = 0
    num_requests: int | None = None
    duration_s: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Point:
    """One run. `concurrency` is set for a closed loop; else every request has an arrival time.

    `requests` may be endless when `duration_s` ends a closed loop; `num_expected` is None then.
    """

    label: str
    mode: str  # "closed", "open" or "replay"
    value: float  # the concurrency, the rate in requests/s, or the time scale
    requests: Iterable[RequestSpec]
    concurrency: int | None
    duration_s: float | None
    num_expected: int | None


def plan_points(flags: WorkloadFlags) -> tuple[list[Point], dict[str, Any]]:
    """(the runs in order, a description of the workload for the report).

    Raises:
        ValueError: flags exclude each other or are out of range; the message names them. TraceError: a bad trace.
    """
    _check(flags)
    if flags.trace is None:
        return _synthetic_points(flags)
    return _trace_points(flags, read_trace(flags.trace, limit=flags.limit))


def _check(flags: WorkloadFlags) -> None:
    if flags.concurrency is not None and flags.rate is not None:
        raise ValueError("--concurrency (closed loop) and --rate (open loop) exclude each other; give one")
    only_trace = {"--time-scale": flags.time_scale, "--limit": flags.limit}
    only_synthetic = {
        "--prompt-tokens": flags.prompt_tokens,
        "--output-tokens": flags.output_tokens,
        "--num-requests": flags.num_requests,
    }
    for name, value in only_trace.items() if flags.trace is None else ():
        if value is not None:
            raise ValueError(f"{name} is for traces; add --trace FILE or drop {name}")
    for name, text in only_synthetic.items() if flags.trace is not None else ():
        if text is not None:
            raise ValueError(
                f"{name} is for synthetic requests, a trace has its own; "
                "shorten it with --limit, --max-prompt-tokens, --max-output-tokens"
            )
    for name, value in (("--duration", flags.duration_s), ("--time-scale", flags.time_scale)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0, not {value}")
    for name, count in (
        ("--limit", flags.limit),
        ("--num-requests", flags.num_requests),
        ("--max-prompt-tokens", flags.max_prompt_tokens),
        ("--max-output-tokens", flags.max_output_tokens),
    ):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")


def _synthetic_points(flags: WorkloadFlags) -> tuple[list[Point], dict[str, Any]]:
    prompt = parse_length_range(flags.prompt_tokens or "256", flag="--prompt-tokens")
    output = parse_length_range(flags.output_tokens or "64", flag="--output-tokens")
    count = flags.num_requests
    if count is None and flags.duration_s is None:
        count = DEFAULT_NUM_REQUESTS
    mode, values = _loads(flags)
    if count is None and float("inf") in values:
        raise ValueError("--rate inf sends all requests at once; give --num-requests")
    requests = SyntheticRequests(
        prompt.clipped(flags.max_prompt_tokens), output.clipped(flags.max_output_tokens), flags.seed, count
    )
    points = [_point(flags, mode, value, requests, count) for value in values]
    return points, {
        "kind": "synthetic",
        "prompt_tokens": str(prompt),
        "output_tokens": str(output),
        "shared_prefix_tokens": flags.shared_prefix_tokens,
        **_limits(flags),
    }


def _trace_points(flags: WorkloadFlags, trace: Trace) -> tuple[list[Point], dict[str, Any]]:
    clipped = [clip(request, flags.max_prompt_tokens, flags.max_output_tokens) for request in trace.requests]
    if flags.concurrency is None and flags.rate is None:
        if not trace.has_arrivals:
            raise ValueError(f"{flags.trace} has lengths but no arrival times; give --rate or --concurrency")
        scale = flags.time_scale or 1.0
        requests = _before(with_scaled_arrivals(clipped, scale), flags.duration_s)
        points = [Point(f"replay x{scale:g}", "replay", scale, requests, None, None, len(requests))]
    else:
        if flags.time_scale is not None:
            raise ValueError("--time-scale replays a trace's own arrivals; drop it, or drop --rate and --concurrency")
        mode, values = _loads(flags)
        points = [_point(flags, mode, value, clipped, len(clipped)) for value in values]
    return points, {
        "kind": "trace",
        "file": Path(flags.trace or "").name,
        "format": trace.format,
        "requests": len(trace.requests),
        "skipped": trace.num_skipped,
        "clipped": sum(old != new for old, new in zip(trace.requests, clipped, strict=True)),
        **_limits(flags),
    }


def _loads(flags: WorkloadFlags) -> tuple[str, list[float]]:
    if flags.rate is not None:
        return "open", parse_numbers(flags.rate, flag="--rate", whole=False)
    return "closed", parse_numbers(flags.concurrency or "1", flag="--concurrency", whole=True)


def _limits(flags: WorkloadFlags) -> dict[str, Any]:
    return {
        "max_prompt_tokens": flags.max_prompt_tokens,
        "max_output_tokens": flags.max_output_tokens,
        "seed": flags.seed,
    }


def _point(flags: WorkloadFlags, mode: str, value: float, requests: Iterable[RequestSpec], count: int | None) -> Point:
    """A closed loop is ended by its own clock; an open one is cut at its duration beforehand."""
    if mode == "closed":
        return Point(f"concurrency {value:g}", mode, value, requests, int(value), flags.duration_s, count)
    arriving = _before(with_poisson_arrivals(requests, value, seed=flags.seed), flags.duration_s)
    return Point(f"rate {value:g}/s", mode, value, arriving, None, None, len(arriving))


def _before(requests: Iterable[RequestSpec], duration_s: float | None) -> list[RequestSpec]:
    return list(takewhile(lambda request: duration_s is None or (request.arrival_s or 0.0) < duration_s, requests))
