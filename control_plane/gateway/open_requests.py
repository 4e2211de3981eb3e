"""The record of every open request: its prompt, its attempts, and every token that has come. Pure.

Whatever happens to the workers, this record holds all that is needed to go on elsewhere: prompt + tokens so far. An
*attempt* is one placement of the request. It begins as one with all samples; where it is lost, each sample that has
tokens goes on as an attempt of its own (`rest_of`).

Tokens of one sample come from two workers (the first from prefill, the rest from decode) and may overtake each other
on the way; here they are put in order, and what is in order is turned into text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from control_plane.gateway.request_ids import ClaimedId
from control_plane.gateway.service import SampleDelta, TokenInfo, Usage
from control_plane.gateway.text.detokenizer import SampleText, token_info
from control_plane.gateway.text.tokenizer import TextTokenizer
from phasewise.core.errors import ServingError
from phasewise.core.lifecycle import RequestStatus, Stage, is_end
from phasewise.core.messages import NewTokens, TimelineEvent
from phasewise.core.placement import Placement, WorkerId
from phasewise.core.request import FinishReason, Request


@dataclass(slots=True)
class OpenSample:
    """One sample of an open request. `token_ids` are those that came in order, however much text is held back."""

    text: SampleText
    token_ids: list[int] = field(default_factory=list)
    early: dict[int, NewTokens] = field(default_factory=dict)  # by position, waiting for those before them
    finish_reason: FinishReason | None = None
    last_token_s: float | None = None


@dataclass(slots=True)
class Attempt:
    """One placement of a request, or of one sample of it, under an id of its own: `request.request_id`.

    So what is still on its way for an attempt that was given up finds nothing. `is_decoding`: the prefill worker has
    nothing of it any more.
    """

    request: Request
    number: int = 0
    placement: Placement | None = None
    has_first_token: bool = False
    is_decoding: bool = False


@dataclass(slots=True)
class OpenRequest:
    """One request from its arrival to its end. `pending` is what the client has not fetched yet.

    `client` is whose share of the open requests it is part of. `client_id` is the id that the client knows, `own_id`
    the claim to it where no other request shares it. `request` is what it asked for, `attempts` what workers have of
    it, by the ids that they know. `placement` is the newest; `avoided` are workers that failed it without being lost.
    """

    client_id: str
    request: Request
    gateway_id: str
    received_s: float
    deadline_s: float
    samples: list[OpenSample]
    client: str | None = None
    own_id: ClaimedId | None = None
    status: RequestStatus = RequestStatus.RECEIVED
    attempts: dict[str, Attempt] = field(default_factory=dict)
    avoided: set[WorkerId] = field(default_factory=set)
    placement: Placement | None = None
    pending: list[SampleDelta] = field(default_factory=list)
    events: list[TimelineEvent] = field(default_factory=list)
    prompt_tokens: tuple[TokenInfo, ...] = ()
    num_cached_tokens: int = 0
    first_token_s: float | None = None
    error: ServingError | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def is_over(self) -> bool:
        return is_end(self.status)

    @property
    def is_whole(self) -> bool:
        """True when every sample has ended."""
        return all(sample.finish_reason is not None for sample in self.samples)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(sample.token_ids) for sample in self.samples)

    def samples_of(self, attempt: Attempt) -> list[OpenSample]:
        return [self.samples[i] for i in attempt.request.sample_indices]

    def needs(self, attempt: Attempt, worker_id: WorkerId) -> bool:
        """Whether something of the attempt ends with this worker."""
        placement = attempt.placement
        if placement is None or worker_id not in (placement.prefill_worker, placement.decode_worker):
            return False
        # A first token that is not here yet may have died with the prefill worker, even when decoding has begun.
        num_before = attempt.request.num_resumed_tokens
        has_all_first = all(len(sample.token_ids) > num_before for sample in self.samples_of(attempt))
        return placement.decode_worker == worker_id or not (attempt.is_decoding and has_all_first)

    def rest_of(self, attempt: Attempt) -> list[Request]:
        """What is left of an attempt that is given up, as requests; their ids are the caller's to choose.

        The same again when none of its tokens has come, else one for each sample that has not ended: its prompt is the
        prompt and the tokens so far. Tokens that came out of order are forgotten: they will come again.
        """
        request, own = attempt.request, self.request
        for sample in self.samples_of(attempt):
            sample.early.clear()
        if all(len(sample.token_ids) == request.num_resumed_tokens for sample in self.samples_of(attempt)):
            return [request]
        # The prompt's log-probabilities come with the first token of all, so they are here.
        sampling = replace(own.sampling, n=1, prompt_logprobs=None)
        return [
            replace(
                own,
                prompt_token_ids=(*own.prompt_token_ids, *self.samples[i].token_ids),
                sampling=sampling,
                num_resumed_tokens=len(self.samples[i].token_ids),
                sample_index=i,
            )
            for i in request.sample_indices
            if self.samples[i].finish_reason is None
        ]

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.prompt_token_ids), self.num_output_tokens, self.num_cached_tokens)

    def take(self, chunk: NewTokens, tokenizer: TextTokenizer) -> list[SampleDelta]:
        """Puts a chunk in its place; returns the deltas that are certain now, in order."""
        sample = self.samples[chunk.sample_index]
        if sample.finish_reason is not None:
            return []
        sample.early[chunk.position] = chunk
        deltas = []
        while sample.finish_reason is None:
            next_chunk = sample.early.pop(len(sample.token_ids), None)
            if next_chunk is None:
                break
            deltas.append(self._apply(sample, next_chunk, tokenizer))
        return deltas

    def _apply(self, sample: OpenSample, chunk: NewTokens, tokenizer: TextTokenizer) -> SampleDelta:
        text, stop = sample.text.push(chunk.tokens, chunk.finish_reason)
        reason = FinishReason.STOP if stop is not None else chunk.finish_reason
        stop_reason: str | int | None = stop
        if reason is FinishReason.STOP and stop is None:
            stop_reason = chunk.tokens[-1].token_id
        tokens = chunk.tokens
        if stop is not None:  # what follows the stop string is not counted
            tokens = tokens[: sample.text.num_tokens - len(sample.token_ids)]
        ids = tuple(token.token_id for token in tokens)
        sample.token_ids.extend(ids)
        sample.finish_reason = reason
        infos: tuple[TokenInfo, ...] = ()
        if self.request.sampling.logprobs is not None:
            infos = tuple(token_info(tokenizer, token) for token in tokens)
        return SampleDelta(chunk.sample_index, text, ids, infos, reason, stop_reason)


def merge_deltas(deltas: list[SampleDelta]) -> list[SampleDelta]:
    """Joins what is new of each sample: a slow reader gets fewer and larger deltas. Linear in what is joined."""
    if len(deltas) < 2:
        return deltas
    by_sample: dict[int, list[SampleDelta]] = {}
    for delta in deltas:
        by_sample.setdefault(delta.sample_index, []).append(delta)
    return [_join(parts) for parts in by_sample.values()]


def _join(parts: list[SampleDelta]) -> SampleDelta:
    last = parts[-1]
    return SampleDelta(
        last.sample_index,
        "".join(part.text for part in parts),
        tuple(token_id for part in parts for token_id in part.token_ids),
        tuple(token for part in parts for token in part.tokens),
        last.finish_reason,
        last.stop_reason,
    )


_BREAKABLE = (
    (Stage.RESERVE_ASKED, Stage.RESERVED),
    (Stage.PREFILL_START, Stage.PREFILL_END),
    (Stage.HANDOFF_START, Stage.HANDOFF_END),
)


def stage_durations(events: Iterable[TimelineEvent]) -> dict[str, float]:
    """Seconds that a request spent in each stage before its second token, as far as its timeline tells.

    queue: received → prefill start, without the wait for the reservation; reserve: asked → granted;
    prefill: start → end; handoff: first bytes sent → whole on the other side; first_decode: there → first decode
    step over. What a fault broke off does not count: the attempt that ended it does.
    """
    at: dict[Stage, float] = {}
    for event in events:
        if event.stage is Stage.RECOVERING:
            for start, end in _BREAKABLE:
                if end not in at:
                    at.pop(start, None)
        at.setdefault(event.stage, event.at_unix_s)

    def between(start: Stage, end: Stage) -> float | None:
        return max(at[end] - at[start], 0.0) if start in at and end in at else None

    reserve = between(Stage.RESERVE_ASKED, Stage.RESERVED)
    queue = between(Stage.RECEIVED, Stage.PREFILL_START)
    decode_from = Stage.HANDOFF_END if Stage.HANDOFF_END in at else Stage.PREFILL_END
    durations = {
        "queue": None if queue is None else max(queue - (reserve or 0.0), 0.0),
        "reserve": reserve,
        "prefill": between(Stage.PREFILL_START, Stage.PREFILL_END),
        "handoff": between(Stage.HANDOFF_START, Stage.HANDOFF_END),
        "first_decode": between(decode_from, Stage.DECODE_START),
    }
    return {stage: seconds for stage, seconds in durations.items() if seconds is not None}
