"""Logits → tokens on the GPU, without waiting for it: the batched twin of engine/sampler.py, whose contract holds.

What the host knows (parameters, random numbers, earlier tokens) goes to the device in one copy. The newest token of a
sequence may be there only: penalties then read it where it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from engine.cuda.sampling_kernels import NUM_PARAMS, draw_tokens
from engine.random_numbers import uniforms
from engine.sampler import biases, is_adjusted
from engine.sequence import Sequence
from phasewise.core.request import SampledToken, SamplingParams

_ROWS_AT_ONCE = 64  # bounds the memory for float32 copies of logits
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class DrawRow:
    """One token to choose: from row `logits_row`, for this sample of the sequence's request.

    num_outputs: output tokens before this one, those that the host has not seen included; the random number's position.
    pending: the row of `newest` that holds the sequence's newest token when `token_ids` lacks it, else -1.
    """

    sequence: Sequence
    sample_index: int
    logits_row: int
    num_outputs: int
    pending: int = -1


class Drawn:
    """Chosen tokens on the device, and the way to the host for them and their log-probabilities.

    `tokens`: [num_rows] int64; -1 where the row's logits hold a NaN, or infinity where the largest should be, or where
    no token is left that may be chosen.
    """

    def __init__(self, tokens: torch.Tensor, wanted: list[int | None], described: list[_Described]) -> None:
        self.tokens = tokens
        self._wanted = wanted
        self._described = described
        self._host: list[torch.Tensor] | None = None
        self._copied = torch.cuda.Event()

    def start_copy(self) -> None:
        """Begins the copies to the host, on the current stream; does not wait for them."""
        parts = [self.tokens, *(tensor for part in self._described for tensor in (part.logprobs, part.ids))]
        self._host = [
            torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True) for part in parts
        ]
        self._copied.record()

    def result(self) -> list[SampledToken | None]:
        """The tokens in the order of the rows; None for -1. Waits for the copies.

        Raises:
            ValueError: `start_copy` was not called.
        """
        if self._host is None:
            raise ValueError("the tokens are on the device only; call start_copy first")
        self._copied.synchronize()
        tokens, *described = (part.tolist() for part in self._host)
        result = [None if token < 0 else SampledToken(token) for token in tokens]
        for part, logprobs, ids in zip(self._described, described[::2], described[1::2], strict=True):
            for i, (own, *top), top_ids in zip(part.rows, logprobs, ids, strict=True):
                if tokens[i] >= 0:
                    count = self._wanted[i]
                    alternatives = tuple(zip(top_ids[:count], top[:count], strict=True))
                    result[i] = SampledToken(tokens[i], own, alternatives)
        return result


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The first of the largest logits of each row; -1 as in `Drawn`. May be captured in a graph.

    logits: [n, vocab_size]; the result: [n] int64.
    """
    largest, tokens = logits.max(dim=-1)  # a NaN anywhere in a row is its maximum
    return tokens.masked_fill_((largest - largest).isnan(), -1)  # of infinity, too


def draw(logits: torch.Tensor, rows: list[DrawRow], newest: torch.Tensor | None = None) -> Drawn:
    """Chooses a token per row. Enqueues work on the current stream, never waits for the device.

    logits: [n, vocab_size] float32 or bfloat16, left as they are; newest: int64, see `DrawRow.pending`. A pending
    token of -1 (its own draw failed) counts as token 0: what is drawn after it is not used.

    Raises:
        ValueError: a row has a pending token, but there is no `newest`.
    """
    device, vocab_size = logits.device, logits.shape[1]
    if newest is None:
        if any(row.pending >= 0 for row in rows):
            raise ValueError("a row has its newest token pending; give the tensor that holds it as newest")
        newest = torch.empty(0, dtype=torch.int64, device=device)
    plain: list[int] = []
    special: list[int] = []
    for i, row in enumerate(rows):
        (special if is_adjusted(row.sequence.sampling, row.num_outputs) else plain).append(i)
    wanted = [row.sequence.sampling.logprobs for row in rows]
    upload = _Upload()
    params_place = upload.add(_kernel_params(rows, plain, special, vocab_size))
    adjustments = [
        _Adjustment(upload, rows, special[start : start + _ROWS_AT_ONCE], vocab_size)
        for start in range(0, len(special), _ROWS_AT_ONCE)
    ]
    asked = [i for i, count in enumerate(wanted) if count is not None]
    asked_rows = upload.add(np.array([[i, rows[i].logits_row] for i in asked], dtype=np.int64))
    sent = upload.send(device)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=device)
    plain_params, *special_params = (
        sent.floats(params_place)
        .view(-1, NUM_PARAMS)
        .split([len(plain), *(adjustment.num_rows for adjustment in adjustments)])
    )
    draw_tokens(logits, plain_params, tokens)
    for adjustment, params in zip(adjustments, special_params, strict=True):
        draw_tokens(adjustment.apply(logits, sent, newest), params, tokens)
    described = []
    places = sent.integers(asked_rows).view(-1, 2)
    for start in range(0, len(asked), _ROWS_AT_ONCE):
        part = asked[start : start + _ROWS_AT_ONCE]
        most = min(max(wanted[i] or 0 for i in part), vocab_size)
        described.append(_describe(logits, tokens, part, places[start : start + len(part)], most))
    return Drawn(tokens, wanted, described)


def warm_up(logits: torch.Tensor) -> None:
    """Compiles what `draw` needs for logits of this vocabulary and dtype, so that no request waits for it.

    logits: [1, vocab_size].
    """
    for penalty in (1.0, 2.0):
        sampling = SamplingParams(repetition_penalty=penalty)
        draw(logits, [DrawRow(Sequence("warm-up", sampling, [0], 1), 0, 0, 0)])


def _counts_outputs(sampling: SamplingParams) -> bool:
    return bool(sampling.frequency_penalty or sampling.presence_penalty)


def _kernel_params(rows: list[DrawRow], plain: list[int], special: list[int], vocab_size: int) -> np.ndarray:
    """[len(rows), NUM_PARAMS] float64: the columns of `draw_tokens`, for the plain rows and then for the special ones.

    The logits of the latter are copies: `_ROWS_AT_ONCE` of them together.
    """
    chosen = [*plain, *special]
    params = [rows[i].sequence.sampling for i in chosen]
    table = np.empty((len(chosen), NUM_PARAMS))
    table[:, 0] = [*(rows[i].logits_row for i in plain), *(i % _ROWS_AT_ONCE for i in range(len(special)))]
    table[:, 1] = chosen
    # In float32 a temperature next to 0 would be 0, and its inverse infinite. At 1e-30 every logit below the largest is
    # infinitely far from it already.
    temperature = np.array([p.temperature and max(p.temperature, 1e-30) for p in params])
    table[:, 2] = temperature
    table[:, 3] = [p.top_k if 0 < p.top_k < vocab_size else 0 for p in params]
    table[:, 4] = [p.top_p for p in params]
    min_p = np.array([p.min_p for p in params])
    table[:, 5] = np.log(min_p, out=np.full(len(chosen), -math.inf), where=min_p > 0)
    table[:, 6] = uniforms(
        [p.seed for p in params], [rows[i].sample_index for i in chosen], [rows[i].num_outputs for i in chosen]
    )
    table[:, 7] = np.divide(_LOG2_E, temperature, out=np.zeros(len(chosen)), where=temperature > 0)
    return table


class _Upload:
    """Arrays of eight-byte numbers that go to the device in one copy."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._size = 0

    def add(self, values: np.ndarray) -> slice:
        """values: int64 or float64, of any shape. Returns their place in the buffer."""
        self._parts.append(np.ascontiguousarray(values).reshape(-1).view(np.int64))
        self._size += self._parts[-1].size
        return slice(self._size - self._parts[-1].size, self._size)

    def send(self, device: torch.device) -> _Sent:
        pinned = torch.empty(self._size, dtype=torch.int64, pin_memory=True)
        np.concatenate(self._parts, out=pinned.numpy())
        return _Sent(pinned.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True)
class _Sent:
    """An upload on the device: buffer [num_values] int64, read as integers or as floats."""

    buffer: torch.Tensor

    def integers(self, place: slice) -> torch.Tensor:
        return self.buffer[place]

    def floats(self, place: slice) -> torch.Tensor:
        return self.buffer[place].view(torch.float64)


class _Places:
    """The tokens of some sequences, as places in [num_rows, vocab_size] logits; the pending ones join on the device."""

    def __init__(self) -> None:
        self._known: list[np.ndarray] = []
        self._pending: list[tuple[int, int]] = []  # (start of the row, row of newest)

    def add(self, row_start: int, token_ids: list[int], pending: int) -> None:
        self._known.append(np.array(token_ids, dtype=np.int64) + row_start)
        if pending >= 0:
            self._pending.append((row_start, pending))

    def upload(self, upload: _Upload) -> None:
        self._known_slice = upload.add(np.concatenate([np.empty(0, dtype=np.int64), *self._known]))
        self._pending_slice = upload.add(np.array(self._pending, dtype=np.int64))

    def on_device(self, sent: _Sent, newest: torch.Tensor) -> torch.Tensor:
        """[number of tokens] int64, with repetitions."""
        known = sent.integers(self._known_slice)
        if not self._pending:
            return known
        pending = sent.integers(self._pending_slice).view(-1, 2)
        return torch.cat([known, pending[:, 0] + newest[pending[:, 1]].clamp_(min=0)])


class _Adjustment:
    """Bias and penalties of some rows: what the host sends for them, and their application to a copy of the logits."""

    def __init__(self, upload: _Upload, rows: list[DrawRow], chosen: list[int], vocab_size: int) -> None:
        self._seen, self._outputs = _Places(), _Places()
        bias_places: list[int] = []
        bias_values: list[float] = []
        for i, row in enumerate(rows[j] for j in chosen):
            sequence, start = row.sequence, i * vocab_size
            sampling = sequence.sampling
            added = biases(sampling, row.num_outputs)
            bias_places += [start + token for token, _ in added]
            bias_values += [value for _, value in added]
            if sampling.repetition_penalty != 1.0:
                self._seen.add(start, sequence.token_ids, row.pending)
            if _counts_outputs(sampling):
                self._outputs.add(start, sequence.token_ids[sequence.first_output :], row.pending)
        params = [rows[j].sequence.sampling for j in chosen]
        self.num_rows = len(chosen)
        self._logits_rows = upload.add(np.array([rows[j].logits_row for j in chosen], dtype=np.int64))
        self._penalties = upload.add(
            np.array([[p.repetition_penalty, p.frequency_penalty, p.presence_penalty] for p in params])
        )
        self._bias_places = upload.add(np.array(bias_places, dtype=np.int64))
        self._bias_values = upload.add(np.array(bias_values, dtype=np.float64))
        self._seen.upload(upload)
        self._outputs.upload(upload)

    def apply(self, logits: torch.Tensor, sent: _Sent, newest: torch.Tensor) -> torch.Tensor:
        """[number of rows, vocab_size] float32.

        Every place that a token repeats is written with the same value each time, so their order does not matter.
        """
        adjusted = logits[sent.integers(self._logits_rows)].float()
        flat, vocab_size = adjusted.view(-1), adjusted.shape[1]
        repetition, frequency, presence = sent.floats(self._penalties).float().view(-1, 3).unbind(1)
        flat.index_add_(0, sent.integers(self._bias_places), sent.floats(self._bias_values).float())
        seen = self._seen.on_device(sent, newest)
        if len(seen):
            values, penalty = flat[seen], repetition[seen // vocab_size]
            flat[seen] = torch.where(values > 0, values / penalty, values * penalty)
        outputs = self._outputs.on_device(sent, newest)
        if len(outputs):
            counts = torch.zeros_like(flat)
            counts.index_add_(0, outputs, torch.ones_like(outputs, dtype=torch.float32))
            row = outputs // vocab_size
            flat[outputs] = flat[outputs] - (frequency[row] * counts[outputs] + presence[row])
        return adjusted


@dataclass(frozen=True, slots=True)
class _Described:
    """Log-probabilities of the drawn rows `rows`, on the device.

    logprobs: [len(rows), 1 + most], the token's own and those of the `most` largest; ids: of the latter.
    """

    rows: list[int]
    logprobs: torch.Tensor
    ids: torch.Tensor


def _describe(
    logits: torch.Tensor, tokens: torch.Tensor, rows: list[int], places: torch.Tensor, most: int
) -> _Described:
    """places: [len(rows), 2], the rows of `tokens` and of `logits`."""
    picked = logits[places[:, 1]].float()
    chosen = tokens[places[:, 0]].clamp_(min=0).unsqueeze(1)
    top = picked.topk(most, dim=-1)
    logprobs = torch.cat([picked.gather(1, chosen), top.values], dim=1) - picked.logsumexp(dim=-1, keepdim=True)
    return _Described(rows, logprobs, top.indices)
