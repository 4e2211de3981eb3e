"""What a decoder-only model looks like, read from a Hugging Face `config.json`. The unsupported is refused here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phasewise.core.errors import ModelLoadError
from phasewise.core.model_source import read_json

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. Fields that a type does not use keep their default.

    `rope_type` is one of SUPPORTED_ROPE_TYPES, with the meaning that transformers gives them. `frequency_divisors`
    (GGUF's `rope_freqs.weight`) divides each frequency: llama.cpp's stored form of llama3 scaling.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    frequency_divisors: tuple[float, ...] = ()


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
    values = read_json(path)
    try:
        return _from_values(values)
    except _Unsupported as error:
        raise ModelLoadError(f"{path}: {error}") from None


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


class _Unsupported(Exception):
    """What is wrong, without the file's name."""


def _from_values(values: dict[str, Any]) -> ModelConfig:
    names = values.get("architectures") or [None]
    architecture = names[0] if isinstance(names, list) else names
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise _Unsupported(f"architecture {architecture!r} is not supported; {_list(SUPPORTED_ARCHITECTURES)}")
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise _Unsupported(f"quantisation {method!r} is not supported; use float32 or bfloat16 weights, or a GGUF file")
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise _Unsupported(f"activation {activation!r} (hidden_act) is not supported; supported: silu")
    hidden_size, num_heads = _positive(values, "hidden_size"), _positive(values, "num_attention_heads")
    num_layers = _positive(values, "num_hidden_layers")
    config = ModelConfig(
        architecture=architecture,
        vocab_size=_positive(values, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive(values, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_positive(values, "num_key_value_heads", default=num_heads),
        head_dim=_positive(values, "head_dim", default=_derived_head_dim(architecture, hidden_size, num_heads)),
        max_position_embeddings=_positive(values, "max_position_embeddings"),
        rms_norm_eps=_number(values, "rms_norm_eps", 1e-6),
        rope=_rope(values),
        windows=_windows(architecture, values, num_layers),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "Qwen2ForCausalLM" or _has_attention_bias(architecture, values),
        output_bias=_has_attention_bias(architecture, values),
        mlp_bias=architecture == "LlamaForCausalLM" and bool(values.get("mlp_bias", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        initializer_range=_number(values, "initializer_range", 0.02),
    )
    check_shape(config, "config.json")
    return config


def _list(names: tuple[str, ...]) -> str:
    return "supported: " + ", ".join(names)


def _positive(values: dict[str, Any], key: str, *, default: int | None = None) -> int:
    value = values.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _Unsupported(f"{key!r} must be a positive whole number, not {value!r}")
    return value


def _number(values: dict[str, Any], key: str, default: float) -> float:
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _Unsupported(f"{key!r} must be a number, not {value!r}")
    return float(value)


def _derived_head_dim(architecture: str, hidden_size: int, num_heads: int) -> int:
    if architecture == "Qwen3ForCausalLM":
        return 128
    if hidden_size % num_heads:
        raise _Unsupported(
            f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}; give head_dim"
        )
    return hidden_size // num_heads


def _has_attention_bias(architecture: str, values: dict[str, Any]) -> bool:
    return architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and bool(values.get("attention_bias", False))


def _windows(architecture: str, values: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    if architecture == "LlamaForCausalLM":
        return (None,) * num_layers
    if values.get("sliding_window", 4096) is None:  # transformers' default where the key is absent
        return (None,) * num_layers
    window = _positive(values, "sliding_window", default=4096)
    if architecture == "MistralForCausalLM":
        return (window,) * num_layers
    if not values.get("use_sliding_window", False):
        return (None,) * num_layers
    kinds = values.get("layer_types")
    if kinds is None:
        first = values.get("max_window_layers", 28)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown or len(kinds) != num_layers:
        raise _Unsupported(f"'layer_types' must name sliding_attention or full_attention for {num_layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(values: dict[str, Any]) -> RopeConfig:
    """Both forms: transformers 5 (`rope_parameters`), and before (`rope_scaling` beside `rope_theta`)."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise _Unsupported(f"'rope_parameters' must be an object, not {given!r}")
    rope_type = given.get("rope_type", given.get("type", "default"))
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise _Unsupported(f"RoPE type {rope_type!r} is not supported; {_list(SUPPORTED_ROPE_TYPES)}")
    partial = given.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise _Unsupported(f"partial_rotary_factor {partial!r} is not supported; supported: 1.0")
    theta = _number(given, "rope_theta", _number(values, "rope_theta", 10000.0))
    if rope_type == "default":
        return RopeConfig(theta=theta)
    context = _positive(values, "max_position_embeddings")
    original = values.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    if not original:
        original = context
    if rope_type != "yarn" and not isinstance(given.get("factor"), int | float):
        raise _Unsupported(f"RoPE type {rope_type!r} needs a number as 'factor', not {given.get('factor')!r}")
    for key in ("low_freq_factor", "high_freq_factor") if rope_type == "llama3" else ():
        if given.get(key) is None:
            raise _Unsupported(f"RoPE type 'llama3' needs {key!r}")
    return RopeConfig(
        rope_type=rope_type,
        theta=theta,
        factor=_number(given, "factor", context / original),
        original_context=int(original),
        low_freq_factor=_number(given, "low_freq_factor", 1.0),
        high_freq_factor=_number(given, "high_freq_factor", 4.0),
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        truncate=bool(given.get("truncate", True)),
        attention_factor=given.get("attention_factor"),
        mscale=given.get("mscale"),
        mscale_all_dim=given.get("mscale_all_dim"),
    )
