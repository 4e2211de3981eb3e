"""Decides where each request runs. Sans-I/O: events in, decisions out, time from a clock.

The scheduler keeps a ledger: for every open attempt its placement, and on each worker the work that is left of those.
Gateways feed it (arrival, first token, end), because they hold the truth about their requests; workers' load reports
tell who is alive and how full.

Event                        Decision
    worker_joined              requests may be placed on it
    worker_changed             its role or state is another
    worker_lost                it is forgotten; each gateway moves its own requests, by `place`
    gateway_lost               its attempts are over
    place(request)             a Placement, or Overloaded, or Unavailable
    restore(attempt)           a placement of before this process was made: a gateway still has it
    first_token(id)            the prompt's work is off the prefill worker
    finished(id)               all its work is off

Each attempt at a request is placed under an id of its own, and ended like a request. Who is in the cluster is decided
in membership.py, which calls this.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from control_plane.policies.placement import Arrival, Candidate, choose_pair
from control_plane.serving_pools import why_unservable
from control_plane.worker_registry import WorkerRegistry
from phasewise.core.clock import Clock
from phasewise.core.errors import Overloaded, Unavailable
from phasewise.core.heartbeat import OpenAttempt
from phasewise.core.identity import MemberId
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import Placement, PlaceRequest, WorkerId, WorkerRole, WorkerState
from phasewise.core.profile import DeviceProfile
from phasewise.core.recent import RecentNames

Pools = tuple[list[Candidate], list[Candidate], list[Candidate]]
"""Ready workers of the roles prefill, decode and mixed."""

_Kind = tuple[tuple[str, str, str, int], str, int]
"""Workers of one kind take equal times: device, model and weights, and the cache's dtype and block size."""

_EXPECTED_TOKENS_START = 128.0
_SMOOTHING = 0.05


@dataclass(slots=True)
class _Entry:
    """An open attempt. `prefill_pending`: it has no first token yet."""

    placement: Placement
    arrival: Arrival
    gateway_id: MemberId
    prefill_pending: bool = True


class ClusterScheduler:
    """The ledger of open attempts, and placement.

    `max_waiting` bounds the prompts that are placed on a prefill-capable worker and have no first token yet.
    `candidates` has the workers with their work: to be read only.
    """

    def __init__(self, clock: Clock, *, max_waiting: int) -> None:
        self.registry = WorkerRegistry()
        self.candidates: dict[WorkerId, Candidate] = {}
        self._clock = clock
        self._max_waiting = max_waiting
        self._pools: set[WorkerRole] = set()  # roles that workers ever had
        self._entries: dict[str, _Entry] = {}  # by the id of the attempt
        self._profiles: dict[_Kind, DeviceProfile] = {}
        self._ended_early = RecentNames()  # ids of attempts whose end came before they were placed
        self._expected_tokens = _EXPECTED_TOKENS_START

    @property
    def num_open(self) -> int:
        """Attempts that are placed and have not ended."""
        return len(self._entries)

    # ---- workers

    def worker_joined(self, info: WorkerInfo) -> None:
        self.registry.join(info)
        self._pools.add(info.role)
        # Workers of one kind are equally fast. What each measured while others started beside it is noise, and would
        # leave one of two equals without work.
        kind = _kind(info)
        profile = self._profiles[kind] = info.profile.joined(self._profiles.get(kind, info.profile))
        capacity_tokens = info.num_kv_blocks * info.kv_spec.block_size
        self.candidates.setdefault(info.worker_id, Candidate(info.worker_id, profile, capacity_tokens))
        for member in self.registry.members():
            if _kind(member.info) == kind:
                self.candidates[member.info.worker_id].profile = profile

    def worker_load(self, load: WorkerLoad) -> None:
        self.registry.update(load)

    def worker_changed(self, worker_id: WorkerId, role: WorkerRole, state: WorkerState) -> None:
        """Requests are placed on a ready worker alone, for the phases of its role."""
        self._pools.add(role)
        self.registry.change(worker_id, role, state)

    def worker_lost(self, worker_id: WorkerId) -> bool:
        """Forgets a worker. True when it was known. Attempts on it are ended by their gateways."""
        self.candidates.pop(worker_id, None)
        return self.registry.forget(worker_id)

    def gateway_lost(self, gateway_id: MemberId) -> None:
        """Its attempts are over: nobody else would say so."""
        for request_id in [r for r, entry in self._entries.items() if entry.gateway_id == gateway_id]:
            self.finished(request_id, 0)

    def why_unservable(self) -> str:
        """Why no request can be served; "" when one can."""
        return why_unservable(self._pools, {member.load.role for member in self.registry.ready()})

    # ---- requests

    def place(self, request: PlaceRequest) -> Placement:
        """Chooses both workers; one of `avoid` only where there is no other of its kind.

        A further attempt is never refused for full queues: its request was taken already. An attempt that has ended
        before it is placed is refused: nobody would ever take it out of the ledger. One that is asked for again, for
        the answer did not arrive, is placed where it was.

        Raises:
            Unavailable: no pair of workers is ready, or the attempt has ended.
            Overloaded: every prefill queue is full.
        """
        if request.request_id in self._ended_early:
            raise Unavailable("the request ended while it was placed")
        if request.request_id in self._entries:
            return self._entries[request.request_id].placement
        expected = min(float(request.max_tokens), self._expected_tokens)
        arrival = Arrival(request.request_id, request.num_prompt_tokens, request.num_samples, expected)
        prefills, decodes, mixed = self._ready()
        if request.avoid:
            prefills, decodes, mixed = _preferred((prefills, decodes, mixed), request.avoid)
        if not mixed and not (prefills and decodes):
            raise Unavailable(self.why_unservable(), retry_after_s=2.0)
        if request.attempt == 0:
            prefills = [c for c in prefills if c.num_pending_prompts < self._max_waiting]
            mixed = [c for c in mixed if c.num_pending_prompts < self._max_waiting]
        pair = choose_pair(arrival, prefills, decodes, mixed)
        if pair is None:
            raise Overloaded(f"{self._max_waiting} prompts wait at every prefill worker already", retry_after_s=1.0)
        placement = Placement(request.request_id, *pair, request.attempt)
        self._enter(_Entry(placement, arrival, request.gateway_id))
        for worker_id in set(pair):
            self.candidates[worker_id].num_placed += 1
        return placement

    def restore(self, attempt: OpenAttempt, gateway_id: MemberId) -> None:
        """An attempt that was placed before this process was made."""
        expected = min(float(attempt.max_tokens), self._expected_tokens)
        placement = attempt.placement
        arrival = Arrival(placement.request_id, attempt.num_prompt_tokens, attempt.num_samples, expected)
        self._enter(_Entry(placement, arrival, gateway_id))
        if attempt.has_first_token:
            self.first_token(placement.request_id)

    def first_token(self, request_id: str) -> None:
        """The prompt is computed. Ignored when the attempt is not open, or has said so before."""
        entry = self._entries.get(request_id)
        if entry is not None and entry.prefill_pending:
            entry.prefill_pending = False
            self._count_prompt(entry, -1)

    def finished(self, request_id: str, num_output_tokens: int) -> None:
        """The attempt is over, however it ended; its output length teaches what to expect."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            self._ended_early.add(request_id)
            return
        if entry.prefill_pending:
            self._count_prompt(entry, -1)
        self._count_decode(entry, -1)
        if num_output_tokens > 0:
            per_sample = num_output_tokens / entry.arrival.num_samples
            self._expected_tokens += _SMOOTHING * (per_sample - self._expected_tokens)

    def _enter(self, entry: _Entry) -> None:
        self._entries[entry.placement.request_id] = entry
        self._count_prompt(entry, +1)
        self._count_decode(entry, +1)

    def _count_prompt(self, entry: _Entry, sign: int) -> None:
        if worker := self.candidates.get(entry.placement.prefill_worker):  # else it is gone
            worker.add_prompt(entry.arrival, sign)

    def _count_decode(self, entry: _Entry, sign: int) -> None:
        if worker := self.candidates.get(entry.placement.decode_worker):
            worker.add_decode(entry.arrival, sign)

    def _ready(self) -> Pools:
        by_role: dict[WorkerRole, list[Candidate]] = {role: [] for role in WorkerRole}
        for member in self.registry.ready():
            by_role[member.load.role].append(self.candidates[member.info.worker_id])
        return by_role[WorkerRole.PREFILL], by_role[WorkerRole.DECODE], by_role[WorkerRole.MIXED]


def _kind(info: WorkerInfo) -> _Kind:
    return info.profile.facts.kind, info.kv_spec.dtype, info.kv_spec.block_size


def _preferred(pools: Pools, avoid: Collection[WorkerId]) -> Pools:
    """The pools without the workers to avoid; where that leaves no way to go, a pool that became empty as it was."""
    prefills, decodes, mixed = ([c for c in pool if c.worker_id not in avoid] for pool in pools)
    if mixed or (prefills and decodes):
        return prefills, decodes, mixed
    return prefills or pools[0], decodes or pools[1], pools[2]
