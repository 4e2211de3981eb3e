"""Measures links with probes: parts that belong to no handoff, sent beside those that do.

A probe waits for a buffer as parts do, behind them, and counts against no window. Each is answered once: when it has
arrived, when its link or peer is lost, or when its time is over.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from kv_transfer.link import DeviceFull, Link
from phasewise.core.clock import Clock
from phasewise.core.links import PROBE_ALIGNMENT, SMALLEST_PROBE_BYTES, LinkProbe
from phasewise.core.messages import PROBE_DTYPE, KVPart, LinkLost
from phasewise.core.placement import WorkerId


@dataclass(frozen=True, slots=True)
class ProbeLink:
    """Send a probe of `num_bytes` to `peer`. For the mailbox of this process: it carries a function.

    `answer` is called once, by the step loop's thread.
    """

    peer: WorkerId
    num_bytes: int
    timeout_s: float
    answer: Callable[[LinkProbe], None]


@dataclass(slots=True)
class _Probe:
    order: ProbeLink
    deadline_s: float
    started_s: float | None = None  # None: not sent yet


class ProbingCache(Protocol):
    """What a prober needs of a worker's cache."""

    def aside(self) -> AbstractContextManager[object]:
        """Within it the current stream is the one on which parts are packed."""


class LinkProber:
    """The probes of one worker. Used by the step loop's thread alone."""

    def __init__(self, worker_id: WorkerId, cache: ProbingCache, link: Link, clock: Clock) -> None:
        self._worker_id = worker_id
        self._cache = cache
        self._link = link
        self._clock = clock
        self._probes: dict[str, _Probe] = {}
        self._num_orders = 0

    def start(self, order: ProbeLink) -> None:
        """Sends the probe when the link has a buffer. One that the link cannot take is answered at once."""
        limit = self._link.max_part_bytes(order.peer)
        if not SMALLEST_PROBE_BYTES <= order.num_bytes <= limit or order.num_bytes % PROBE_ALIGNMENT:
            wanted = f"a multiple of {PROBE_ALIGNMENT} from {SMALLEST_PROBE_BYTES} to {limit}"
            order.answer(LinkProbe(order.num_bytes, None, f"num_bytes must be {wanted}, not {order.num_bytes}"))
            return
        self._num_orders += 1
        # With a blank, which no request's id has: it cannot be that of a transfer.
        probe_id = f"probe {self._worker_id}.{self._num_orders}"
        self._probes[probe_id] = _Probe(order, self._clock.now_s() + order.timeout_s)
        self.poll()

    def poll(self) -> None:
        """Sends what waits for a buffer, and gives up what takes too long: once a round."""
        for probe_id, probe in list(self._probes.items()):
            self._advance(probe_id, probe)

    def on_part_ack(self, probe_id: str) -> None:
        """Acknowledgements of other parts are ignored."""
        probe = self._probes.get(probe_id)
        if probe is not None and probe.started_s is not None:
            self._end(probe_id, self._clock.now_s() - probe.started_s, "")

    def on_link_lost(self, lost: LinkLost) -> None:
        """What was not sent yet goes where the link now leads."""
        for probe_id in lost.transfer_ids & self._probes.keys():
            self._end(probe_id, None, f"the link to {lost.peer} broke: {lost.reason}")

    def on_peer_lost(self, peer: WorkerId) -> None:
        for probe_id, probe in list(self._probes.items()):
            if probe.order.peer == peer:
                self._end(probe_id, None, f"worker {peer} was lost")

    def next_deadline_s(self) -> float:
        """When `poll` has something to give up next; infinity when never."""
        return min((probe.deadline_s for probe in self._probes.values()), default=float("inf"))

    def _advance(self, probe_id: str, probe: _Probe) -> None:
        if probe.deadline_s <= self._clock.now_s():
            what = "every buffer of the link was in use" if probe.started_s is None else "it did not arrive"
            self._end(probe_id, None, f"{what} for {probe.order.timeout_s:g} s")
        elif probe.started_s is None:
            with self._cache.aside():  # a buffer may come back before it is filled: its next writer must come behind
                self._fill_and_send(probe_id, probe)

    def _fill_and_send(self, probe_id: str, probe: _Probe) -> None:
        order = probe.order
        try:
            wire = self._link.buffer(order.peer, order.num_bytes)
        except DeviceFull:  # a probe must not end the worker
            self._end(probe_id, None, f"the device has no {order.num_bytes} bytes left for a buffer")
            return
        if wire is None:
            return
        wire.zero_()  # zeros have the checksum zero, and so are a part that is right
        part = KVPart(probe_id, 0, 0, 0, 0, 0, order.num_bytes, PROBE_DTYPE, "none")
        probe.started_s = self._clock.now_s()
        self._link.send_part(order.peer, part, wire)

    def _end(self, probe_id: str, seconds: float | None, failure: str) -> None:
        order = self._probes.pop(probe_id).order
        order.answer(LinkProbe(order.num_bytes, seconds, failure))
