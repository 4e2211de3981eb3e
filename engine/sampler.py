"""Logits → tokens. A sample is a pure function of (logits, sampling parameters, seed, sample index, output position).

Order of operations, as in vLLM and the OpenAI API:
    logit_bias; minus infinity for every token that would end a sample before it has min_tokens
    repetition, frequency and presence penalty
    temperature (0: the largest logit wins, and nothing below matters)
    top_k, top_p on what top_k left, min_p
    one uniform number, looked up in the cumulative distribution in the order of the vocabulary
Log-probabilities are those of the model itself: before bias, penalties and temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.random_numbers import uniforms
from engine.sequence import Sequence
from phasewise.core.request import SampledToken, SamplingParams

# Candidates looked at before the whole vocabulary is: enough for nearly every top-p.
_FIRST_CANDIDATES = 512


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One token to choose: from row `logits_row`, for this sample of the sequence's request."""

    sequence: Sequence
    sample_index: int
    logits_row: int


def sample(logits: torch.Tensor, rows: list[SampleRow]) -> list[SampledToken | None]:
    """Chooses a token per row; None where the logits hold NaN, or infinity where the largest should be, or where no
    token is left that may be chosen.

    logits: [num_logits_rows, vocab_size] float32, left as they are.
    """
    if not rows:
        return []
    largest, best = logits.max(dim=-1)  # a NaN anywhere in a row is its maximum
    is_usable, best_ids = largest.isfinite().tolist(), best.tolist()
    tokens = [best_ids[row.logits_row] if is_usable[row.logits_row] else None for row in rows]
    others = [i for i, row in enumerate(rows) if is_usable[row.logits_row] and not _takes_largest(row.sequence)]
    if others:
        for i, token in zip(others, _choose(logits, [rows[i] for i in others]), strict=True):
            tokens[i] = token
    if any(row.sequence.sampling.logprobs is not None for row in rows):
        return _with_logprobs(logits, rows, tokens)
    return [None if token is None else SampledToken(token) for token in tokens]


def _with_logprobs(logits: torch.Tensor, rows: list[SampleRow], tokens: list[int | None]) -> list[SampledToken | None]:
    """The tokens chosen for these rows; with log-probabilities where asked for. logits: as in `sample`."""
    wanted = [row.sequence.sampling.logprobs for row in rows]
    picked = logits[torch.tensor([row.logits_row for row in rows], device=logits.device)]
    described = describe(picked, [token or 0 for token in tokens], wanted)
    return [None if token is None else one for token, one in zip(tokens, described, strict=True)]


def describe(logits: torch.Tensor, tokens: list[int], wanted: list[int | None]) -> list[SampledToken]:
    """Tokens with the model's own log-probabilities; `wanted[i]` alternatives, None for no log-probability at all.

    logits: [len(tokens), vocab_size] float32.
    """
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    most = min(max((count or 0 for count in wanted), default=0), logits.shape[1])
    top = logprobs.topk(most, dim=-1)
    top_logprobs, top_ids = top.values.tolist(), top.indices.tolist()
    described = []
    for i, (token, count) in enumerate(zip(tokens, wanted, strict=True)):
        if count is None:
            described.append(SampledToken(token))
            continue
        alternatives = tuple(zip(top_ids[i][:count], top_logprobs[i][:count], strict=True))
        described.append(SampledToken(token, chosen[i], alternatives))
    return described


def _choose(logits: torch.Tensor, rows: list[SampleRow]) -> list[int | None]:
    """Tokens for rows whose logits are usable and do not decide alone; None where no token may be chosen."""
    adjusted = logits[torch.tensor([row.logits_row for row in rows], device=logits.device)]
    for values, row in zip(adjusted, rows, strict=True):
        apply_bias_and_penalties(values, row.sequence)
    largest, places = adjusted.max(dim=-1)
    has_token = largest.isfinite().tolist()
    chosen: list[int | None] = [token if has_token[i] else None for i, token in enumerate(places.tolist())]
    drawn = [i for i, row in enumerate(rows) if has_token[i] and row.sequence.sampling.temperature > 0]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        for i, token in zip(drawn, _draw(adjusted[index], [rows[i] for i in drawn]), strict=True):
            chosen[i] = token
    return chosen


def _takes_largest(sequence: Sequence) -> bool:
    sampling = sequence.sampling
    return sampling.temperature == 0 and not is_adjusted(sampling, sequence.num_output_tokens)


def is_adjusted(sampling: SamplingParams, num_outputs: int) -> bool:
    """Whether logits are changed before a token is chosen, after so many output tokens."""
    return bool(
        sampling.logit_bias
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1.0
        or (sampling.min_tokens and sampling.must_go_on(num_outputs))
    )


def biases(sampling: SamplingParams, num_outputs: int) -> tuple[tuple[int, float], ...]:
    """(token, what is added to its logit), after so many output tokens. A token may come twice."""
    if not sampling.must_go_on(num_outputs):
        return sampling.logit_bias
    return sampling.logit_bias + tuple((token, -math.inf) for token in sampling.stop_token_ids)


def apply_bias_and_penalties(logits: torch.Tensor, sequence: Sequence) -> None:
    """Changes one row ([vocab_size]) in place.

    Repetition (Keskar et al. 2019, "CTRL") looks at prompt and output, frequency and presence at the output only.
    """
    sampling, num_outputs = sequence.sampling, sequence.num_output_tokens
    if not is_adjusted(sampling, num_outputs):
        return
    device = logits.device
    if added := biases(sampling, num_outputs):
        ids = torch.tensor([token for token, _ in added], device=device)
        bias = torch.tensor([value for _, value in added], dtype=logits.dtype, device=device)
        logits.index_add_(0, ids, bias)
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sequence.token_ids, device=device).unique()
        values = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    output = sequence.token_ids[sequence.first_output :]
    if output and (sampling.frequency_penalty or sampling.presence_penalty):
        seen, counts = torch.tensor(output, device=device).unique(return_counts=True)
        logits[seen] -= sampling.frequency_penalty * counts + sampling.presence_penalty


def _draw(logits: torch.Tensor, rows: list[SampleRow]) -> list[int]:
    """One token per row by inverse transform sampling in float64.

    logits: [num_rows, vocab_size], in each row a finite largest. Temperatures are above 0, however near.
    """
    sampling = [row.sequence.sampling for row in rows]
    temperature = torch.tensor([params.temperature for params in sampling], dtype=torch.float64, device=logits.device)
    scaled = logits.double()
    scaled -= scaled.max(dim=-1, keepdim=True).values  # before the division, which would overflow near temperature 0
    scaled /= temperature.unsqueeze(1)
    cutoffs = [draw_cutoff(values, params) for values, params in zip(scaled, sampling, strict=True)]
    if any(cutoff > -math.inf for cutoff in cutoffs):
        limit = torch.tensor(cutoffs, dtype=torch.float64, device=logits.device).unsqueeze(1)
        scaled = scaled.masked_fill_(scaled < limit, -math.inf)
    cumulative = scaled.exp_().cumsum(dim=-1)
    total = cumulative[:, -1:]
    numbers = uniforms(
        [params.seed for params in sampling],
        [row.sample_index for row in rows],
        [row.sequence.num_output_tokens for row in rows],
    )
    targets = torch.from_numpy(numbers).to(logits.device).unsqueeze(1) * total
    # Rounding may put a target on the total itself; the last token with any probability is then the one.
    last = (cumulative < total).sum(dim=-1, keepdim=True)
    tokens = torch.searchsorted(cumulative, targets, right=True)
    return torch.minimum(tokens, last).squeeze(1).tolist()


def draw_cutoff(values: torch.Tensor, sampling: SamplingParams) -> float:
    """The smallest scaled logit that may be drawn; tokens that tie with it may be too.

    values: [vocab_size] float64, the largest of them 0.
    """
    vocab_size = len(values)
    cutoff = -math.inf
    has_top_k = 0 < sampling.top_k < vocab_size
    if has_top_k:
        cutoff = values.topk(sampling.top_k).values[-1].item()
    if sampling.top_p < 1:
        cutoff = max(cutoff, _top_p_cutoff(values, cutoff, sampling.top_p))
    if sampling.min_p > 0:
        cutoff = max(cutoff, math.log(sampling.min_p))
    return cutoff


def _top_p_cutoff(values: torch.Tensor, top_k_cutoff: float, top_p: float) -> float:
    """Nucleus sampling (Holtzman et al. 2020): the fewest most probable tokens whose probabilities reach `top_p`.

    values: as in `draw_cutoff`; `top_k_cutoff` is what top-k leaves of them. -inf where rounding leaves no cutoff.
    """
    kept = torch.where(values >= top_k_cutoff, values.exp(), 0.0)
    goal = top_p * kept.sum()
    num_candidates = _FIRST_CANDIDATES
    while True:
        num_candidates = min(num_candidates, len(values))
        candidates = kept.topk(num_candidates)
        reached = (candidates.values.cumsum(dim=0) >= goal).nonzero()
        if len(reached):
            return values[candidates.indices[reached[0, 0]]].item()
        if num_candidates == len(values):  # only by rounding
            return -math.inf
        num_candidates *= 8
