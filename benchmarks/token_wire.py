"""What a worker's step pays to tell a gateway its tokens: a plain connection (phasewise/delivery) and an actor's call.

The sender is one thread that gives an output each 5 ms, as a step loop does; the receiver is another process. Both
ways carry the same bytes. `sender` is the time that the call takes the thread, `receiver` the processor time of the
receiving process per output, with decoding.

    python -m benchmarks.token_wire --output benchmarks/results/token-wire-cpu.json
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.offline import device_name, write_result
from phasewise.core.messages import NewTokens, WorkerOutput
from phasewise.core.request import SampledToken
from phasewise.delivery.frames import LENGTH, decode_output, encode_output
from phasewise.delivery.listener import TokenListener
from phasewise.delivery.sinks import TokenSinks

SIZES = (1, 64, 256)
"""Sequences in a step, of a token each."""
NUM_STEPS, WARM_UP, STEP_S = 600, 100, 0.005
WORKER, GATEWAY = "decode-0#1", "gateway-0#1"
MUST_US = 100.0
"""Of a call with 64 sequences. An actor's call takes 300 to 600."""


class Counter:
    """An OutputTaker that counts."""

    def __init__(self) -> None:
        self.num_outputs = 0

    def deliver(self, output: WorkerOutput) -> None:
        self.num_outputs += 1

    def tokens_lost(self, worker_id: str) -> None:
        raise AssertionError("nothing is lost")


class RayReceiver:
    """An actor that decodes what it is given, as a gateway did."""

    def __init__(self) -> None:
        self._counter = Counter()

    async def deliver(self, frame: bytes) -> None:
        self._counter.deliver(decode_output(memoryview(frame)[LENGTH.size :], WORKER))

    async def told(self) -> tuple[int, float]:
        return self._counter.num_outputs, time.process_time()


async def receive() -> None:
    """The receiving process: prints its address, and for each line of input what it has received and computed."""
    counter = Counter()
    listener = TokenListener(GATEWAY, "", counter)
    print(await listener.open("127.0.0.1"), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(counter.num_outputs, time.process_time(), flush=True)
    await listener.close()


def output_of(size: int, position: int) -> WorkerOutput:
    names = (f"cmpl-{i:032x}~0123abcd{i}" for i in range(size))
    chunks = [NewTokens(name, 0, position, (SampledToken(1000 + i),)) for i, name in enumerate(names)]
    return WorkerOutput(WORKER, tuple(chunks))


def measure(
    size: int, deliver: Callable[[WorkerOutput], None], told: Callable[[], tuple[int, float]]
) -> dict[str, float]:
    """Microseconds a step, of both sides."""
    outputs = [output_of(size, i) for i in range(WARM_UP + NUM_STEPS)]
    num_before, _ = told()
    times_us, next_s = [], time.monotonic()
    for number, output in enumerate(outputs):
        if number == WARM_UP:
            _, cpu_before_s = told()
            next_s = time.monotonic()
        start_s = time.perf_counter()
        deliver(output)
        times_us.append((time.perf_counter() - start_s) * 1e6)
        next_s += STEP_S
        time.sleep(max(next_s - time.monotonic(), 0.0))
    while (now := told())[0] < num_before + len(outputs):
        time.sleep(0.05)
    times_us = sorted(times_us[WARM_UP:])
    return {
        "sender p50": statistics.median(times_us),
        "sender p99": times_us[len(times_us) * 99 // 100],
        "receiver": (now[1] - cpu_before_s) / NUM_STEPS * 1e6,
    }


def over_connection() -> dict[int, dict[str, float]]:
    command = [sys.executable, "-m", "benchmarks.token_wire", "--receive"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        sinks = TokenSinks(WORKER, "")
        sinks.connect({GATEWAY: process.stdout.readline().strip()})

        def told() -> tuple[int, float]:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            number, cpu_s = process.stdout.readline().split()
            return int(number), float(cpu_s)

        results = {size: measure(size, lambda output: sinks.deliver(GATEWAY, output), told) for size in SIZES}
        sinks.close()
        process.stdin.close()
    return results


def over_ray() -> dict[int, dict[str, float]]:
    import ray

    from benchmarks.token_wire import RayReceiver as Receiver  # not of `__main__`, which Ray would send by value

    ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        actor: Any = ray.remote(Receiver).options(num_cpus=0).remote()
        return {
            size: measure(
                size,
                lambda output: actor.deliver.remote(encode_output(output)),
                lambda: ray.get(actor.told.remote()),
            )
            for size in SIZES
        }
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--receive", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.receive:
        uvloop.run(receive())
        return
    connection, calls = over_connection(), over_ray()
    rows = [
        {
            "case": f"{size} sequences, {what}",
            "unit": "us",
            "ours": connection[size][what],
            "floor": None,
            "peer": calls[size][what],
            "better": "low",
            "must": MUST_US if (size, what) == (64, "sender p50") else None,
            "goal": None,
        }
        for size in SIZES
        for what in connection[size]
    ]
    for row in rows:
        print(f"{row['case']:30} {row['ours']:8.1f} us   actor's call {row['peer']:8.1f} us")
    if arguments.output is not None:
        write_result(arguments.output, device_name("cpu"), ("ray", "uvloop"), rows)


if __name__ == "__main__":
    main()
