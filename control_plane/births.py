"""What the processes of a cluster's members are told when they are made. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

from phasewise.core.birth import MemberBirth
from phasewise.core.config import ServingConfig
from phasewise.core.desired import DesiredState
from phasewise.core.identity import MemberId, name_of
from phasewise.core.placement import WorkerRole
from phasewise.core.view import GatewayInfo


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """What all members of a cluster have in common. `device`, `log_collector`, `secret`, `head`: as MemberBirth."""

    config: ServingConfig
    device: str
    log_collector: str | None = None
    secret: str = field(default="", repr=False)
    head: str = ""


class Births:
    """Makes MemberBirths. It remembers where gateways listened: a successor takes the same ports."""

    def __init__(self, facts: ClusterFacts) -> None:
        self._facts = facts
        self._gateways: dict[str, GatewayInfo] = {}

    def gateway_joined(self, info: GatewayInfo) -> None:
        self._gateways[name_of(info.gateway_id)] = info

    def birth(self, member_id: MemberId, role: WorkerRole | None, desired: DesiredState, num_hosts: int) -> MemberBirth:
        """`desired`, `num_hosts`: among so many the cores of each host are shared out."""
        facts = self._facts
        if role is None:
            config = self._with_addresses(name_of(member_id))
            return MemberBirth(
                member_id, None, config, log_collector=facts.log_collector, secret=facts.secret, head=facts.head
            )
        pool = facts.config.pool_of(role)
        num_devices = sum(facts.config.pool_of(r).tensor_parallel * size for r, size in desired.pools.items())
        return MemberBirth(
            member_id,
            role,
            facts.config.with_cache_of(pool),
            facts.device,
            pool.tensor_parallel,
            pool.threads,
            max(ceil(num_devices / max(num_hosts, 1)), 1),
            facts.log_collector,
            facts.secret,
            facts.head,
        )

    def _with_addresses(self, name: str) -> ServingConfig:
        config, known = self._facts.config, self._gateways.get(name)
        if known is None:
            return config
        gateway = config.gateway.model_copy(update={"http": known.http, "grpc": known.grpc})
        return config.model_copy(update={"gateway": gateway})
