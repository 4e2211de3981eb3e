"""What one client does to the streams of others: the largest gap in 32 open streams while hostile input comes.

The gateway runs on a core of its own, over workers that give each stream a token every 20 ms (gateway_stub.py). The
streams are read by this process on another core, and hostile requests of one kind are sent from a third process, ten a
second. `peer` is the run without them. A large gap beside a peer's small one is the gateway's.

    python -m benchmarks.gateway --output benchmarks/results/gateway-cpu.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.offline import device_name, write_result

NUM_STREAMS = 32
SETTLE_S = 5.0
"""How long the gateway has to give its memory back; 10 s are allowed."""
MUST_MS, GOAL_MS = 100.0, 30.0
KINDS = (
    "words_5mb", "words_7mb", "letter_16mib", "messages_16mib", "tokenize_16mib", "ids_16mib", "detokenize_16mib",
    "many_messages", "small_messages", "prompt_lists", "stop_ids", "nested_1mb", "digits_1mb", "wrong_shapes",
    "endless_header", "pipelined", "half_body", "silent", "leaves", "grpc_words_5mb", "grpc_ids_16mib", "grpc_messages",
    "grpc_small_messages", "grpc_leaves", "grpc_malformed",
)  # fmt: skip


class Gateway:
    """The gateway's process."""

    def __init__(self, context: int, core: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gateway_stub", "--context", str(context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        assert self._process.stdout is not None
        self.http, self.grpc, self.max_bytes = self._process.stdout.readline().split()

    def dropped(self) -> dict[str, float]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))

    def cpu_s(self) -> float:
        """What the process itself has computed."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> float:
        """Of the process and its children."""
        total = 0
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    if self._process.pid in (parent, int(entry.name)):
                        total += int((entry / "statm").read_text().split()[1])
                except (OSError, IndexError):
                    continue
        return total * os.sysconf("SC_PAGE_SIZE") / 2**20

    def close(self) -> None:
        self._process.communicate()


class Stream(asyncio.Protocol):
    """A client of one stream: keeps the largest time between two arrivals after the first."""

    def __init__(self) -> None:
        self.largest_gap_s = 0.0
        self.num_arrivals = 0
        self._last_s: float | None = None

    def connection_made(self, transport: Any) -> None:
        body = json.dumps({"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        transport.write(head.encode() + body)

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        if self._last_s is not None:
            self.largest_gap_s = max(self.largest_gap_s, now_s - self._last_s)
        self._last_s = now_s
        self.num_arrivals += 1

    def begin_again(self) -> None:
        """From now on gaps count."""
        self.largest_gap_s = 0.0
        self.num_arrivals = 0


async def measure(gateway: Gateway, kind: str | None, seconds: float) -> dict[str, Any]:
    """The largest gap while input of a kind comes; memory before, at its most, and after."""
    loop = asyncio.get_running_loop()
    host, port = gateway.http.split(":")
    pairs = [await loop.create_connection(Stream, host, int(port)) for _ in range(NUM_STREAMS)]
    await asyncio.sleep(1.0)
    before_mib = most_mib = gateway.memory_mib()
    sender = None
    if kind is not None:
        sender = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.gateway_hostile", kind, gateway.http, gateway.grpc),
            *(gateway.max_bytes, str(seconds)),
            stdout=subprocess.PIPE,
        )
        assert sender.stdout is not None
        await sender.stdout.readline()  # it has made its input
    for _, stream in pairs:
        stream.begin_again()
    cpu_before_s = gateway.cpu_s()
    for _ in range(int(seconds * 5)):
        await asyncio.sleep(0.2)
        most_mib = max(most_mib, gateway.memory_mib())
    cpu_s = gateway.cpu_s() - cpu_before_s
    gap_s = max(stream.largest_gap_s for _, stream in pairs)
    assert min(stream.num_arrivals for _, stream in pairs) > seconds * 10, "the streams have stopped"
    told: dict[str, Any] = {}
    if sender is not None:
        out, _ = await sender.communicate()
        told = json.loads(out)
        await asyncio.sleep(SETTLE_S)
    after_mib = gateway.memory_mib()
    for transport, _ in pairs:
        transport.abort()
    await asyncio.sleep(0.5)
    memory = {"before_mib": before_mib, "most_mib": most_mib, "after_mib": after_mib}
    result = {"gap_ms": gap_s * 1000, "cpu_s": cpu_s, **memory}
    if left := told.pop("left", None):
        dropped = gateway.dropped()
        delays = sorted(dropped[i] - at_s for i, at_s in left.items() if i in dropped)
        result["num_left"] = len(left)
        result["num_dropped"] = len(delays)
        result["drop_ms_p50"], result["drop_ms_max"] = delays[len(delays) // 2] * 1000, delays[-1] * 1000
    return {**result, **told}


async def run(arguments: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    for context in arguments.contexts:
        gateway = Gateway(context, arguments.cores[0])
        quiet = await measure(gateway, None, arguments.seconds)
        print(f"context {context}: alone {quiet['gap_ms']:.1f} ms", flush=True)
        for kind in arguments.kinds:
            found = await measure(gateway, kind, arguments.seconds)
            case = f"{kind}, context {context}"
            details[case] = found
            print(
                case, json.dumps({k: round(v, 1) if isinstance(v, float) else v for k, v in found.items()}), flush=True
            )
            row = {"unit": "ms", "floor": 20.0, "peer": round(quiet["gap_ms"], 1), "better": "low"}
            rows.append({"case": case, "ours": round(found["gap_ms"], 1), "must": MUST_MS, "goal": GOAL_MS, **row})
        gateway.close()
    if arguments.output is not None:
        write_result(arguments.output, device_name("cpu"), ("uvicorn", "grpcio", "tokenizers"), rows, details=details)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 131072])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--cores", type=int, nargs=2, default=[0, 1])
    parser.add_argument("--output", type=Path)
    parsed = parser.parse_args()
    os.sched_setaffinity(0, {parsed.cores[1]})
    uvloop.run(run(parsed))
