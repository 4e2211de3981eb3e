"""Percentiles, gaps, SLOs and rates: the arithmetic of a report."""

from __future__ import annotations

import random

import numpy
import pytest

from cli.bench.summary import RequestRow, Slo, distribution, parse_slo, percentile, summarize


def row(times: list[tuple[float, int]], **changes: object) -> RequestRow:
    num = sum(count for _, count in times)
    fields: dict[str, object] = {
        "index": 0,
        "num_prompt_tokens": 10,
        "num_wanted_tokens": num,
        "scheduled_s": 0.0,
        "sent_s": 0.0,
        "token_times_s": times,
        "end_s": times[-1][0] if times else 0.0,
        "num_output_tokens": num,
        "finish_reason": "length",
    }
    return RequestRow(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 101])
def test_percentiles_are_numpys(size: int) -> None:
    source = random.Random(size)
    values = [source.random() for _ in range(size)]
    for percent in (0, 1, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(float(numpy.percentile(values, percent)))


def test_nothing_has_no_percentile() -> None:
    assert percentile([], 50) is None
    assert distribution([]) == {"count": 0}
    assert distribution([None, 2.0]) == {"count": 1, "mean": 2.0, "p50": 2.0, "p90": 2.0, "p99": 2.0, "max": 2.0}


def test_tokens_of_one_event_are_one_gap_and_zeros() -> None:
    seen = row([(1.0, 1), (1.5, 3), (2.5, 2)], sent_s=0.25, scheduled_s=0.2)
    assert seen.gaps_s == [0.5, 0.0, 0.0, 1.0, 0.0]
    assert seen.ttft_s == 0.75
    assert seen.e2e_s == 2.25
    assert seen.tpot_s == pytest.approx(1.5 / 5)
    assert seen.lateness_s == pytest.approx(0.05)
    assert sum(seen.gaps_s) == pytest.approx(seen.e2e_s - seen.ttft_s)


def test_first_event_with_several_tokens() -> None:
    seen = row([(1.0, 3)])
    assert seen.gaps_s == [0.0, 0.0]
    assert seen.tpot_s == 0.0
    assert row([(1.0, 1)]).tpot_s is None


def test_slo_limits_are_inclusive_and_all_must_hold() -> None:
    seen = row([(0.5, 1), (0.6, 1), (0.9, 1)])
    assert Slo(ttft_s=0.5, e2e_s=0.9).met_by(seen)
    assert not Slo(ttft_s=0.49).met_by(seen)
    assert not Slo(ttft_s=0.5, e2e_s=0.89).met_by(seen)
    assert not Slo(tbt_s=0.29).met_by(seen)
    assert Slo(tbt_s=0.31, tpot_s=0.21).met_by(seen)
    assert not Slo(tpot_s=0.19).met_by(seen)
    assert Slo(tbt_s=0.001, tpot_s=0.001).met_by(row([(0.5, 1)]))  # a single token has no gap
    assert not Slo(ttft_s=9.0).met_by(row([(0.5, 1)], error="timeout"))
    assert not Slo(ttft_s=9.0).met_by(row([]))


def test_parse_slo() -> None:
    assert parse_slo("ttft=500ms, tbt=50ms,e2e=10s") == Slo(ttft_s=0.5, tbt_s=0.05, e2e_s=10.0)
    assert parse_slo("tpot=12.5ms").as_json() == {"tpot_s": 0.0125}
    for text in ("ttft", "ttft=5", "latency=5ms", "ttft=5m", "ttft=-5ms", ""):
        with pytest.raises(ValueError, match=r"--slo: .* must be ttft, tbt, tpot or e2e"):
            parse_slo(text)
    with pytest.raises(ValueError, match="ttft is given twice"):
        parse_slo("ttft=5ms,ttft=6ms")


def test_a_summary_adds_up() -> None:
    rows = [
        row([(2.0, 1), (3.0, 1)], scheduled_s=1.0, sent_s=1.0, num_cached_tokens=4),
        row([(3.0, 1), (5.0, 1), (6.0, 2)], scheduled_s=2.0, sent_s=2.5, num_wanted_tokens=5),
        row([], scheduled_s=2.0, sent_s=2.0, end_s=11.0, error="timeout"),
        row([(2.5, 1)], scheduled_s=2.0, sent_s=2.0, end_s=3.0, error="stream cut short"),
    ]
    found = summarize(rows, slo=Slo(ttft_s=0.6))
    assert (found["requests"], found["completed"], found["failed"]) == (4, 2, 2)
    assert found["errors"] == {"timeout": 1, "stream cut short": 1}
    assert found["wrong_length"] == 1
    assert found["duration_s"] == 10.0
    assert found["requests_per_s"] == 0.2
    assert found["output_tokens_per_s"] == 0.6
    assert found["prompt_tokens_per_s"] == 2.0
    assert found["cached_tokens"] == 4
    assert found["tokens_per_event"] == pytest.approx(6 / 5)
    assert found["ttft_s"]["mean"] == pytest.approx(0.75)
    assert found["tbt_s"]["count"] == 4
    assert found["tbt_s"]["max"] == 2.0
    assert found["e2e_s"]["max"] == 3.5
    assert found["lateness_s"]["max"] == 0.5
    assert found["slo_attainment"] == 0.25
    assert found["goodput_requests_per_s"] == 0.1
    assert summarize(rows, slo=Slo())["goodput_requests_per_s"] is None


def test_a_summary_of_nothing() -> None:
    found = summarize([], slo=Slo(ttft_s=1.0))
    assert found["requests_per_s"] == 0.0
    assert found["slo_attainment"] is None
    assert found["ttft_s"] == {"count": 0}
