"""What a cluster should be: how many members of each pool. The control plane's reconciler makes it so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from phasewise.core.config import ServingConfig
from phasewise.core.placement import WorkerRole


@dataclass(frozen=True, slots=True)
class DesiredState:
    """Workers of each role, and gateways. A role that is not named has none."""

    pools: Mapping[WorkerRole, int] = field(default_factory=dict)
    gateways: int = 1

    def size(self, role: WorkerRole) -> int:
        return self.pools.get(role, 0)

    def scaled(self, role: WorkerRole, size: int) -> DesiredState:
        return replace(self, pools={**self.pools, role: size})


def desired_of(config: ServingConfig) -> DesiredState:
    """What a configuration asks for at the start."""
    pools = config.pools
    sizes = {WorkerRole.PREFILL: pools.prefill, WorkerRole.DECODE: pools.decode, WorkerRole.MIXED: pools.mixed}
    return DesiredState({role: pool.workers for role, pool in sizes.items()})
