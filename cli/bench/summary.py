"""From the times of single requests to the numbers of a run: percentiles, throughput, goodput. Pure arithmetic.

Definitions, all in seconds on one clock:
    TTFT   from sending a request to the arrival of its first token
    TBT    time between tokens: each gap between two tokens of a request, over all requests. The tokens of one event
           arrive together: an event of k tokens is one gap since the event before it and k - 1 gaps of 0
    TPOT   per request: time from first to last token over the number of tokens after the first
    E2E    from sending a request to the arrival of its last token
In an open loop requests are sent on schedule, whatever the answers do. How late the load generator was itself is
reported as lateness and is not part of the latencies; a run with much of it measured the generator.
Where the server does not say how many tokens an event has, each event counts as one token (`tbt_basis`: "events").
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

PERCENTILES = (50, 90, 99)
SLO_UNITS_S = {"ms": 1e-3, "s": 1.0}


@dataclass(slots=True)
class RequestRow:
    """What was seen of one request. Times count from the beginning of the run.

    `token_times_s` has one (arrival, number of tokens) per event that brought tokens. `error` is "" for a success.
    """

    index: int
    num_prompt_tokens: int
    num_wanted_tokens: int
    scheduled_s: float
    sent_s: float
    token_times_s: list[tuple[float, int]] = field(default_factory=list)
    end_s: float = 0.0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: str = ""
    error: str = ""

    @property
    def lateness_s(self) -> float:
        return self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        return self.token_times_s[0][0] - self.sent_s if self.token_times_s else None

    @property
    def e2e_s(self) -> float | None:
        return self.token_times_s[-1][0] - self.sent_s if self.token_times_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Every gap between two tokens: as many as tokens seen, less one."""
        gaps: list[float] = []
        before_s = None
        for at_s, count in self.token_times_s:
            if before_s is not None:
                gaps.append(at_s - before_s)
            gaps.extend([0.0] * (count - 1))
            before_s = at_s
        return gaps

    @property
    def tpot_s(self) -> float | None:
        num_later = sum(count for _, count in self.token_times_s) - 1
        if num_later < 1:
            return None
        return (self.token_times_s[-1][0] - self.token_times_s[0][0]) / num_later

    def as_json(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "scheduled_s": round(self.scheduled_s, 6),
            "sent_s": round(self.sent_s, 6),
            "end_s": round(self.end_s, 6),
            "prompt_tokens": self.num_prompt_tokens,
            "wanted_tokens": self.num_wanted_tokens,
            "output_tokens": self.num_output_tokens,
            "cached_tokens": self.num_cached_tokens,
            "finish_reason": self.finish_reason,
            "error": self.error,
            "token_times_s": [[round(at_s, 6), count] for at_s, count in self.token_times_s],
        }


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits that a request must meet, in seconds; None is no limit.

    `tbt_s` holds for the 99th percentile of the request's own gaps, `tpot_s` for their mean.
    """

    ttft_s: float | None = None
    tbt_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def met_by(self, row: RequestRow) -> bool:
        """False for failed requests. A request of one token has no gaps and meets `tbt` and `tpot`."""
        if row.error or not row.token_times_s:
            return False
        measured = (
            (self.ttft_s, row.ttft_s),
            (self.tbt_s, percentile(row.gaps_s, 99)),
            (self.tpot_s, row.tpot_s),
            (self.e2e_s, row.e2e_s),
        )
        return all(limit is None or value is None or value <= limit for limit, value in measured)

    def as_json(self) -> dict[str, float]:
        limits = {"ttft_s": self.ttft_s, "tbt_s": self.tbt_s, "tpot_s": self.tpot_s, "e2e_s": self.e2e_s}
        return {name: limit for name, limit in limits.items() if limit is not None}


def parse_slo(text: str) -> Slo:
    """`ttft=500ms,tbt=50ms,e2e=10s` → Slo. Raises ValueError naming --slo and the part that is wrong."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", value)
        if name not in ("ttft", "tbt", "tpot", "e2e") or match is None:
            raise ValueError(f"--slo: {part.strip()!r} must be ttft, tbt, tpot or e2e with a time, such as ttft=500ms")
        if name in limits:
            raise ValueError(f"--slo: {name} is given twice")
        limits[name] = float(match[1]) * SLO_UNITS_S[match[2]]
    return Slo(**{f"{name}_s": limit for name, limit in limits.items()})


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between the two nearest ranks, as numpy's default; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def distribution(values: Iterable[float | None]) -> dict[str, float | int]:
    """{"count", "mean", "p50", "p90", "p99", "max"} of the values that are there; only {"count": 0} of nothing."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return {"count": 0}
    found: dict[str, float | int] = {"count": len(ordered), "mean": math.fsum(ordered) / len(ordered)}
    for percent in PERCENTILES:
        found[f"p{percent}"] = percentile(ordered, percent) or 0.0
    return {**found, "max": ordered[-1]}


def summarize(rows: Sequence[RequestRow], *, slo: Slo) -> dict[str, Any]:
    """The numbers of one run. Latencies are over requests that succeeded; failed ones count in rates only as sent.

    `duration_s` is from the first request's time to the last answer's end, so a run that is still draining at its end
    shows a lower throughput than a steady state would: choose runs much longer than a request.
    """
    good = [row for row in rows if not row.error]
    begin_s = min((row.scheduled_s for row in rows), default=0.0)
    duration_s = max((row.end_s for row in rows), default=0.0) - begin_s
    num_events = sum(len(row.token_times_s) for row in good)
    num_output = sum(row.num_output_tokens for row in good)
    num_prompt = sum(row.num_prompt_tokens for row in good)
    num_met = sum(slo.met_by(row) for row in good)

    def rate(count: int) -> float:
        return count / duration_s if duration_s > 0 else 0.0

    return {
        "requests": len(rows),
        "completed": len(good),
        "failed": len(rows) - len(good),
        "errors": dict(Counter(row.error for row in rows if row.error).most_common()),
        "wrong_length": sum(row.num_output_tokens != row.num_wanted_tokens for row in good),
        "duration_s": duration_s,
        "requests_per_s": rate(len(good)),
        "prompt_tokens_per_s": rate(num_prompt),
        "output_tokens_per_s": rate(num_output),
        "prompt_tokens": num_prompt,
        "output_tokens": num_output,
        "cached_tokens": sum(row.num_cached_tokens for row in good),
        "tokens_per_event": num_output / num_events if num_events else 0.0,
        "ttft_s": distribution(row.ttft_s for row in good),
        "tbt_s": distribution(gap for row in good for gap in row.gaps_s),
        "tpot_s": distribution(row.tpot_s for row in good),
        "e2e_s": distribution(row.e2e_s for row in good),
        "lateness_s": distribution(row.lateness_s for row in rows),
        "slo": slo.as_json(),
        "goodput_requests_per_s": rate(num_met) if slo.as_json() else None,
        "slo_attainment": num_met / len(rows) if slo.as_json() and rows else None,
    }
