"""What workers tell of their links: facts, and measured times of probes."""

from __future__ import annotations

from dataclasses import dataclass

from phasewise.core.placement import WorkerId

SMALLEST_PROBE_BYTES = 32
PROBE_ALIGNMENT = 16
NO_TIME_LEFT = "no time was left for it; raise timeout_s"
"""A probe's failure when it was not tried: nothing is known of the link."""


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """How KV gets from one worker to another, and what happens to it on its way.

    Attributes:
        link: `nccl`, `object_store` or `loopback`: where the next part would go.
        bytes_per_s: measured by the link; 0.0 when not known.
        part_s: what each part costs its sender besides the time of its bytes, as the link knows it.
        max_part_bytes: larger parts are cut.
        dtype, codec: of the values on the wire, by what is known now.
        bytes_per_token: on the wire.
        is_lossless: the peer's cache gets exactly the numbers of this one's.
        refusal: why the peer can never take a handoff, or "".
    """

    peer: WorkerId
    link: str
    bytes_per_s: float
    part_s: float
    max_part_bytes: int
    dtype: str
    codec: str
    bytes_per_token: float
    is_lossless: bool
    refusal: str


@dataclass(frozen=True, slots=True)
class WorkerLinks:
    """A worker's side of all its handoffs. `layers_per_part` and `chunk_tokens` are those that it works with."""

    worker_id: WorkerId
    wire_version: int
    layers_per_part: int
    chunk_tokens: int
    links: tuple[LinkFacts, ...]


@dataclass(frozen=True, slots=True)
class LinkProbe:
    """One part sent for measuring. `seconds`: until its acknowledgement was here; None: `failure` says why."""

    num_bytes: int
    seconds: float | None
    failure: str = ""
