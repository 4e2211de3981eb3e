"""The hop messages: everything that travels between gateway, workers and control plane.

    gateway → prefill worker     PrefillTask
    gateway → both workers       AbortRequest
    prefill → decode worker      KVOffer, KVPart (with a payload), KVCommit, KVAbort
    decode → prefill worker      KVAccepted, KVRefused, KVPartAck, KVDone, KVFailed
    worker → gateway             WorkerOutput: one per step and gateway
    worker → control plane       WorkerInfo once, WorkerLoad often
    control plane → worker       PeerLost, GatewayLost, Drain, ChangeRole
    a worker's own links         LinkLost

All are frozen, hold no tensors, and can be pickled. Times that cross a process are either durations left
(`time_left_s`) or seconds since the epoch (`…_unix_s`): monotonic clocks of two processes do not compare.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.lifecycle import Stage
from phasewise.core.placement import Placement, WorkerId, WorkerRole, WorkerState
from phasewise.core.profile import DeviceProfile
from phasewise.core.request import FinishReason, Request, SampledToken

PROBE_DTYPE = "probe"

# ---- to a worker, from a gateway


@dataclass(frozen=True, slots=True)
class PrefillTask:
    """Run this prompt; hand its KV to `placement.decode_worker`; send tokens to `gateway_id`."""

    request: Request
    placement: Placement
    gateway_id: str
    time_left_s: float


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """Forget a request, or one sample of it when `sample_index` is given. Unknown ids are ignored: it may be over."""

    request_id: str
    sample_index: int | None = None


# ---- between workers: a handoff


@dataclass(frozen=True, slots=True)
class KVOffer:
    """Prefill asks decode to set blocks aside for a prompt that is about to run."""

    transfer_id: str
    wire_version: int
    sender: WorkerId
    spec: KVCacheSpec
    request: Request
    gateway_id: str
    time_left_s: float


@dataclass(frozen=True, slots=True)
class KVAccepted:
    """Blocks are set aside. The first `num_cached_tokens` need not be sent: decode has them in its prefix cache.

    `dtype` is that of the receiver's cache, which may differ from the sender's.
    """

    transfer_id: str
    num_cached_tokens: int
    dtype: str


@dataclass(frozen=True, slots=True)
class KVRefused:
    """The offer cannot be taken, ever: version, fingerprint or size do not fit, or its time is over.

    `others_may`: another worker may take it. This one drains, or decodes no more.
    """

    transfer_id: str
    reason: str
    others_may: bool = False


@dataclass(frozen=True, slots=True)
class KVPart:
    """Header of one part: KV of some layers and tokens. `num_bytes` travel beside it (kv_transfer/codec.py).

    `dtype` is that of the values before the codec: of the two caches' dtypes the narrower one. A part with the dtype
    "probe" is of no handoff: it only measures the link (kv_transfer/prober.py).
    """

    transfer_id: str
    part_index: int
    first_layer: int
    num_layers: int
    first_token: int
    num_tokens: int
    num_bytes: int
    dtype: str
    codec: str

    @property
    def is_probe(self) -> bool:
        return self.dtype == PROBE_DTYPE


@dataclass(frozen=True, slots=True)
class KVPartAck:
    """A part has arrived, or been given up: its bytes no longer count against the sender's window."""

    transfer_id: str
    part_index: int


@dataclass(frozen=True, slots=True)
class KVCommit:
    """All parts are sent. Nothing is decoded before this has come and all `num_parts` parts are in and right.

    `first_tokens[i]` is sample i's first token, or None when that sample ended with it.
    """

    transfer_id: str
    num_parts: int
    num_tokens: int
    first_tokens: tuple[SampledToken | None, ...]
    started_unix_s: float


@dataclass(frozen=True, slots=True)
class KVAbort:
    """The sender gives the handoff up; the receiver frees what it set aside."""

    transfer_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class KVDone:
    """Decode owns the sequence now; prefill may free its blocks."""

    transfer_id: str


@dataclass(frozen=True, slots=True)
class KVFailed:
    """The receiver gives the handoff up (checksum, lease, cancel); its blocks are free."""

    transfer_id: str
    reason: str


# ---- from a worker to a gateway


class NewTokens(NamedTuple):
    """New tokens of one sample. `position` is the output position of the first, so order can be restored.

    A tuple, because each step makes one for every sequence: a frozen dataclass takes three times as long to make.
    """

    request_id: str
    sample_index: int
    position: int
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of the prompt's tokens; the first token has none (its `logprob` is None)."""

    request_id: str
    tokens: tuple[SampledToken, ...]


@dataclass(frozen=True, slots=True)
class TimelineEvent:
    """One moment of a request. The last three are set where the stage has them.

    `num_tokens` of `prefill_start` is the part of the prompt that the prefix cache had.
    """

    request_id: str
    stage: Stage
    at_unix_s: float
    worker_id: WorkerId
    num_bytes: int = 0
    duration_s: float = 0.0
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """A worker gave a request up. `code` is that of the error class (phasewise/core/errors.py)."""

    request_id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class WorkerOutput:
    """All that one step of one worker has for one gateway."""

    worker_id: WorkerId
    chunks: tuple[NewTokens, ...] = ()
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    events: tuple[TimelineEvent, ...] = ()
    failures: tuple[RequestFailed, ...] = ()


# ---- between workers and the control plane


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What does not change while a worker lives. `link_address`: where its direct links listen; "" for none."""

    worker_id: WorkerId
    role: WorkerRole
    pid: int
    host: str
    device: str
    dtype: str
    num_threads: int
    kv_spec: KVCacheSpec
    num_kv_blocks: int
    max_model_len: int
    profile: DeviceProfile
    link_address: str = ""


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What changes: sent when it changed, and as a heartbeat.

    A block counts as used while a sequence or a reservation refers to it; blocks that only the prefix cache
    remembers count as free (`num_cached_blocks` of the free ones are such). `counters` only grow. `number` counts the
    worker's reports, which may overtake each other.
    """

    worker_id: WorkerId
    role: WorkerRole
    state: WorkerState
    num_waiting: int = 0
    num_running: int = 0
    num_preempted: int = 0
    num_reservations: int = 0
    num_handoffs_out: int = 0
    waiting_prompt_tokens: int = 0
    num_kv_blocks: int = 0
    num_used_blocks: int = 0
    num_cached_blocks: int = 0
    counters: dict[str, float] = field(default_factory=dict)
    number: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether the worker has nothing of any request, KV that others have not fetched included."""
        counts = (self.num_waiting, self.num_running, self.num_preempted, self.num_reservations, self.num_handoffs_out)
        return not any(counts) and not self.num_used_blocks


@dataclass(frozen=True, slots=True)
class PeerLost:
    """A worker is gone for good: free what it held here, expect nothing from it."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The link between this worker and `peer` broke, and took with it parts of the transfers `transfer_ids`.

    Others are not concerned: their parts have arrived, or took another link.
    """

    peer: WorkerId
    reason: str
    transfer_ids: frozenset[str]


@dataclass(frozen=True, slots=True)
class GatewayLost:
    """A gateway is gone: cancel its requests."""

    gateway_id: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Take nothing new and give back what waits. What still runs after `time_left_s` is given back, too."""

    time_left_s: float


@dataclass(frozen=True, slots=True)
class ChangeRole:
    """Do what `role` says from now on."""

    role: WorkerRole


WorkerMessage = (
    PrefillTask
    | AbortRequest
    | KVOffer
    | KVAccepted
    | KVRefused
    | KVPart
    | KVPartAck
    | KVCommit
    | KVAbort
    | KVDone
    | KVFailed
    | PeerLost
    | LinkLost
    | GatewayLost
    | Drain
    | ChangeRole
)
