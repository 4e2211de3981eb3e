"""A model over several ranks: the parts are those of the whole, and together they compute what one rank computes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from engine.loader import load_model
from engine.model_config import ModelConfig, read_model_config
from engine.sharding import Shard
from engine.tensor_parallel import Group, ids_of, sortable
from phasewise.core.errors import ConfigError, ModelLoadError
from phasewise.core.model_source import ModelSource, resolve_model
from tests.support import rank_work
from tests.support.ranks import Ranks

SMALL: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama-one-kv-head": lambda: transformers.LlamaConfig(**{**SMALL, "num_key_value_heads": 1}),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=19),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=32),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, kit: Any) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp(request.param)
    return kit.build_oracle(MODELS[request.param](), directory), directory


def load(path: Path, shard: Shard, kind: str = "hf") -> Any:
    source = ModelSource(kind, path, "test")  # type: ignore[arg-type]
    return load_model(source, dtype="bfloat16", device="cpu", seed=7, progress=lambda _: None, group=Group(shard))


def no_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.layers.linear.can_pack", lambda dtype, device: False)


def config_of(**changes: Any) -> ModelConfig:
    names = {"num_heads": 32, "num_kv_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
    base = {"architecture": "LlamaForCausalLM", "hidden_size": 4096, "num_layers": 1, "head_dim": 128}
    rest = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope": None, "windows": (None,)}
    return ModelConfig(**{**base, **rest, **names, **changes})


def test_two_ranks_compute_the_logits_of_one_and_of_transformers(model: Any, ranks: Ranks, kit: Any) -> None:
    oracle, directory = model
    prompt = kit.random_prompt(70)
    with torch.inference_mode():
        expected = oracle(torch.tensor([prompt])).logits[0]
    one = torch.from_numpy(rank_work.logits(Group(), "hf", directory, prompt))
    first, second = (torch.from_numpy(part) for part in ranks.run(rank_work.logits, "hf", directory, prompt))
    assert torch.equal(first, second), "every rank has the same logits"
    torch.testing.assert_close(first, one, atol=1e-4, rtol=0)
    torch.testing.assert_close(first, expected, atol=1e-4, rtol=0)


def test_random_and_gguf_models_too(model: Any, ranks: Ranks, kit: Any) -> None:
    path, prompt = model[1] / "config.json", kit.random_prompt(20)
    one = torch.from_numpy(rank_work.logits(Group(), "random", path, prompt))
    for part in ranks.run(rank_work.logits, "random", path, prompt):
        torch.testing.assert_close(torch.from_numpy(part), one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_parts_are_slices_of_the_whole(model: Any, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    no_packing(monkeypatch)
    for kind, path in (("hf", model[1]), ("random", model[1] / "config.json")):
        whole = load(path, Shard(), kind)
        views = whole.model.weight_views()
        seen: dict[str, int] = dict.fromkeys(views, 0)
        for rank in range(size):
            part = load(path, Shard(rank, size), kind)
            assert part.fingerprint == whole.fingerprint
            assert part.config.num_heads == 8 // size and part.config.num_kv_heads == part.model.config.num_kv_heads
            for name, view in part.model.weight_views().items():
                cut = Shard(rank, size).slice_of(name, read_model_config(model[1] / "config.json"))
                wanted = views[name] if cut is None else views[name].narrow(cut.dim, cut.first, cut.count)
                assert torch.equal(view, wanted), name
                seen[name] += view.numel()
        for name, view in views.items():
            assert seen[name] >= view.numel(), f"{name} is not covered"
            if ".mlp." in name and "down_proj.bias" not in name:
                assert seen[name] == view.numel(), f"{name} overlaps"


@pytest.mark.parametrize("size", [3])
def test_a_gguf_file_is_cut_too(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    no_packing(monkeypatch)
    path = resolve_model("smollm2-135m").path
    views = load(path, Shard(), "gguf").model.weight_views()
    for rank in range(size):
        part = load(path, Shard(rank, size), "gguf")
        for name, view in part.model.weight_views().items():
            cut = Shard(rank, size).slice_of(
                name,
                config_of(
                    num_heads=9, num_kv_heads=3, head_dim=64, hidden_size=576, intermediate_size=1536, vocab_size=49152
                ),
            )
            wanted = views[name] if cut is None else views[name].narrow(cut.dim, cut.first, cut.count)
            assert torch.equal(view, wanted), name


def test_what_cannot_be_split_is_refused() -> None:
    for changes, size, words in (
        ({"num_heads": 9, "num_kv_heads": 3}, 2, "2 cannot split this model evenly: 9 attention heads, 3 key/"),
        ({"num_heads": 12, "num_kv_heads": 3, "intermediate_size": 14400}, 2, "128256; possible: 1, 3, 6, 12"),
        ({"intermediate_size": 14337}, 2, "intermediate_size 14337"),
        ({"vocab_size": 3, "num_kv_heads": 32}, 32, "vocabulary 3"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            Shard(0, size).part(config_of(**changes))
        assert caught.value.field == "tensor_parallel"


def test_the_vocabulary_is_split_in_whole_tiles() -> None:
    for vocab_size, size in ((128256, 2), (128256, 4), (151936, 8), (199, 2), (49152, 3), (5, 5)):
        parts = [Shard(rank, size).vocab(vocab_size) for rank in range(size)]
        assert parts[0][0] == 0 and sum(count for _, count in parts) == vocab_size
        assert all(a[0] + a[1] == b[0] for a, b in itertools.pairwise(parts))
    assert Shard(0, 4).vocab(128256) == (0, 32128)


def test_the_largest_logit_over_ranks(ranks: Ranks) -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(50, 199)) * 10.0 ** rng.integers(-15, 15, size=(50, 1))).astype(np.float32)
    values[3], values[4, [7, 150]], values[5] = -np.inf, 1e30, -(values[5] ** 2)
    values[3, 9] = -1e38
    assert ranks.run(rank_work.largest, values) == [values.argmax(axis=1).tolist()] * 2
    keys = sortable(torch.tensor([[0.5, -0.0, 0.5], [-2.0, -3.0, -2.0]]), 100)
    assert ids_of(keys).tolist() == [100, 100]
    keys = sortable(torch.tensor([[0.5, torch.nan], [-torch.nan, 1.0], [torch.inf, 2.0]]), 7)
    assert ids_of(keys).tolist() == [-1, -1, -1]


def test_a_tensor_of_the_wrong_shape_is_named_by_every_rank(model: Any, tmp_path: Path) -> None:
    values = json.loads((model[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "intermediate_size": 104}))
    for file in model[1].glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    with pytest.raises(ModelLoadError, match=r"mlp.down_proj.* has shape \[64\] |mlp.* has shape \[.*96.*\], the conf"):
        load(tmp_path, Shard(1, 2))
