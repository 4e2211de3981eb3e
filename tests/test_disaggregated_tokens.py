"""Tokens through the whole of Phasewise against transformers: every architecture, every way that a request can go.

The cluster is real but for its processes: gateway, scheduler, workers on threads, engine, handoffs (tests/support).
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import transformers

from control_plane.gateway.service import GenerateInput, SamplingInput
from tests.engine.conftest import SMALL, build_oracle, oracle_tokens
from tests.support.generated_stream import deltas_of
from tests.support.local_cluster import LocalCluster, local_cluster

CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=20),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16),
}
PAIR = {"prefill": {"workers": 1, "threads": 1}, "decode": {"workers": 1, "threads": 1}}
MIXED = {"prefill": {"workers": 0}, "decode": {"workers": 0}, "mixed": {"workers": 1, "threads": 1}}
# bytes per block of these models: 3 layers x 2 x 2 heads x 16 x 16 tokens x 4 bytes
BLOCK_GIB = 3 * 2 * 2 * 16 * 16 * 4 / 2**30
WAYS: dict[str, dict[str, Any]] = {
    "handoff": {"pools": PAIR},
    "handoff by layers and chunks": {
        "pools": PAIR,
        "scheduler": {"token_budget": 16},
        "transfer": {"layerwise_threshold_tokens": 8, "layers_per_part": 1},
    },
    "no prefix cache": {"pools": PAIR, "cache": {"prefix_caching": False, "kv_cache_gib": 0.02}},
    "mixed": {"pools": MIXED},
    "mixed, chunked": {"pools": MIXED, "scheduler": {"token_budget": 16}},
    "preempted": {"pools": PAIR, "cache": {"kv_cache_gib": 17 * BLOCK_GIB}, "scheduler": {"reserve_headroom": 0.0}},
}


LAYERWISE = {"layerwise_threshold_tokens": 8, "layers_per_part": 1}


def ranks(prefill: int, decode: int, **decode_pool: Any) -> dict[str, Any]:
    pools = {
        "prefill": {"workers": 1, "threads": 1, "tensor_parallel": prefill},
        "decode": {"workers": 1, "threads": 1, "tensor_parallel": decode, **decode_pool},
    }
    return {"pools": pools, "scheduler": {"token_budget": 16}, "transfer": LAYERWISE}


# One worker of several ranks at most: they are in this process's group.
UNEQUAL_ENDS: dict[str, dict[str, Any]] = {
    "blocks of 16 and 32": ranks(1, 1, block_size=32),
    "one rank and two": ranks(1, 2),
    "two ranks and one": ranks(2, 1, block_size=8),
    "one rank and four, two with each head": ranks(1, 4),
    "four ranks, two with each head, and one": ranks(4, 1),
}


def prompts() -> list[list[int]]:
    rng = random.Random(2)
    lengths = (1, 3, 15, 16, 17, 31, 40, 64, 90, 120)
    return [[rng.randrange(199) for _ in range(length)] for length in lengths]


async def run(cluster: LocalCluster, prompt: list[int], num_tokens: int, **more: Any) -> list[int]:
    sampling = SamplingInput(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, **more)
    stream = await cluster.service.generate(GenerateInput(token_ids=tuple(prompt), sampling=sampling))
    return [token_id async for delta in deltas_of(stream) for token_id in delta.token_ids]


@pytest.fixture(scope="module")
def oracle_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name → (directory, expected tokens of each prompt), computed once."""
    known: dict[str, tuple[Path, list[list[int]]]] = {}

    def get(name: str) -> tuple[Path, list[list[int]]]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            model = build_oracle(CONFIGS[name](), folder)
            (folder / "tokenizer.json").write_text(BYTE_TOKENIZER)
            known[name] = (folder, [oracle_tokens(model, prompt, 64) for prompt in prompts()])
        return known[name]

    return get


BYTE_TOKENIZER = (
    '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":null,'
    '"post_processor":null,"decoder":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},'
    '"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,'
    '"fuse_unk":false,"byte_fallback":false,"ignore_merges":false,"vocab":{"a":0,"b":1},"merges":[]}}'
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONFIGS)
async def test_tokens_are_those_of_transformers(name: str, way: str, oracle_of: Any) -> None:
    folder, expected = oracle_of(name)
    async with local_cluster(folder, **WAYS[way]) as cluster:
        together = await asyncio.gather(*(run(cluster, prompt, 64) for prompt in prompts()))
        assert together == expected, "all at once"
        again = await asyncio.gather(*(run(cluster, prompt, 64) for prompt in prompts()[-3:]))
        assert again == expected[-3:], "with what the prefix cache has now"
        if way != "preempted":
            alone = [await run(cluster, prompt, 64) for prompt in prompts()[3:5]]
            assert alone == expected[3:5], "one at a time"
        await asyncio.wait_for(cluster.until_empty(), 30)
        counters = [worker.load().counters for worker in cluster.workers.values()]
        preemptions = sum(c["preemptions"] for c in counters)
        assert (preemptions > 0) is (way == "preempted")
        if "handoff" in way:
            assert sum(c["handoffs_in"] for c in counters) == 15


@pytest.mark.parametrize("way", ["handoff by layers and chunks", "mixed, chunked", "preempted"])
async def test_min_tokens_are_those_of_transformers(way: str, oracle_of: Any) -> None:
    folder, free = oracle_of("llama")
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    wanted = []
    for i, (prompt, tokens) in enumerate(zip(prompts(), free, strict=True)):
        limits = {"min_tokens": 12 * (i % 5), "ends": (tokens[0], tokens[7], tokens[30])}
        wanted.append((prompt, limits, oracle_tokens(model, prompt, 64, **limits)))
    async with local_cluster(folder, **WAYS[way]) as cluster:
        answers = await asyncio.gather(
            *(run(cluster, p, 64, min_tokens=x["min_tokens"], stop_token_ids=x["ends"]) for p, x, _ in wanted)
        )
        assert answers == [tokens for _, _, tokens in wanted]
        await asyncio.wait_for(cluster.until_empty(), 30)
    assert len({len(tokens) for tokens in answers}) > 3


@pytest.mark.parametrize("way", UNEQUAL_ENDS)
async def test_unequal_ends_change_no_token(way: str, oracle_of: Any) -> None:
    folder, expected = oracle_of("llama")
    async with local_cluster(folder, **UNEQUAL_ENDS[way]) as cluster:
        together = await asyncio.gather(*(run(cluster, prompt, 64) for prompt in prompts()))
        assert together == expected, "all at once"
        again = await asyncio.gather(*(run(cluster, prompt, 64) for prompt in prompts()[-3:]))
        assert again == expected[-3:], "with what the prefix cache has now"
        await asyncio.wait_for(cluster.until_empty(), 30)


@pytest.mark.parametrize("transfer", [{}, LAYERWISE], ids=["whole", "by layers"])
async def test_direct_links_change_no_token(transfer: dict[str, int], oracle_of: Any) -> None:
    folder, expected = oracle_of("llama")
    pools = {"prefill": {"workers": 2, "threads": 1}, "decode": {"workers": 2, "threads": 1}}
    sections = {"pools": pools, "scheduler": {"token_budget": 16}, "transfer": transfer}
    async with local_cluster(folder, has_direct_links=True, **sections) as cluster:
        together = await asyncio.gather(*(run(cluster, prompt, 64) for prompt in prompts()))
        assert together == expected, "all at once"
        cluster.direct["prefill-0"].forget("decode-0")  # from now on this pair goes beside its link
        again = await asyncio.gather(*(run(cluster, prompt, 64) for prompt in prompts()))
        assert again == expected, "with what the prefix cache has, and one link fewer"
        await asyncio.wait_for(cluster.until_empty(), 30)
        for links in cluster.direct.values():
            assert all(room.pool.num_free_bytes == room.pool.num_bytes for room in (links.outgoing, links.incoming))


async def test_same_seed_same_tokens_whatever_the_batch_the_worker_and_the_way(oracle_of: Any) -> None:
    folder, _ = oracle_of("llama")
    sampling = SamplingInput(
        max_tokens=40, temperature=1.2, top_p=0.9, top_k=50, seed=1234, n=2, frequency_penalty=0.4, ignore_eos=True
    )
    request = GenerateInput(token_ids=tuple(prompts()[6]), sampling=sampling)

    async def sampled(cluster: LocalCluster) -> dict[int, list[int]]:
        stream = await cluster.service.generate(request)
        ids: dict[int, list[int]] = {0: [], 1: []}
        async for delta in deltas_of(stream):
            ids[delta.sample_index].extend(delta.token_ids)
        return ids

    outcomes = []
    for sections in ({"pools": PAIR}, {"pools": MIXED}):
        async with local_cluster(folder, **sections) as cluster:
            outcomes.append(await sampled(cluster))
            crowd = [run(cluster, prompt, 50) for prompt in prompts()]
            outcomes.append((await asyncio.gather(sampled(cluster), *crowd))[0])
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert outcomes[0][0] != outcomes[0][1], "two samples of one request differ"
