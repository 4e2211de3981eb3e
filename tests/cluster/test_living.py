"""Members come, go, return and change while streams are open."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import phasewise
from tests.cluster.test_life import is_back, session_processes, shared_memory
from tests.support.processes import processes_of
from tests.support.served import Served, held, served, until

pytestmark = pytest.mark.cluster

NUM_STREAMS, NUM_TOKENS = 8, 400


async def streams_while(cluster: Served, disturb: Callable[[], None]) -> list[list[int]]:
    """The tokens of streams, greedy and drawn, during which `disturb` is called, in another thread."""
    async with phasewise.AsyncClient(cluster.grpc, timeout_s=120, max_retries=0) as client:
        first = asyncio.Event()

        async def one(seed: int) -> list[int]:
            ids: list[int] = []
            async for delta in client.stream(
                token_ids=[seed, 2, 3],
                max_tokens=NUM_TOKENS,
                temperature=seed % 2 * 0.8,
                top_k=4,
                seed=seed,
                ignore_eos=True,
            ):
                ids += delta.token_ids
                first.set()
            return ids

        streams = [asyncio.create_task(one(seed)) for seed in range(NUM_STREAMS)]
        await first.wait()
        await asyncio.to_thread(disturb)
        return await asyncio.gather(*streams)


def control_plane_of(cluster: Served) -> int:
    (process,) = [p for p in processes_of(cluster.pid) if p.command.startswith("ray::ControlPlaneActor")]
    return process.pid


def serves(cluster: Served) -> None:
    with phasewise.Client(cluster.grpc, timeout_s=60) as client:
        assert client.generate(token_ids=[5, 6], max_tokens=4, ignore_eos=True).usage.num_output_tokens == 4


async def test_each_process_may_die_and_is_back_and_no_stream_notices(tiny_model: tuple[Path, Any]) -> None:
    with served(str(tiny_model[0]), "--prefill", "1", "--decode", "2") as cluster:
        undisturbed = await streams_while(cluster, lambda: None)

        def kill(name: str) -> None:
            os.kill(cluster.members()[name]["pid"], signal.SIGKILL)

        assert await streams_while(cluster, lambda: kill("decode-0")) == undisturbed
        await asyncio.to_thread(until, lambda: is_back(cluster, "decode-0"), 60.0)

        first = control_plane_of(cluster)

        def kill_control_plane() -> None:
            os.kill(first, signal.SIGKILL)
            serves(cluster)  # waits within its deadline until there is one again

        assert await streams_while(cluster, kill_control_plane) == undisturbed
        assert control_plane_of(cluster) != first
        ids = {member["id"] for member in cluster.members().values()}
        assert ids == {"prefill-0#1", "decode-0#2", "decode-1#1", "gateway-0#1"}, "it found them all"

        kill("gateway-0")
        await asyncio.to_thread(until, lambda: is_back(cluster, "gateway-0"), 60.0)
        await asyncio.to_thread(serves, cluster)
        assert await streams_while(cluster, lambda: None) == undisturbed
        await asyncio.to_thread(until, lambda: not held(cluster.status()), 10.0)
        cluster.signal(signal.SIGTERM)
        assert await asyncio.to_thread(cluster.wait_end) == 0, "\n".join(cluster.lines)
        assert session_processes(cluster.pid) == []


async def test_a_cluster_grows_and_shrinks_under_load(tiny_model: tuple[Path, Any]) -> None:
    with served(str(tiny_model[0])) as cluster:
        undisturbed = await streams_while(cluster, lambda: None)

        def grow() -> None:
            cluster.order("scale", prefill=2, decode=2)
            until(lambda: cluster.members().keys() >= {"prefill-1", "decode-1"}, 60.0)
            until(lambda: all(member["state"] == "ready" for member in cluster.members().values()), 60.0)

        def shrink() -> None:
            cluster.order("scale", prefill=1, decode=1)
            until(lambda: len(cluster.members()) == 3, 60.0)

        assert await streams_while(cluster, grow) == undisturbed
        assert await streams_while(cluster, shrink) == undisturbed
        await asyncio.to_thread(until, lambda: not held(cluster.status()), 10.0)
        await asyncio.to_thread(serves, cluster)
        cluster.order("stop")
        assert await asyncio.to_thread(cluster.wait_end) == 0, "\n".join(cluster.lines)


@pytest.mark.parametrize("who", ["launcher", "gcs"])
def test_a_private_cluster_ends_with_its_launcher_and_with_its_gcs(who: str, tiny_model: tuple[Path, Any]) -> None:
    memory_before = shared_memory()
    with served(str(tiny_model[0])) as cluster:
        (gcs,) = [p for p in processes_of(cluster.pid) if "gcs_server" in p.command.split(" ", 1)[0]]
        os.kill(cluster.pid if who == "launcher" else gcs.pid, signal.SIGKILL)
        until(lambda: session_processes(cluster.pid) == [], 60.0)
        until(lambda: cluster.folders() == [], 20.0)
        assert cluster.wait_end() == (-signal.SIGKILL if who == "launcher" else 1)
        if who == "gcs":
            assert cluster.lines[-1].startswith("phasewise: Ray's control process (gcs_server) has ended")
    assert shared_memory() <= memory_before
