"""Each trace format, known by its content; made-up rows in the published forms."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from cli.bench.traces import TraceError, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319601,3180,8
2023-11-16 18:17:05,110,0
2023-11-16 19:17:05.5,110,27
"""


def write(tmp_path: Path, text: str, name: str = "trace") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def lines(*rows: dict[str, object]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def test_azure(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, AZURE))
    assert (trace.format, trace.has_arrivals, trace.num_skipped) == ("azure", True, 1)
    assert [(r.index, r.num_prompt_tokens, r.num_output_tokens) for r in trace.requests] == [
        (0, 4808, 10),
        (1, 3180, 8),
        (2, 110, 27),
    ]
    first, second, third = (request.arrival_s or 0.0 for request in trace.requests)
    assert second - first == pytest.approx(0.0520001, abs=1e-6)
    assert third - first == pytest.approx(3601.52004, abs=1e-6)


def test_azure_with_a_time_zone_as_in_2024(tmp_path: Path) -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n"
    (request,) = read_trace(write(tmp_path, text)).requests
    assert request.arrival_s == pytest.approx(1715299200.00993)


def test_lengths_only_forms(tmp_path: Path) -> None:
    xxx = read_trace(write(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,107,15\nXXX,396,513\n"))
    assert (xxx.format, xxx.has_arrivals) == ("azure lengths", False)
    vidur = read_trace(
        write(tmp_path, "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.85\n")
    )
    assert (vidur.format, vidur.has_arrivals) == ("vidur", False)
    assert (vidur.requests[0].num_prompt_tokens, vidur.requests[0].num_output_tokens) == (3772, 54)


def test_servegen(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, "arrival_s,input_tokens,output_tokens,reason_ratio\n0.0599,796,269,0.412\n"))
    assert trace.format == "servegen"
    assert trace.requests[0].arrival_s == 0.0599


def test_mooncake(tmp_path: Path) -> None:
    text = lines({"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 14]})
    (request,) = read_trace(write(tmp_path, text)).requests
    assert (request.arrival_s, request.num_prompt_tokens, request.hash_ids) == (3.0, 600, (0, 14))


def test_llmservingsim_gzipped(tmp_path: Path) -> None:
    path = tmp_path / "trace.bin"
    row = {"input_toks": 3, "output_toks": 2, "arrival_time_ns": 46926808, "input_tok_ids": [9, 8, 7]}
    path.write_bytes(gzip.compress(lines(row).encode()))
    trace = read_trace(path)
    assert trace.format == "llmservingsim"
    assert trace.requests[0].arrival_s == pytest.approx(0.046926808)
    assert trace.requests[0].token_ids == (9, 8, 7)


def test_limit_counts_usable_requests(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, AZURE), limit=3)
    assert len(trace.requests) == 3
    assert len(read_trace(write(tmp_path, AZURE), limit=1).requests) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"columns of no known trace \(a, b\); known are azure: .*mooncake: "),
        ("", "no known trace"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2: TIMESTAMP must be a date"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,1\n",
            "line 2: GeneratedTokens must be a whole number, not None",
        ),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,1.5,2\n", "line 2: ContextTokens must be a whole number"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,nan,2\n", "line 2: ContextTokens must be a whole number"),
        ("arrival_s,input_tokens,output_tokens\ninf,1,2\n", "line 2: arrival_s must be a number, not 'inf'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,1,2\n2023-11-16 18:17:03,1,2\n", "1 of 2 rows have an arrival"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{broken\n', "line 2 is not JSON"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n[1]\n', "line 2 must be a JSON object"),
        (
            '{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"timestamp": 1}\n',
            "line 2: column 'input_length'",
        ),
        ('{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}', "do not cover input_length 513"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": "x"}', "hash_ids must be a list"),
        (
            '{"input_toks": 2, "output_toks": 1, "arrival_time_ns": 0, "input_tok_ids": [1]}',
            "has 1 ids, input_toks says 2",
        ),
    ],
)
def test_bad_traces_say_where_and_what(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read_trace(write(tmp_path, text))


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot read the trace .*none: No such file"):
        read_trace(tmp_path / "none")
    binary = tmp_path / "binary"
    binary.write_bytes(bytes(range(128, 256)))
    with pytest.raises(TraceError, match="neither CSV nor JSON lines"):
        read_trace(binary)
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(AZURE.encode())[:40])
    with pytest.raises(TraceError, match="neither CSV nor JSON lines"):
        read_trace(cut)
