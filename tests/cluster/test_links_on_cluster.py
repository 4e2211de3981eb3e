"""Direct links between real processes: right tokens over them, also when a worker at their end stops, dies or ends.

Over NCCL where there are GPUs, else over TCP. Of two GPUs the decode workers share one: NCCL wants different ones only
at the ends of a link. The tests share a cluster, in this order; the last but one ends it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import phasewise
from tests.cluster.test_life import session_processes, shared_memory
from tests.support.served import PHASEWISE, Served, held, served, until
from tests.support.tiny_model import greedy

pytestmark = pytest.mark.cluster

STALL_S = 1.0
NUM_WORKERS = 3
NUM_GPUS = torch.cuda.device_count()
WIRE = "nccl" if NUM_GPUS >= 2 else "tcp"
SHARING_RAY = f"""
import ray, sys
ray = ray.init("local", num_cpus=8, num_gpus={NUM_WORKERS}, include_dashboard=False, _node_ip_address="127.0.0.1")
print("address", ray.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""
CONFIG = f"""
model: {{dtype: float32}}
cache: {{kv_cache_gib: 1}}
transfer: {{link: {WIRE}, stall_s: {STALL_S}, slab_mib: 1, layerwise_threshold_tokens: 200, layers_per_part: 1}}
"""


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """A Ray of our own where two GPUs must do for three workers; it takes the GPUs as the environment names them."""
    if NUM_GPUS != 2:
        yield "local"
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # `phasewise serve` must have it, too
        with subprocess.Popen(
            [sys.executable, "-c", SHARING_RAY],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "0,1,1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            yield next(line.split()[1] for line in process.stdout if line.startswith("address"))
            process.stdin.close()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> str:
    file = tmp_path_factory.mktemp("links") / "links.yaml"
    file.write_text(f"{CONFIG}ray: {{address: '{ray_address}'}}\n")
    return str(file)


@pytest.fixture(scope="module")
def memory_before(config: str) -> set[str]:
    return shared_memory()


@pytest.fixture(scope="module")
def linked(tiny_model: tuple[Path, Any], config: str, memory_before: set[str]) -> Iterator[Served]:
    with served(str(tiny_model[0]), "--config", config, "--prefill", "1", "--decode", "2") as cluster:
        # Links open beside the first requests, which the object store carries.
        until(lambda: [pair["link"] for pair in cluster.get("/links")["pairs"]] == ["tcp", "tcp"], 30.0)
        yield cluster


def prompt_of(seed: int, length: int) -> list[int]:
    return [seed, *(position * (seed + 3) % 250 for position in range(length - 1))]


def counter(cluster: Served, name: str, worker_id: str = "prefill-0") -> int:
    return int(cluster.worker(worker_id)["counters"][name])


class Streams:
    """Greedy streams at once. `tokens` fills as they run."""

    def __init__(self, cluster: Served, prompts: list[list[int]], num_tokens: int) -> None:
        self._prompts = prompts
        self._num_tokens = num_tokens
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self._client = phasewise.AsyncClient(cluster.grpc, timeout_s=90, max_retries=0)

    async def run(self) -> list[list[int]]:
        async with self._client:
            await asyncio.gather(*map(self._one, range(len(self._prompts))))
        return self.tokens

    async def _one(self, number: int) -> None:
        stream: AsyncIterator[Any] = self._client.stream(
            token_ids=self._prompts[number], max_tokens=self._num_tokens, temperature=0.0, ignore_eos=True
        )
        async for delta in stream:
            self.tokens[number] += delta.token_ids


def expected(model: Any, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    return [greedy(model, prompt, num_tokens) for prompt in prompts]


async def test_handoffs_go_over_the_link_and_not_through_the_object_store(
    linked: Served, tiny_model: tuple[Path, Any]
) -> None:
    prompts = [prompt_of(seed, (1, 40, 199, 200, 700, 1500)[seed % 6]) for seed in range(12)]
    tokens = await Streams(linked, prompts, 8).run()
    assert tokens == expected(tiny_model[1], prompts, 8)
    until(lambda: not held(linked.status()), 10.0)
    assert counter(linked, "handoffs_out") == len(prompts)
    assert min(counter(linked, "handoffs_in", f"decode-{i}") for i in range(2)) > 0
    assert counter(linked, "handoff_bytes_out") > 0
    assert counter(linked, "parts_stored") == 0
    assert counter(linked, "links_lost") == 0


async def test_a_decode_worker_that_stops_for_a_while_gets_its_link_back(
    linked: Served, tiny_model: tuple[Path, Any]
) -> None:
    prompts = [prompt_of(seed + 20, 600) for seed in range(6)]
    pid, lost = linked.worker("decode-1")["pid"], counter(linked, "links_lost")
    before = counter(linked, "handoffs_in", "decode-1")
    running = asyncio.create_task(Streams(linked, prompts, 30).run())
    await asyncio.to_thread(until, lambda: counter(linked, "handoffs_in", "decode-1") > before, 30.0)
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.to_thread(until, lambda: counter(linked, "links_lost") > lost, STALL_S + 15.0)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert await running == expected(tiny_model[1], prompts, 30)
    until(lambda: not held(linked.status()), 10.0)
    assert linked.worker("decode-1")["state"] == "ready"

    def is_used_again() -> bool:
        stored, taken = counter(linked, "parts_stored"), counter(linked, "handoffs_in", "decode-1")
        more = [prompt_of(seed + 40, 50) for seed in range(4)]
        assert asyncio.run(Streams(linked, more, 2).run()) == expected(tiny_model[1], more, 2)
        until(lambda: not held(linked.status()), 10.0)
        return counter(linked, "parts_stored") == stored and counter(linked, "handoffs_in", "decode-1") > taken

    await asyncio.to_thread(until, is_used_again, 20.0)


async def test_a_decode_worker_killed_during_handoffs_costs_no_token(
    linked: Served, tiny_model: tuple[Path, Any]
) -> None:
    prompts = [prompt_of(seed + 60, 900) for seed in range(8)]
    pid, lost = linked.worker("decode-1")["pid"], counter(linked, "links_lost")
    before = counter(linked, "handoffs_in", "decode-1")
    running = asyncio.create_task(Streams(linked, prompts, 30).run())
    await asyncio.to_thread(until, lambda: counter(linked, "handoffs_in", "decode-1") > before, 30.0)
    os.kill(pid, signal.SIGKILL)
    assert await running == expected(tiny_model[1], prompts, 30)
    until(lambda: linked.members().get("decode-1", {}).get("id") != "decode-1#1", 20.0)
    until(lambda: not held(linked.status()), 10.0)
    assert counter(linked, "links_lost") > lost
    assert counter(linked, "checksum_failures", "decode-0") == 0


def test_an_orderly_end_leaves_no_process_and_no_shared_memory(linked: Served, memory_before: set[str]) -> None:
    linked.signal(signal.SIGTERM)
    assert linked.wait_end() == 0, "\n".join(linked.lines)
    assert session_processes(linked.pid) == []
    assert shared_memory() <= memory_before


@pytest.mark.parametrize(
    ("device", "link", "message"), [("cpu", "nccl", "transfer.link nccl needs GPUs; use tcp or object_store")]
)
def test_a_link_that_the_workers_cannot_have_is_one_clear_line(
    tmp_path: Path, tiny_model: tuple[Path, Any], device: str, link: str, message: str
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(f"transfer: {{link: {link}}}\nmodel: {{device: {device}}}\n")
    ports = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
    done = subprocess.run(
        [PHASEWISE, "serve", str(tiny_model[0]), "--config", str(file), *ports],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout
    assert message in done.stderr.splitlines()[-1], done.stderr
