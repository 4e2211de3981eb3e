"""Many streams at once through processes: all finish, all right, nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest

import phasewise
from tests.support.served import Served, held, until
from tests.support.tiny_model import greedy

pytestmark = pytest.mark.cluster


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


async def test_200_concurrent_streams_of_mixed_length(cluster: Served, tiny_model: tuple[Path, Any]) -> None:
    rng = random.Random(3)
    shapes = [(rng.choice([1, 7, 16, 33, 90, 200, 500]), rng.choice([1, 2, 9, 24]), i % 25) for i in range(200)]
    async with phasewise.AsyncClient(cluster.grpc, timeout_s=200) as client:

        async def one(length: int, num_tokens: int, seed: int) -> list[int]:
            ids: list[int] = []
            prompt = prompt_of(length, seed)
            async for delta in client.stream(token_ids=prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True):
                ids.extend(delta.token_ids)
            return ids

        outputs = await asyncio.gather(*(one(*shape) for shape in shapes))
    expected: dict[tuple[int, int], list[int]] = {}
    for (length, num_tokens, seed), output in zip(shapes, outputs, strict=True):
        if (length, seed) not in expected:
            expected[(length, seed)] = greedy(tiny_model[1], prompt_of(length, seed), 24)
        assert output == expected[(length, seed)][:num_tokens]
    counters = [cluster.worker(f"decode-{i}")["counters"]["handoffs_in"] for i in range(2)]
    assert min(counters) > 20, "both decode workers took their share"


async def test_50_clients_that_leave_half_way_free_their_blocks(cluster: Served) -> None:
    async with phasewise.AsyncClient(cluster.grpc, timeout_s=60) as client:

        async def leave(seed: int) -> None:
            num_tokens = 0
            async for delta in client.stream(
                token_ids=prompt_of(40, seed), max_tokens=900, temperature=0.0, ignore_eos=True
            ):
                num_tokens += len(delta.token_ids)
                if num_tokens > 3:
                    break

        await asyncio.gather(*(leave(seed) for seed in range(50)))
        await asyncio.to_thread(until, lambda: not held(cluster.status()), 10.0)


@pytest.mark.parametrize("stream", [True, False])
async def test_bursts_of_clients_that_leave_at_once_are_run_for_nobody(cluster: Served, stream: bool) -> None:
    body = {"prompt": [65] * 20, "max_tokens": 8000, "ignore_eos": True, "stream": stream}
    rng = random.Random(1)

    async def leave_http(host: str, port: str) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        content = json.dumps(body)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write((head + content).encode())
        await asyncio.sleep(rng.uniform(0, 0.015))
        writer.close()
        with contextlib.suppress(ConnectionError):
            await reader.read()

    async def leave_grpc(client: phasewise.AsyncClient) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0, 0.015)):
                await client.generate(token_ids=[65] * 20, max_tokens=8000, ignore_eos=True)

    before = num_finished(cluster)
    for _ in range(3):
        await asyncio.gather(*(leave_http(*cluster.http.split(":")) for _ in range(20)))
    async with phasewise.AsyncClient(cluster.grpc) as client:
        await client.model()  # connected
        for _ in range(3):
            await asyncio.gather(*(leave_grpc(client) for _ in range(20)))
    await asyncio.to_thread(until, lambda: not held(cluster.status()), 10.0)
    assert num_finished(cluster) == before, "ran to their end, for nobody"


def num_finished(cluster: Served) -> float:
    with urllib.request.urlopen(f"http://{cluster.http}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("phasewise_requests_finished_total"))


def test_n_samples_are_handed_off_once(cluster: Served) -> None:
    before = sum(cluster.worker(f"decode-{i}")["counters"]["handoffs_in"] for i in range(2))
    with phasewise.Client(cluster.grpc) as client:
        done = client.generate(token_ids=prompt_of(60, 77), n=4, max_tokens=12, temperature=1.0, seed=5)
    assert len(done.samples) == 4
    until(lambda: sum(cluster.worker(f"decode-{i}")["counters"]["handoffs_in"] for i in range(2)) == before + 1, 5.0)


def test_same_seed_same_tokens_alone_and_in_a_crowd(cluster: Served) -> None:
    with phasewise.Client(cluster.grpc) as client:
        request: dict[str, Any] = {"max_tokens": 20, "temperature": 1.3, "seed": 11, "ignore_eos": True}
        alone = client.generate(token_ids=prompt_of(50, 1), **request).samples[0].token_ids

    async def crowd() -> list[Any]:
        async with phasewise.AsyncClient(cluster.grpc) as aio:
            others = [aio.generate(token_ids=prompt_of(30 + i, i), max_tokens=20, temperature=1.0) for i in range(12)]
            return await asyncio.gather(aio.generate(token_ids=prompt_of(50, 1), **request), *others)

    assert asyncio.run(crowd())[0].samples[0].token_ids == alone


def test_openai_client_streams_a_chat_with_usage(cluster: Served) -> None:
    client = openai.OpenAI(base_url=f"http://{cluster.http}/v1", api_key="none")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Grüße, 世界"}],
        max_tokens=30,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"x-phasewise-timeline": "1"},
    )
    text, usage, timeline = "", None, None
    for chunk in stream:
        usage = chunk.usage or usage
        timeline = getattr(chunk, "timeline", None) or timeline
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert usage is not None
    assert usage.completion_tokens == 30
    stages = [event["stage"] for event in timeline["events"]]
    for stage in ("received", "placed", "reserved", "prefill_end", "handoff_end", "decode_start", "finished"):
        assert stage in stages
    whole = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Grüße, 世界"}], max_tokens=30, temperature=0.0
    )
    assert whole.choices[0].message.content == text
