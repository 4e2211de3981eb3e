"""The record of an open request: its prompt, its attempts, and every token that has come. Pure.

The record holds all that is needed to go on with other workers: the prompt and the tokens so far. An *attempt* is one
placement of the request. The first one has all samples; where it is lost, each sample that has tokens goes on as an
attempt of its own (`Attempt.rest`).

Tokens of one sample come from two workers (the first from prefill, the rest from decode) and may overtake each other
on the way; here they are put in order, and what is in order is turned into text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from control_plane.gateway.service import SampleDelta, TokenInfo, Usage
from control_plane.gateway.text.detokenizer import SampleText, TokenTexts, token_info
from phasewise.core.errors import ServingError
from phasewise.core.lifecycle import RequestStatus, Stage, is_end
from phasewise.core.messages import NewTokens, TimelineEvent
from phasewise.core.placement import Placement, PlaceRequest, WorkerId
from phasewise.core.request import FinishReason, Request


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that was checked and tokenised, under the client's own id. Workers never see `stop`: they know no text.

    `continues_text` is for `SampleText`: the output goes on from a text instead of answering a chat. `samples`: those
    of a request that goes on where its answer broke off, as far as they have come (resumption.py); else there are none.
    """

    request: Request
    stop: tuple[str, ...]
    timeout_s: float
    continues_text: bool
    samples: tuple[OpenSample, ...] = ()


@dataclass(slots=True)
class OpenSample:
    """One sample of an open request.

    `token_ids` are all tokens that came in order; the text of the newest may still be held back. `early` are tokens
    that came before their predecessors, by the output position of their first.
    """

    text: SampleText
    token_ids: list[int] = field(default_factory=list)
    early: dict[int, NewTokens] = field(default_factory=dict)
    finish_reason: FinishReason | None = None
    last_token_s: float | None = None


@dataclass(slots=True, eq=False)
class OpenRequest:
    """One request from its arrival to its end.

    Attributes:
        client_id: the id that the client knows.
        request: what the client asked for, under the id of the first attempt.
        received_s, deadline_s, first_token_s: in seconds of the gateway's clock.
        attempts: what workers have of it, by the ids that they know.
        avoided: workers that failed it without being lost.
        placement: the newest.
        pending: the deltas that the client has not read yet.
        num_resumed: output tokens that the client had when it asked, from where its answer broke off.
    """

    client_id: str
    request: Request
    received_s: float
    deadline_s: float
    samples: list[OpenSample]
    status: RequestStatus = RequestStatus.RECEIVED
    attempts: dict[str, Attempt] = field(default_factory=dict)
    avoided: set[WorkerId] = field(default_factory=set)
    placement: Placement | None = None
    pending: list[SampleDelta] = field(default_factory=list)
    events: list[TimelineEvent] = field(default_factory=list)
    prompt_tokens: tuple[TokenInfo, ...] = ()
    num_cached_tokens: int = 0
    num_resumed: int = 0
    first_token_s: float | None = None
    error: ServingError | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def is_over(self) -> bool:
        return is_end(self.status)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(sample.token_ids) for sample in self.samples)

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.prompt_token_ids), self.num_output_tokens, self.num_cached_tokens)

    def note(self, stage: Stage, at_unix_s: float, gateway_id: str) -> None:
        """Adds an event of the gateway's own to the timeline."""
        self.events.append(TimelineEvent(self.request_id, stage, at_unix_s, gateway_id))

    def take(self, new: NewTokens, texts: TokenTexts) -> list[SampleDelta]:
        """Puts new tokens in their place; returns the deltas that are certain now, in order."""
        sample = self.samples[new.sample_index]
        position = len(sample.token_ids)
        if new.position < position:
            return []  # they came before
        if new.position > position or sample.finish_reason is not None:
            sample.early[new.position] = new
            return []
        deltas = [self._apply(sample, new, texts)]
        while sample.finish_reason is None and len(sample.token_ids) in sample.early:
            deltas.append(self._apply(sample, sample.early.pop(len(sample.token_ids)), texts))
        return deltas

    def _apply(self, sample: OpenSample, new: NewTokens, texts: TokenTexts) -> SampleDelta:
        stop_reason: str | int | None
        tokens, reason = new.tokens, new.finish_reason
        text, stop_reason = sample.text.push(tokens, reason)
        if stop_reason is not None:  # a stop string; what follows it is not counted
            tokens = tokens[: sample.text.num_tokens - len(sample.token_ids)]
            reason = FinishReason.STOP
        elif reason is FinishReason.STOP:
            stop_reason = tokens[-1].token_id
        ids = tuple([token.token_id for token in tokens])
        sample.token_ids.extend(ids)
        sample.finish_reason = reason
        has_logprobs = self.request.sampling.logprobs is not None
        infos = tuple(token_info(texts, token) for token in tokens) if has_logprobs else ()
        return SampleDelta(new.sample_index, text, ids, infos, reason, stop_reason)


@dataclass(slots=True, eq=False)
class Attempt:
    """One placement of a request, or of one sample of it, under an id of its own.

    What is still on its way for an attempt that was given up finds nothing under its id.

    Attributes:
        number: 0 for the first, one more for each that was given up before it.
        cause: the fault of the one that was given up before it.
        placement: None until the control plane has answered.
    """

    record: OpenRequest
    request: Request
    number: int = 0
    cause: ServingError | None = None
    placement: Placement | None = None
    has_first_token: bool = False

    @property
    def attempt_id(self) -> str:
        return self.request.request_id

    @property
    def wanted(self) -> PlaceRequest:
        """What to ask of the control plane."""
        request = self.request
        size = (request.num_prompt_tokens, request.sampling.n, request.max_new_tokens)
        return PlaceRequest(self.attempt_id, *size, self.number, frozenset(self.record.avoided))

    @property
    def samples(self) -> list[OpenSample]:
        return [self.record.samples[i] for i in self.request.sample_indices]

    @property
    def num_output_tokens(self) -> int:
        return sum(len(sample.token_ids) for sample in self.samples)

    def ends_with(self, worker_id: WorkerId) -> bool:
        """Whether something of the attempt is lost with this worker."""
        placement = self.placement
        if placement is None or worker_id not in (placement.prefill_worker, placement.decode_worker):
            return False
        # Once decode has all of it, the prefill worker holds nothing any more. But a first token that is not here yet
        # may have died with it.
        own_stages = {event.stage for event in self.record.events if event.request_id == self.attempt_id}
        is_decoding = Stage.HANDOFF_END in own_stages or Stage.DECODE_START in own_stages
        num_before = self.request.num_resumed_tokens
        has_all_first = all(len(sample.token_ids) > num_before for sample in self.samples)
        return placement.decode_worker == worker_id or not (is_decoding and has_all_first)

    def rest(self) -> list[Request]:
        """What is left of an attempt that is given up, as requests; their ids are the caller's to choose.

        The same again when none of its tokens has come, else one for each sample that has not ended: its prompt is the
        prompt and the tokens so far. Tokens that came out of order are forgotten: they will come again.
        """
        request, whole = self.request, self.record.request
        for sample in self.samples:
            sample.early.clear()
        if all(len(sample.token_ids) == request.num_resumed_tokens for sample in self.samples):
            return [request]
        # The prompt's log-probabilities come with the first token of all, so they are here.
        sampling = replace(whole.sampling, n=1, prompt_logprobs=None)
        return [
            replace(
                whole,
                prompt_token_ids=(*whole.prompt_token_ids, *sample.token_ids),
                sampling=sampling,
                num_resumed_tokens=len(sample.token_ids),
                sample_index=index,
            )
            for index, sample in zip(request.sample_indices, self.samples, strict=True)
            if sample.finish_reason is None
        ]


_SPANS = (
    ("queue", Stage.RECEIVED, Stage.PREFILL_START),
    ("reserve", Stage.RESERVE_ASKED, Stage.RESERVED),
    ("prefill", Stage.PREFILL_START, Stage.PREFILL_END),
    ("handoff", Stage.HANDOFF_START, Stage.HANDOFF_END),
    ("first_decode", Stage.PREFILL_END, Stage.DECODE_START),
    ("first_decode", Stage.HANDOFF_END, Stage.DECODE_START),
)
"""The stages of a request. Of two with the same name the later counts, where the timeline has both."""

_BREAKABLE = ("reserve", "prefill", "handoff")


def stage_durations(events: Iterable[TimelineEvent]) -> dict[str, float]:
    """Seconds that a request spent in each stage before its second token, as far as its timeline tells.

    queue: received → prefill start, without the wait for the reservation; reserve: asked → granted;
    prefill: start → end; handoff: first bytes sent → whole on the other side; first_decode: there → first decode
    step over. What a fault broke off does not count: the attempt that ended it does.
    """
    at: dict[Stage, float] = {}
    for event in events:
        if event.stage is Stage.RECOVERING:
            _forget_broken_off(at)
        at.setdefault(event.stage, event.at_unix_s)
    spans = [(name, at[end] - at[start]) for name, start, end in _SPANS if start in at and end in at]
    durations = {name: max(seconds, 0.0) for name, seconds in spans}
    if "queue" in durations:
        durations["queue"] = max(durations["queue"] - durations.get("reserve", 0.0), 0.0)
    return durations


def _forget_broken_off(at: dict[Stage, float]) -> None:
    for name, start, end in _SPANS:
        if name in _BREAKABLE and end not in at:
            at.pop(start, None)
