"""Rotary position embedding: its settings, and how a `config.json` gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phasewise.core.errors import ModelLoadError
from phasewise.core.hf_config import HFConfig

SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_LAYER_KINDS = ("full_attention", "sliding_attention")


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


def read_rope(config: HFConfig) -> RopeConfig:
    """Reads both forms, transformers 5's (`rope_parameters`) and the older `rope_scaling`, which takes precedence.

    Raises:
        ModelLoadError: a type that is not supported, or a key that a type needs and does not have.
    """
    given = config.values.get("rope_scaling") or config.values.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise config.error(f"'rope_parameters' must be an object, not {given!r}")
    values = _RopeValues(config, given)
    if nested := [kind for kind in _LAYER_KINDS if kind in given]:
        raise config.error(f"RoPE settings of their own for {' and '.join(nested)} layers are not supported")
    rope_type = given.get("rope_type", given.get("type", "default"))
    if rope_type not in SUPPORTED_ROPE_TYPES:
        supported = ", ".join(SUPPORTED_ROPE_TYPES)
        raise config.error(f"RoPE type {rope_type!r} is not supported; supported: {supported}")
    partial = given.get("partial_rotary_factor", config.values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise config.error(f"partial_rotary_factor {partial!r} is not supported; supported: 1.0")
    theta = values.number("rope_theta", config.number("rope_theta"))
    if rope_type == "default":
        return RopeConfig(theta=theta)
    context = config.whole("max_position_embeddings")
    original = context
    if rope_type in ("llama3", "yarn"):
        original = values.original_context(context)
    for key in ("factor", "low_freq_factor", "high_freq_factor") if rope_type == "llama3" else ("factor",):
        if key not in given:
            raise config.error(f"RoPE type {rope_type!r} needs {key!r}")
    derived = context / original if rope_type == "yarn" and given["factor"] is None else None
    return RopeConfig(
        rope_type=rope_type,
        theta=theta,
        factor=values.positive("factor") if derived is None else derived,
        original_context=original,
        low_freq_factor=values.number("low_freq_factor", 1.0),
        high_freq_factor=values.number("high_freq_factor", 4.0),
        beta_fast=values.optional_number("beta_fast") or 32.0,
        beta_slow=values.optional_number("beta_slow") or 1.0,
        truncate=bool(given.get("truncate", True)),
        attention_factor=values.optional_number("attention_factor"),
        mscale=values.optional_number("mscale"),
        mscale_all_dim=values.optional_number("mscale_all_dim"),
    )


class _RopeValues:
    """Typed access to the RoPE settings of one config. Methods raise ModelLoadError for a value of another type."""

    def __init__(self, config: HFConfig, given: dict[str, Any]) -> None:
        self._config = config
        self._given = given

    def number(self, key: str, default: float) -> float:
        """A number; `default` where the key is absent, which `null` is not."""
        value = self._given.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._error(key, "a number", value)
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self._given.get(key) is None else self.number(key, 0.0)

    def positive(self, key: str) -> float:
        value = self.number(key, 0.0)
        if value <= 0:
            raise self._error(key, "a number above 0", value)
        return value

    def original_context(self, default: int) -> int:
        """The length before scaling. The config's own key takes precedence over that of the RoPE settings."""
        key = "original_max_position_embeddings"
        value = self._config.values[key] if key in self._config.values else self._given.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self._error(key, "a positive whole number", value)
        return value

    def _error(self, key: str, wanted: str, value: object) -> ModelLoadError:
        return self._config.error(f"RoPE setting {key!r} must be {wanted}, not {value!r}")
