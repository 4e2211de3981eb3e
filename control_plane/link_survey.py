"""Looks at the links from every prefill to every decode worker, and measures them one after the other.

A LinkAsker reaches the workers: in a cluster by calls to their actors (control_plane/remote_members.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from phasewise.core.clock import Clock
from phasewise.core.config import TransferConfig
from phasewise.core.errors import InvalidRequest, Overloaded, Unavailable
from phasewise.core.links import (
    NO_TIME_LEFT,
    PROBE_ALIGNMENT,
    SMALLEST_PROBE_BYTES,
    LinkFacts,
    LinkProbe,
    WorkerLinks,
)
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import WorkerId, WorkerRole, WorkerState

DEFAULT_SIZES = (SMALLEST_PROBE_BYTES, 1 << 20, 16 << 20, 64 << 20)
DEFAULT_TIMEOUT_S = 30.0
_MOST_SIZES, _LARGEST_SIZE, _LONGEST_TIMEOUT_S = 8, 1 << 30, 600.0
_REPEATS = 3  # the fastest counts: noise only ever slows one down


class LinkAsker(Protocol):
    """How workers are asked for their links."""

    async def links(self, worker_id: WorkerId, peers: Sequence[WorkerInfo]) -> WorkerLinks:
        """The worker's links to `peers`. Raises Unavailable when the worker does not answer."""

    async def probe(self, worker_id: WorkerId, peer: WorkerId, num_bytes: int, timeout_s: float) -> LinkProbe:
        """Has the worker send one part to `peer`. Raises Unavailable when the worker does not answer."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A prefill and a decode worker that are ready, and what is known between them."""

    prefill: WorkerId
    decode: WorkerId
    facts: LinkFacts
    probes: tuple[LinkProbe, ...] = ()


@dataclass(frozen=True, slots=True)
class LinkSurvey:
    """All workers, lost ones too, and all pairs of ready ones. `sides`: what each ready worker knows of its links."""

    transfer: TransferConfig
    workers: tuple[tuple[WorkerInfo, WorkerLoad], ...]
    sides: Mapping[WorkerId, WorkerLinks]
    pairs: tuple[Pair, ...]

    def with_probes(self, probes: Mapping[tuple[WorkerId, WorkerId], tuple[LinkProbe, ...]]) -> LinkSurvey:
        """The survey with what `measure` gave. Probes of pairs that are gone are left out."""
        return replace(self, pairs=tuple(replace(p, probes=probes.get((p.prefill, p.decode), ())) for p in self.pairs))


def check_probes(sizes: Sequence[int], timeout_s: float) -> None:
    """Raises InvalidRequest that names `sizes` or `timeout_s`."""
    if not 1 <= len(sizes) <= _MOST_SIZES:
        raise InvalidRequest(f"sizes must have 1 to {_MOST_SIZES} entries, not {len(sizes)}", field="sizes")
    for i, size in enumerate(sizes):
        if not SMALLEST_PROBE_BYTES <= size <= _LARGEST_SIZE or size % PROBE_ALIGNMENT:
            wanted = f"a multiple of {PROBE_ALIGNMENT} from {SMALLEST_PROBE_BYTES} to {_LARGEST_SIZE} bytes"
            raise InvalidRequest(f"sizes[{i}] must be {wanted}, not {size}", field=f"sizes[{i}]")
    if not 0 < timeout_s <= _LONGEST_TIMEOUT_S:
        raise InvalidRequest(
            f"timeout_s must be above 0 and at most {_LONGEST_TIMEOUT_S:g}, not {timeout_s:g}", field="timeout_s"
        )


async def look(
    transfer: TransferConfig, workers: Iterable[tuple[WorkerInfo, WorkerLoad]], asker: LinkAsker
) -> LinkSurvey:
    """What workers know of their links, without measuring anything. Raises Unavailable when one does not answer."""
    workers = tuple(workers)
    ready = [(info, load.role) for info, load in workers if load.state is WorkerState.READY]
    decodes = [info for info, role in ready if role is WorkerRole.DECODE]
    asked = [(info.worker_id, decodes if role is WorkerRole.PREFILL else []) for info, role in ready]
    sides = await asyncio.gather(*(asker.links(worker_id, peers) for worker_id, peers in asked))
    pairs = tuple(Pair(side.worker_id, facts.peer, facts) for side in sides for facts in side.links)
    return LinkSurvey(transfer, workers, {side.worker_id: side for side in sides}, pairs)


async def measure(
    pairs: Sequence[Pair], asker: LinkAsker, sizes: Sequence[int], timeout_s: float, clock: Clock
) -> dict[tuple[WorkerId, WorkerId], tuple[LinkProbe, ...]]:
    """Probes every pair in turn, so that none disturbs another: (prefill, decode) → its probes by growing size.

    What is left of `timeout_s` is shared out evenly among the pairs that are left. A size that a link does not take
    becomes the largest that it takes. A failure ends the probes of its pair.
    """
    last_s = clock.now_s() + timeout_s
    probes: dict[tuple[WorkerId, WorkerId], tuple[LinkProbe, ...]] = {}
    for i, pair in enumerate(pairs):
        now_s = clock.now_s()
        end_s = now_s + (last_s - now_s) / (len(pairs) - i)
        largest = pair.facts.max_part_bytes // PROBE_ALIGNMENT * PROBE_ALIGNMENT
        taken: list[LinkProbe] = []
        for size in sorted({min(size, largest) for size in sizes}):
            taken.append(await _fastest(pair, size, asker, end_s, clock))
            if taken[-1].seconds is None:
                break
        probes[pair.prefill, pair.decode] = tuple(taken)
    return probes


async def _fastest(pair: Pair, num_bytes: int, asker: LinkAsker, end_s: float, clock: Clock) -> LinkProbe:
    best = LinkProbe(num_bytes, None, NO_TIME_LEFT)
    for _ in range(_REPEATS):
        left_s = end_s - clock.now_s()
        if left_s <= 0:
            break
        try:
            probe = await asker.probe(pair.prefill, pair.decode, num_bytes, left_s)
        except Unavailable as error:
            return LinkProbe(num_bytes, None, error.message)
        if probe.seconds is None:  # the time, not the link, may have cut a repeat short
            return best if best.seconds is not None and clock.now_s() >= end_s else probe
        if best.seconds is None or probe.seconds < best.seconds:
            best = probe
    return best


class LinkSurveyor:
    """The surveys of one cluster. `workers` gives the workers of the moment, and what each last said."""

    def __init__(
        self,
        transfer: TransferConfig,
        workers: Callable[[], list[tuple[WorkerInfo, WorkerLoad]]],
        asker: LinkAsker,
        clock: Clock,
    ) -> None:
        self._transfer = transfer
        self._workers = workers
        self._asker = asker
        self._clock = clock
        self._is_probing = False

    async def look(self) -> LinkSurvey:
        """What workers know of the links between them. Raises Unavailable when one does not answer."""
        return await look(self._transfer, self._workers(), self._asker)

    async def probe(self, sizes: Sequence[int], timeout_s: float) -> LinkSurvey:
        """The same, measured. One at a time: two would measure each other.

        Raises:
            Overloaded: the links are being measured already.
            Unavailable: a worker does not answer.
        """
        if self._is_probing:
            raise Overloaded("the links are being probed already; ask again later", retry_after_s=timeout_s)
        self._is_probing = True
        try:
            before = await self.look()
            probes = await measure(before.pairs, self._asker, sizes, timeout_s, self._clock)
            return (await self.look()).with_probes(probes)  # with what the links have learnt
        finally:
            self._is_probing = False
