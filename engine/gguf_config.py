"""ModelConfig from the metadata of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from __future__ import annotations

from engine.model_config import ModelConfig, check_shape
from phasewise.core.errors import ModelLoadError
from phasewise.core.gguf_file import GGUFFile
from phasewise.core.gguf_metadata import GGUFValues

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""GGUF architecture → ours. Mistral models are `llama` there."""


def read_gguf_config(file: GGUFFile) -> ModelConfig:
    """The model's shape and variant.

    Biases and tied embeddings are not in the metadata; they are told by which tensors the file has.

    Raises:
        ModelLoadError: names the file, the key, and what is supported instead.
    """
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelLoadError(
            f"{file.path}: GGUF architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if file.metadata.get(f"{name}.expert_count"):
        raise ModelLoadError(f"{file.path}: mixture-of-experts models ({name}.expert_count) are not supported")
    num_parts = file.metadata.get("split.count", 1)
    if num_parts > 1:
        raise ModelLoadError(f"{file.path} is one of {num_parts} parts; join them with: llama-gguf-split --merge")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelLoadError(f"{file.path}: tensor 'token_embd.weight' is missing; the file is damaged")
    values = GGUFValues(file)
    hidden_size, num_heads = values.integer("embedding_length"), values.integer("attention.head_count")
    head_dim = values.integer("attention.key_length", default=hidden_size // max(num_heads, 1))
    rotary_dim = values.integer("rope.dimension_count", default=head_dim)
    if rotary_dim != head_dim:
        raise ModelLoadError(f"{file.path}: partial rotary positions ({rotary_dim} of {head_dim}) are not supported")
    num_layers = values.integer("block_count")
    window = values.integer("attention.sliding_window", default=0) if name == "llama" else 0
    config = ModelConfig(
        architecture=ARCHITECTURES[name],
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=values.integer("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=values.integer("attention.head_count_kv", default=num_heads),
        head_dim=head_dim,
        max_position_embeddings=values.integer("context_length"),
        rms_norm_eps=values.number("attention.layer_norm_rms_epsilon"),
        rope=values.rope(),
        windows=(window or None,) * num_layers,
        tie_word_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        qk_norm=name == "qwen3",
    )
    check_shape(config, file.path)
    return config
