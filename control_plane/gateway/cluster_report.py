"""The workers of a cluster as JSON: what GET /status answers of them."""

from __future__ import annotations

from typing import Any

from phasewise.core.identity import name_of
from phasewise.core.messages import WorkerInfo, WorkerLoad


def worker_report(info: WorkerInfo, load: WorkerLoad) -> dict[str, Any]:
    """One worker: what it is, and what it last said of its load."""
    return {
        "id": info.worker_id,
        "name": name_of(info.worker_id),
        "pid": info.pid,
        "role": load.role.value,
        "state": load.state.value,
        "host": info.host,
        "device": info.device,
        "dtype": info.dtype,
        "threads": info.num_threads,
        "waiting": load.num_waiting,
        "running": load.num_running,
        "preempted": load.num_preempted,
        "reservations": load.num_reservations,
        "handoffs": load.num_handoffs_out,
        "kv_blocks": load.num_kv_blocks,
        "kv_used_blocks": load.num_used_blocks,
        "kv_cached_blocks": load.num_cached_blocks,
        "waiting_prompt_tokens": load.waiting_prompt_tokens,
        "counters": load.counters,
    }
