"""What a model's files say, seen in the answers of a whole cluster in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from control_plane.gateway.service import GenerateInput, SamplingInput
from phasewise.core.errors import ConfigError
from phasewise.core.request import FinishReason
from tests.engine.conftest import build_oracle, oracle_tokens
from tests.engine.test_gguf import SHAPE, write_gguf
from tests.support.generated_stream import deltas_of
from tests.support.local_cluster import local_cluster
from tests.support.tiny_model import greedy, save_tiny_model
from tests.test_disaggregated_tokens import BYTE_TOKENIZER

MIXED = {"prefill": {"workers": 0}, "decode": {"workers": 0}, "mixed": {"workers": 1, "threads": 1}}
PROMPT = [5, 9, 2, 7, 30, 31]


async def generate(cluster: Any, **sampling: Any) -> tuple[list[int], FinishReason | None]:
    given = GenerateInput(token_ids=tuple(PROMPT), sampling=SamplingInput(**sampling))
    deltas = [delta async for delta in deltas_of(await cluster.service.generate(given))]
    return [token for delta in deltas for token in delta.token_ids], deltas[-1].finish_reason


async def test_sampling_values_of_the_model_are_those_of_requests_that_give_none(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, context=256)
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 1, "temperature": 1.9, "do_sample": True}))
    expected = greedy(model, PROMPT, 24)
    async with local_cluster({"path": str(tmp_path)}, pools=MIXED) as cluster:
        assert (await generate(cluster, max_tokens=24, ignore_eos=True))[0] == expected
        other, _ = await generate(cluster, max_tokens=24, ignore_eos=True, top_k=0, temperature=2.0, seed=1)
    assert other != expected
    async with local_cluster({"path": str(tmp_path), "generation_config": "none"}, pools=MIXED) as cluster:
        assert (await generate(cluster, max_tokens=24, ignore_eos=True, temperature=2.0, seed=1))[0] == other


async def test_a_gguf_model_ends_its_turn_at_a_token_of_a_known_text(tmp_path: Path) -> None:
    """As a converter leaves it that knows the base model's end alone: eos_token_id names another token."""
    oracle = build_oracle(transformers.LlamaConfig(**SHAPE), tmp_path / "hf")
    expected = oracle_tokens(oracle, PROMPT, 24)
    end = expected[3]
    assert end > 5 and end not in expected[:3] and 5 not in expected[:3], "5 is what the file names"
    tokens = ["a", "b", "ab", *(f"<{i}>" if i != end else "<|im_end|>" for i in range(3, SHAPE["vocab_size"]))]
    extra = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.token_type": [3] * len(tokens),
        "tokenizer.ggml.merges": ["a b"],
    }
    write_gguf(tmp_path / "model.gguf", oracle, "llama", "F32", extra, tokens=tokens)
    async with local_cluster({"path": str(tmp_path / "model.gguf")}, pools=MIXED) as cluster:
        found, reason = await generate(cluster, max_tokens=24, temperature=0.0)
        assert (found, reason) == (expected[: expected.index(end) + 1], FinishReason.STOP)
        assert (await generate(cluster, max_tokens=24, temperature=0.0, ignore_eos=True))[0] == expected


async def test_a_context_that_rope_scaling_gives_is_served_and_one_that_nothing_gives_is_not(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    shape = {**SHAPE, "max_position_embeddings": 32, "hidden_size": 64, "intermediate_size": 96}
    oracle = build_oracle(transformers.LlamaConfig(**shape, rope_parameters=yarn), tmp_path)
    (tmp_path / "tokenizer.json").write_text(BYTE_TOKENIZER)
    async with local_cluster({"path": str(tmp_path)}, pools=MIXED) as cluster:
        assert cluster.card.context_length == 128
        found, reason = await generate(cluster, max_tokens=100, temperature=0.0)
        assert (found, reason) == (oracle_tokens(oracle, PROMPT, 100), FinishReason.LENGTH)
    with pytest.raises(ConfigError, match=r"model\.max_model_len is 129, but the model takes 128 tokens"):
        async with local_cluster({"path": str(tmp_path), "max_model_len": 129}, pools=MIXED):
            pass
