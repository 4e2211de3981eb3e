"""The model's own sampling values reach requests of both protocols that give none."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import grpc.aio
import httpx
import pytest

from control_plane.gateway.grpc_front.server import start_grpc_server
from control_plane.gateway.service import ModelCard
from control_plane.gateway.text.tokenizer import TextTokenizer
from phasewise.core.sampling_defaults import SamplingDefaults
from phasewise.rpc import phasewise_pb2 as pb
from phasewise.rpc.phasewise_pb2_grpc import InferenceStub
from tests.control_plane.gateway.conftest import HashService

LENGTH = 12


@pytest.fixture
def service(smollm2_card: ModelCard, smollm2_tokenizer: TextTokenizer) -> HashService:
    """Greedy unless a request asks for something else: its tokens then depend on the seed, which is drawn."""
    return HashService(replace(smollm2_card, sampling=SamplingDefaults(temperature=0.0)), smollm2_tokenizer)


def test_over_http(base_url: str) -> None:
    def texts(**more: Any) -> set[str]:
        body = {"prompt": "The sea", "max_tokens": LENGTH, **more}
        answers = [httpx.post(f"{base_url}/v1/completions", json=body) for _ in range(2)]
        return {answer.json()["choices"][0]["text"] for answer in answers}

    assert len(texts()) == 1
    assert len(texts(temperature=None)) == 1, "null is not given"
    assert len(texts(temperature=1.0)) == 2


async def test_over_grpc(service: HashService) -> None:
    server, port = await start_grpc_server(service, "127.0.0.1:0", max_message_bytes=1 << 20)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

        async def text(**more: Any) -> str:
            request = pb.GenerateRequest(text="The sea", sampling=pb.Sampling(max_tokens=LENGTH, **more))
            messages = [message async for message in InferenceStub(channel).Generate(request)]
            return "".join(delta.text for message in messages for delta in message.deltas)

        assert len(set(await asyncio.gather(text(), text()))) == 1
        assert len(set(await asyncio.gather(text(temperature=1.0), text(temperature=1.0)))) == 2
    await server.stop(None)
