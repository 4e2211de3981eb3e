"""Processor time per output token, of a gateway and of workers with a tiny model: now and before, in alternating turns.

    gateway, HTTP    a gateway's process with its real servers, over workers that give every stream a token each 20 ms
    gateway, gRPC    (benchmarks/gateway_stub.py); 64 streams are read by this process. Text is decoded and sent.
    workers          a prefill and a decode worker in one process, joined by the in-process link, with a Llama of 4
                     layers and 64 values: 32 requests of 64 prompt and 128 output tokens at once, in one thread

Everything that a request costs is in it: accepting, placing, prefill, handoff, its end. A turn is a process of its own.

    python -m benchmarks.token_cpu --before ../before --output benchmarks/results/token-cpu.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.alternating import OWN_TREE, alternate, check_tree, environment_of, rows_of, run_turn, show

NUM_STREAMS, STREAM_TOKENS = 64, 150
NUM_REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 32, 64, 128
TOLERANCE = 0.02
MODULE = "benchmarks.token_cpu"


# ---- the gateway's process


async def serve(tree: Path) -> None:
    """Prints the addresses, then for each line of input the process's own processor time, in seconds."""
    import workers
    from benchmarks import gateway_stub as stub

    check_tree(tree, workers)
    sys.setswitchinterval(stub.SWITCH_INTERVAL_S)
    cluster = stub.StubCluster(8192)
    listener = stub.bind_http("127.0.0.1:0")
    bodies = stub.Bodies(1 << 20, 4096)
    _, grpc_port = await stub.start_grpc_server(
        cluster.service, "127.0.0.1:0", max_message_bytes=1 << 20, bodies=bodies
    )
    http = stub.make_http_server(stub.build_app(cluster.service, bodies))
    cluster.service.start_admitting()
    stub.freeze_collector()
    tasks = [asyncio.create_task(http.serve(sockets=[listener])), asyncio.create_task(cluster.steps())]
    print(stub.format_address(listener), f"127.0.0.1:{grpc_port}", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(time.process_time(), flush=True)
    tasks[1].cancel()
    http.should_exit = True
    await tasks[0]
    bodies.close()


class GatewayProcess:
    """A gateway of `tree`."""

    def __init__(self, tree: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE, "--serve", str(tree)],
            cwd=tree,
            env=environment_of(tree),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.http, self.grpc = self._line().split()

    def cpu_s(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the gateway's process has ended")
        return line


async def read_http(address: str, number: int) -> int:
    """Streams one completion; tokens that came."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    asked = {"prompt": f"Story {number}", "max_tokens": STREAM_TOKENS, "ignore_eos": True, "stream": True}
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in answer, answer[:500]
    return answer.count(b" word")  # the stub's one token; a slow reader gets several in one event


async def read_grpc(client: Any, number: int) -> int:
    count = 0
    async for delta in client.stream(f"Story {number}", max_tokens=STREAM_TOKENS, ignore_eos=True):
        count += len(delta.token_ids)
    return count


async def ask_gateway(gateway: GatewayProcess, protocol: str) -> float:
    """Microseconds of the gateway's processor time per token."""
    import phasewise

    async def streams() -> int:
        if protocol == "HTTP":
            return sum(await asyncio.gather(*(read_http(gateway.http, i) for i in range(NUM_STREAMS))))
        async with phasewise.AsyncClient(gateway.grpc) as client:
            return sum(await asyncio.gather(*(read_grpc(client, i) for i in range(NUM_STREAMS))))

    before_s = gateway.cpu_s()
    num_tokens = await streams()
    spent_s = gateway.cpu_s() - before_s
    assert num_tokens == NUM_STREAMS * STREAM_TOKENS, f"{num_tokens} tokens came"
    return spent_s / num_tokens * 1e6


def measure_gateway(tree: Path) -> dict[str, float]:
    gateway = GatewayProcess(tree)
    try:
        for protocol in ("HTTP", "gRPC"):
            asyncio.run(ask_gateway(gateway, protocol))  # warm-up
        return {f"gateway, {name}: per token": asyncio.run(ask_gateway(gateway, name)) for name in ("HTTP", "gRPC")}
    finally:
        gateway.close()


# ---- the workers' process


def measure_workers(tree: Path) -> dict[str, float]:
    import random

    import torch

    import workers
    from benchmarks.step_loop_cpu import make_pair, submit
    from engine.kv_cache import PagedKVCache
    from engine.loader import load_model
    from engine.model_runner import ModelRunner
    from phasewise.core.model_source import resolve_model
    from tests.support.tiny_model import save_tiny_model

    check_tree(tree, workers)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_model(Path(folder))
        source = resolve_model(folder)
        loaded = load_model(source, dtype="float32", device="cpu", seed=0, progress=lambda share: None)

    def engine_of(worker_id: str) -> tuple[Any, Any, Any]:
        spec = loaded.kv_cache_spec(16)
        cache = PagedKVCache(spec, 1024, "cpu")
        return ModelRunner(loaded, cache, 8192), cache, spec

    ports, rng = make_pair(engine_of), random.Random(0)
    prefill, decode = ports.workers["prefill-0"], ports.workers["decode-0"]
    spent_s = []
    for repeat in range(4):
        start_s = time.process_time()
        for i in range(NUM_REQUESTS):
            prompt = [rng.randrange(256) for _ in range(PROMPT_TOKENS)]
            submit(ports, f"r{repeat}.{i}", prompt, OUTPUT_TOKENS)
        while prefill.round() or decode.round() or decode.load().num_reservations or prefill.load().num_handoffs_out:
            decode.round()
        spent_s.append(time.process_time() - start_s)
        done = decode.load().counters["output_tokens"]
        assert done == (repeat + 1) * NUM_REQUESTS * (OUTPUT_TOKENS - 1), done  # the first ones come from prefill
    return {"workers, tiny model: per token": min(spent_s[1:]) / (NUM_REQUESTS * OUTPUT_TOKENS) * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="root of the checkout to compare with")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)  # a process with workers
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)  # a process with a gateway
    arguments = parser.parse_args()
    if arguments.serve:
        import uvloop

        uvloop.run(serve(arguments.serve))
        return
    if arguments.turn:
        print(json.dumps(measure_workers(arguments.turn)))
        return
    trees = {"now": OWN_TREE, **({"before": arguments.before.resolve()} if arguments.before else {})}
    values = alternate(trees, arguments.turns, lambda tree: {**measure_gateway(tree), **run_turn(MODULE, tree)})
    rows = rows_of(values, "us", TOLERANCE)
    show(rows)
    if arguments.output:
        from benchmarks.offline import device_name, write_result

        packages = ("phasewise", "torch", "uvicorn", "grpcio")
        write_result(arguments.output, device_name("cpu"), packages, rows, turns=values)


if __name__ == "__main__":
    main()
