"""What a token costs a gateway's process, and how late it is read; workers and clients are in processes of their own.

    cost     64 streams of a token each 20 ms, one event or message a token: processor time per token, HTTP and gRPC
    behind   500 streams, 30,000 tokens a second in all and more, whatever the gateway does: when a token is read,
             after its worker gave it away; of three runs that with the median p99. A gateway that falls behind puts
             several tokens of a stream into one event

The workers are a stub that sends over the connections for tokens (phasewise/delivery). The cost has all that a request
costs: accepting, placing, its end.

    python -m benchmarks.gateway_tokens --output benchmarks/results/gateway-tokens-cpu.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pickle
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import gateway_stub as stub
from benchmarks.offline import device_name, write_result
from phasewise.core.messages import AbortRequest, NewTokens, PrefillTask, WorkerOutput
from phasewise.core.request import FinishReason, SampledToken
from phasewise.delivery.listener import TokenListener
from phasewise.delivery.sinks import TokenSinks

MODULE = "benchmarks.gateway_tokens"
GATEWAY, WORKER = "gateway-0", "decode-0"
COST_STREAMS, COST_TOKENS, COST_STEP_S = 64, 150, 0.02
BEHIND_STREAMS, BEHIND_SECONDS, RATES = 500, 10, (30_000, 60_000)
RATE_MUST, DELAY_MUST_MS = 30_000, 60.0
BARS = {"HTTP": (60.0, 45.0), "gRPC": (75.0, 55.0)}
_LENGTH = struct.Struct(">I")


# ---- the gateway's process


class Cluster(stub.StubCluster):
    """A gateway whose workers are in another process, behind a socket."""

    def __init__(self, workers: socket.socket) -> None:
        super().__init__(8192)
        self._workers = workers

    def send(self, worker_id: str, message: Any) -> None:
        body = pickle.dumps(message)
        self._workers.sendall(_LENGTH.pack(len(body)) + body)


async def serve(workers: socket.socket) -> None:
    """Prints its addresses (HTTP, gRPC, tokens), then for each line of input the process's own processor time."""
    sys.setswitchinterval(stub.SWITCH_INTERVAL_S)
    cluster = Cluster(workers)
    listener, bodies = stub.bind_http("127.0.0.1:0"), stub.Bodies(1 << 20, 4096)
    tokens = TokenListener(GATEWAY, "", cluster.service)
    _, grpc_port = await stub.start_grpc_server(
        cluster.service, "127.0.0.1:0", max_message_bytes=1 << 20, bodies=bodies
    )
    http = stub.make_http_server(stub.build_app(cluster.service, bodies))
    cluster.service.start_admitting()
    stub.freeze_collector()
    task = asyncio.create_task(http.serve(sockets=[listener]))
    print(stub.format_address(listener), f"127.0.0.1:{grpc_port}", await tokens.open("127.0.0.1"), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(time.process_time(), flush=True)
    http.should_exit = True
    await task
    await tokens.close()
    bodies.close()


# ---- the workers' process


def work(gateway: socket.socket, address: str, step_s: float) -> None:
    """Gives each open request a token a step, until the gateway's end of `gateway` closes.

    Prints the moments of its steps and in which each request began, as JSON.
    """
    sinks = TokenSinks(WORKER, "")
    sinks.connect({GATEWAY: address})
    token = SampledToken(stub.load_tokenizer(stub.resolve_model("smollm2-135m")).encode(" word")[0])
    running: dict[str, tuple[int, int]] = {}  # request id → tokens given, tokens wanted
    began: dict[str, int] = {}
    steps_s: list[float] = []
    received = b""
    gateway.setblocking(False)
    next_s = time.monotonic()
    while True:
        try:
            while data := gateway.recv(1 << 16):
                received += data
            break
        except BlockingIOError:
            pass
        while len(received) >= 4 and len(received) >= 4 + (length := _LENGTH.unpack_from(received)[0]):
            message, received = pickle.loads(received[4 : 4 + length]), received[4 + length :]
            if isinstance(message, PrefillTask):
                running[message.request.request_id] = (0, message.request.max_new_tokens)
                began[message.request.request_id.rsplit("~", 1)[0]] = len(steps_s)
            elif isinstance(message, AbortRequest):
                running.pop(message.request_id, None)
        chunks = []
        for request_id, (position, wanted) in list(running.items()):
            is_last = position + 1 == wanted
            chunks.append(NewTokens(request_id, 0, position, (token,), FinishReason.LENGTH if is_last else None))
            running[request_id] = (position + 1, wanted)
            if is_last:
                del running[request_id]
        steps_s.append(time.monotonic())
        if chunks:
            sinks.deliver(GATEWAY, WorkerOutput(WORKER, tuple(chunks)))
        next_s += step_s
        time.sleep(max(next_s - time.monotonic(), 0.0))
    sinks.close()
    print(json.dumps({"steps_s": steps_s, "began": began}))


# ---- the client's process


class Processes:
    """A gateway's and its workers'."""

    def __init__(self, step_s: float, core: int | None) -> None:
        ours, theirs = socket.socketpair()
        pin = None if core is None else lambda: os.sched_setaffinity(0, {core})
        self._gateway = self._start(ours, pin, "--gateway")
        self.http, self.grpc, tokens = self._line(self._gateway).split()
        self._workers = self._start(theirs, None, "--workers", tokens, "--step", str(step_s))
        ours.close()
        theirs.close()

    def cpu_s(self) -> float:
        assert self._gateway.stdin is not None
        self._gateway.stdin.write("\n")
        self._gateway.stdin.flush()
        return float(self._line(self._gateway))

    @property
    def gateway_pid(self) -> int:
        return self._gateway.pid

    def close(self) -> dict[str, Any]:
        """What the workers did."""
        self._gateway.communicate()
        out, _ = self._workers.communicate()
        return dict(json.loads(out))

    def _start(self, end: socket.socket, pin: Any, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", MODULE, "--fd", str(end.fileno()), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, pass_fds=(end.fileno(),), preexec_fn=pin)

    def _line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("a process has ended")
        return line


@contextmanager
def processes(step_s: float, core: int | None = None) -> Iterator[tuple[Processes, dict[str, Any]]]:
    made, told = Processes(step_s, core), dict[str, Any]()
    try:
        yield made, told
    finally:
        told |= made.close()


class HttpStream(asyncio.Protocol):
    """Reads one event stream: counts tokens and events, and keeps when each token was read."""

    def __init__(self, number: int, num_tokens: int) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.arrivals_s: list[float] = []
        self.num_events = 0
        self.request_id = f"stream-{number}"
        self._asked = {"prompt": f"Story {number}", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}

    def connection_made(self, transport: Any) -> None:
        body = json.dumps(self._asked).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: {self.request_id}\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        transport.write(head.encode() + body)

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        self.arrivals_s += [now_s] * data.count(b" word")  # the stub's one token
        self.num_events += data.count(b"data: ")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)


async def read_http(address: str, num_streams: int, num_tokens: int) -> list[HttpStream]:
    host, port = address.split(":")
    loop = asyncio.get_running_loop()
    streams = []
    for number in range(num_streams):
        _, stream = await loop.create_connection(lambda i=number: HttpStream(i, num_tokens), host, int(port))  # type: ignore[misc]
        streams.append(stream)
    for stream in streams:
        await stream.over
        assert len(stream.arrivals_s) == num_tokens, f"{len(stream.arrivals_s)} of {num_tokens} tokens came"
    return streams


async def read_grpc(address: str, num_streams: int, num_tokens: int) -> int:
    """Messages that came."""
    import phasewise

    async def read(client: Any, number: int) -> int:
        num_messages = count = 0
        async for delta in client.stream(f"Story {number}", max_tokens=num_tokens, ignore_eos=True):
            count += len(delta.token_ids)
            num_messages += 1
        assert count == num_tokens, f"{count} of {num_tokens} tokens came"
        return num_messages

    async with phasewise.AsyncClient(address) as client:
        return sum(await asyncio.gather(*(read(client, i) for i in range(num_streams))))


async def ask(address: str, protocol: str) -> int:
    """Events or messages that came."""
    if protocol == "HTTP":
        return sum(s.num_events - 1 for s in await read_http(address, COST_STREAMS, COST_TOKENS))  # [DONE] is one
    return await read_grpc(address, COST_STREAMS, COST_TOKENS)


def measure_cost(num_turns: int) -> list[dict[str, Any]]:
    costs_us: dict[str, list[float]] = {name: [] for name in BARS}
    shares: dict[str, list[float]] = {name: [] for name in BARS}
    num_tokens = COST_STREAMS * COST_TOKENS
    with processes(COST_STEP_S) as (made, _):
        for turn in range(num_turns + 1):
            for protocol in BARS:
                before_s = made.cpu_s()
                num_events = uvloop.run(ask(made.http if protocol == "HTTP" else made.grpc, protocol))
                spent_s = made.cpu_s() - before_s
                if turn:  # the first warms up
                    costs_us[protocol].append(spent_s / num_tokens * 1e6)
                    shares[protocol].append(num_events / num_tokens)
    rows = []
    for protocol, (must, goal) in BARS.items():
        row = {"case": f"{protocol}, processor time per token", "unit": "us", "better": "low", "floor": None}
        rows.append(row | {"ours": statistics.median(costs_us[protocol]), "peer": None, "must": must, "goal": goal})
        rows[-1] |= {"values": costs_us[protocol], "events_per_token": statistics.median(shares[protocol])}
    return rows


def measure_behind(rate: int) -> list[dict[str, Any]]:
    num_tokens = BEHIND_SECONDS * rate // BEHIND_STREAMS
    with processes(BEHIND_STREAMS / rate) as (made, told):
        uvloop.run(read_http(made.http, 20, 50))  # warm-up
        before_s = made.cpu_s()
        streams = uvloop.run(read_http(made.http, BEHIND_STREAMS, num_tokens))
        spent_s = made.cpu_s() - before_s
    steps_s, delays_ms = told["steps_s"], []
    first_s = max(stream.arrivals_s[0] for stream in streams)  # from here on all streams run
    last_s = min(stream.arrivals_s[-1] for stream in streams)
    for stream in streams:
        began = told["began"][stream.request_id]
        for position, arrival_s in enumerate(stream.arrivals_s):
            if first_s <= arrival_s <= last_s:
                delays_ms.append((arrival_s - steps_s[began + position]) * 1000)
    delays_ms.sort()
    num_all, is_bar = BEHIND_STREAMS * num_tokens, rate == RATE_MUST
    row = {"floor": None, "peer": None, "goal": None}
    read = {"case": f"{rate} tokens/s: read", "unit": "1/s", "ours": len(delays_ms) / (last_s - first_s)}
    late = {"case": f"{rate} tokens/s: delay p99", "unit": "ms", "ours": delays_ms[len(delays_ms) * 99 // 100]}
    more = {
        "p50_ms": delays_ms[len(delays_ms) // 2],
        "cpu_us_per_token": spent_s / num_all * 1e6,
        "events_per_token": sum(stream.num_events for stream in streams) / num_all,
    }
    return [
        read | row | {"better": "high", "must": rate * 0.99 if is_bar else None},  # it is given no more than that
        late | row | {"better": "low", "must": DELAY_MUST_MS if is_bar else None} | more,
    ]


def median_behind(rate: int) -> list[dict[str, Any]]:
    runs = sorted((measure_behind(rate) for _ in range(3)), key=lambda rows: float(rows[1]["ours"]))
    rows = runs[1]
    rows[1]["values"] = [late["ours"] for _, late in runs]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["cost", "behind"], choices=["cost", "behind"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)  # the socket between gateway and workers
    parser.add_argument("--gateway", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--workers", help=argparse.SUPPRESS)
    parser.add_argument("--step", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.gateway:
        uvloop.run(serve(socket.socket(fileno=arguments.fd)))
        return
    if arguments.workers:
        work(socket.socket(fileno=arguments.fd), arguments.workers, arguments.step)
        return
    rows = (measure_cost(arguments.turns) if "cost" in arguments.parts else []) + (
        [row for rate in RATES for row in median_behind(rate)] if "behind" in arguments.parts else []
    )
    for row in rows:
        print(json.dumps(row))
    if arguments.output is not None:
        write_result(arguments.output, device_name("cpu"), ("uvicorn", "uvloop", "grpcio"), rows)


if __name__ == "__main__":
    main()
