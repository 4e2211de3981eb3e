"""What the benchmarks of handoffs and of disaggregation compute from what they measured."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.disaggregation import (
    OURS,
    PEER,
    Entry,
    add_rows,
    best,
    entry_of,
    served_rate,
    verdict,
    window,
)
from benchmarks.offline import Rows, row_line
from cli.bench.summary import RequestRow, Slo
from cli.bench.workload import RequestSpec

SLO = Slo(ttft_s=1.0, tbt_s=0.025)
TRACE = [RequestSpec(i, 100 + i, 10, 3.0 * i + (i % 4)) for i in range(200)]


def request(ttft_s: float, gap_s: float, error: str = "") -> RequestRow:
    times = [(2.0 + ttft_s + i * gap_s, 1) for i in range(5)]
    return RequestRow(0, 10, 5, 2.0, 2.0, times, times[-1][0], 5, error=error)


def entry(rate: float, share: float, cluster: str = OURS, missed: tuple[float, float] = (0.0, 0.0)) -> Entry:
    met = round(100 * rate * share)
    by_slo: dict[str, Any] = {"goodput": met / 100, "met": met, "share": share}
    by_slo |= {"missed_ttft": missed[0], "missed_tbt": missed[1]}
    tails = {"count": 1, "p50": 0.1 * rate, "p99": rate}
    return {
        "cluster": cluster,
        "trace": "code",
        "rate": rate,
        **{name: {"middle": value} for name, value in by_slo.items()},
        "ttft_s": tails,
        "tbt_s": tails,
    }


def test_a_window_has_the_same_requests_at_every_rate() -> None:
    slow, fast = window(TRACE, 1.0, 20.0, seed=3), window(TRACE, 2.5, 20.0, seed=3)
    assert (len(slow), len(fast)) == (20, 50)
    assert [r.num_prompt_tokens for r in slow] == [r.num_prompt_tokens for r in fast[:20]]
    for picked in (slow, fast):
        times = [r.arrival_s or 0.0 for r in picked]
        assert times == sorted(times) and times[0] == 0.0 and times[-1] == pytest.approx(20.0 * (1 - 1 / len(picked)))
        gaps = {round(b - a, 9) for a, b in itertools.pairwise(times)}
        assert len(gaps) > 1, "the trace's own bursts"
    assert window(TRACE, 1.0, 20.0, seed=5) != slow


@pytest.mark.parametrize("rate", [0.01, 50.0])
def test_a_window_that_the_trace_cannot_fill_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="a trace of 200 gives half"):
        window(TRACE, rate, 20.0, seed=0)


def test_goodput_counts_what_meets_the_slo_in_the_window() -> None:
    rows = [request(0.5, 0.02)] * 6 + [request(1.5, 0.02), request(0.5, 0.03), request(1.5, 0.03)]
    found = entry_of(OURS, "code", 1.0, 10.0, [*rows, request(0.1, 0.01, error="timeout")], {"middle": SLO})
    assert (found["requests"], found["failed"], found["met"]) == (10, 1, {"middle": 6})
    assert found["goodput"] == {"middle": 0.6} and found["share"] == {"middle": 0.6}
    assert found["missed_ttft"] == {"middle": 0.3}, "the failed one, too"
    assert found["missed_tbt"] == {"middle": 0.2}
    assert found["second_token_s"]["p50"] == pytest.approx(0.02)
    assert found["ttft_s"]["count"] == 9


def test_the_rate_that_is_served_ends_at_the_first_that_is_not() -> None:
    entries = [entry(12.0, 0.95), entry(4.0, 0.99), entry(8.0, 0.5)]
    assert served_rate(entries, "middle") == 4.0
    assert served_rate([entry(4.0, 0.89)], "middle") == 0.0
    assert best(entries, "middle")["rate"] == 12.0


@pytest.mark.parametrize(
    ("shares", "wanted"),
    [((0.9, 0.5), "disaggregation pays"), ((0.5, 0.9), "mixed workers are better"), ((0.9, 0.89), "no difference")],
)
def test_the_verdict_is_computed(shares: tuple[float, float], wanted: str) -> None:
    ours = [entry(4.0, 0.3), entry(8.0, shares[0], missed=(0.25, 0.0))]
    peer = [entry(4.0, 0.3, PEER), entry(8.0, shares[1], PEER, missed=(0.0, 0.5))]
    text = verdict("code", "middle", SLO, ours, peer)
    assert f": {wanted}. Goodput {8 * shares[0]:.2f} against {8 * shares[1]:.2f} requests/s" in text
    assert f"{OURS}: TTFT missed by 25 %, TBT by 0 %; {PEER}: TTFT missed by 0 %, TBT by 50 %" in text


def test_rows_are_written_as_they_come_and_name_both_clusters(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "result.json", "a device", ("phasewise",))
    assert add_rows(rows, [entry(4.0, 0.9)], {"middle": SLO}) == [], "nothing to compare with"
    assert rows.rows == []
    verdicts = add_rows(rows, [entry(4.0, 0.9), entry(4.0, 0.5, PEER), entry(8.0, 0.1)], {"middle": SLO})
    assert len(verdicts) == 1
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["device"] == "a device"
    cases = {row["case"]: (row["ours"], row["peer"]) for row in written["rows"]}
    assert cases["code: goodput, middle SLO"] == (3.6, 2.0)
    assert cases["code at 4/s: TTFT p99"] == (4000, 4000)
    assert not any("8/s" in case for case in cases), "measured on one cluster only"


def test_a_row_says_when_it_misses_what_it_must(capsys: pytest.CaptureFixture[str]) -> None:
    rows = Rows(None, "a device", ())
    rows.add("a", "ms", 3.0, must=2.0)
    rows.add("b", "%", 96.0, must=97.0, better="high")
    rows.add("c", "ms", 2.0, must=2.0, goal=1.0)
    rows.add("d", "ms", 2.0)
    assert [row_line(row).endswith("MISSED") for row in rows.rows] == [True, True, False, False]
    assert [row["goal"] for row in rows.rows] == [2.0, 97.0, 1.0, None]
    assert capsys.readouterr().out.count("MISSED") == 2
