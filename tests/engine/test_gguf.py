"""GGUF files written by gguf's own writer: metadata, every quantisation, row order, and damage at any place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from engine.gguf_config import read_gguf_config
from engine.gguf_weights import SUPPORTED_TYPES, load_gguf
from engine.loader import load_model
from engine.models.registry import build_model
from phasewise.core.errors import ModelLoadError
from phasewise.core.gguf_file import TENSOR_TYPES, GGUFFile
from phasewise.core.model_source import model_facts, resolve_model

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# Where the float16 scales lie in a block that random bytes would fill with infinities.
SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def quantised(values: np.ndarray, type_name: str, rng: np.random.Generator) -> np.ndarray:
    """Bytes of a tensor of this type; where gguf cannot quantise, random blocks with sane scales."""
    kind = gguf.GGMLQuantizationType[type_name]
    if type_name not in SCALES:
        return gguf.quants.quantize(values, kind)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (values.size // block_size, block_bytes), dtype=np.uint8)
    for offset in SCALES[type_name]:
        scale = rng.uniform(1e-4, 1e-3, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*values.shape[:-1], -1)


def interleaved(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Query or key rows as llama.cpp's converter stores them: the two halves of each head interleaved."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    arch: str,
    type_name: str,
    extra: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    tokens: list[str] | None = None,
) -> dict[str, np.ndarray]:
    """Writes the model; gives back, by Hugging Face name, the values that the file stands for."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(5)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_token_list(tokens or [f"token{i} é" for i in range(config.vocab_size)])
    writer.add_array("test.numbers", list(range(1000)))
    for name, value in (extra or {}).items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    rng = np.random.default_rng(0)
    stored: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if arch == "llama" and heads:
            values = interleaved(values, heads)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if values.ndim == 1:
            writer.add_tensor(gguf_name, values)
            data = values
        else:
            raw = quantised(values, type_name, rng)
            kind = gguf.GGMLQuantizationType[type_name]
            writer.add_tensor(gguf_name, raw, raw_dtype=kind)
            data = gguf.quants.dequantize(raw.view(np.uint8).reshape(values.shape[0], -1), kind).reshape(values.shape)
        if arch == "llama" and heads:
            data = data.reshape(heads, -1, 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        stored[name] = data
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory, kit: Any) -> torch.nn.Module:
    return kit.build_oracle(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True), tmp_path_factory.mktemp("o"))


@pytest.mark.parametrize("type_name", SUPPORTED_TYPES)
def test_every_supported_type_is_dequantised_as_gguf_does(oracle: Any, tmp_path: Path, type_name: str) -> None:
    stored = write_gguf(tmp_path / "model.gguf", oracle, "llama", type_name)
    with GGUFFile(tmp_path / "model.gguf") as file:
        config = read_gguf_config(file)
        model = build_model(config, torch.float32, torch.device("cpu"))
        views, shares = model.weight_views(), []
        load_gguf(file, config, views, shares.append)
    assert set(stored) == set(views)
    for name, values in stored.items():
        assert np.isfinite(values).all() and values.std() > 0
        assert np.array_equal(views[name].numpy(), values), name
    assert shares == sorted(shares) and shares[-1] == 1.0


@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("llama", transformers.LlamaConfig(**SHAPE)),
        ("llama", transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True)),
        ("qwen2", transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True)),
        ("qwen3", transformers.Qwen3Config(**SHAPE, head_dim=32)),
    ],
    ids=["llama", "llama-tied", "qwen2", "qwen3"],
)
def test_a_gguf_model_computes_what_its_source_computes(
    arch: str, config: transformers.PretrainedConfig, tmp_path: Path, kit: Any
) -> None:
    oracle = kit.build_oracle(config, tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", oracle, arch, "F32")
    source = resolve_model(str(tmp_path / "model.gguf"))
    loaded = load_model(source, dtype="auto", device="auto", seed=0, progress=lambda share: None)
    assert loaded.dtype == "float32" and source.name == "model"
    engine = kit.Engine(loaded, max_len=128)
    prompt = kit.random_prompt(40, vocab_size=96)
    with torch.inference_mode():
        expected = oracle(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(engine.logits(prompt), expected, atol=1e-4, rtol=0)
    engine.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_transformers_reads_the_same_from_a_quantised_file(oracle: Any, tmp_path: Path, kit: Any) -> None:
    write_gguf(tmp_path / "model.gguf", oracle, "llama", "Q8_0")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    source = resolve_model(str(tmp_path / "model.gguf"))
    engine = kit.Engine(load_model(source, dtype="float32", device="cpu", seed=0, progress=lambda _: None), max_len=128)
    prompt = kit.random_prompt(30, vocab_size=96)
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(engine.logits(prompt), expected, atol=1e-4, rtol=0)
    engine.close()


def test_llama3_frequencies_stored_as_a_tensor(tmp_path: Path, kit: Any) -> None:
    """llama.cpp's converter writes Llama 3.1's scaling as divisors of the frequencies."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    oracle = kit.build_oracle(transformers.LlamaConfig(**SHAPE, rope_parameters=rope), tmp_path / "hf")
    unscaled = 1e4 ** -(np.arange(0, 64, 2) / 64)
    divisors = (unscaled / oracle.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert divisors.max() > 7
    path = tmp_path / "model.gguf"
    write_gguf(path, oracle, "llama", "F32", tensors={"rope_freqs.weight": divisors})
    loaded = load_model(resolve_model(str(path)), dtype="float32", device="cpu", seed=0, progress=lambda _: None)
    engine = kit.Engine(loaded, max_len=128)
    prompt = kit.random_prompt(100, vocab_size=96)
    with torch.inference_mode():
        expected = oracle(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(engine.logits(prompt), expected, atol=2e-4, rtol=0)
    engine.close()


def test_metadata_and_facts(oracle: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", oracle, "llama", "Q4_0", extra={"test.flag": True, "test.real": 0.5})
    with GGUFFile(tmp_path / "model.gguf") as file:
        assert file.metadata["tokenizer.ggml.tokens"] == [f"token{i} é" for i in range(96)]
        assert file.metadata["test.numbers"] == list(range(1000))
        assert file.metadata["test.flag"] is True and file.metadata["test.real"] == 0.5
        tensor = file.tensors["blk.1.ffn_down.weight"]
        assert (tensor.shape, tensor.type_name, tensor.num_bytes) == ((256, 512), "Q4_0", 256 * 512 // 32 * 18)
    facts = model_facts(resolve_model(str(tmp_path / "model.gguf")))
    assert (facts.architecture, facts.context_length, facts.vocab_size) == ("llama", 128, 96)
    assert (facts.eos_token_ids, facts.bos_token_id, facts.dtype) == ((5,), None, "Q4_0")


@pytest.mark.parametrize(
    ("keys", "kind", "factor", "context", "reason"),
    [
        ({}, "default", 1.0, 128, "llama.context_length 128"),
        ({"type": "none", "factor": 4.0}, "default", 1.0, 128, "llama.context_length 128"),
        ({"type": "yarn", "factor": 4.0}, "yarn", 4.0, 512, "factor 4 × original 128"),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 64}, "yarn", 4.0, 256, "factor 4 × original 64"),
        ({"type": "linear", "factor": 2.0}, "linear", 2.0, 256, "factor 2 × llama.context_length 128"),
        ({"factor": 2.0}, "linear", 2.0, 256, "factor 2 × llama.context_length 128"),
        ({"type": "linear"}, "default", 1.0, 128, "llama.context_length 128"),
    ],
)
def test_the_context_is_what_rope_scaling_gives(
    keys: dict[str, Any], kind: str, factor: float, context: int, reason: str, oracle: Any, tmp_path: Path
) -> None:
    """As llama.cpp reads the keys: a factor without a type is linear scaling."""
    extra = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    write_gguf(tmp_path / "model.gguf", oracle, "llama", "Q4_0", extra)
    facts = model_facts(resolve_model(str(tmp_path / "model.gguf")))
    assert facts.context_length == context and facts.context.reason.endswith(reason)
    with GGUFFile(tmp_path / "model.gguf") as file:
        rope = read_gguf_config(file).rope
    assert (rope.rope_type, rope.factor) == (kind, factor)


def test_the_table_of_types_is_ggufs() -> None:
    for type_id, (name, block_size, block_bytes) in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType[name]
        assert (kind.value, gguf.GGML_QUANT_SIZES[kind]) == (type_id, (block_size, block_bytes))


@pytest.fixture(scope="module")
def good_file(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "model.gguf"
    write_gguf(path, oracle, "llama", "Q4_1")
    return path.read_bytes()


def failure(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ModelLoadError) as caught:
        GGUFFile(path)
    message = caught.value.message
    assert str(path) in message and "\n" not in message
    return message


def test_a_file_cut_anywhere_is_refused(good_file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    cuts = {0, 1, 3, 4, 8, 23, 24, 25, 60, 200, 1000, 2000, 3000, 5000, len(good_file) // 2, len(good_file) - 40}
    for length in sorted(cuts):
        message = failure(path, good_file[:length])
        assert ("not a GGUF file" if length < 24 else "cut short") in message
    assert "in tensor 'output_norm.weight', which should end at byte" in failure(path, good_file[:-40])


def test_other_damage_is_named(good_file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    assert "begins with b'PK" in failure(path, b"PK\x03\x04" + good_file[4:])
    assert "GGUF version 7" in failure(path, good_file[:4] + b"\x07\0\0\0" + good_file[8:])
    assert "big-endian" in failure(path, good_file[:4] + b"\0\0\0\x03" + good_file[8:])
    assert "cut short" in failure(path, good_file[:8] + b"\xff" * 8 + good_file[16:])
    huge = good_file.replace(
        b"tokenizer.ggml.tokens\x09\0\0\0\x08\0\0\0\x60", b"tokenizer.ggml.tokens\x09\0\0\0\x08\0\0\0\xff"
    )
    assert huge != good_file
    assert "damaged" in failure(path, huge)
    with pytest.raises(ModelLoadError, match=r"cannot read the GGUF file .*nothing"):
        GGUFFile(tmp_path / "nothing.gguf")


@pytest.mark.parametrize(
    ("arch", "extra", "words"),
    [
        ("gpt2", {}, "architecture 'gpt2' is not supported; supported: llama, qwen2, qwen3"),
        ("llama", {"llama.expert_count": 8}, "mixture-of-experts"),
        ("llama", {"split.count": 3}, "is one of 3 parts; join them"),
        ("llama", {"llama.rope.scaling.type": "longrope"}, "RoPE scaling 'longrope'"),
        ("llama", {"llama.rope.dimension_count": 32}, "partial rotary positions \\(32 of 64\\)"),
    ],
)
def test_what_is_not_supported_is_named(
    arch: str, extra: dict[str, Any], words: str, oracle: Any, tmp_path: Path
) -> None:
    if arch == "gpt2":
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", arch)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        write_gguf(tmp_path / "model.gguf", oracle, arch, "F16", extra)
    with pytest.raises(ModelLoadError, match=words), GGUFFile(tmp_path / "model.gguf") as file:
        read_gguf_config(file)


def test_a_tensor_of_the_wrong_shape_is_named(oracle: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", oracle, "llama", "F16", {"llama.attention.value_length": 64})
    content = (tmp_path / "model.gguf").read_bytes()
    key = b"llama.feed_forward_length\x04\0\0\0"
    changed = content.replace(key + b"\0\x02\0\0", key + b"\0\x04\0\0")
    assert changed != content
    (tmp_path / "model.gguf").write_bytes(changed)
    source = resolve_model(str(tmp_path / "model.gguf"))
    with pytest.raises(ModelLoadError, match=r"tensor 'blk.0.ffn_(gate|up|down).weight' has shape .* asks for"):
        load_model(source, dtype="float32", device="cpu", seed=0, progress=lambda _: None)


def test_facts_need_no_tensor_library(oracle: Any, tmp_path: Path) -> None:
    """The gateway reads a model's facts in a process that has no torch."""
    import subprocess
    import sys

    write_gguf(tmp_path / "model.gguf", oracle, "llama", "Q8_0")
    code = (
        "import json, sys\n"
        "from phasewise.core.model_source import model_facts, resolve_model\n"
        "facts = model_facts(resolve_model(sys.argv[1]))\n"
        "heavy = [m for m in ('torch', 'numpy', 'gguf', 'grpc') if m in sys.modules]\n"
        "print(json.dumps([facts.vocab_size, heavy]))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.gguf")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(output.stdout) == [96, []]
