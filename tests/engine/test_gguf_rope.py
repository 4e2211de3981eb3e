"""RoPE scaling in a GGUF file: computed as transformers computes it where the keys mean the same, refused otherwise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.layers.rotary import rope_frequencies
from engine.loader import load_model
from phasewise.core.errors import ModelLoadError
from phasewise.core.gguf_file import GGUFFile
from phasewise.core.gguf_metadata import GGUFValues
from phasewise.core.model_source import resolve_model
from phasewise.core.rope import RopeConfig
from tests.engine.test_gguf import SHAPE, write_gguf

FACTOR, CONTEXT = 4.0, 64
YARN = {"type": "yarn", "factor": FACTOR, "original_context_length": CONTEXT}
DEFAULT_SCALE = 1.0 + 0.1 * math.log(FACTOR)
THEIRS = {
    "rope_type": "yarn",
    "factor": FACTOR,
    "original_max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
}
ALL_KEYS = {
    "attn_factor": 1.2,
    "yarn_beta_fast": 16.0,
    "yarn_beta_slow": 2.0,
    "yarn_log_multiplier": 0.5,
    "yarn_ext_factor": 1.0,
    "yarn_attn_factor": 1.0,
}
ALL_OF_THEIRS = {
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "attention_factor": 1.2 * DEFAULT_SCALE / (1.0 + 0.05 * math.log(FACTOR)),
}


def read_rope(path: Path, keys: dict[str, Any]) -> RopeConfig:
    writer = gguf.GGUFWriter(path / "model.gguf", "llama")
    writer.add_context_length(CONTEXT)
    for key, value in keys.items():
        name = f"llama.rope.scaling.{key}"
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(path / "model.gguf") as file:
        return GGUFValues(file).rope()


@pytest.mark.parametrize(
    ("keys", "theirs"),
    [
        ({}, {}),
        ({"yarn_ext_factor": -1.0}, {}),  # llama.cpp's word for "not set"
        ({"yarn_beta_fast": 16.0}, {"beta_fast": 16.0}),
        ({"yarn_beta_slow": 2.0}, {"beta_slow": 2.0}),
        ({"attn_factor": 1.5}, {"attention_factor": 1.5 * DEFAULT_SCALE}),
        ({"yarn_log_multiplier": 1.0}, {"mscale": 1.0, "mscale_all_dim": 1.0}),
        ({"yarn_log_multiplier": 0.5}, {"mscale": 1.0, "mscale_all_dim": 0.5}),
        (ALL_KEYS, ALL_OF_THEIRS),
    ],
    ids=["none", "unset", "fast", "slow", "attention", "multiplier-1", "multiplier-half", "all"],
)
def test_yarn_is_that_of_transformers(keys: dict[str, Any], theirs: dict[str, Any], tmp_path: Path) -> None:
    frequencies, scale = rope_frequencies(read_rope(tmp_path, {**YARN, **keys}), 64)
    config = transformers.LlamaConfig(**SHAPE, rope_parameters={**THEIRS, **theirs})
    oracle = LlamaRotaryEmbedding(config)
    torch.testing.assert_close(frequencies, oracle.inv_freq, rtol=1e-6, atol=0)
    assert scale == pytest.approx(oracle.attention_scaling, rel=1e-6)


def test_a_model_with_all_yarn_keys_computes_what_its_source_computes(tmp_path: Path, kit: Any) -> None:
    config = transformers.LlamaConfig(**SHAPE, rope_parameters={**THEIRS, **ALL_OF_THEIRS})
    oracle = kit.build_oracle(config, tmp_path / "hf")
    path = tmp_path / "model.gguf"
    extra = {f"llama.rope.scaling.{key}": value for key, value in {**YARN, **ALL_KEYS}.items()}
    write_gguf(path, oracle, "llama", "F32", extra)
    loaded = load_model(resolve_model(str(path)), dtype="float32", device="cpu", seed=0, progress=lambda _: None)
    engine = kit.Engine(loaded, max_len=128)
    prompt = kit.random_prompt(100, vocab_size=96)
    with torch.inference_mode():
        expected = oracle(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(engine.logits(prompt), expected, atol=2e-4, rtol=0)
    engine.close()


LINEAR = {"type": "linear", "factor": FACTOR}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({**YARN, "yarn_ext_factor": 0.5}, r"rope.scaling.yarn_ext_factor' is 0.5.* supported with YaRN: 1\."),
        ({**YARN, "yarn_ext_factor": 0.0}, r"rope.scaling.yarn_ext_factor' is 0,"),
        ({**YARN, "yarn_attn_factor": 1.25}, r"rope.scaling.yarn_attn_factor' is 1.25"),
        ({**YARN, "yarn_beta_fast": 0.0}, r"rope.scaling.yarn_beta_fast' must be a number above 0"),
        ({**YARN, "yarn_beta_slow": -1.0}, r"rope.scaling.yarn_beta_slow' must be a number above 0"),
        ({**YARN, "yarn_beta_fast": "32"}, r"rope.scaling.yarn_beta_fast' must be a number, not '32'"),
        ({**YARN, "attn_factor": math.inf}, r"rope.scaling.attn_factor' must be a number above 0"),
        ({**YARN, "yarn_log_multiplier": -0.1}, r"rope.scaling.yarn_log_multiplier' must be a number, at least 0"),
        ({**LINEAR, "attn_factor": 1.5}, r"rope.scaling.attn_factor' is 1.5.* supported without YaRN: 1\."),
        ({**LINEAR, "yarn_attn_factor": 1.5}, r"rope.scaling.yarn_attn_factor' is 1.5"),
        ({**LINEAR, "yarn_ext_factor": 1.0}, r"rope.scaling.yarn_ext_factor' is 1,.* supported without YaRN: 0\."),
        ({"attn_factor": 1.5}, r"rope.scaling.attn_factor' is 1.5"),
    ],
)
def test_what_would_be_computed_differently_is_refused(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=words):
        read_rope(tmp_path, keys)


@pytest.mark.parametrize("keys", [LINEAR, {**LINEAR, "attn_factor": 1.0, "yarn_ext_factor": 0.0}])
def test_values_that_change_nothing_are_accepted(keys: dict[str, Any], tmp_path: Path) -> None:
    rope = read_rope(tmp_path, keys)
    assert (rope.rope_type, rope.factor) == ("linear", FACTOR)
