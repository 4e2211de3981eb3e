"""What a worker process is told when it is made."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from phasewise.core.birth import MemberBirth
from phasewise.core.config import ServingConfig
from phasewise.core.placement import WorkerId, WorkerRole


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """One worker of a cluster. `device` is a torch device name: `cpu`, `cuda:0`.

    With `tensor_parallel` > 1 the worker is so many processes, and rank r is on GPU r of those that they see.
    `secret` is known to the processes of this cluster alone: links and connections for tokens are opened only to those
    who know it. `head` is an address of the cluster: others reach this worker at the address from which its host
    reaches that one. "": on this host only.
    """

    worker_id: WorkerId
    role: WorkerRole
    device: str
    num_threads: int
    config: ServingConfig
    log_collector: str | None = None
    tensor_parallel: int = 1
    secret: str = field(default="", repr=False)
    head: str = ""


def settings_of(birth: MemberBirth) -> WorkerSettings:
    """What a worker was told, completed on the host where it runs: its share of the cores that are there."""
    assert birth.role is not None, "a gateway is no worker"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return WorkerSettings(
        birth.member_id,
        birth.role,
        birth.device,
        birth.num_threads or max(cores // birth.num_sharing, 1),
        birth.config,
        birth.log_collector,
        birth.tensor_parallel,
        birth.secret,
        birth.head,
    )


CPU_TOKEN_BUDGET = 128  # a step stays short enough for an abort to be heard within a second
GPU_TOKEN_BUDGET = 2048  # Splitwise, figure 6: prompt throughput falls beyond


def token_budget(config: ServingConfig, device: str) -> int:
    """Most tokens in one step."""
    return config.scheduler.token_budget or (CPU_TOKEN_BUDGET if device == "cpu" else GPU_TOKEN_BUDGET)
