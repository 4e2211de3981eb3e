"""What a worker's links take of its GPU, by how many peers it has. Measured: docs/performance.md, "The handoff".

Each NCCL channel is memory in every link, and with more peers each gets a smaller share of the wire anyway; staging
buffers (slabs) are one worker's, for all its links. So few peers get much of both, and many still stay within a
gibibyte.
"""

from __future__ import annotations

from dataclasses import dataclass

from phasewise.core.config import ServingConfig


@dataclass(frozen=True, slots=True)
class LinkSizes:
    """As transfer.nccl_channels, .num_slabs and .slab_mib of the configuration."""

    channels: int
    num_slabs: int
    slab_mib: int


_BY_PEERS = ((2, LinkSizes(16, 4, 128)), (4, LinkSizes(8, 2, 128)))  # up to so many
_MANY_PEERS = LinkSizes(4, 2, 96)


def sizes_for(num_peers: int) -> LinkSizes:
    return next((sizes for most, sizes in _BY_PEERS if num_peers <= most), _MANY_PEERS)


def link_sizes(config: ServingConfig) -> LinkSizes:
    """Those of all workers of a cluster: the two ends of a link must have equally many channels."""
    pools, transfer = config.pools, config.transfer
    sizes = sizes_for(max(pools.prefill.workers, pools.decode.workers))
    return LinkSizes(
        transfer.nccl_channels or sizes.channels,
        transfer.num_slabs or sizes.num_slabs,
        transfer.slab_mib or sizes.slab_mib,
    )
