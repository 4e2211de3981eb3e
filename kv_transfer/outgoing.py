"""The outgoing handoffs of one worker: what may be sent, in which order, and what is tried again. Pure.

One handoff, over all attempts at it (the states of an attempt: kv_transfer/state.py):

    PLANNED ─► OFFERED ─► ACCEPTED ─► SENDING, inside a window ─► COMMITTED ─► DONE
       ▲          │           │          │                           │
       │          └───────────┴──────────┴───────────────────────────┴─► FAILED ─► OFFERED again, once
       └ withdrawn before the prompt ran: this was no attempt

KV may be computed before the offer is answered; it waits here. Long prompts go layer group by layer group while later
layers compute (Splitwise, section 4.3), others as a whole behind their last layer. A failed handoff is offered again
when nothing of the prompt is computed, or when all of it is: then everything is sent once more from the blocks, which
are still here. A second failure is final.

The caller (kv_transfer/sender.py) carries out what `due` gives it. Messages for other workers go out by `peers`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from kv_transfer.cache_protocol import KVPlace, StreamMark
from kv_transfer.codec import ALIGNMENT, Codec, part_layout, wire_dtype
from kv_transfer.plan import WIRE_VERSION, PartSpan, clip_tokens, cut
from kv_transfer.state import SEND_TRANSITIONS, SendStatus, check
from phasewise.core.clock import Clock
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import KVAbort, KVAccepted, KVCommit, KVOffer, LinkLost
from phasewise.core.placement import WorkerId
from phasewise.core.ports import PeerPort
from phasewise.core.request import Request, SampledToken

MAX_ATTEMPTS = 2
"""The first attempt at a handoff and one more with the same worker."""

_NOTHING = PartSpan(0, 0, 0, 0)
_ACCEPTED = (SendStatus.ACCEPTED, SendStatus.SENDING)
_LIVE = (SendStatus.OFFERED, *_ACCEPTED, SendStatus.COMMITTED)


@dataclass(frozen=True, slots=True)
class ComputedKV:
    """KV that can be sent. `mark`: behind it, it is in the cache."""

    span: PartSpan
    place: KVPlace
    mark: StreamMark


@dataclass(slots=True, eq=False)
class Attempt:
    """One offer of a handoff and what follows from it. Its id is never used twice: a delayed part finds nothing."""

    transfer_id: str = ""
    deadline_s: float = float("inf")
    max_part_bytes: int = 0
    status: SendStatus = SendStatus.PLANNED
    reason: str = ""  # why it failed
    num_cached_tokens: int = 0  # the receiver has these already
    dtype: str = ""  # of the values on the wire
    started_unix_s: float = 0.0
    unanswered: list[ComputedKV] = field(default_factory=list)  # computed before the offer was accepted
    waiting: deque[ComputedKV] = field(default_factory=deque)  # parts that are not sent yet
    in_flight: dict[int, int] = field(default_factory=dict)  # part index → bytes
    num_parts: int = 0
    commit_on_link: KVCommit | None = None  # while nothing but the link brings it

    def move(self, status: SendStatus) -> None:
        check(SEND_TRANSITIONS, self.status, status)
        self.status = status


class SendWindow:
    """Bounds what is in flight for a whole worker to `num_bytes`; one part may always go."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.num_bytes_in_flight = 0
        self.is_held = False  # nothing may pass the part that was given out last

    def fits(self, part_bytes: int) -> bool:
        """Whether there is room for a part. Nothing passes one that does not fit: smaller ones would keep it out for
        ever."""
        in_flight = self.num_bytes_in_flight
        self.is_held = in_flight > 0 and in_flight + part_bytes > self.num_bytes
        return not self.is_held

    def sent(self, attempt: Attempt, part_bytes: int) -> int:
        """The attempt's first waiting part is on its way. Returns its index among the attempt's parts."""
        attempt.waiting.popleft()
        part_index = attempt.num_parts
        attempt.in_flight[part_index] = part_bytes
        attempt.num_parts += 1
        self.num_bytes_in_flight += part_bytes
        return part_index

    def arrived(self, attempt: Attempt, part_index: int) -> None:
        self.num_bytes_in_flight -= attempt.in_flight.pop(part_index, 0)

    def release(self, attempt: Attempt) -> None:
        """The attempt is over: nothing waits for its parts."""
        self.num_bytes_in_flight -= sum(attempt.in_flight.values())
        attempt.in_flight.clear()


@dataclass(slots=True, eq=False)
class Handoff:
    """A sequence that its owner hands to another worker. The owner makes it, gives it to the sender's methods, and
    reads its state once a step.

    `request`: what the peer goes on with; the KV of its prompt is what is handed off. `deadline_s`: its own.
    """

    peer: WorkerId
    request: Request
    gateway_id: str
    deadline_s: float
    attempt: Attempt = field(default_factory=Attempt)
    place: KVPlace | None = None  # from the prompt's first chunk on
    whole: PartSpan = _NOTHING  # all of the prompt's KV; known with `place`
    is_layerwise: bool = False
    first_tokens: tuple[SampledToken | None, ...] | None = None  # known once the prompt is computed
    has_sent_parts: bool = False  # by any attempt
    num_failures: int = 0

    @property
    def transfer_id(self) -> str:
        """Of the newest attempt; "" while nothing is offered."""
        return self.attempt.transfer_id

    @property
    def status(self) -> SendStatus:
        """Of the newest attempt. FAILED may be followed by another one, until `has_failed`."""
        return self.attempt.status

    @property
    def reason(self) -> str:
        """Why the newest attempt failed, or ""."""
        return self.attempt.reason

    @property
    def has_begun_sending(self) -> bool:
        return self.status in (SendStatus.SENDING, SendStatus.COMMITTED)

    @property
    def has_failed(self) -> bool:
        """Whether no other attempt follows."""
        return self.num_failures >= MAX_ATTEMPTS

    @property
    def is_computed(self) -> bool:
        """Whether the commit is known: it goes out behind the last part."""
        return self.first_tokens is not None

    @property
    def is_leaving(self) -> bool:
        """Whether parts wait to be sent, or are on their way."""
        return bool(self.attempt.waiting or self.attempt.in_flight)

    def begin(self, block_table: Sequence[int], num_layers: int, *, is_layerwise: bool) -> None:
        """The prompt's first chunk is about to run. The blocks must stay untouched until the handoff has ended."""
        self.place = KVPlace(list(block_table))
        self.whole = PartSpan(0, num_layers, 0, self.request.num_prompt_tokens)
        self.is_layerwise = is_layerwise

    def to_send(self, computed: PartSpan) -> PartSpan | None:
        """What can be sent now that `computed` is: some layers of a chunk, or everything once the last is computed."""
        if self.is_layerwise:
            return computed
        is_last = (computed.end_layer, computed.end_token) == (self.whole.end_layer, self.whole.end_token)
        return self.whole if is_last else None

    def make_commit(self, clock: Clock) -> KVCommit:
        """All parts of the newest attempt are out."""
        attempt = self.attempt
        assert self.first_tokens is not None
        attempt.move(SendStatus.COMMITTED)
        started_unix_s = attempt.started_unix_s or clock.unix_s()
        num_tokens = self.request.num_prompt_tokens
        return KVCommit(attempt.transfer_id, attempt.num_parts, num_tokens, self.first_tokens, started_unix_s)

    def bound(self, deadline_s: float) -> None:
        """The newest attempt ends no later, if the prompt is computed."""
        if self.is_computed:
            self.attempt.deadline_s = min(self.attempt.deadline_s, deadline_s)

    def count_failure(self, now_s: float) -> bool:
        """The newest attempt has failed: whether another one is due now. Nothing is counted while that is open."""
        is_computing = self.place is not None and not self.is_computed
        if is_computing or self.deadline_s <= now_s or self.has_failed:
            return False
        self.num_failures += 1
        return not self.has_failed

    def end_sample(self, sample_index: int) -> None:
        """A sample was cancelled: a commit that has not gone out yet does not begin it."""
        if self.first_tokens is not None:
            samples = zip(self.request.sample_indices, self.first_tokens, strict=True)
            self.first_tokens = tuple(None if index == sample_index else token for index, token in samples)


class OutgoingHandoffs:
    """All of one worker. What is in flight stays within `window_bytes`, but one part may always go.

    `timeout_s` bounds a computed prompt's handoff, from the acceptance on: the receiver may have to make room first.

    There are more than 20 methods: one for each thing that an owner asks for, and for each message of a receiver.
    """

    def __init__(
        self,
        worker_id: WorkerId,
        spec: KVCacheSpec,
        peers: PeerPort,
        clock: Clock,
        window_bytes: int,
        timeout_s: float,
    ) -> None:
        self._worker_id = worker_id
        self._spec = spec
        self._peers = peers
        self._clock = clock
        self.window = SendWindow(window_bytes)
        self._timeout_s = timeout_s
        self._handoffs: dict[str, Handoff] = {}  # by the id of their newest attempt, in the order of the offers
        self._num_offers = 0

    @property
    def transfer_ids(self) -> list[str]:
        """Of the newest attempts of all handoffs that their owners have not forgotten."""
        return list(self._handoffs)

    # ---- what owners ask for

    def offer(self, handoff: Handoff, max_part_bytes: int) -> None:
        """Asks the peer to set blocks aside: a new attempt. `max_part_bytes`: as the link to the peer takes them."""
        self._handoffs.pop(handoff.transfer_id, None)
        self._num_offers += 1
        transfer_id = f"{handoff.request.request_id}#{self._worker_id}.{self._num_offers}"
        handoff.attempt = Attempt(transfer_id, handoff.deadline_s, max_part_bytes)
        handoff.attempt.move(SendStatus.OFFERED)
        # Other prompts ask for nothing while a computed one is offered again: that may not last.
        handoff.bound(self._clock.now_s() + self._timeout_s)
        self._handoffs[transfer_id] = handoff
        request, time_left_s = handoff.request, handoff.deadline_s - self._clock.now_s()
        offer = KVOffer(
            transfer_id, WIRE_VERSION, self._worker_id, self._spec, request, handoff.gateway_id, time_left_s
        )
        self._peers.send(handoff.peer, offer)

    def add(self, handoff: Handoff, computed: ComputedKV) -> None:
        """Takes KV that is computed, and cuts it into parts that the link takes once the offer is accepted.

        Tokens that the receiver has are left out. Not for an attempt that has failed.
        """
        attempt = handoff.attempt
        if attempt.status is SendStatus.OFFERED:
            attempt.unanswered.append(computed)
            return
        if attempt.status is SendStatus.ACCEPTED:
            attempt.move(SendStatus.SENDING)
            attempt.started_unix_s = self._clock.unix_s()
        span = clip_tokens(computed.span, attempt.num_cached_tokens)
        if span is not None:
            cell = part_layout(self._spec, PartSpan(0, 1, 0, 1), attempt.dtype, Codec.NONE)
            seal_bytes = cell.num_bytes - cell.content_bytes  # at most: padding and checksum
            max_cells = (attempt.max_part_bytes - seal_bytes - ALIGNMENT) // cell.content_bytes
            attempt.waiting.extend(replace(computed, span=part) for part in cut(span, max_cells))

    def commit(self, handoff: Handoff, first_tokens: tuple[SampledToken | None, ...]) -> None:
        """Everything is computed and added: the commit goes out behind the last part."""
        handoff.first_tokens = first_tokens
        if handoff.status in _ACCEPTED:
            handoff.bound(self._clock.now_s() + self._timeout_s)

    def withdraw(self, handoff: Handoff, reason: str) -> None:
        """Gives the reservation back before the prompt runs, as if it had not been asked for."""
        self.abort(handoff, reason)
        self.forget(handoff)
        handoff.attempt = Attempt()

    def abort(self, handoff: Handoff, reason: str) -> None:
        """Gives the attempt up and tells the receiver. Ignored when there is none that goes on."""
        if handoff.status in _LIVE:
            self._fail(handoff.attempt, reason)
            self._peers.send(handoff.peer, KVAbort(handoff.transfer_id, reason))

    def forget(self, handoff: Handoff) -> None:
        """Drops the record of a handoff that has ended, or was not offered."""
        assert handoff.status not in _LIVE, handoff.status
        self._handoffs.pop(handoff.transfer_id, None)

    # ---- once a step

    def expire(self) -> None:
        """Fails attempts whose time is over."""
        now_s = self._clock.now_s()
        for handoff in self._handoffs.values():
            if handoff.attempt.deadline_s <= now_s:
                self.abort(handoff, "the handoff's time is over")

    def take_failures(self) -> list[Handoff]:
        """Counts attempts that failed. Returns the handoffs that are to be offered again.

        A prompt that runs is computed to its end first. One whose own deadline has passed is left to its owner.
        """
        now_s = self._clock.now_s()
        return [h for h in self._handoffs.values() if h.status is SendStatus.FAILED and h.count_failure(now_s)]

    def next_deadline_s(self) -> float:
        """When `expire` has something to do next; infinity when never."""
        live = (h.attempt.deadline_s for h in self._handoffs.values() if h.status in _LIVE)
        return min(live, default=float("inf"))

    # ---- what may be sent

    def due(self) -> Iterator[tuple[Handoff, ComputedKV | KVCommit]]:
        """What may go out now: parts in the order in which the attempts began, each attempt's commit behind its parts.

        The caller tells `window` of a part that was sent before it takes the next. Where it was not, the link has no
        room for it now; the parts of other handoffs follow, unless `window.is_held`.
        """
        self.window.is_held = False
        for handoff in self._handoffs.values():
            waiting = handoff.attempt.waiting
            while waiting and not self.window.is_held:
                part = waiting[0]
                yield handoff, part
                if waiting and waiting[0] is part:
                    break
            if handoff.is_computed and not waiting and handoff.status in _ACCEPTED:
                yield handoff, handoff.make_commit(self._clock)

    @property
    def is_held_back(self) -> bool:
        """Whether computed KV waits for what is under way to arrive."""
        return self.window.num_bytes_in_flight > 0 and any(h.attempt.waiting for h in self._handoffs.values())

    # ---- what the receiver and the link say

    def on_accepted(self, message: KVAccepted) -> None:
        handoff = self._handoffs.get(message.transfer_id)
        if handoff is None or handoff.status is not SendStatus.OFFERED:
            return
        attempt = handoff.attempt
        attempt.num_cached_tokens = message.num_cached_tokens
        attempt.dtype = wire_dtype(self._spec.dtype, message.dtype)
        attempt.move(SendStatus.ACCEPTED)
        handoff.bound(self._clock.now_s() + self._timeout_s)
        for computed in attempt.unanswered:
            self.add(handoff, computed)
        attempt.unanswered.clear()

    def on_part_ack(self, transfer_id: str, part_index: int) -> None:
        handoff = self._handoffs.get(transfer_id)
        if handoff is not None:
            self.window.arrived(handoff.attempt, part_index)

    def on_done(self, transfer_id: str) -> None:
        handoff = self._handoffs.get(transfer_id)
        if handoff is not None and handoff.status in (SendStatus.OFFERED, SendStatus.COMMITTED):
            self.window.release(handoff.attempt)
            handoff.attempt.move(SendStatus.DONE)

    def on_failed(self, transfer_id: str, reason: str) -> None:
        """The receiver refused or gave up; it has freed its blocks."""
        handoff = self._handoffs.get(transfer_id)
        if handoff is not None and handoff.status in _LIVE:
            self._fail(handoff.attempt, reason)

    def on_peer_lost(self, peer: WorkerId) -> None:
        for handoff in self._handoffs.values():
            if handoff.peer == peer and handoff.status in _LIVE:
                self._fail(handoff.attempt, f"worker {peer} was lost")

    def on_link_lost(self, lost: LinkLost) -> None:
        """Gives up the attempts whose parts were on that link. Another attempt takes another link.

        A commit may have been on it behind parts that had all arrived: it is sent again.
        """
        for transfer_id in sorted(lost.transfer_ids):
            if transfer_id in self._handoffs:
                self.abort(self._handoffs[transfer_id], f"the link to {lost.peer} broke: {lost.reason}")
        for handoff in self._handoffs.values():
            attempt = handoff.attempt
            if handoff.peer == lost.peer and handoff.status is SendStatus.COMMITTED and attempt.commit_on_link:
                self._peers.send(handoff.peer, attempt.commit_on_link)
                attempt.commit_on_link = None

    # ---- inside

    def _fail(self, attempt: Attempt, reason: str) -> None:
        attempt.move(SendStatus.FAILED)
        attempt.reason = reason
        attempt.unanswered.clear()
        attempt.waiting.clear()
        self.window.release(attempt)
