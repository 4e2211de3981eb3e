"""What a member's process is told when it is made. Everything else it asks the control plane for."""

from __future__ import annotations

from dataclasses import dataclass, field

from phasewise.core.config import ServingConfig
from phasewise.core.identity import MemberId
from phasewise.core.placement import WorkerRole

CONTROL_PLANE_NAME = "control-plane"
"""Under which every member finds the control plane, in the cluster's namespace. A member is found by its identity."""


@dataclass(frozen=True, slots=True)
class MemberBirth:
    """The one argument of a member's actor.

    Attributes:
        role: a worker's; None for a gateway.
        config: of the cluster. A worker's has the cache settings of its pool; a gateway's has the addresses where its
            predecessor of the same name listened.
        device: a worker's: `cpu` or `cuda`.
        num_threads: of a worker, on each of its ranks. None: the cores of its host, shared out.
        num_sharing: processes that share the cores of a host.
        log_collector: the path of a socket that takes its log.
        secret: known to the processes of this cluster alone: links and connections for tokens are opened only to those
            who know it.
        head: an address of the cluster: others reach this member at the address from which its host reaches that one.
            "": on this host only.
    """

    member_id: MemberId
    role: WorkerRole | None
    config: ServingConfig
    device: str = "cpu"
    tensor_parallel: int = 1
    num_threads: int | None = None
    num_sharing: int = 1
    log_collector: str | None = None
    secret: str = field(default="", repr=False)
    head: str = ""
