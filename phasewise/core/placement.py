"""Who does what for a request: worker identities, roles, placements."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

WorkerId = str
"""`<role>-<number>#<birth>` (identity.py): `prefill-0#1`. The role in the name is the role at birth."""


class WorkerRole(StrEnum):
    """Which phases a worker runs."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"
    ATTENTION = "attention"

    @property
    def can_prefill(self) -> bool:
        return self in (WorkerRole.PREFILL, WorkerRole.MIXED)

    @property
    def can_decode(self) -> bool:
        return self in (WorkerRole.DECODE, WorkerRole.MIXED)


class WorkerState(StrEnum):
    """A worker's own life: loading → ready → draining → stopped; suspect while it is silent, lost when it vanished."""

    LOADING = "loading"
    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    STOPPED = "stopped"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class PlaceRequest:
    """What a gateway asks the control plane for: workers for one attempt at a request.

    Attributes:
        request_id: of the attempt, never used twice.
        num_samples: sequences that will decode; they share the prompt's KV.
        max_tokens: most output tokens of one sample.
        attempt: 0 for the first; a further one is not refused for full queues.
        avoid: workers to be chosen only where there is no other.
        gateway_id: whose request it is; the attempts of a gateway that is gone are over.
    """

    request_id: str
    num_prompt_tokens: int
    num_samples: int
    max_tokens: int
    attempt: int = 0
    avoid: frozenset[WorkerId] = frozenset()
    gateway_id: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """The workers chosen for one attempt at a request. `attempt` counts from 0 and grows with each recovery."""

    request_id: str
    prefill_worker: WorkerId
    decode_worker: WorkerId
    attempt: int = 0

    @property
    def is_local(self) -> bool:
        """True when one worker does both phases, so no KV moves."""
        return self.prefill_worker == self.decode_worker
