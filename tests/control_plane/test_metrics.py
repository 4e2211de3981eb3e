"""The exposition is read back with Prometheus' own parser, and held against its naming rules."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from control_plane.metrics import GatewayMetrics, Workers
from phasewise.core import metrics as names
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.metrics import Histogram
from phasewise.core.placement import WorkerRole, WorkerState
from phasewise.core.profile import DeviceProfile

SPEC = KVCacheSpec(num_layers=2, num_kv_heads=1, head_dim=8, block_size=16, dtype="float32")
MODEL = 'a "quoted" \\ name'


def worker(worker_id: str, role: WorkerRole, **load: object) -> tuple[WorkerInfo, WorkerLoad]:
    info = WorkerInfo(
        worker_id=worker_id,
        role=role,
        pid=1,
        host="host-1",
        device="cpu",
        dtype="float32",
        num_threads=1,
        kv_spec=SPEC,
        num_kv_blocks=100,
        max_model_len=128,
        profile=DeviceProfile.linear(0.0, 0.0, 0.0, 0.0),
    )
    fields = {"role": role, "state": WorkerState.READY, "num_kv_blocks": 100, **load}
    return info, WorkerLoad(worker_id=worker_id, **fields)  # type: ignore[arg-type]


def samples(metrics: GatewayMetrics, workers: Workers = ()) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    body, content_type = metrics.render(workers)
    assert content_type.startswith("text/plain; version=0.0.4")
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} is rendered twice"
            found[key] = sample.value
    return found


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def finish(metrics: GatewayMetrics, **changes: object) -> None:
    values: dict[str, object] = {
        "num_prompt_tokens": 32,
        "num_output_tokens": 5,
        "num_cached_tokens": 16,
        "e2e_s": 0.5,
        "ttft_s": 0.1,
        "stages": {"queue": 0.01, "prefill": 0.06, "handoff": 0.02, "first_decode": 0.01},
    }
    metrics.request_finished("length", **{**values, **changes})  # type: ignore[arg-type]


def test_a_finished_request_shows_under_both_names() -> None:
    metrics = GatewayMetrics(MODEL)
    metrics.request_started()
    finish(metrics)
    found = samples(metrics)
    for own, vllm in (
        ("phasewise_ttft_seconds", "vllm:time_to_first_token_seconds"),
        ("phasewise_e2e_seconds", "vllm:e2e_request_latency_seconds"),
        ("phasewise_tpot_seconds", "vllm:request_time_per_output_token_seconds"),
        ("phasewise_request_prompt_tokens", "vllm:request_prompt_tokens"),
        ("phasewise_request_output_tokens", "vllm:request_generation_tokens"),
    ):
        assert found[key(f"{own}_count")] == found[key(f"{vllm}_count", model_name=MODEL)] == 1
        assert found[key(f"{own}_sum")] == found[key(f"{vllm}_sum", model_name=MODEL)]
    assert found[key("phasewise_tpot_seconds_sum")] == pytest.approx(0.4 / 4)
    assert found[key("phasewise_ttft_seconds_bucket", le="0.08")] == 0
    assert found[key("phasewise_ttft_seconds_bucket", le="0.1")] == 1
    assert found[key("vllm:request_success_total", model_name=MODEL, finished_reason="length")] == 1
    assert found[key("vllm:request_success_total", model_name=MODEL, finished_reason="stop")] == 0
    assert found[key("phasewise_requests_finished_total", finish_reason="length")] == 1
    assert found[key("vllm:prompt_tokens_total", model_name=MODEL)] == 32
    assert found[key("vllm:generation_tokens_total", model_name=MODEL)] == 5
    assert found[key("vllm:prefix_cache_queries_total", model_name=MODEL)] == 32
    assert found[key("vllm:prefix_cache_hits_total", model_name=MODEL)] == 16
    assert found[key("phasewise_ttft_stage_seconds_sum", stage="prefill")] == pytest.approx(0.06)
    assert found[key("phasewise_ttft_stage_seconds_count", stage="reserve")] == 0
    assert found[key("phasewise_requests_open")] == 0


def test_tpot_of_several_samples_is_that_of_one() -> None:
    metrics = GatewayMetrics("m")
    finish(metrics, num_output_tokens=10, num_samples=2)
    finish(metrics, num_output_tokens=1)  # a single token has no time per later token
    found = samples(metrics)
    assert found[key("phasewise_tpot_seconds_count")] == 1
    assert found[key("phasewise_tpot_seconds_sum")] == pytest.approx(0.4 / 4)


def test_a_request_without_output_has_no_first_token() -> None:
    metrics = GatewayMetrics("m")
    finish(metrics, num_output_tokens=0)
    found = samples(metrics)
    assert found[key("phasewise_ttft_seconds_count")] == found[key("phasewise_tpot_seconds_count")] == 0
    assert found[key("phasewise_e2e_seconds_count")] == found[key("phasewise_request_output_tokens_count")] == 1
    assert found[key("phasewise_prompt_tokens_total")] == 32


def test_every_way_to_end_closes_the_request() -> None:
    metrics = GatewayMetrics("m")
    for _ in range(4):
        metrics.request_started()
    metrics.request_refused("overloaded")
    metrics.request_failed("worker_lost", num_prompt_tokens=7, num_output_tokens=3)
    metrics.cancelled(num_output_tokens=2)
    finish(metrics)
    found = samples(metrics)
    assert found[key("phasewise_requests_open")] == 1
    assert found[key("phasewise_requests_started_total")] == 4
    assert found[key("phasewise_requests_cancelled_total")] == 1
    assert found[key("phasewise_requests_failed_total", code="overloaded")] == 1
    assert found[key("phasewise_requests_failed_total", code="worker_lost")] == 1
    assert found[key("phasewise_prompt_tokens_total")] == 39
    assert found[key("phasewise_output_tokens_total")] == 10
    assert found[key("phasewise_ttft_seconds_count")] == 1


def test_gaps_handoffs_placements_and_recoveries() -> None:
    metrics = GatewayMetrics("m")
    metrics.inter_token(0.02)
    metrics.inter_token(0.03, num_tokens=3)
    metrics.inter_token(9.0, num_tokens=0)
    metrics.handoff(1_000_000, 0.004)
    metrics.placed(is_local=False)
    metrics.placed(is_local=True)
    metrics.placed(is_local=False)
    metrics.preempted()
    metrics.recovered("worker_lost")
    found = samples(metrics)
    assert found[key("vllm:inter_token_latency_seconds_count", model_name="m")] == 4
    assert found[key("phasewise_tbt_seconds_sum")] == pytest.approx(0.05)
    assert found[key("phasewise_tbt_seconds_bucket", le="0.001")] == 2
    assert found[key("phasewise_handoff_bytes_sum")] == 1_000_000
    assert found[key("phasewise_handoff_seconds_bucket", le="0.004")] == 1
    assert found[key("phasewise_placements_total", kind="handoff")] == 2
    assert found[key("phasewise_placements_total", kind="local")] == 1
    assert found[key("phasewise_preemptions_total")] == 1
    assert found[key("phasewise_recoveries_total", reason="worker_lost")] == 1


def test_an_unknown_stage_is_named_and_records_nothing() -> None:
    metrics = GatewayMetrics("m")
    before = samples(metrics)
    with pytest.raises(KeyError, match=r"cooking.*first_decode"):
        finish(metrics, stages={"cooking": 1.0})
    assert samples(metrics) == before


def test_workers_are_rendered_as_they_are_at_the_scrape() -> None:
    metrics = GatewayMetrics("m")
    first = worker("prefill-0", WorkerRole.PREFILL, num_waiting=3, num_used_blocks=10, waiting_prompt_tokens=900)
    second = worker("decode-0", WorkerRole.DECODE, num_running=8, num_preempted=1, num_used_blocks=75)
    found = samples(metrics, [first, second])
    assert found[key("phasewise_worker_requests_waiting", worker="prefill-0", role="prefill")] == 3
    assert found[key("phasewise_worker_waiting_prompt_tokens", worker="prefill-0", role="prefill")] == 900
    assert found[key("phasewise_worker_kv_usage_ratio", worker="decode-0", role="decode")] == 0.75
    assert found[key("phasewise_worker_state", worker="decode-0", role="decode", state="ready")] == 1
    assert found[key("phasewise_worker_state", worker="decode-0", role="decode", state="draining")] == 0
    assert found[key("vllm:num_requests_running", model_name="m")] == 8
    assert found[key("vllm:num_requests_waiting", model_name="m")] == 4
    assert found[key("vllm:kv_cache_usage_perc", model_name="m")] == 0.75  # the fullest pool, not the mean
    config = {"engine": "decode-0", "block_size": "16", "num_gpu_blocks": "100", "cache_dtype": "float32"}
    assert found[key("vllm:cache_config_info", model_name="m", **config)] == 1
    later = samples(metrics, [worker("decode-0", WorkerRole.DECODE, state=WorkerState.DRAINING)])
    assert later[key("phasewise_worker_state", worker="decode-0", role="decode", state="draining")] == 1
    assert not any(("worker", "prefill-0") in labels for _, labels in later)


def test_counters_keep_their_series_when_a_worker_changes_role() -> None:
    counters = {name: float(i) for i, name in enumerate(names.WORKER_COUNTERS)} | {"new_thing": 5.0}
    info, _ = worker("decode-0", WorkerRole.DECODE)
    _, load = worker("decode-0", WorkerRole.MIXED, counters=counters)
    found = samples(GatewayMetrics("m"), [(info, load)])
    for name, (middle, _) in names.WORKER_COUNTERS.items():
        assert found[key(f"phasewise_worker_{middle}_total", worker="decode-0", role="decode")] == counters[name]
    assert found[key("phasewise_worker_other_total", worker="decode-0", role="decode", counter="new_thing")] == 5
    assert found[key("phasewise_worker_requests_running", worker="decode-0", role="mixed")] == 0


def test_every_gauge_of_a_load_has_a_name_and_the_names_are_fields() -> None:
    others = {"worker_id", "role", "state", "counters", "number"}
    counted = {name for name in WorkerLoad.__slots__ if name not in others}
    assert set(names.WORKER_GAUGES) == counted


def exposition() -> str:
    metrics = GatewayMetrics("m")
    finish(metrics)
    metrics.request_failed("internal")
    metrics.recovered("transfer_failed")
    counters = dict.fromkeys(names.WORKER_COUNTERS, 1.0)
    return metrics.render([worker("decode-0", WorkerRole.DECODE, counters=counters)])[0].decode()


def lines_of(kind: str) -> Iterable[tuple[str, str]]:
    return re.findall(rf"^# {kind} (\S+) (.+)$", exposition(), flags=re.M)


def test_names_follow_prometheus_rules() -> None:
    helps, types = dict(lines_of("HELP")), dict(lines_of("TYPE"))
    assert helps.keys() == types.keys()
    assert len(types) > 50
    for name, kind in types.items():
        assert re.fullmatch(r"(phasewise_|vllm:)[a-z][a-z0-9_]*", name), name
        assert len(helps[name]) >= 10
        assert (kind == "counter") == name.endswith("_total"), f"{name} is a {kind}"
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mb|mib|percent|created|count|sum|bucket)(_|$)", name), name
        assert not re.search(r"_(gauge|counter|histogram)(_|$)", name), name
        if "latency" in name or name.endswith(("ttft", "tbt", "e2e")):
            assert name.endswith("_seconds"), name


def test_histograms_are_whole_and_their_buckets_rise() -> None:
    for family in text_string_to_metric_families(exposition()):
        if family.type != "histogram":
            continue
        buckets = [sample for sample in family.samples if sample.name.endswith("_bucket")]
        by_series: dict[frozenset[tuple[str, str]], list[tuple[float, float]]] = {}
        for sample in buckets:
            series = frozenset((k, v) for k, v in sample.labels.items() if k != "le")
            by_series.setdefault(series, []).append((float(sample.labels["le"]), sample.value))
        for series, points in by_series.items():
            assert points == sorted(points)
            assert [count for _, count in points] == sorted(count for _, count in points)
            assert points[-1][0] == float("inf")
            count = next(
                s.value for s in family.samples if s.name.endswith("_count") and frozenset(s.labels.items()) == series
            )
            assert points[-1][1] == count


def test_histogram_bounds_must_rise_and_are_inclusive() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (1.0, 1.5, 2.0, 3.0):
        histogram.observe(value)
    assert histogram.cumulative() == [1, 3, 4]
    assert histogram.count == 4
    assert histogram.total == 7.5
    with pytest.raises(ValueError, match="must rise"):
        Histogram((1.0, 1.0))
    with pytest.raises(ValueError, match="not be empty"):
        Histogram(())
