"""What a load test sends, and when: lengths, arrivals, prompts. Pure: a seed decides, no clock, no network."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

HASH_BLOCK_TOKENS = 512
"""Tokens that one of Mooncake's hash ids stands for (FAST '25 traces)."""


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One request to send.

    `arrival_s` counts from the beginning of the run; None where the lengths come without times. A prompt is, in this
    order of preference, `token_ids` as they are, the blocks that `hash_ids` name (equal ids, equal tokens), or random.
    """

    index: int
    num_prompt_tokens: int
    num_output_tokens: int
    arrival_s: float | None = None
    hash_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LengthRange:
    """A number of tokens, drawn evenly from low to high, both included."""

    low: int
    high: int

    def draw(self, source: random.Random) -> int:
        return source.randint(self.low, self.high)

    def clipped(self, limit: int | None) -> LengthRange:
        return self if limit is None else LengthRange(min(self.low, limit), min(self.high, limit))

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


def parse_length_range(text: str, *, flag: str) -> LengthRange:
    """`128` or `64:256` → LengthRange. Raises ValueError naming `flag`."""
    low, separator, high = text.partition(":")
    if not low.isdecimal() or (separator and not high.isdecimal()):
        raise ValueError(f"{flag} must be a number of tokens or a range such as 64:256, not {text!r}")
    found = LengthRange(int(low), int(high or low))
    if not 1 <= found.low <= found.high:
        raise ValueError(f"{flag} must be at least 1 and rise, not {text!r}")
    return found


def parse_numbers(text: str, *, flag: str, whole: bool) -> list[float]:
    """`1,2,4` → numbers above 0, for a sweep (`inf` too where `whole` is False). Raises ValueError naming `flag`."""
    numbers = []
    for part in text.split(","):
        try:
            number = float(int(part)) if whole else float(part)
        except ValueError:
            kind = "whole numbers" if whole else "numbers"
            raise ValueError(f"{flag} must be {kind} with commas between, such as 1,2,4, not {text!r}") from None
        if not number > 0:
            raise ValueError(f"{flag} must be above 0, not {part.strip()}")
        numbers.append(number)
    return numbers


@dataclass(frozen=True, slots=True)
class SyntheticRequests:
    """Requests with lengths drawn by `seed`: `count` of them, or without end when it is None.

    Each iteration gives the same ones, and the first n are the same whatever `count` is.
    """

    prompt: LengthRange
    output: LengthRange
    seed: int
    count: int | None = None

    def __iter__(self) -> Iterator[RequestSpec]:
        source = random.Random(f"lengths {self.seed}")
        for index in count() if self.count is None else range(self.count):
            yield RequestSpec(index, self.prompt.draw(source), self.output.draw(source))


def poisson_arrivals_s(rate: float, *, seed: int) -> Iterator[float]:
    """Arrival times of a Poisson process of `rate` requests/s, without end; the first is at its first gap, not at 0.

    `rate` infinite: all at 0.
    """
    if math.isinf(rate):
        while True:
            yield 0.0
    source = random.Random(f"arrivals {seed}")
    now_s = 0.0
    while True:
        now_s += source.expovariate(rate)
        yield now_s


def with_poisson_arrivals(requests: Iterable[RequestSpec], rate: float, *, seed: int) -> Iterator[RequestSpec]:
    """The same requests in the same order, arriving as a Poisson process; lazy, as `requests` may be endless."""
    for request, at_s in zip(requests, poisson_arrivals_s(rate, seed=seed), strict=False):
        yield replace(request, arrival_s=at_s)


def with_scaled_arrivals(requests: Sequence[RequestSpec], time_scale: float) -> list[RequestSpec]:
    """Arrivals from the first one on, times `time_scale`: 0.5 replays twice as fast. In order of arrival."""
    times_s = [request.arrival_s for request in requests if request.arrival_s is not None]
    if len(times_s) != len(requests):
        raise ValueError("these requests have no arrival times; give a rate")
    first_s = min(times_s, default=0.0)
    ordered = sorted(requests, key=lambda request: request.arrival_s or 0.0)
    return [replace(request, arrival_s=((request.arrival_s or 0.0) - first_s) * time_scale) for request in ordered]


def clip(request: RequestSpec, max_prompt_tokens: int | None, max_output_tokens: int | None) -> RequestSpec:
    """The request, no longer than the limits. A prompt keeps its beginning, so shared prefixes stay shared."""
    num_prompt = min(request.num_prompt_tokens, max_prompt_tokens or request.num_prompt_tokens)
    num_output = min(request.num_output_tokens, max_output_tokens or request.num_output_tokens)
    return replace(request, num_prompt_tokens=num_prompt, num_output_tokens=num_output)


class PromptBuilder:
    """Turns a RequestSpec into token ids, the same ones for the same seed.

    Args:
        token_ids: ids that the model accepts in a prompt.
        shared_prefix: the first so many tokens of random prompts are the same in all of them.
    """

    def __init__(self, token_ids: Sequence[int], *, seed: int | str, shared_prefix: int = 0) -> None:
        if not token_ids:
            raise ValueError("no token ids to make prompts of")
        self._token_ids = token_ids
        self._seed = seed
        self._prefix = self._random(f"prefix {seed}", shared_prefix)

    def build(self, request: RequestSpec) -> list[int]:
        """Exactly `request.num_prompt_tokens` ids."""
        length = request.num_prompt_tokens
        if request.token_ids:
            # Another model's ids are folded into this vocabulary: equal beginnings stay equal, lengths stay exact.
            size = len(self._token_ids)
            return [self._token_ids[token_id % size] for token_id in request.token_ids[:length]]
        if request.hash_ids:
            return self._blocks(request.hash_ids, length)
        prefix = self._prefix[:length]
        return prefix + self._random(f"prompt {self._seed} {request.index}", length - len(prefix))

    def _blocks(self, hash_ids: Sequence[int], length: int) -> list[int]:
        prompt: list[int] = []
        for hash_id in hash_ids:
            prompt += self._random(f"block {self._seed} {hash_id}", min(HASH_BLOCK_TOKENS, length - len(prompt)))
        return prompt

    def _random(self, name: str, length: int) -> list[int]:
        return random.Random(name).choices(self._token_ids, k=length) if length > 0 else []
