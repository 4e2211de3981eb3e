"""Names and meanings of every metric, and an in-process recorder for them; no exporter.

Pure, so that the gateway, the simulator and tests record the same things under the same names. A recorder belongs to
one thread (the gateway's event loop): it takes no locks, which is what makes an observation cost well under 1 µs.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

TTFT_STAGES = ("queue", "reserve", "prefill", "handoff", "first_decode")
"""What the wait for the first two tokens is made of: in the prefill worker's queue; for the decode worker's blocks;
computing the prompt; moving its KV after the first token; until the request's first decode step has ended."""

TTFT_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0),
)
TBT_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.0125, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.075, 0.1),
    *(0.125, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
E2E_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0),
)
STAGE_BUCKETS_S = (0.0005, *TTFT_BUCKETS_S[:-1])
HANDOFF_BUCKETS_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064),
    *(0.125, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
HANDOFF_BUCKETS_BYTES = tuple(float(4**power) for power in range(6, 19))  # 4 KiB to 64 GiB
TOKEN_BUCKETS = tuple(float(2**power) for power in range(21))  # 1 to 1,048,576 tokens

WORKER_COUNTERS: dict[str, tuple[str, str]] = {
    "steps": ("steps", "Steps of the worker's loop that ran a batch"),
    "broken_steps": ("broken_steps", "Steps on which the engine broke; their requests are tried again in halves"),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens computed, those of the prefix cache not counted"),
    "output_tokens": ("output_tokens", "Output tokens sampled"),
    "preemptions": ("preemptions", "Sequences pushed out of the running batch"),
    "handoffs_in": ("handoffs_in", "Handoffs received completely"),
    "handoffs_out": ("handoffs_out", "Handoffs sent completely"),
    "handoff_bytes_in": ("handoff_in_bytes", "KV bytes received in handoffs"),
    "handoff_bytes_out": ("handoff_out_bytes", "KV bytes sent in handoffs"),
    "handoff_failures": ("handoff_failures", "Handoffs given up, for any reason"),
    "checksum_failures": ("checksum_failures", "KV parts whose checksum did not match; never decoded"),
    "late_parts": ("late_parts", "KV parts that came after their reservation had ended; dropped"),
    "parts_stored": ("object_store_parts", "KV parts sent through Ray's object store, not over a direct link"),
    "links_lost": ("links_lost", "Direct links that broke; the object store served meanwhile"),
    "leases_expired": ("leases_expired", "Reservations freed because their lease ran out"),
    "prefix_query_tokens": ("prefix_query_tokens", "Prompt tokens looked up in the prefix cache"),
    "prefix_hit_tokens": ("prefix_hit_tokens", "Prompt tokens found in the prefix cache"),
    "aborts": ("aborts", "Requests aborted on this worker"),
}
"""Key in `WorkerLoad.counters` → (middle of the metric's name, `phasewise_worker_<middle>_total`; its help)."""

WORKER_GAUGES: dict[str, tuple[str, str]] = {
    "num_waiting": ("requests_waiting", "Requests in the worker's queue; they hold no blocks"),
    "num_running": ("requests_running", "Sequences in the worker's running batch"),
    "num_preempted": ("requests_preempted", "Sequences whose KV waits in host memory"),
    "num_reservations": ("reservations", "Open reservations: blocks set aside for KV that is still to come"),
    "num_handoffs_out": ("handoffs_open", "Handoffs that this worker is sending"),
    "waiting_prompt_tokens": ("waiting_prompt_tokens", "Prompt tokens of the waiting requests still to compute"),
    "num_kv_blocks": ("kv_blocks", "Blocks of the worker's KV cache"),
    "num_used_blocks": ("kv_used_blocks", "Blocks that a sequence or a reservation refers to"),
    "num_cached_blocks": ("kv_cached_blocks", "Free blocks that the prefix cache remembers"),
}
"""Field of `WorkerLoad` → (end of the metric's name, `phasewise_worker_<end>`; its help)."""


class Histogram:
    """Counts observations by bucket. `bounds` rise; an observation belongs to the first bound at or above it.

    Raises ValueError for bounds that do not rise.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        if not bounds or any(low >= high for low, high in pairwise(bounds)):
            raise ValueError(f"histogram bounds must rise and not be empty, got {bounds}")
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last one is for +Inf
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Counts `value` `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.counts)

    def cumulative(self) -> list[int]:
        """Number of observations up to each bound, the last for +Inf: what Prometheus' text format wants."""
        result, running = [], 0
        for count in self.counts:
            running += count
            result.append(running)
        return result


@dataclass(frozen=True, slots=True)
class MetricName:
    """A metric's own name, its help, and the name under which tools made for vLLM look for it, or ""."""

    own: str
    help: str
    vllm: str = ""


TTFT = MetricName(
    "phasewise_ttft_seconds", "From a request's arrival to its first token", "vllm:time_to_first_token_seconds"
)
TBT = MetricName(
    "phasewise_tbt_seconds", "Between two tokens of one sample, every gap", "vllm:inter_token_latency_seconds"
)
TPOT = MetricName(
    "phasewise_tpot_seconds",
    "Mean time per output token after the first, by request",
    "vllm:request_time_per_output_token_seconds",
)
E2E = MetricName(
    "phasewise_e2e_seconds", "From a request's arrival to its last token", "vllm:e2e_request_latency_seconds"
)
TTFT_STAGE = MetricName("phasewise_ttft_stage_seconds", "Time of each stage on the way to the first tokens")
HANDOFF_SECONDS = MetricName("phasewise_handoff_seconds", "From a handoff's first part to its completion")
HANDOFF_BYTES = MetricName("phasewise_handoff_bytes", "KV bytes moved by a handoff")
REQUEST_PROMPT_TOKENS = MetricName(
    "phasewise_request_prompt_tokens", "Prompt tokens of a finished request", "vllm:request_prompt_tokens"
)
REQUEST_OUTPUT_TOKENS = MetricName(
    "phasewise_request_output_tokens", "Output tokens of a finished request", "vllm:request_generation_tokens"
)
PROMPT_TOKENS = MetricName("phasewise_prompt_tokens", "Prompt tokens of ended requests", "vllm:prompt_tokens")
OUTPUT_TOKENS = MetricName("phasewise_output_tokens", "Output tokens of ended requests", "vllm:generation_tokens")
PREFIX_QUERIES = MetricName(
    "phasewise_prefix_cache_query_tokens",
    "Prompt tokens of finished requests, looked up in the prefix cache",
    "vllm:prefix_cache_queries",
)
PREFIX_HITS = MetricName(
    "phasewise_prefix_cache_hit_tokens",
    "Prompt tokens of finished requests that the prefix cache had",
    "vllm:prefix_cache_hits",
)
FINISHED = MetricName("phasewise_requests_finished", "Requests that ended well, by reason", "vllm:request_success")
STARTED = MetricName("phasewise_requests_started", "Requests accepted by this gateway")
FAILED = MetricName("phasewise_requests_failed", "Requests refused or failed, by error code")
CANCELLED = MetricName("phasewise_requests_cancelled", "Requests whose client left or cancelled")
PREEMPTIONS = MetricName("phasewise_preemptions", "Preemptions seen in this gateway's requests")
RECOVERIES = MetricName("phasewise_recoveries", "Attempts given up and placed again, by reason")
PLACEMENTS = MetricName("phasewise_placements", "Placements, by whether the KV travels (handoff) or not (local)")
OPEN_REQUESTS = MetricName("phasewise_requests_open", "Requests open at this gateway")
