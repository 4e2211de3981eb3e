"""A survey of a cluster's links as JSON: what GET /links and POST /links/probe answer."""

from __future__ import annotations

import json
from typing import Any

from control_plane.link_survey import LinkSurvey, Pair
from phasewise.core.messages import WorkerInfo, WorkerLoad


def link_report(survey: LinkSurvey, context_length: int) -> dict[str, Any]:
    """`context_length`: the longest prompt plus output that the cluster serves, in tokens."""
    transfer = survey.transfer
    return {
        "context_length": context_length,
        "transfer": {
            "link": transfer.link,
            "codec": transfer.codec,
            "window_bytes": transfer.window_mib * 2**20,
            "layerwise_threshold_tokens": transfer.layerwise_threshold_tokens,
        },
        "workers": [_worker(survey, info, load) for info, load in survey.workers],
        "pairs": [_pair(pair) for pair in survey.pairs],
    }


def _worker(survey: LinkSurvey, info: WorkerInfo, load: WorkerLoad) -> dict[str, Any]:
    spec, side = info.kv_spec, survey.sides.get(info.worker_id)
    return {
        "id": info.worker_id,
        "role": load.role.value,
        "state": load.state.value,
        "host": info.host,
        "device": info.device,
        "ranks": info.profile.facts.tensor_parallel,
        "max_model_len": info.max_model_len,
        "kv_tokens": info.num_kv_blocks * spec.block_size,
        "kv_layout": {
            "num_layers": spec.num_layers,
            "num_kv_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "block_size": spec.block_size,
            "dtype": spec.dtype,
            "content_fingerprint": spec.content_fingerprint,
        },
        "wire_version": side.wire_version if side else None,
        "layers_per_part": side.layers_per_part if side else None,
        "chunk_tokens": side.chunk_tokens if side else None,
        "checksum_failures": load.counters.get("checksum_failures", 0.0),
        "profile": json.loads(info.profile.to_json()),
    }


def _pair(pair: Pair) -> dict[str, Any]:
    facts = pair.facts
    return {
        "prefill": pair.prefill,
        "decode": pair.decode,
        "link": facts.link,
        "bytes_per_s": facts.bytes_per_s,
        "part_s": facts.part_s,
        "max_part_bytes": facts.max_part_bytes,
        "dtype": facts.dtype,
        "codec": facts.codec,
        "bytes_per_token": facts.bytes_per_token,
        "is_lossless": facts.is_lossless,
        "refusal": facts.refusal,
        "probes": [{"num_bytes": p.num_bytes, "seconds": p.seconds, "failure": p.failure} for p in pair.probes],
    }
