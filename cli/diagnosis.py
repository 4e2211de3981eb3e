"""Pure: what follows from a report of a cluster's links (control_plane/gateway/link_report.py).

Predictions take the times that the probes had: the latency is the smallest probe's time, and the rate that of the
largest one without it. What a part costs its sender is what the link says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from typing import Any

from phasewise.core.handoff_cost import HandoffPath, pays, pays_from_tokens
from phasewise.core.links import NO_TIME_LEFT
from phasewise.core.profile import DeviceProfile

Json = Mapping[str, Any]


class Severity(StrEnum):
    """An error: requests fail or nothing is handed over. A warning: slower or smaller than it could be."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    severity: Severity
    message: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """A prompt's way over one pair. `visible_s` is what of `handoff_s` comes after the prompt is computed."""

    prompt_tokens: int
    prefill: str
    decode: str
    prefill_s: float
    handoff_s: float
    visible_s: float
    is_layerwise: bool
    pays: bool


class Cluster:
    """A report, looked up by worker and pair. Raises KeyError or TypeError for what is none."""

    def __init__(self, report: Json) -> None:
        self.report = report
        self.workers: dict[str, Json] = {worker["id"]: worker for worker in report["workers"]}
        self.ready = [worker for worker in self.workers.values() if worker["state"] == "ready"]
        self.pairs: list[Json] = list(report["pairs"])
        self.context_length: int = report["context_length"]
        self._profiles = {
            name: DeviceProfile.from_json(json.dumps(worker["profile"]), source=name)
            for name, worker in self.workers.items()
        }

    def of_role(self, role: str) -> list[Json]:
        return [worker for worker in self.ready if worker["role"] == role]

    def path(self, pair: Json) -> HandoffPath | None:
        """None where no probe has arrived."""
        times = [(probe["num_bytes"], probe["seconds"]) for probe in pair["probes"] if probe["seconds"]]
        if not times:
            return None
        (small, latency_s), (large, seconds) = times[0], times[-1]
        bytes_s = seconds - latency_s if seconds > latency_s else seconds
        worker = self.workers[pair["prefill"]]
        return HandoffPath(
            pair["bytes_per_token"],
            (large - small if large > small else large) / bytes_s,
            pair["part_s"],
            pair["max_part_bytes"],
            ceil(worker["kv_layout"]["num_layers"] / worker["layers_per_part"]),
            worker["chunk_tokens"],
            self.report["transfer"]["layerwise_threshold_tokens"],
            latency_s,
        )

    def predict(self, pair: Json, path: HandoffPath, num_tokens: int) -> Prediction:
        prefill, decode = self._profiles[pair["prefill"]], self._profiles[pair["decode"]]
        prefill_s = prefill.prefill_s(num_tokens)
        return Prediction(
            num_tokens,
            pair["prefill"],
            pair["decode"],
            prefill_s,
            path.total_s(num_tokens),
            path.visible_s(num_tokens, prefill_s),
            path.is_layerwise(num_tokens),
            pays(path, prefill, decode, num_tokens),
        )

    def predictions(self, prompt_tokens: Sequence[int]) -> list[Prediction]:
        """Of each length that the cluster serves and each pair that was measured."""
        paths = [(pair, path) for pair in self.pairs if (path := self.path(pair)) is not None]
        lengths = [n for n in prompt_tokens if n <= self.context_length]
        return [self.predict(pair, path, n) for n in lengths for pair, path in paths]

    def pays_from(self) -> list[tuple[Json, int | None]]:
        """The prompt length from which a handoff pays, for each pair that was measured; None: never."""
        found = []
        for pair in self.pairs:
            if (path := self.path(pair)) is not None:
                profiles = self._profiles[pair["prefill"]], self._profiles[pair["decode"]]
                found.append((pair, pays_from_tokens(path, *profiles, self.context_length)))
        return found


def conversions(cluster: Cluster, pair: Json) -> str:
    """What a transfer changes on its way, in words; "" when nothing."""
    ours, theirs = (cluster.workers[pair[end]] for end in ("prefill", "decode"))
    changes = [
        f"{name} {a} → {b}"
        for name, a, b in (
            ("", ours["kv_layout"]["dtype"], theirs["kv_layout"]["dtype"]),
            ("block", ours["kv_layout"]["block_size"], theirs["kv_layout"]["block_size"]),
            ("ranks", ours["ranks"], theirs["ranks"]),
        )
        if a != b
    ]
    if pair["codec"] != "none":
        changes.append(f"codec {pair['codec']}")
    if not pair["is_lossless"]:
        changes.append("lossy")
    return ", ".join(changes).strip()


def findings(cluster: Cluster, prompt_tokens: Sequence[int]) -> list[Finding]:
    """Everything worth saying, errors first."""
    found = [
        *_of_pools(cluster),
        *_of_pairs(cluster),
        *_of_transfer(cluster),
        *_of_lengths(cluster, prompt_tokens),
    ]
    order = list(Severity)
    return sorted(found, key=lambda finding: order.index(finding.severity))


def _of_pools(cluster: Cluster) -> list[Finding]:
    found = []
    prefills, decodes, mixed = (cluster.of_role(role) for role in ("prefill", "decode", "mixed"))
    missing = [name for name, pool in (("prefill", prefills), ("decode", decodes)) if not pool]
    if missing and not mixed:
        what = " and no ".join(missing)
        found.append(
            Finding(Severity.ERROR, f"no {what} worker is ready: no request can be served; look for why in the log")
        )
    elif len(missing) == 1:
        found.append(
            Finding(
                Severity.ERROR,
                f"no {missing[0]} worker is ready: nothing is disaggregated, mixed workers do all; add one to "
                f"pools.{missing[0]}.workers",
            )
        )
    elif missing:
        found.append(Finding(Severity.NOTE, "only mixed workers: nothing is handed over"))
    for worker in cluster.workers.values():
        if worker["state"] != "ready":
            found.append(Finding(Severity.WARNING, f"worker {worker['id']} is {worker['state']}: restart the cluster"))
        if worker["checksum_failures"]:
            message = (
                f"{worker['checksum_failures']:.0f} parts came damaged to {worker['id']}: look at memory and links"
            )
            found.append(Finding(Severity.WARNING, message))
    room, need = (sum(worker["kv_tokens"] for worker in pool) for pool in (decodes, prefills))
    if prefills and decodes and room < need:
        message = (
            f"the decode pool holds {room:,} tokens of KV and the prefill pool can fill {need:,}: prompts will wait "
            "for reservations; add decode workers or cache"
        )
        found.append(Finding(Severity.WARNING, message))
    return found


def _of_pairs(cluster: Cluster) -> list[Finding]:
    found = []
    wanted = cluster.report["transfer"]["link"]
    for pair in cluster.pairs:
        name = f"{pair['prefill']} → {pair['decode']}"
        prefill, decode = cluster.workers[pair["prefill"]], cluster.workers[pair["decode"]]
        if pair["refusal"]:
            found.append(Finding(Severity.ERROR, f"{name} refuse each other: {pair['refusal']}; use one model"))
        if prefill["wire_version"] != decode["wire_version"]:
            versions = f"{prefill['wire_version']} and {decode['wire_version']}"
            message = f"{name} speak wire versions {versions}: install the same Phasewise on both hosts"
            found.append(Finding(Severity.ERROR, message))
        for probe in pair["probes"]:
            if probe["failure"] == NO_TIME_LEFT:
                message = f"{name}: no time was left to measure {probe['num_bytes']:,} bytes; raise --timeout"
                found.append(Finding(Severity.WARNING, message))
            elif probe["seconds"] is None:
                message = f"{name}: a probe of {probe['num_bytes']:,} bytes failed: {probe['failure']}"
                found.append(Finding(Severity.ERROR, message))
        on_gpus = all(worker["device"].startswith("cuda") for worker in (prefill, decode))
        if on_gpus and wanted != "object_store" and pair["link"] == "object_store":
            message = f"{name} fell back to object_store: the direct link is down; the log has the reason"
            found.append(Finding(Severity.WARNING, message))
        if not pair["is_lossless"]:
            found.append(Finding(Severity.NOTE, f"{name} loses precision: {conversions(cluster, pair)}"))
    return found


def _of_transfer(cluster: Cluster) -> list[Finding]:
    found = []
    transfer, pairs = cluster.report["transfer"], cluster.pairs
    measured = [pair for pair in pairs if pair["bytes_per_s"] > 0]
    if transfer["codec"] != "none" and measured and all(pair["codec"] == "none" for pair in measured):
        message = f"transfer.codec {transfer['codec']} is allowed, and no link is slow enough for it: set it to none"
        found.append(Finding(Severity.WARNING, message))
    part_bytes = max((_layerwise_part_bytes(cluster, pair) for pair in pairs), default=0)
    if transfer["window_bytes"] < part_bytes:
        message = (
            f"transfer.window_mib {transfer['window_bytes'] >> 20} is less than a part of {part_bytes:,} bytes: they "
            f"go one by one; set it to {ceil(2 * part_bytes / 2**20)} or more"
        )
        found.append(Finding(Severity.WARNING, message))
    return found


def _layerwise_part_bytes(cluster: Cluster, pair: Json) -> int:
    """The largest part of a prompt that is pushed layer by layer."""
    worker = cluster.workers[pair["prefill"]]
    layers = min(worker["layers_per_part"] / worker["kv_layout"]["num_layers"], 1.0)
    return min(pair["max_part_bytes"], int(worker["chunk_tokens"] * pair["bytes_per_token"] * layers))


def _of_lengths(cluster: Cluster, prompt_tokens: Sequence[int]) -> list[Finding]:
    found = []
    by_length = sorted(cluster.ready, key=lambda worker: worker["max_model_len"])
    if by_length and by_length[0]["max_model_len"] < by_length[-1]["max_model_len"]:
        least, most = by_length[0], by_length[-1]
        message = (
            f"{least['id']} holds {least['max_model_len']:,} tokens of a sequence and {most['id']} "
            f"{most['max_model_len']:,}: longer requests are refused; give {least['id']} more cache"
        )
        found.append(Finding(Severity.WARNING, message))
    for num_tokens in prompt_tokens:
        if num_tokens > cluster.context_length:
            message = f"a prompt of {num_tokens:,} tokens is not served: the context is {cluster.context_length:,}"
            found.append(Finding(Severity.WARNING, message))
    return found
