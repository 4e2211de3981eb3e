"""Start, stop and loss of a cluster's processes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import phasewise
from phasewise.core.model_source import resolve_model
from tests.support.served import PHASEWISE, Served, held, served, until

pytestmark = pytest.mark.cluster

FREE_PORTS = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
HEALTH_PATHS = ("/health", "/health/ready", "/health/live")


def session_processes(session: int) -> list[str]:
    """Command lines of what is left of a session."""
    rows = subprocess.run(["ps", "-eo", "sid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    fields = [row.split(None, 2) for row in rows.splitlines()]
    return [f[2] for f in fields if int(f[0]) == session and not f[1].startswith("Z")]


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_process_no_shared_memory_no_port(
    number: signal.Signals, tiny_model: tuple[Path, Any]
) -> None:
    memory_before = shared_memory()
    flags = ["--prefill", "0", "--decode", "0", "--mixed", "1", *FREE_PORTS]
    cluster = Served([str(tiny_model[0]), *flags])
    cluster.wait_ready()
    pids = [worker["pid"] for worker in cluster.status()["workers"]]
    cluster.signal(number)
    assert cluster.wait_end() == 0, "\n".join(cluster.lines)
    assert "stopped" in cluster.lines[-1]
    assert session_processes(cluster.pid) == []
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 5.0)  # reaped, too
    assert shared_memory() <= memory_before
    for address in (cluster.http, cluster.grpc, cluster.admin):
        host, port = address.split(":")
        with socket.socket() as probe:
            assert probe.connect_ex((host, int(port))) != 0


def test_an_impatient_user_leaves_nothing_behind_either(tiny_model: tuple[Path, Any]) -> None:
    with served(str(tiny_model[0]), "--prefill", "0", "--decode", "0", "--mixed", "1") as cluster:
        with phasewise.Client(cluster.grpc, max_retries=0) as client:
            stream = iter(client.stream(token_ids=[1, 2, 3], max_tokens=8000, temperature=0.0, ignore_eos=True))
            next(stream)
            cluster.signal(signal.SIGINT)
            until(lambda: any("stopping" in line for line in cluster.lines), 10.0)
            for _ in range(4):  # the first of these asks for an end at once, the others come while it is being made
                cluster.signal(signal.SIGINT)
            assert cluster.wait_end() == 130, "\n".join(cluster.lines)
            with pytest.raises(phasewise.ServingError):
                list(stream)
        assert session_processes(cluster.pid) == []


def test_shutdown_lets_open_requests_finish(tiny_model: tuple[Path, Any]) -> None:
    with served(str(tiny_model[0])) as cluster, phasewise.Client(cluster.grpc, max_retries=0) as client:
        stream = client.stream(token_ids=[1, 2, 3], max_tokens=300, temperature=0.0, ignore_eos=True)
        num_tokens = 0
        for delta in stream:
            if num_tokens == 0:
                cluster.signal(signal.SIGTERM)
            num_tokens += len(delta.token_ids)
        assert num_tokens == 300
        assert cluster.wait_end() == 0


def test_two_clusters_on_one_machine_and_a_taken_port(cluster: Served, tiny_model: tuple[Path, Any]) -> None:
    with served(str(tiny_model[0]), "--mixed", "1", "--prefill", "0", "--decode", "0") as second:
        assert second.http != cluster.http
        for each in (cluster, second):
            with phasewise.Client(each.grpc) as client:
                assert client.generate(token_ids=[5, 6], max_tokens=3).usage.num_output_tokens >= 1
    for flag, address in (("--http", cluster.http), ("--grpc", cluster.grpc), ("--admin", cluster.admin)):
        other = dict(zip(FREE_PORTS[::2], FREE_PORTS[1::2], strict=True)) | {flag: address}
        flags = [part for pair in other.items() for part in pair]
        done = subprocess.run(
            [PHASEWISE, "serve", str(tiny_model[0]), *flags], capture_output=True, text=True, timeout=60
        )
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("phasewise:")]
        assert address in line
        assert flag in line


# Prompts take long, and take as long again: so a worker can be found, and killed, with some in its queue.
SLOW_PROMPTS = """
pools: {prefill: {workers: 2, threads: 1}, decode: {workers: 2, threads: 1}}
scheduler: {token_budget: 16}
cache: {prefix_caching: false}
"""


async def streams_under(
    cluster: Served, *, in_prefill: str = "", in_decode: str = "", num_tokens: int = 1000
) -> list[list[int]]:
    """The tokens of eight streams, greedy and drawn. One worker is killed with prompts in its queue, another when it
    decodes.

    Few tokens are drawn from, so that no draw is within rounding of the next token: a batch of another size may round
    otherwise.
    """
    async with phasewise.AsyncClient(cluster.grpc, timeout_s=120, max_retries=0) as client:

        async def one(seed: int) -> list[int]:
            ids: list[int] = []
            prompt = [seed, *(position * seed % 250 for position in range(1000))]
            async for delta in client.stream(
                token_ids=prompt, max_tokens=num_tokens, temperature=seed % 2 * 0.8, top_k=4, seed=seed, ignore_eos=True
            ):
                ids += delta.token_ids
            return ids

        pids = {worker["name"]: worker["pid"] for worker in cluster.status()["workers"]}
        if in_prefill:
            os.kill(pids[in_prefill], signal.SIGSTOP)  # what it is given stays in its queue
        streams = [asyncio.create_task(one(seed)) for seed in range(8)]
        if in_prefill:
            await asyncio.to_thread(until, lambda: cluster.status()["gateway"]["open_requests"] == 8, 30.0)
            os.kill(pids[in_prefill], signal.SIGKILL)
        if in_decode:
            await asyncio.to_thread(until, lambda: cluster.worker(in_decode)["running"] > 0, 30.0)
            os.kill(pids[in_decode], signal.SIGKILL)
        return await asyncio.gather(*streams)


def is_back(cluster: Served, name: str, birth: int = 2) -> bool:
    """Whether the member of that name was born again, and is ready."""
    member = cluster.members().get(name)
    return member is not None and member["id"] == f"{name}#{birth}" and member["state"] == "ready"


def recoveries(cluster: Served) -> int:
    with urllib.request.urlopen(f"http://{cluster.http}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("phasewise_recoveries_total{"))


async def test_killed_workers_change_no_token_of_any_stream(tiny_model: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(SLOW_PROMPTS)
    with served(str(tiny_model[0]), "--config", str(tmp_path / "cluster.yaml")) as cluster:
        undisturbed = await streams_under(cluster)
        assert all(len(ids) == 1000 for ids in undisturbed)
        assert recoveries(cluster) == 0
        assert await streams_under(cluster, in_prefill="prefill-0", in_decode="decode-1") == undisturbed
        assert recoveries(cluster) > 1, "some requests were on each of the killed workers"
        for name in ("decode-1", "prefill-0"):
            await asyncio.to_thread(until, lambda name=name: is_back(cluster, name), 60.0)
        until(lambda: not held(cluster.status()), 2.0)


async def test_a_killed_worker_that_is_the_only_one_is_back_and_its_streams_go_on(tiny_model: tuple[Path, Any]) -> None:
    with served(str(tiny_model[0]), "--prefill", "1", "--decode", "1") as cluster:
        undisturbed = await streams_under(cluster, num_tokens=300)
        assert await streams_under(cluster, in_decode="decode-0", num_tokens=300) == undisturbed
        assert is_back(cluster, "decode-0")


def test_a_cluster_without_a_pool_says_so_lets_streams_go_on_and_serves_again(tiny_model: tuple[Path, Any]) -> None:
    """A stream that decodes needs no prefill worker."""
    with served(str(tiny_model[0])) as cluster, phasewise.Client(cluster.grpc, max_retries=0) as client:
        assert {cluster.health(path) for path in HEALTH_PATHS} == {(200, "")}
        stream = client.stream(token_ids=[1, 2, 3], max_tokens=8000, temperature=0.0, ignore_eos=True)
        deltas = iter(stream)
        next(deltas)
        until(lambda: cluster.worker("decode-0")["running"] == 1, 20.0)
        prefill = cluster.worker("prefill-0")["pid"]
        os.kill(prefill, signal.SIGKILL)
        until(lambda: cluster.health("/health/ready") == (503, "no prefill worker is ready"), 20.0)
        assert cluster.health("/health/live") == (200, "")
        num_tokens = 0
        while num_tokens < 100:
            num_tokens += len(next(deltas).token_ids)
        until(lambda: cluster.health("/health/ready") == (200, ""), 60.0)
        assert cluster.worker("prefill-0")["pid"] != prefill
        assert client.generate(token_ids=[5, 6], max_tokens=3, ignore_eos=True).usage.num_output_tokens == 3
        next(deltas)
        stream.close()


BAD_STARTS = {
    "no such model": (["/nowhere/model"], "/nowhere/model"),
    "no such config": (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
    "no workers": (["--prefill", "0"], "prefill"),
    "bad address": (["--http", "localhost"], "HOST:PORT"),
    "bad dtype": (["--dtype", "int8"], "dtype"),
    "unknown flag": (["--prefil", "2"], "--prefill"),
    "no gpu": (["--device", "cuda"], "GPU"),
}


@pytest.mark.parametrize("name", BAD_STARTS)
def test_a_bad_start_is_one_clear_line(name: str) -> None:
    flags, expected = BAD_STARTS[name]
    ports = FREE_PORTS[2:] if "--http" in flags else FREE_PORTS
    done = subprocess.run([PHASEWISE, "serve", *flags, *ports], capture_output=True, text=True, timeout=90)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout
    assert expected in done.stderr.splitlines()[-1], done.stderr


def test_bad_model_files_are_one_clear_line(tmp_path: Path, tiny_model: tuple[Path, Any]) -> None:
    built_in = resolve_model("smollm2-135m").path
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(built_in.read_bytes()[:50_000_000])
    other = tmp_path / "other"
    shutil.copytree(tiny_model[0], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    torn = tmp_path / "torn"
    shutil.copytree(tiny_model[0], torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for path, expected in ((cut, "cut"), (other, "MambaForCausalLM"), (torn, "model.safetensors")):
        done = subprocess.run(
            [PHASEWISE, "serve", str(path), *FREE_PORTS],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode != 0
        assert "Traceback" not in done.stderr + done.stdout
        last = done.stderr.splitlines()[-1]
        assert last.startswith("phasewise:"), done.stderr
        assert expected in last


def test_a_config_file_with_a_typing_error_names_the_right_key(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("pools:\n  decoder:\n    workers: 2\n")
    done = subprocess.run([PHASEWISE, "serve", "--config", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "did you mean 'decode'?" in done.stderr
