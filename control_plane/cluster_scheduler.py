"""Decides where each request runs. Sans-I/O: events in, decisions out, time from a clock.

The scheduler keeps a ledger: for every open request its placement and the work that is left of it. Gateways feed it
(arrival, first token, end), because they hold the truth about their requests; workers' load reports tell who is alive
and how full.

Events                       Decision
    worker_joined / _lost      (lost: nothing here; each gateway moves its own requests, by `place`)
    place(arrival)             a Placement, or Overloaded, or Unavailable
    first_token(id)            the prompt's work is off the prefill worker
    finished(id)               all its work is off
    tick()                     workers that are overdue, now marked lost

Each attempt at a request is placed under an id of its own, and ended like a request. Borrowing between pools and role
changes will be further events of this class: the roles in the registry are their place.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from control_plane.health import ListenedTime
from control_plane.policies.placement import Arrival, Candidate, choose_pair
from control_plane.serving_pools import why_unservable
from control_plane.worker_registry import Member, WorkerRegistry
from phasewise.core.clock import Clock
from phasewise.core.errors import Overloaded, Unavailable
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import Placement, PlaceRequest, WorkerId, WorkerRole
from phasewise.core.profile import DeviceProfile
from phasewise.core.recent import RecentNames

Pools = tuple[list[Candidate], list[Candidate], list[Candidate]]
"""Candidates of the roles prefill, decode and mixed."""

_Kind = tuple[tuple[str, str, str, int], str, int]
"""Workers of one kind take equal times: device, model and weights, and the cache's dtype and block size."""

_EXPECTED_TOKENS_START = 128.0
_SMOOTHING = 0.05


@dataclass(slots=True)
class _Entry:
    placement: Placement
    arrival: Arrival
    prefill_pending: bool = True


@dataclass(slots=True)
class _Work:
    """What is placed on one worker and not done; `num_placed` counts for ever."""

    num_prompts: int = 0
    num_prompt_tokens: int = 0
    num_decoding: int = 0
    num_pledged_tokens: float = 0.0
    num_placed: int = 0

    def add_prompt(self, arrival: Arrival, sign: int) -> None:
        self.num_prompts += sign
        self.num_prompt_tokens += sign * arrival.num_prompt_tokens

    def add_decode(self, arrival: Arrival, sign: int) -> None:
        self.num_decoding += sign * arrival.num_samples
        self.num_pledged_tokens += sign * arrival.num_kv_tokens


class ClusterScheduler:
    """Membership, the ledger of open requests, and placement.

    `max_waiting` bounds the prompts that are placed on a prefill-capable worker and have no first token yet. A worker
    that is silent for `overdue_s` of listened time (health.py) is lost.
    """

    def __init__(self, clock: Clock, *, max_waiting: int, overdue_s: float, heartbeat_s: float) -> None:
        self.listened = ListenedTime(clock, heartbeat_s)
        self.registry = WorkerRegistry(self.listened, overdue_s)
        self._max_waiting = max_waiting
        self._entries: dict[str, _Entry] = {}
        self._work: dict[WorkerId, _Work] = {}
        self._profiles: dict[_Kind, DeviceProfile] = {}
        self._ended_early = RecentNames()
        self._expected_tokens = _EXPECTED_TOKENS_START

    @property
    def num_open(self) -> int:
        return len(self._entries)

    # ---- workers

    def worker_joined(self, info: WorkerInfo) -> None:
        self.registry.join(info)
        self._work.setdefault(info.worker_id, _Work())
        # Workers of one kind are equally fast. What each measured while others started beside it is noise, and would
        # leave one of two equals without work.
        kind = _kind(info)
        self._profiles[kind] = info.profile.joined(self._profiles.get(kind, info.profile))

    def worker_load(self, load: WorkerLoad) -> None:
        self.registry.update(load)

    def worker_lost(self, worker_id: WorkerId) -> bool:
        """True when this is news, so that everybody is told once."""
        return self.registry.mark_lost(worker_id)

    def tick(self) -> list[WorkerId]:
        """Marks overdue workers lost and returns them; the first tick after a pause marks nobody.

        To be called every `heartbeat_s`.
        """
        self.listened.tick()
        if self.listened.is_behind_pause:
            return []  # reports may wait to be read
        return [worker_id for worker_id in self.registry.overdue() if self.worker_lost(worker_id)]

    def why_unservable(self) -> str:
        """Why no request can be served; "" when one can. Lost workers do not come back, so this does not either."""
        pools = {member.info.role for member in self.registry.members()}
        return why_unservable(pools, {member.load.role for member in self.registry.ready()})

    # ---- requests

    def place(self, request: PlaceRequest) -> Placement:
        """Chooses both workers; one of `avoid` only where there is no other of its kind.

        A further attempt is never refused for full queues: its request was taken already. One whose end has come here
        before it is refused: nobody would ever take it out of the ledger.

        Raises:
            Unavailable: no pair of workers is ready, or the attempt has ended.
            Overloaded: every prefill queue is full.
        """
        if request.request_id in self._ended_early:
            raise Unavailable("the request ended while it was placed")
        expected = min(float(request.max_tokens), self._expected_tokens)
        arrival = Arrival(request.request_id, request.num_prompt_tokens, request.num_samples, expected)
        prefills, decodes, mixed = _preferred(self._candidates(), request.avoid)
        if not mixed and not (prefills and decodes):
            raise Unavailable(self.why_unservable(), retry_after_s=2.0)
        if request.attempt == 0:
            prefills = [c for c in prefills if c.num_pending_prompts < self._max_waiting]
            mixed = [c for c in mixed if c.num_pending_prompts < self._max_waiting]
        pair = choose_pair(arrival, prefills, decodes, mixed)
        if pair is None:
            raise Overloaded(f"{self._max_waiting} prompts wait at every prefill worker already", retry_after_s=1.0)
        placement = Placement(request.request_id, *pair, request.attempt)
        self._enter(_Entry(placement, arrival))
        for worker_id in set(pair):
            self._work[worker_id].num_placed += 1
        return placement

    def first_token(self, request_id: str) -> None:
        entry = self._entries.get(request_id)
        if entry is not None and entry.prefill_pending:
            entry.prefill_pending = False
            self._work[entry.placement.prefill_worker].add_prompt(entry.arrival, -1)

    def finished(self, request_id: str, num_output_tokens: int) -> None:
        """The request is over, however it ended; its output length teaches what to expect."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            self._ended_early.add(request_id)
            return
        if entry.prefill_pending:
            self._work[entry.placement.prefill_worker].add_prompt(entry.arrival, -1)
        self._work[entry.placement.decode_worker].add_decode(entry.arrival, -1)
        if num_output_tokens > 0:
            per_sample = num_output_tokens / entry.arrival.num_samples
            self._expected_tokens += _SMOOTHING * (per_sample - self._expected_tokens)

    # ---- inside

    def _enter(self, entry: _Entry) -> None:
        self._entries[entry.placement.request_id] = entry
        if entry.prefill_pending:
            self._work[entry.placement.prefill_worker].add_prompt(entry.arrival, +1)
        self._work[entry.placement.decode_worker].add_decode(entry.arrival, +1)

    def _candidates(self) -> Pools:
        """Ready workers of the three roles, with the work that the ledger has for them."""

        def candidate(member: Member) -> Candidate:
            info, work = member.info, self._work[member.info.worker_id]
            return Candidate(
                info.worker_id,
                self._profiles[_kind(info)],
                work.num_prompts,
                work.num_prompt_tokens,
                work.num_decoding,
                work.num_pledged_tokens,
                info.num_kv_blocks * info.kv_spec.block_size,
                work.num_placed,
            )

        by_role: dict[WorkerRole, list[Candidate]] = {role: [] for role in WorkerRole}
        for member in self.registry.ready():
            by_role[member.load.role].append(candidate(member))
        return by_role[WorkerRole.PREFILL], by_role[WorkerRole.DECODE], by_role[WorkerRole.MIXED]


def _kind(info: WorkerInfo) -> _Kind:
    return info.profile.facts.kind, info.kv_spec.dtype, info.kv_spec.block_size


def _preferred(pools: Pools, avoid: Collection[WorkerId]) -> Pools:
    """The pools without the workers to avoid; where that leaves no way to go, a pool that became empty as it was."""
    prefills, decodes, mixed = ([c for c in pool if c.worker_id not in avoid] for pool in pools)
    if mixed or (prefills and decodes):
        return prefills, decodes, mixed
    return prefills or pools[0], decodes or pools[1], pools[2]
