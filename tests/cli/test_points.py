"""Which runs the flags ask for, and which flags exclude each other."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from cli.bench.load import warm_up_requests
from cli.bench.points import DEFAULT_NUM_REQUESTS, WorkloadFlags, plan_points

LENGTHS = "TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,107,15\nXXX,396,513\n"
TIMED = "arrival_s,input_tokens,output_tokens\n10,5,3\n11,6,4\n14,7,5\n"


def trace_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return str(path)


def test_nothing_given_is_a_closed_loop_of_one() -> None:
    (point,), workload = plan_points(WorkloadFlags())
    requests = list(point.requests)
    assert (point.mode, point.concurrency, point.num_expected) == ("closed", 1, DEFAULT_NUM_REQUESTS)
    assert len(requests) == DEFAULT_NUM_REQUESTS
    assert (requests[0].num_prompt_tokens, requests[0].num_output_tokens) == (256, 64)
    assert workload["kind"] == "synthetic"


def test_points_of_a_sweep_have_the_same_lengths() -> None:
    points, _ = plan_points(WorkloadFlags(concurrency="1,4", prompt_tokens="5:50", num_requests=20))
    one, two = ([request.num_prompt_tokens for request in point.requests] for point in points)
    assert one == two
    assert [point.concurrency for point in points] == [1, 4]


def test_a_closed_loop_with_a_duration_has_requests_without_end() -> None:
    (point,), _ = plan_points(WorkloadFlags(duration_s=5.0))
    assert point.num_expected is None and point.duration_s == 5.0
    assert len(list(islice(point.requests, 1000))) == 1000


def test_an_open_loop_is_cut_at_its_duration() -> None:
    (point,), _ = plan_points(WorkloadFlags(rate="100", duration_s=2.0))
    times_s = [request.arrival_s or 0.0 for request in point.requests]
    assert 100 < len(times_s) < 300
    assert max(times_s) < 2.0
    assert point.num_expected == len(times_s)
    assert point.concurrency is None


def test_a_trace_with_times_is_replayed(tmp_path: Path) -> None:
    path = trace_file(tmp_path, TIMED)
    (point,), workload = plan_points(WorkloadFlags(trace=path, time_scale=2.0, max_prompt_tokens=6))
    assert [request.arrival_s for request in point.requests] == [0.0, 2.0, 8.0]
    assert [request.num_prompt_tokens for request in point.requests] == [5, 6, 6]
    assert workload["clipped"] == 1
    assert workload["file"] == "trace.csv"
    (cut,), _ = plan_points(WorkloadFlags(trace=path, duration_s=3.0))
    assert len(list(cut.requests)) == 2


def test_a_trace_of_lengths_takes_its_times_from_the_rate(tmp_path: Path) -> None:
    path = trace_file(tmp_path, LENGTHS)
    (point,), _ = plan_points(WorkloadFlags(trace=path, rate="5"))
    assert [request.num_output_tokens for request in point.requests] == [15, 513]
    assert all(request.arrival_s is not None for request in point.requests)
    with pytest.raises(ValueError, match="no arrival times; give --rate or --concurrency"):
        plan_points(WorkloadFlags(trace=path))


def test_warm_up_has_the_lengths_but_not_the_prompts(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 14]}')
    (point,), _ = plan_points(WorkloadFlags(trace=str(path)))
    (warm,) = warm_up_requests(point, 5)
    assert (warm.num_prompt_tokens, warm.num_output_tokens, warm.hash_ids, warm.index) == (600, 5, (), -1)
    assert len(list(point.requests)) == 1  # still there to be measured


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"concurrency": "1", "rate": "1"}, "--concurrency .* and --rate .* exclude each other"),
        ({"time_scale": 1.0}, "--time-scale is for traces"),
        ({"limit": 5}, "--limit is for traces"),
        ({"trace": "TIMED", "prompt_tokens": "5"}, "--prompt-tokens is for synthetic requests"),
        ({"trace": "TIMED", "num_requests": 5}, "--num-requests is for synthetic"),
        ({"trace": "TIMED", "rate": "1", "time_scale": 2.0}, "--time-scale replays a trace's own arrivals"),
        ({"duration_s": 0.0}, "--duration must be above 0"),
        ({"trace": "TIMED", "time_scale": -1.0}, "--time-scale must be above 0"),
        ({"duration_s": float("nan")}, "--duration must be above 0"),
        ({"num_requests": 0}, "--num-requests must be at least 1"),
        ({"max_output_tokens": 0}, "--max-output-tokens must be at least 1"),
        ({"rate": "inf", "duration_s": 1.0}, "--rate inf sends all requests at once; give --num-requests"),
        ({"concurrency": "1.5"}, "--concurrency must be whole numbers"),
        ({"prompt_tokens": "9:3"}, "--prompt-tokens must be at least 1 and rise"),
    ],
)
def test_flags_that_make_no_sense_are_named(tmp_path: Path, flags: dict[str, object], message: str) -> None:
    if flags.get("trace"):
        flags = {**flags, "trace": trace_file(tmp_path, TIMED)}
    with pytest.raises(ValueError, match=message):
        plan_points(WorkloadFlags(**flags))  # type: ignore[arg-type]
