"""Every architecture and variant against transformers on the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.model_config import read_model_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama-head-dim": ("Llama", {"head_dim": 32}),
    "llama-eps": ("Llama", {"rms_norm_eps": 1e-2}),
    "llama-theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": ("Llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
    "llama-yarn-attention": ("Llama", {"rope_parameters": YARN | {"attention_factor": 1.2, "beta_fast": 16}}),
    "llama-yarn-smooth": ("Llama", {"rope_parameters": YARN | {"truncate": False, "beta_slow": 2}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 19}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-bias": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-layer-types": (
        "Qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 11,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, kit: Any) -> tuple[Any, Any]:
    family, options = VARIANTS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    config = getattr(transformers, family + "Config")(**{**kit.SMALL, **options})
    return kit.build_oracle(config, directory), kit.load(directory)


def test_logits_agree(variant: tuple[Any, Any], kit: Any) -> None:
    oracle, loaded = variant
    engine = kit.Engine(loaded)
    for attention in ("auto", "reference"):
        for length in (1, 7, 90):
            prompt = kit.random_prompt(length, seed=length)
            with torch.inference_mode():
                expected = oracle(torch.tensor([prompt])).logits[0]
            assert expected.std() > 0.5, "the oracle says nothing"
            torch.testing.assert_close(engine.logits(prompt, attention), expected, atol=1e-4, rtol=0)
    engine.close()


def test_64_greedy_tokens_are_identical(variant: tuple[Any, Any], kit: Any) -> None:
    oracle, loaded = variant
    engine = kit.Engine(loaded)
    prompt = kit.random_prompt(23)
    assert engine.generate(prompt, 64) == kit.oracle_tokens(oracle, prompt, 64)
    assert engine.generate(prompt, 64, chunk=5) == kit.oracle_tokens(oracle, prompt, 64)
    engine.close()


@pytest.mark.parametrize(
    ("scaling", "theta"),
    [
        (None, 1e6),
        ({"type": "linear", "factor": 2.0}, 10000.0),
        ({"rope_type": "llama3", **{k: v for k, v in LLAMA3.items() if k not in ("rope_type", "rope_theta")}}, 5e5),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 1e4),
    ],
)
def test_the_older_form_of_rope_settings_means_the_same(
    scaling: dict[str, Any] | None, theta: float, tmp_path: Path, kit: Any
) -> None:
    """config.json as transformers 4 wrote it: `rope_scaling` beside `rope_theta`."""
    modern = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    modern["rope_type"] = modern.pop("type", modern["rope_type"])
    transformers.LlamaConfig(**kit.SMALL, rope_parameters=modern, architectures=["LlamaForCausalLM"]).save_pretrained(
        tmp_path
    )
    values = json.loads((tmp_path / "config.json").read_text())
    del values["rope_parameters"]
    (tmp_path / "old.json").write_text(json.dumps({**values, "rope_scaling": scaling, "rope_theta": theta}))
    old = read_model_config(tmp_path / "old.json")
    assert old == read_model_config(tmp_path / "config.json")
    assert old.rope.theta == theta


def test_bfloat16_stays_close_to_float32(llama: tuple[Any, Any], tmp_path: Path, kit: Any) -> None:
    oracle, _ = llama
    oracle.save_pretrained(tmp_path)
    engine = kit.Engine(kit.load(tmp_path, dtype="bfloat16"))
    prompt = kit.random_prompt(60)
    with torch.inference_mode():
        exact = oracle(torch.tensor([prompt])).logits[0]
        rounded = type(oracle).from_pretrained(tmp_path, dtype=torch.bfloat16)(torch.tensor([prompt])).logits[0]
    ours = (engine.logits(prompt) - exact).abs().mean()
    theirs = (rounded.float() - exact).abs().mean()
    assert ours < 1.5 * theirs  # no worse than what rounding does to the oracle itself
    engine.close()
