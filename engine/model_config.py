"""The shape of a decoder-only model, read from a Hugging Face `config.json`. What is not supported is refused here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from phasewise.core.errors import ModelLoadError
from phasewise.core.hf_config import HFConfig
from phasewise.core.rope import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and variant of a decoder-only transformer of the Llama family.

    `windows[i]` is layer i's sliding window in tokens (itself included), or None for full attention.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    initializer_range: float = 0.02

    def fingerprint(self, weights_identity: str) -> str:
        """Names this model with these weights: equal in two processes that load the same, different otherwise."""
        text = json.dumps(asdict(self), sort_keys=True) + weights_identity
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_model_config(path: Path) -> ModelConfig:
    """Reads a `config.json`.

    Raises:
        ModelLoadError: names the file, the key, and what is supported instead.
    """
    values = HFConfig(path)
    if quantization := values.values.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise values.error(f"quantisation {method!r} is not supported; use float32 or bfloat16 weights, or a GGUF file")
    activation = values.get("hidden_act")
    if activation not in ("silu", "swish"):
        raise values.error(f"activation {activation!r} (hidden_act) is not supported; supported: silu")
    num_layers, num_heads = values.whole("num_hidden_layers"), values.whole("num_attention_heads")
    config = ModelConfig(
        architecture=values.architecture,
        vocab_size=values.whole("vocab_size"),
        hidden_size=values.whole("hidden_size"),
        intermediate_size=values.whole("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=values.optional_whole("num_key_value_heads") or num_heads,
        head_dim=_head_dim(values, num_heads),
        max_position_embeddings=values.whole("max_position_embeddings"),
        rms_norm_eps=values.number("rms_norm_eps"),
        rope=read_rope(values),
        windows=_windows(values, num_layers),
        tie_word_embeddings=values.flag("tie_word_embeddings"),
        qkv_bias=values.architecture == "Qwen2ForCausalLM" or values.flag("attention_bias"),
        output_bias=values.flag("attention_bias"),
        mlp_bias=values.flag("mlp_bias"),
        qk_norm=values.architecture == "Qwen3ForCausalLM",
        initializer_range=values.number("initializer_range"),
    )
    check_shape(config, str(path))
    return config


def check_shape(config: ModelConfig, where: str) -> None:
    """Cross-checks that hold for every source. Raises ModelLoadError."""
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        if getattr(config, name) <= 0:
            raise ModelLoadError(f"{where}: {name} must be positive, not {getattr(config, name)}")
    if config.num_heads % config.num_kv_heads:
        raise ModelLoadError(
            f"{where}: {config.num_heads} attention heads cannot share {config.num_kv_heads} key/value heads evenly"
        )
    if config.head_dim <= 0 or config.head_dim % 2:
        raise ModelLoadError(f"{where}: head_dim must be positive and even for rotary positions, not {config.head_dim}")
    divisors = config.rope.frequency_divisors
    if divisors and len(divisors) != config.head_dim // 2:
        raise ModelLoadError(f"{where}: rope_freqs has {len(divisors)} values, head_dim {config.head_dim} needs half")


def _head_dim(values: HFConfig, num_heads: int) -> int:
    """The file's, or else a head's share of the hidden size. Raises ModelLoadError when Llama's share is uneven."""
    given = values.optional_whole("head_dim")
    if given is not None:
        return given
    hidden_size = values.whole("hidden_size")
    if values.architecture == "LlamaForCausalLM" and hidden_size % num_heads:
        raise values.error(
            f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}; give head_dim"
        )
    return hidden_size // num_heads


def _windows(values: HFConfig, num_layers: int) -> tuple[int | None, ...]:
    """Mistral has one window for all layers; Qwen has one where it is switched on, for the layers that are named.

    Raises ModelLoadError for layer types that are not supported, or contradict the window.
    """
    full = (None,) * num_layers
    if not values.has("sliding_window"):
        return full
    if not values.has("use_sliding_window"):
        return (values.optional_whole("sliding_window"),) * num_layers
    window = values.optional_whole("sliding_window") if values.flag("use_sliding_window") else None
    kinds = values.get("layer_types")
    if kinds is None:
        first = values.get("max_window_layers")
        if not isinstance(first, int) or isinstance(first, bool):
            raise values.error(f"'max_window_layers' must be a whole number, not {first!r}")
        return full if window is None else tuple(window if i >= first else None for i in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise values.error(f"'layer_types' must be a list of {num_layers} names, one for each layer")
    if unknown := [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]:
        raise values.error(f"'layer_types' may name sliding_attention and full_attention, not {unknown[0]!r}")
    if window is None and "sliding_attention" in kinds:
        raise values.error(
            "'layer_types' names sliding_attention, which needs use_sliding_window true and a sliding_window"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
