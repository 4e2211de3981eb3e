"""What the gateway tells Prometheus: its own observations, and the workers' last loads, rendered at each scrape.

Own names start with `phasewise_`. What autoscalers and routers made for vLLM read is emitted under vLLM's names too
(label `model_name`, as in vLLM 0.33), from the same numbers, so nothing is observed twice.

Two rules keep sums over gateways right: series of requests count what went through this gateway and may be added up;
series of workers (label `worker`) and `vllm:num_requests_*`, `vllm:kv_cache_usage_perc` show the cluster as a whole and
are the same at every gateway, so take one, not their sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.utils import floatToGoString

from phasewise.core import metrics as names
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.metrics import Histogram, MetricName
from phasewise.core.placement import WorkerRole, WorkerState

Workers = Sequence[tuple[WorkerInfo, WorkerLoad]]


class GatewayMetrics:
    """Records what the gateway sees. One event loop owns it: no locks, an observation is a bisection and two additions.

    Every accepted request is one `request_started` and then exactly one of `request_finished`, `request_failed`,
    `cancelled`; one that is refused before it is accepted is a `request_refused` alone.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._latencies = {
            names.TTFT: Histogram(names.TTFT_BUCKETS_S),
            names.TBT: Histogram(names.TBT_BUCKETS_S),
            names.TPOT: Histogram(names.TBT_BUCKETS_S),
            names.E2E: Histogram(names.E2E_BUCKETS_S),
            names.REQUEST_PROMPT_TOKENS: Histogram(names.TOKEN_BUCKETS),
            names.REQUEST_OUTPUT_TOKENS: Histogram(names.TOKEN_BUCKETS),
            names.HANDOFF_SECONDS: Histogram(names.HANDOFF_BUCKETS_S),
            names.HANDOFF_BYTES: Histogram(names.HANDOFF_BUCKETS_BYTES),
        }
        self._tbt = self._latencies[names.TBT]
        self._stages = {stage: Histogram(names.STAGE_BUCKETS_S) for stage in names.TTFT_STAGES}
        self._counts: Counter[MetricName] = Counter()
        self._finished: Counter[str] = Counter({"stop": 0, "length": 0})
        self._failed: Counter[str] = Counter()
        self._recoveries: Counter[str] = Counter()
        self._placements: Counter[str] = Counter({"handoff": 0, "local": 0})
        self._num_open = 0

    def request_started(self) -> None:
        """A request was accepted: it will end in exactly one of the three ways below."""
        self._counts[names.STARTED] += 1
        self._num_open += 1

    def request_refused(self, code: str) -> None:
        """A request was turned away before it was accepted. `code`: that of the error class."""
        self._failed[code] += 1

    def request_finished(
        self,
        finish_reason: str,
        *,
        num_prompt_tokens: int,
        num_output_tokens: int,
        num_cached_tokens: int,
        e2e_s: float,
        ttft_s: float,
        stages: Mapping[str, float],
        num_samples: int = 1,
    ) -> None:
        """A request ended well. `num_output_tokens` is the sum over its `num_samples` samples; with none of them there
        was no first token, and `ttft_s` is not used.

        `stages` maps names of TTFT_STAGES to seconds; stages that the request skipped are absent.
        Raises KeyError on an unknown stage, before anything is recorded.
        """
        unknown = stages.keys() - self._stages.keys()
        if unknown:
            raise KeyError(f"unknown TTFT stage {sorted(unknown)}; the stages are {names.TTFT_STAGES}")
        self._num_open -= 1
        self._finished[finish_reason] += 1
        self._count_tokens(num_prompt_tokens, num_output_tokens)
        self._counts[names.PREFIX_QUERIES] += num_prompt_tokens
        self._counts[names.PREFIX_HITS] += num_cached_tokens
        latencies = self._latencies
        if num_output_tokens:
            latencies[names.TTFT].observe(ttft_s)
        latencies[names.E2E].observe(e2e_s)
        latencies[names.REQUEST_PROMPT_TOKENS].observe(num_prompt_tokens)
        latencies[names.REQUEST_OUTPUT_TOKENS].observe(num_output_tokens)
        # Samples run side by side, so the time after the first token is shared by one sample's tokens, not by all.
        later_tokens = num_output_tokens / num_samples - 1
        if later_tokens > 0:
            latencies[names.TPOT].observe((e2e_s - ttft_s) / later_tokens)
        for stage, seconds in stages.items():
            self._stages[stage].observe(seconds)

    def request_failed(self, code: str, *, num_prompt_tokens: int = 0, num_output_tokens: int = 0) -> None:
        """An accepted request ended in an error. Its tokens count: they were computed."""
        self._num_open -= 1
        self._failed[code] += 1
        self._count_tokens(num_prompt_tokens, num_output_tokens)

    def cancelled(self, *, num_prompt_tokens: int = 0, num_output_tokens: int = 0) -> None:
        """An accepted request's client left or cancelled. Its tokens count: they were computed."""
        self._num_open -= 1
        self._counts[names.CANCELLED] += 1
        self._count_tokens(num_prompt_tokens, num_output_tokens)

    def inter_token(self, gap_s: float, num_tokens: int = 1) -> None:
        """`num_tokens` tokens of one sample came together, `gap_s` after the one before them.

        The first of them waited `gap_s`, the others not at all: that is what a reader of the stream sees. No tokens (a
        delta that only says that the sample is finished) are no gap.
        """
        if num_tokens < 1:
            return
        self._tbt.observe(gap_s)
        if num_tokens > 1:
            self._tbt.observe(0.0, num_tokens - 1)

    def handoff(self, num_bytes: int, seconds: float) -> None:
        """KV of a request has moved from its prefill to its decode worker."""
        self._latencies[names.HANDOFF_BYTES].observe(num_bytes)
        self._latencies[names.HANDOFF_SECONDS].observe(seconds)

    def placed(self, *, is_local: bool) -> None:
        """A request (or an attempt at it) was placed; `is_local` when one worker does both phases."""
        self._placements["local" if is_local else "handoff"] += 1

    def preempted(self) -> None:
        """A worker preempted a sample of this gateway's."""
        self._counts[names.PREEMPTIONS] += 1

    def recovered(self, reason: str) -> None:
        """An attempt at a request was given up and its rest is placed again; `reason` is the error's code."""
        self._recoveries[reason] += 1

    def render(self, workers: Workers) -> tuple[bytes, str]:
        """(body, content type) in Prometheus' text format 0.0.4, with the workers' loads as given."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Scrape(self, workers))
        return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        """This gateway's own series, under both kinds of names."""
        for name, histogram in self._latencies.items():
            yield from self._histograms(name, histogram)
        stages = HistogramMetricFamily(names.TTFT_STAGE.own, names.TTFT_STAGE.help, labels=["stage"])
        for stage, histogram in self._stages.items():
            stages.add_metric([stage], _buckets(histogram), histogram.total)
        yield stages
        for name in (names.PROMPT_TOKENS, names.OUTPUT_TOKENS, names.PREFIX_QUERIES, names.PREFIX_HITS):
            yield from self._counters(name, self._counts[name])
        for name in (names.STARTED, names.CANCELLED, names.PREEMPTIONS):
            yield from self._counters(name, self._counts[name])
        yield _by_label(names.FINISHED, "finish_reason", self._finished)
        yield _by_label(names.FAILED, "code", self._failed)
        yield _by_label(names.RECOVERIES, "reason", self._recoveries)
        yield _by_label(names.PLACEMENTS, "kind", self._placements)
        success = CounterMetricFamily(
            names.FINISHED.vllm, names.FINISHED.help, labels=["model_name", "finished_reason"]
        )
        for reason, count in self._finished.items():
            success.add_metric([self._model_name, reason], count)
        yield success
        yield GaugeMetricFamily(names.OPEN_REQUESTS.own, names.OPEN_REQUESTS.help, value=self._num_open)

    @property
    def model_name(self) -> str:
        return self._model_name

    def _count_tokens(self, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self._counts[names.PROMPT_TOKENS] += num_prompt_tokens
        self._counts[names.OUTPUT_TOKENS] += num_output_tokens

    def _histograms(self, name: MetricName, histogram: Histogram) -> Iterator[Metric]:
        buckets = _buckets(histogram)
        yield HistogramMetricFamily(name.own, name.help, buckets=buckets, sum_value=histogram.total)
        if name.vllm:
            family = HistogramMetricFamily(name.vllm, name.help, labels=["model_name"])
            family.add_metric([self._model_name], buckets, histogram.total)
            yield family

    def _counters(self, name: MetricName, value: float) -> Iterator[Metric]:
        yield CounterMetricFamily(name.own, name.help, value=value)
        if name.vllm:
            family = CounterMetricFamily(name.vllm, name.help, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family


class _Scrape:
    """One scrape: the gateway's series and those of the workers, as they are now."""

    def __init__(self, gateway: GatewayMetrics, workers: Workers) -> None:
        self._gateway = gateway
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        yield from self._gateway.collect()
        yield from _worker_gauges(self._workers)
        yield from _worker_counters(self._workers)
        yield from _cluster_under_vllm_names(self._gateway.model_name, self._workers)


def _worker_gauges(workers: Workers) -> Iterator[Metric]:
    labels = ["worker", "role"]
    info = GaugeMetricFamily(
        "phasewise_worker_info", "Always 1; what a worker is", labels=[*labels, "host", "device", "dtype", "block_size"]
    )
    states = GaugeMetricFamily(
        "phasewise_worker_state", "1 for the state that the worker is in, 0 for the others", labels=[*labels, "state"]
    )
    usage = GaugeMetricFamily(
        "phasewise_worker_kv_usage_ratio", "Used share of the worker's KV blocks, 0 to 1", labels=labels
    )
    gauges = {
        field: GaugeMetricFamily(f"phasewise_worker_{end}", text, labels=labels)
        for field, (end, text) in names.WORKER_GAUGES.items()
    }
    for worker, load in workers:
        who = [worker.worker_id, load.role.value]
        spec = worker.kv_spec
        info.add_metric([*who, worker.host, worker.device, worker.dtype, str(spec.block_size)], 1)
        usage.add_metric(who, _usage_ratio([load]))
        for state in WorkerState:
            states.add_metric([*who, state.value], float(load.state is state))
        for field, value in _gauge_values(load).items():
            gauges[field].add_metric(who, value)
    yield from (info, states, usage, *gauges.values())


def _gauge_values(load: WorkerLoad) -> dict[str, int]:
    return {
        "num_waiting": load.num_waiting,
        "num_running": load.num_running,
        "num_preempted": load.num_preempted,
        "num_reservations": load.num_reservations,
        "num_handoffs_out": load.num_handoffs_out,
        "waiting_prompt_tokens": load.waiting_prompt_tokens,
        "num_kv_blocks": load.num_kv_blocks,
        "num_used_blocks": load.num_used_blocks,
        "num_cached_blocks": load.num_cached_blocks,
    }


def _worker_counters(workers: Workers) -> Iterator[Metric]:
    labels = ["worker", "role"]
    families = {
        key: CounterMetricFamily(f"phasewise_worker_{middle}", text, labels=labels)
        for key, (middle, text) in names.WORKER_COUNTERS.items()
    }
    # A newer worker may count what this gateway has no name for; a rolling update must not break the scrape.
    other = CounterMetricFamily(
        "phasewise_worker_other", "Counters that this gateway's version does not know", labels=[*labels, "counter"]
    )
    for worker, load in workers:
        # The role at birth: a counter must not start a new series when a worker changes its role.
        who = [worker.worker_id, worker.role.value]
        for key, value in load.counters.items():
            if key in families:
                families[key].add_metric(who, value)
            else:
                other.add_metric([*who, key], value)
    yield from (*families.values(), other)


def _cluster_under_vllm_names(model_name: str, workers: Workers) -> Iterator[Metric]:
    """The cluster seen as one vLLM server, for autoscalers and routers that know only that."""
    loads = [load for _, load in workers]
    # The fullest pool decides when requests have to wait; a mean over pools would hide a full one behind an empty one.
    usage = max((_usage_ratio([x for x in loads if x.role is role]) for role in WorkerRole), default=0.0)
    for name, text, value in (
        ("vllm:num_requests_running", "Sequences in running batches, all workers", sum(x.num_running for x in loads)),
        (
            "vllm:num_requests_waiting",
            "Requests waiting or preempted, all workers",
            sum(x.num_waiting + x.num_preempted for x in loads),
        ),
        ("vllm:kv_cache_usage_perc", "Used share of the fullest pool's KV blocks, 0 to 1", usage),
    ):
        gauge = GaugeMetricFamily(name, text, labels=["model_name"])
        gauge.add_metric([model_name], value)
        yield gauge
    config = GaugeMetricFamily(
        "vllm:cache_config_info",
        "Always 1; the KV cache of each worker",
        labels=["model_name", "engine", "block_size", "num_gpu_blocks", "cache_dtype"],
    )
    for worker, _ in workers:
        spec = worker.kv_spec
        config.add_metric(
            [model_name, worker.worker_id, str(spec.block_size), str(worker.num_kv_blocks), spec.dtype], 1
        )
    yield config


def _usage_ratio(loads: Sequence[WorkerLoad]) -> float:
    num_blocks = sum(load.num_kv_blocks for load in loads)
    return sum(load.num_used_blocks for load in loads) / num_blocks if num_blocks else 0.0


def _by_label(name: MetricName, label: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name.own, name.help, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*(floatToGoString(bound) for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, histogram.cumulative(), strict=True))
