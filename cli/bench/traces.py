"""Reads request traces. The format is known by the content: column names of a CSV, keys of a JSON line.

| format | where it comes from | times |
|---|---|---|
| azure | Azure LLM inference traces 2023, 2024 (Splitwise, ISCA '24): TIMESTAMP, ContextTokens, GeneratedTokens | yes |
| azure lengths | the same columns with XXX as TIMESTAMP (NanoFlow's ShareGPT and LMSYS lengths) | no |
| vidur | num_prefill_tokens, num_decode_tokens | no |
| servegen | ServeGen: arrival_s, input_tokens, output_tokens | yes |
| mooncake | Mooncake, FAST '25: timestamp (ms), input_length, output_length, hash_ids | yes |
| llmservingsim | LLMServingSim: arrival_time_ns, input_toks, output_toks, input_tok_ids | yes |

A file may be gzipped. Rows without prompt or output tokens (failed requests in production traces) are skipped, counted.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from cli.bench.workload import HASH_BLOCK_TOKENS, RequestSpec

Row = Mapping[str, Any]


class TraceError(ValueError):
    """A trace cannot be read; the message names file, line, what is wrong and what would be right."""


@dataclass(frozen=True, slots=True)
class Trace:
    """The requests of a file, in the file's order. `has_arrivals` is False where it holds lengths only."""

    format: str
    requests: list[RequestSpec]
    has_arrivals: bool
    num_skipped: int


@dataclass(frozen=True, slots=True)
class _Format:
    name: str
    columns: frozenset[str]  # all must be there
    read: Callable[[Row], RequestSpec]


def read_trace(path: str | Path, *, limit: int | None = None) -> Trace:
    """Reads the first `limit` usable requests of a trace.

    Raises:
        TraceError: the file is missing, empty, of no known format, or a line of it is wrong.
    """
    requests: list[RequestSpec] = []
    num_skipped = 0
    name = ""
    with _open_text(path) as stream:
        for line, kind, row in _rows(stream, path):
            name = kind.name
            request = _read_row(kind, row, where=f"{path}, line {line}")
            if request.num_prompt_tokens < 1 or request.num_output_tokens < 1:
                num_skipped += 1
                continue
            requests.append(replace(request, index=len(requests)))
            if len(requests) == limit:
                break
    if not requests:
        raise TraceError(f"{path} holds no request with prompt and output tokens")
    timed = sum(request.arrival_s is not None for request in requests)
    if timed not in (0, len(requests)):
        raise TraceError(
            f"{path}: {timed} of {len(requests)} rows have an arrival time; it must be all of them or none"
        )
    return Trace(name if timed or name != "azure" else "azure lengths", requests, timed > 0, num_skipped)


def _open_text(path: str | Path) -> TextIO:
    try:
        with open(path, "rb") as binary:
            is_gzip = binary.read(2) == b"\x1f\x8b"
        if is_gzip:
            return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
        return open(path, encoding="utf-8-sig", newline="")
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}") from None


def _rows(stream: TextIO, path: str | Path) -> Iterator[tuple[int, _Format, Row]]:
    """(line number, format, row) of every row."""
    try:
        first = stream.readline()
        lines = _join(first, stream)
        yield from _json_rows(lines, path) if first.lstrip().startswith("{") else _csv_rows(lines, path)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error) as error:
        raise TraceError(f"{path} is neither CSV nor JSON lines: {' '.join(str(error).split())}") from None


def _join(first: str, rest: TextIO) -> Iterator[str]:
    yield first
    yield from rest


def _json_rows(lines: Iterator[str], path: str | Path) -> Iterator[tuple[int, _Format, Row]]:
    kind = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TraceError(f"{path}, line {number} is not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise TraceError(f"{path}, line {number} must be a JSON object, not {type(row).__name__}")
        kind = kind or _format_of(row.keys(), path)
        yield number, kind, row


def _csv_rows(lines: Iterator[str], path: str | Path) -> Iterator[tuple[int, _Format, Row]]:
    reader = csv.DictReader(lines, skipinitialspace=True)
    kind = _format_of(reader.fieldnames or (), path)
    for row in reader:
        yield reader.line_num, kind, row


def _format_of(columns: Any, path: str | Path) -> _Format:
    found = set(columns)
    for kind in _FORMATS:
        if kind.columns <= found:
            return kind
    known = "; ".join(f"{kind.name}: {', '.join(sorted(kind.columns))}" for kind in _FORMATS)
    seen = ", ".join(str(column) for column in columns) or "nothing"
    raise TraceError(f"{path} has columns of no known trace ({seen[:200]}); known are {known}")


def _read_row(kind: _Format, row: Row, *, where: str) -> RequestSpec:
    try:
        return kind.read(row)
    except KeyError as error:
        raise TraceError(f"{where}: column {error.args[0]!r} is missing") from None
    except (ValueError, TypeError) as error:
        raise TraceError(f"{where}: {error}") from None


def _whole(row: Row, column: str) -> int:
    value = row[column]
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{column} must be a whole number, not {value!r}") from None
    if number < 0 or not number.is_integer():  # not a number is no integer either
        raise ValueError(f"{column} must be a whole number, not {value!r}")
    return int(number)


def _seconds(row: Row, column: str, per_second: float) -> float:
    try:
        seconds = float(row[column]) / per_second
    except (TypeError, ValueError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"{column} must be a number, not {row[column]!r}")
    return seconds


def _whole_list(row: Row, column: str) -> tuple[int, ...]:
    values = row.get(column) or ()
    if not isinstance(values, list | tuple) or not all(isinstance(value, int) for value in values):
        raise ValueError(f"{column} must be a list of whole numbers")
    return tuple(values)


def _azure(row: Row) -> RequestSpec:
    stamp = row["TIMESTAMP"]
    arrival_s = None
    if stamp != "XXX":
        try:
            arrival_s = _unix_s(stamp)
        except (ValueError, TypeError):
            raise ValueError(f"TIMESTAMP must be a date and time or XXX, not {stamp!r}") from None
    return RequestSpec(0, _whole(row, "ContextTokens"), _whole(row, "GeneratedTokens"), arrival_s)


def _unix_s(stamp: str) -> float:
    """Seconds of `2023-11-16 18:17:03.9799600`. Its 100 ns digits go beyond what datetime keeps, so they are added."""
    whole, point, rest = stamp.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    fraction = float(f"0.{digits}") if digits else 0.0
    moment = datetime.fromisoformat(whole + (rest[len(digits) :] if point else ""))
    # A stamp without a zone is read as UTC: in a local zone a week-long trace would jump where summer time ends.
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() + fraction


def _vidur(row: Row) -> RequestSpec:
    return RequestSpec(0, _whole(row, "num_prefill_tokens"), _whole(row, "num_decode_tokens"))


def _servegen(row: Row) -> RequestSpec:
    return RequestSpec(0, _whole(row, "input_tokens"), _whole(row, "output_tokens"), _seconds(row, "arrival_s", 1.0))


def _mooncake(row: Row) -> RequestSpec:
    num_prompt, hash_ids = _whole(row, "input_length"), _whole_list(row, "hash_ids")
    if hash_ids and len(hash_ids) * HASH_BLOCK_TOKENS < num_prompt:
        raise ValueError(
            f"{len(hash_ids)} hash_ids of {HASH_BLOCK_TOKENS} tokens do not cover input_length {num_prompt}"
        )
    return RequestSpec(0, num_prompt, _whole(row, "output_length"), _seconds(row, "timestamp", 1e3), hash_ids=hash_ids)


def _llmservingsim(row: Row) -> RequestSpec:
    num_prompt, token_ids = _whole(row, "input_toks"), _whole_list(row, "input_tok_ids")
    if token_ids and len(token_ids) != num_prompt:
        raise ValueError(f"input_tok_ids has {len(token_ids)} ids, input_toks says {num_prompt}")
    return RequestSpec(
        0, num_prompt, _whole(row, "output_toks"), _seconds(row, "arrival_time_ns", 1e9), token_ids=token_ids
    )


_FORMATS = (
    _Format("azure", frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}), _azure),
    _Format("vidur", frozenset({"num_prefill_tokens", "num_decode_tokens"}), _vidur),
    _Format("servegen", frozenset({"arrival_s", "input_tokens", "output_tokens"}), _servegen),
    _Format("mooncake", frozenset({"timestamp", "input_length", "output_length"}), _mooncake),
    _Format("llmservingsim", frozenset({"input_toks", "output_toks", "arrival_time_ns"}), _llmservingsim),
)
