"""Measured times of one (device, model, parallelism), and predictions from them: what routing is based on."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from phasewise.core.errors import ConfigError

VERSION = 1
"""Of the file's form; another version is refused."""

_LINEAR_SIZE = 2**20
_LEAST_SLOPE = 0.1


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """A measured step: `size` is prompt tokens or sequences, `context_tokens` those whose KV is read besides."""

    size: int
    context_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Row:
    """The points of one size, by growing context."""

    contexts: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, context: float) -> float:
        """Linear between the points and beyond the last; what is below the first counts as the first."""
        if len(self.contexts) == 1 or context <= self.contexts[0]:
            return self.seconds[0]
        i = min(bisect_right(self.contexts, context), len(self.contexts) - 1)
        (c0, c1), (s0, s1) = self.contexts[i - 1 : i + 1], self.seconds[i - 1 : i + 1]
        return s0 + (context - c0) * (s1 - s0) / (c1 - c0)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step by its size and its context. `points` need no order and no full grid, but at least one.

    Predictions never fall when size or context grow, whatever noise the points have: what was measured slower than
    a larger step counts as that step (noise only ever slows a step down). They are linear between the points. Beyond
    the smallest and the largest size they go on with one slope for all contexts, because two slopes could cross. Beyond
    the largest it is at least a tenth of that step's time per token or sequence: were it flat by an accident of
    measuring, a worker would seem to have no limit.
    """

    points: tuple[Point, ...]
    _sizes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _rows: tuple[_Row, ...] = field(init=False, repr=False, compare=False)
    _slopes: tuple[float, float] = field(init=False, repr=False, compare=False)  # below the first, beyond the last

    def __post_init__(self) -> None:
        by_size: dict[int, dict[int, float]] = {}
        for point in sorted(self.points):
            by_size.setdefault(point.size, {})[point.context_tokens] = point.seconds
        rows = tuple(_Row(tuple(row), _never_above_the_next(row.values())) for row in by_size.values())
        sizes = tuple(by_size)

        def slope(first: int, context: float) -> float:
            if len(rows) == 1:
                return 0.0
            rise = rows[first + 1].at(context) - rows[first].at(context)
            return max(rise, 0.0) / (sizes[first + 1] - sizes[first])

        least = _LEAST_SLOPE * rows[-1].seconds[0] / sizes[-1] if len(rows) > 1 else 0.0
        slopes = (slope(0, rows[0].contexts[0]), max(slope(len(rows) - 2, rows[-1].contexts[0]), least))
        for name, value in (("_sizes", sizes), ("_rows", rows), ("_slopes", slopes)):
            object.__setattr__(self, name, value)

    @property
    def largest_size(self) -> float:
        return self._sizes[-1]

    def seconds(self, size: float, context_tokens: float) -> float:
        sizes = self._sizes
        values = _never_above_the_next(row.at(context_tokens) for row in self._rows)
        i = bisect_right(sizes, size)
        if i == 0:
            return max(values[0] - (sizes[0] - size) * self._slopes[0], 0.0)
        if i == len(sizes):
            return values[-1] + (size - sizes[-1]) * self._slopes[1]
        share = (size - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
        return values[i - 1] + share * (values[i] - values[i - 1])


@dataclass(frozen=True, slots=True)
class ProfileFacts:
    """What was measured, and where. Rates of 0 were not measured.

    Attributes:
        device, model, dtype, tensor_parallel: what a worker must be for the times to be its own. `model` is a shape.
        kv_blocks, block_size, kv_bytes_per_token: the KV cache that the device had room for.
        memory_bytes_per_s: read and written by a copy on the device.
        kv_to_host_bytes_per_s: gathering KV blocks into pinned host memory; 0 without swap space.
        versions, command, date: to measure it again.
    """

    device: str = ""
    model: str = ""
    dtype: str = ""
    tensor_parallel: int = 1
    kv_blocks: int = 0
    block_size: int = 0
    kv_bytes_per_token: int = 0
    memory_bytes_per_s: float = 0.0
    kv_to_host_bytes_per_s: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    date: str = ""

    @property
    def kind(self) -> tuple[str, str, str, int]:
        """Workers for which it is equal take equal times."""
        return self.device, self.model, self.dtype, self.tensor_parallel


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Times of a worker's steps. Sizes are prompt tokens for `prefill`, sequences for `decode`.

    The context of a prefill point is the tokens before the chunk; that of a decode point is the sum over its sequences.
    """

    prefill: StepTimes
    decode: StepTimes
    facts: ProfileFacts = ProfileFacts()

    @staticmethod
    def linear(
        prefill_base_s: float, prefill_token_s: float, decode_base_s: float, decode_sequence_s: float
    ) -> DeviceProfile:
        """A prefill of t tokens takes base + t * token_s, a decode step of b sequences base + b * sequence_s."""

        def line(base_s: float, slope_s: float) -> StepTimes:
            return StepTimes((Point(0, 0, base_s), Point(_LINEAR_SIZE, 0, base_s + _LINEAR_SIZE * slope_s)))

        return DeviceProfile(line(prefill_base_s, prefill_token_s), line(decode_base_s, decode_sequence_s))

    def joined(self, other: DeviceProfile) -> DeviceProfile:
        """What two workers of one kind measured: the faster of each step, because noise only ever slows one down."""

        def least(ours: StepTimes, theirs: StepTimes) -> StepTimes:
            seconds: dict[tuple[int, int], float] = {}
            for p in (*ours.points, *theirs.points):
                cell = (p.size, p.context_tokens)
                seconds[cell] = min(p.seconds, seconds.get(cell, p.seconds))
            return StepTimes(tuple(Point(*cell, value) for cell, value in seconds.items()))

        return DeviceProfile(least(self.prefill, other.prefill), least(self.decode, other.decode), self.facts)

    def prefill_s(self, num_tokens: float, context_tokens: float = 0.0) -> float:
        """Predicted seconds to compute `num_tokens` prompt tokens that follow `context_tokens` of the same prompt.

        More tokens than the largest point's run in chunks of that size, as a worker's scheduler cuts them.
        """
        seconds, largest = 0.0, self.prefill.largest_size
        while num_tokens > largest:
            seconds += self.prefill.seconds(largest, context_tokens)
            num_tokens -= largest
            context_tokens += largest
        return seconds + self.prefill.seconds(num_tokens, context_tokens)

    def decode_step_s(self, num_sequences: float, context_tokens: float = 0.0) -> float:
        """Predicted seconds of one decode step over sequences that together have `context_tokens` tokens of KV."""
        return self.decode.seconds(num_sequences, context_tokens)

    def to_json(self) -> str:
        """The form that `from_json` reads: one line per point."""
        values = {"version": VERSION, **asdict(self.facts)}
        entries = [f' "{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in values.items()]
        for name, size, times in (("prefill", "tokens", self.prefill), ("decode", "sequences", self.decode)):
            points = (
                json.dumps({size: p.size, "context_tokens": p.context_tokens, "seconds": p.seconds})
                for p in sorted(times.points)
            )
            entries.append(f' "{name}": [\n  ' + ",\n  ".join(points) + "\n ]")
        return "{\n" + ",\n".join(entries) + "\n}\n"

    @staticmethod
    def from_json(text: str, *, source: str) -> DeviceProfile:
        """Raises ConfigError that names `source`, the key, and what is wrong with it."""
        try:
            document = _Document.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            reason = f"{where}: {first['msg']}" if where else first["msg"]
            raise ConfigError(
                f"{source} is no device profile of version {VERSION} ({reason}); measure one with: phasewise profile"
            ) from None
        values = document.model_dump(exclude={"version", "prefill", "decode"})
        return DeviceProfile(
            StepTimes(tuple(Point(p.tokens, p.context_tokens, p.seconds) for p in document.prefill)),
            StepTimes(tuple(Point(p.sequences, p.context_tokens, p.seconds) for p in document.decode)),
            ProfileFacts(**values),
        )

    @staticmethod
    def read(path: str | os.PathLike[str]) -> DeviceProfile:
        """From a file. Raises ConfigError."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ConfigError(
                f"model.profile: cannot read {path}: {reason}; measure one with: phasewise profile --output {path}"
            ) from None
        return DeviceProfile.from_json(text, source=f"model.profile: {path}")

    def check_is_of(self, facts: ProfileFacts, *, source: str) -> None:
        """Raises ConfigError unless the profile was measured on such a device, model shape, dtype and parallelism."""
        for name in ("device", "model", "dtype", "tensor_parallel"):
            theirs, ours = getattr(self.facts, name), getattr(facts, name)
            if theirs != ours:
                raise ConfigError(
                    f"model.profile: {source} was measured with {name} {theirs!r} and this worker has {ours!r}; "
                    "measure this one with: phasewise profile, or leave model.profile out",
                    field="model.profile",
                )


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _PrefillPoint(_Part):
    tokens: int = Field(ge=0)
    context_tokens: int = Field(ge=0)
    seconds: float = Field(ge=0)


class _DecodePoint(_Part):
    sequences: int = Field(ge=0)
    context_tokens: int = Field(ge=0)
    seconds: float = Field(ge=0)


class _Document(_Part):
    version: Literal[1]
    device: str
    model: str
    dtype: str
    tensor_parallel: int = Field(ge=1)
    kv_blocks: int = Field(ge=0)
    block_size: int = Field(ge=0)
    kv_bytes_per_token: int = Field(ge=0)
    memory_bytes_per_s: float = Field(ge=0)
    kv_to_host_bytes_per_s: float = Field(ge=0)
    versions: dict[str, str]
    command: str
    date: str
    prefill: list[_PrefillPoint] = Field(min_length=1)
    decode: list[_DecodePoint] = Field(min_length=1)


def _never_above_the_next(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(accumulate(reversed(tuple(values)), min))[::-1]
