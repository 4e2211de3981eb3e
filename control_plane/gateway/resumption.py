"""A request whose answer broke off, at this gateway or another: its samples as far as their client has them. Pure.

The client sends the same request again, with the same seed, and the tokens that it has. They are put through each
sample's text once more: what is held back behind them (a part of a character, the beginning of a stop string) is as it
was where the answer broke off, so the text goes on with nothing repeated and nothing lost. The tokens themselves go to
the workers as a recovery's do (`Attempt.rest` in open_requests.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from control_plane.gateway.open_requests import OpenSample
from control_plane.gateway.service import SampleSoFar
from control_plane.gateway.text.detokenizer import SampleText, TokenTexts
from phasewise.core.errors import InvalidRequest
from phasewise.core.request import FinishReason, SampledToken, SamplingParams


def resumed_samples(
    given: Sequence[SampleSoFar],
    sampling: SamplingParams,
    texts: TokenTexts,
    stop: Sequence[str],
    *,
    continues_text: bool,
) -> tuple[OpenSample, ...]:
    """All `sampling.n` samples; those that are not `given` are at their beginning.

    Raises:
        InvalidRequest: such an answer cannot have come of this request.
    """
    least = sampling.min_tokens
    samples = tuple(
        OpenSample(SampleText(texts, stop, continues_text=continues_text, min_tokens=least)) for _ in range(sampling.n)
    )
    for so_far in given:
        if not 0 <= so_far.sample_index < sampling.n or samples[so_far.sample_index].token_ids:
            raise _refusal(f"names sample {so_far.sample_index}; each of the {sampling.n} may be there once")
        _fill(samples[so_far.sample_index], so_far, sampling.max_tokens)
    return samples


def _fill(sample: OpenSample, given: SampleSoFar, max_tokens: int) -> None:
    num_tokens, is_over = len(given.token_ids), given.finish_reason is not None
    if not 0 < num_tokens <= max_tokens - (not is_over):
        still = "" if is_over else " and goes on"
        raise _refusal(f"has a sample of {num_tokens} tokens{still}; max_tokens is {max_tokens}")
    if given.finish_reason is FinishReason.ABORT:
        raise _refusal("has a sample that was aborted; send the request again without it")
    sample.token_ids.extend(given.token_ids)
    sample.finish_reason = given.finish_reason
    if not is_over:
        _, hit = sample.text.push([SampledToken(token_id) for token_id in given.token_ids])
        if hit is not None:
            raise _refusal("has a sample that goes on behind a stop string")


def _refusal(what: str) -> InvalidRequest:
    return InvalidRequest(f"resume_after {what}; send what this request brought, or leave it out", field="resume_after")
