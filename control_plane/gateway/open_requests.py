"""The record of every open request: its prompt, its placement, and every token that has come. Pure.

Whatever happens to the workers, this record holds all that is needed to go on elsewhere: prompt + tokens so far.
Tokens of one sample come from two workers (the first from prefill, the rest from decode) and may overtake each other
on the way; here they are put in order, and what is in order is turned into text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from control_plane.gateway.detokenizer import SampleText, token_info
from control_plane.gateway.service import SampleDelta, TokenInfo, Usage
from control_plane.gateway.text import TextTokenizer
from phasewise.core.errors import ServingError
from phasewise.core.lifecycle import RequestStatus, Stage, is_end
from phasewise.core.messages import TimelineEvent, TokenChunk
from phasewise.core.placement import Placement
from phasewise.core.request import FinishReason, Request


@dataclass(slots=True)
class OpenSample:
    """One sample of an open request. `token_ids` are those that came in order, however much text is held back."""

    text: SampleText
    token_ids: list[int] = field(default_factory=list)
    early: dict[int, TokenChunk] = field(default_factory=dict)  # by position, waiting for those before them
    finish_reason: FinishReason | None = None
    last_token_s: float | None = None


@dataclass(slots=True)
class OpenRequest:
    """One request from its arrival to its end. `pending` is what the client has not fetched yet.

    `client_id` is the id that the client knows; workers know `request.request_id`.
    """

    client_id: str
    request: Request
    gateway_id: str
    received_s: float
    samples: list[OpenSample]
    status: RequestStatus = RequestStatus.RECEIVED
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
    def is_decoding(self) -> bool:
        """True when the prefill worker has nothing of this request any more."""
        return any(event.stage in (Stage.HANDOFF_END, Stage.DECODE_START) for event in self.events)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(sample.token_ids) for sample in self.samples)

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.prompt_token_ids), self.num_output_tokens, self.num_cached_tokens)

    def take(self, chunk: TokenChunk, tokenizer: TextTokenizer) -> list[SampleDelta]:
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

    def _apply(self, sample: OpenSample, chunk: TokenChunk, tokenizer: TextTokenizer) -> SampleDelta:
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
