"""Sampling parameters at the ends of their ranges over the real path: HTTP and gRPC, gateway, workers, engine, handoff.

The cluster is that of tests/test_disaggregated_tokens.py; the oracle is transformers on the same weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaForCausalLM

import phasewise
from control_plane.gateway.bodies import Bodies
from control_plane.gateway.grpc_front.server import start_grpc_server
from control_plane.gateway.http_front.openai_server import build_app
from phasewise.core.request import FinishReason
from tests.engine.conftest import oracle_tokens
from tests.support.local_cluster import LocalCluster, local_cluster
from tests.support.tiny_model import EOS_TOKEN_ID, save_tiny_model

CONTEXT = 96
PROMPT = "The sea is calm"  # its bytes are its token ids
PAIR = {"prefill": {"workers": 1, "threads": 1}, "decode": {"workers": 1, "threads": 1}}
MIXED = {"prefill": {"workers": 0}, "decode": {"workers": 0}, "mixed": {"workers": 1, "threads": 1}}
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder, save_tiny_model(folder, context=CONTEXT)


class Served:
    """A cluster with both of its servers."""

    def __init__(self, cluster: LocalCluster, http: httpx.AsyncClient, grpc: phasewise.AsyncClient) -> None:
        self.cluster = cluster
        self.http = http
        self.grpc = grpc

    async def complete(self, prompt: Any = PROMPT, **fields: Any) -> dict[str, Any]:
        """The body of a completion in one piece."""
        answer = await self.http.post(COMPLETIONS, json={"prompt": prompt, "return_token_ids": True, **fields})
        assert answer.status_code == 200, answer.text[:300]
        return dict(answer.json())

    async def token_ids(self, **fields: Any) -> list[int]:
        (choice,) = (await self.complete(**fields))["choices"]
        return list(choice["token_ids"])

    async def events(self, prompt: Any = PROMPT, **fields: Any) -> list[dict[str, Any]]:
        """The events of a streamed completion, [DONE] not counted."""
        body = {"prompt": prompt, "stream": True, "stream_options": {"include_usage": True}, **fields}
        answer = await self.http.post(COMPLETIONS, json=body)
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert answer.status_code == 200 and lines[-1] == "[DONE]", answer.text[:300]
        return [json.loads(line) for line in lines[:-1]]

    async def metric(self, name: str) -> float:
        """The value of a series without labels."""
        lines = (await self.http.get("/metrics")).text.splitlines()
        return next(float(line.split(" ")[1]) for line in lines if line.startswith(f"{name} "))


@contextlib.asynccontextmanager
async def served(folder: Path, **sections: Any) -> AsyncIterator[Served]:
    async with local_cluster(folder, **{"pools": PAIR, **sections}) as cluster:
        app = build_app(cluster.service, Bodies(1 << 20, 10))
        server, port = await start_grpc_server(cluster.service, "127.0.0.1:0", max_message_bytes=1 << 20)
        transport = httpx.ASGITransport(app=app)
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=60) as http,
            phasewise.AsyncClient(f"127.0.0.1:{port}", max_retries=0) as grpc,
        ):
            yield Served(cluster, http, grpc)
            await asyncio.wait_for(cluster.until_empty(), 30)
        await server.stop(None)


def prompt_ids(text: str = PROMPT) -> list[int]:
    """As the tiny model's tokenizer has it: GPT-2's spelling of bytes, sorted."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [alphabet.index(character) for piece, _ in spelled for character in piece]


# ---- min_tokens


@pytest.mark.parametrize("pools", [PAIR, MIXED], ids=["handoff", "mixed"])
async def test_min_tokens_over_both_protocols(pools: dict[str, Any], model: tuple[Path, LlamaForCausalLM]) -> None:
    folder, oracle = model
    ids = prompt_ids()
    free = oracle_tokens(oracle, ids, 12, ends=())
    ends = (EOS_TOKEN_ID, free[0], free[5])  # the first token would be the last
    async with served(folder, pools=pools) as both:
        for min_tokens in (0, 1, 5, 24):
            expected = oracle_tokens(oracle, ids, 24, min_tokens=min_tokens, ends=ends)
            fields = {"max_tokens": 24, "min_tokens": min_tokens, "temperature": 0, "stop_token_ids": list(ends[1:])}
            body = await both.complete(**fields)
            (choice,) = body["choices"]
            assert choice["token_ids"] == expected and body["usage"]["completion_tokens"] == len(expected)
            is_stop = expected[-1] in ends
            assert choice["finish_reason"] == ("stop" if is_stop else "length")
            assert choice["stop_reason"] == (expected[-1] if is_stop else None)
            done = await both.grpc.generate(PROMPT, **fields)
            assert list(done.token_ids) == expected and done.text == choice["text"]
        # The largest bias on the tokens that end a sample changes nothing.
        biased = {**fields, "min_tokens": 6, "max_tokens": 7, "logit_bias": {str(end): 100 for end in ends}}
        tokens = await both.token_ids(**biased)
        assert len(tokens) == 7 and not set(tokens[:6]) & set(ends) and tokens[6] in ends
        # With ignore_eos the end token ends nothing, and may come.
        both_ends = {"max_tokens": 6, "min_tokens": 4, "logit_bias": {str(EOS_TOKEN_ID): 100}, "ignore_eos": True}
        assert await both.token_ids(**both_ends, temperature=0) == [EOS_TOKEN_ID] * 6
        assert len(await both.token_ids(**both_ends | {"ignore_eos": False}, temperature=0)) == 5


async def test_min_tokens_holds_for_stop_strings_and_for_each_sample(model: tuple[Path, LlamaForCausalLM]) -> None:
    folder, _ = model
    async with served(folder) as both:
        fields = {"max_tokens": 30, "temperature": 0, "ignore_eos": True}
        whole = (await both.complete(**fields))["choices"][0]
        stop = whole["text"][2:4]
        assert len((await both.complete(**fields, stop=stop))["choices"][0]["text"]) <= 2
        for min_tokens in (8, 30):
            choice = (await both.complete(**fields, stop=stop, min_tokens=min_tokens))["choices"][0]
            assert len(choice["token_ids"]) >= min_tokens
            assert whole["text"].startswith(choice["text"])
        assert choice == whole
        done = await both.grpc.generate(
            PROMPT,
            n=4,
            seed=5,
            temperature=1.5,
            max_tokens=20,
            min_tokens=9,
            stop_token_ids=tuple(range(0, 320, 2))[:160],
        )
        for sample in done.samples:
            assert 9 < len(sample.token_ids) < 20 and sample.finish_reason is FinishReason.STOP
            assert all(token % 2 for token in sample.token_ids[:9])


# ---- max_tokens 0


def prompt_logprobs(oracle: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """[len(ids) - 1, vocab_size]: of every token but the first."""
    with torch.inference_mode():
        return oracle(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("pools", [PAIR, MIXED], ids=["handoff", "mixed"])
async def test_the_prompt_alone_with_its_log_probabilities(
    pools: dict[str, Any], model: tuple[Path, LlamaForCausalLM]
) -> None:
    folder, oracle = model
    prompt = PROMPT * 3  # in chunks
    ids = prompt_ids(prompt)
    expected = prompt_logprobs(oracle, ids)
    own = expected.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1).tolist()
    async with served(folder, pools=pools, scheduler={"token_budget": 16}) as both:
        fields = {"echo": True, "max_tokens": 0, "logprobs": 2, "temperature": 0}
        body = await both.complete(prompt, **fields)
        (choice,) = body["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (prompt, "length", None)
        assert choice["token_ids"] == [] and choice["logprobs"]["tokens"] == list(prompt)
        assert body["usage"] == {
            "prompt_tokens": len(ids),
            "completion_tokens": 0,
            "total_tokens": len(ids),
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        first, *values = choice["logprobs"]["token_logprobs"]
        assert first is None and values == pytest.approx(own, abs=1e-4)
        for entry, row in zip(choice["logprobs"]["top_logprobs"][1:], expected, strict=True):
            assert max(entry.values()) == pytest.approx(row.max().item(), abs=1e-4) and len(entry) <= 3

        *chunks, last = await both.events(prompt, **fields)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == prompt
        assert chunks[0]["choices"][0]["logprobs"] == choice["logprobs"]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "length"]
        assert last["usage"] == body["usage"]

        done = await both.grpc.generate(prompt, max_tokens=0, prompt_logprobs=2, timeline=True)
        assert (done.text, done.token_ids, done.finish_reason) == ("", (), FinishReason.LENGTH)
        assert (done.usage.num_prompt_tokens, done.usage.num_output_tokens) == (len(ids), 0)
        assert [token.token_id for token in done.prompt_tokens] == ids
        assert [token.logprob for token in done.prompt_tokens[1:]] == pytest.approx(own, abs=1e-4)
        stages = [event.stage for event in done.timeline]
        assert "prefill_end" in stages and not {"first_token", "handoff_start", "decode_start"} & set(stages)

        assert await both.metric("phasewise_ttft_seconds_count") == 0
        assert await both.metric("phasewise_output_tokens_total") == 0
        assert await both.metric("phasewise_prompt_tokens_total") == 3 * len(ids)
        assert await both.metric("phasewise_e2e_seconds_count") == 3


async def test_no_output_of_several_samples_prompts_and_of_a_full_context(
    model: tuple[Path, LlamaForCausalLM],
) -> None:
    folder, oracle = model
    full = [token % 256 for token in range(CONTEXT)]
    async with served(folder) as both:
        body = await both.complete(full, echo=True, max_tokens=0, logprobs=0)
        own = prompt_logprobs(oracle, full).gather(1, torch.tensor(full[1:]).unsqueeze(1)).squeeze(1).tolist()
        assert body["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(own, abs=1e-4)
        assert body["usage"]["prompt_tokens"] == CONTEXT and body["usage"]["completion_tokens"] == 0
        for wrong, param in (
            ({"prompt": [*full, 1], "echo": True, "max_tokens": 0}, "prompt"),
            ({"prompt": full, "echo": True, "max_tokens": 1}, "prompt"),
            ({"prompt": PROMPT, "max_tokens": 0, "logprobs": 1}, "max_tokens"),
            ({"prompt": PROMPT, "max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
        ):
            answer = await both.http.post(COMPLETIONS, json=wrong)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
        several = await both.complete(["abc", "de"], echo=True, max_tokens=0, n=2, seed=3)
        assert [choice["text"] for choice in several["choices"]] == ["abc", "abc", "de", "de"]
        assert {choice["finish_reason"] for choice in several["choices"]} == {"length"}
        assert {choice["logprobs"] for choice in several["choices"]} == {None}
        with pytest.raises(phasewise.InvalidRequest, match="prompt_logprobs") as caught:
            await both.grpc.generate(PROMPT, max_tokens=0)
        assert caught.value.field == "max_tokens"
        # What comes next finds the cluster as it was.
        assert await both.token_ids(max_tokens=8, temperature=0) == oracle_tokens(
            oracle, prompt_ids(), 8, ends=(EOS_TOKEN_ID,)
        )


# ---- the ends of the other ranges


async def test_next_to_nothing_is_greedy(model: tuple[Path, LlamaForCausalLM]) -> None:
    folder, oracle = model
    expected = oracle_tokens(oracle, prompt_ids(), 16)
    text = None
    async with served(folder) as both:
        fields: dict[str, Any] = {"max_tokens": 16, "ignore_eos": True}
        for temperature in (0, 5e-324, 1e-308, 1e-45, 1e-38, 1e-10, 1e-5):
            body = await both.complete(**fields, temperature=temperature, seed=1)
            assert body["choices"][0]["token_ids"] == expected, temperature
            text = text or body["choices"][0]["text"]
            assert text and body["choices"][0]["text"] == text
            done = await both.grpc.generate(PROMPT, **fields, temperature=temperature, top_p=0.9, min_p=0.1)
            assert list(done.token_ids) == expected, temperature
        for changes in ({"top_p": 0}, {"top_p": 5e-324}, {"top_p": 0, "temperature": 1e-308}, {"min_p": 1.0}):
            assert await both.token_ids(**{**fields, "temperature": 2, "seed": 4, **changes}) == expected, changes
            done = await both.grpc.generate(PROMPT, **{**fields, "temperature": 2, **changes})
            assert list(done.token_ids) == expected, changes


async def test_the_ends_of_every_range_give_text(model: tuple[Path, LlamaForCausalLM]) -> None:
    folder, _ = model
    extremes: list[dict[str, Any]] = [
        {"repetition_penalty": 0.01, "frequency_penalty": -2, "presence_penalty": -2},
        {"repetition_penalty": 100, "frequency_penalty": 2, "presence_penalty": 2, "temperature": 1e-5},
        {"logit_bias": {str(token): -100 for token in range(320)}},
        {"logit_bias": {str(token): 100 for token in range(320)}, "temperature": 1e-5, "top_p": 5e-324},
        {"top_k": 10**18, "min_p": 5e-324},
        {"top_k": 319, "top_p": 1 - 2**-53, "min_p": 1},
        {"seed": 2**63 - 1, "temperature": 2},
        {"seed": -(2**63), "stop_token_ids": list(range(256)), "min_tokens": 8},
    ]
    async with served(folder) as both:
        bodies = await asyncio.gather(
            *(both.complete(max_tokens=8, ignore_eos=True, logprobs=1, **changes) for changes in extremes)
        )
        for body, changes in zip(bodies, extremes, strict=True):
            (choice,) = body["choices"]
            assert len(choice["token_ids"]) == 8 and choice["finish_reason"] == "length", changes
            assert all(math.isfinite(value) for value in choice["logprobs"]["token_logprobs"]), changes
            top = choice["logprobs"]["top_logprobs"]
            assert all(-100 < max(entry.values()) <= 0 for entry in top), changes
