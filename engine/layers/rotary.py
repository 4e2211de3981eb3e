"""Rotary position embedding (Su et al. 2021) and its scalings, computed as transformers computes them."""

from __future__ import annotations

import math

import torch

from engine.model_config import ModelConfig
from phasewise.core.errors import ConfigError
from phasewise.core.rope import RopeConfig


class RotaryEmbedding:
    """Rotates queries and keys by their position. Raises ConfigError as `rope_tables` does."""

    def __init__(self, config: ModelConfig, max_model_len: int, dtype: torch.dtype, device: torch.device) -> None:
        cos, sin = rope_tables(config, max_model_len)
        # The first half of a head is rotated with minus the second half: the sign lies in the table.
        self._half = config.head_dim // 2
        self._cos = torch.cat((cos, cos), dim=-1).to(dtype).to(device)  # [max_model_len, head_dim]
        self._signed_sin = torch.cat((-sin, sin), dim=-1).to(dtype).to(device)

    def plan(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `rotate_` needs for tokens at these positions ([num_tokens]): two tensors [num_tokens, 1, head_dim]."""
        cos = self._cos.index_select(0, positions).unsqueeze(1)
        return cos, self._signed_sin.index_select(0, positions).unsqueeze(1)

    def rotate_(self, heads: torch.Tensor, planned: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Rotates [num_tokens, num_heads, head_dim] in place."""
        cos, signed_sin = planned
        swapped = heads.roll(self._half, dims=-1)
        heads.mul_(cos).addcmul_(swapped, signed_sin)


def rope_tables(config: ModelConfig, max_model_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine for every position, each [max_model_len, head_dim / 2] float32 on the CPU.

    Raises:
        ConfigError: dynamic scaling past the trained context. There each new token would change the frequencies of all
            earlier ones, so KV could neither be cached nor moved.
    """
    if config.rope.rope_type == "dynamic" and max_model_len > config.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {max_model_len} is past the {config.max_position_embeddings} tokens up to which this "
            "model's dynamic RoPE scaling is constant; lower it, or set the model's rope type to yarn or linear",
            field="model.max_model_len",
        )
    frequencies, attention_factor = rope_frequencies(config.rope, config.head_dim)
    angles = torch.arange(max_model_len, dtype=torch.float32).unsqueeze(1) * frequencies
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Angles per position, [head_dim / 2] float32, and the factor on cosine and sine."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    attention_factor = 1.0
    if rope.rope_type == "linear":
        frequencies = frequencies / rope.factor
    elif rope.rope_type == "llama3":
        frequencies = _llama3(frequencies, rope)
    elif rope.rope_type == "yarn":
        frequencies, attention_factor = _yarn(rope, head_dim), _yarn_attention_factor(rope)
    # "dynamic" equals "default" up to the trained context, and rope_tables refuses to go beyond.
    if rope.frequency_divisors:
        frequencies = frequencies / torch.tensor(rope.frequency_divisors)
    return frequencies, attention_factor


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated (Llama 3.1).

    frequencies: [head_dim / 2], as what is returned.
    """
    wavelengths = 2 * math.pi / frequencies
    longest, shortest = rope.original_context / rope.low_freq_factor, rope.original_context / rope.high_freq_factor
    smooth = (rope.original_context / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    scaled = torch.where(wavelengths > longest, frequencies / rope.factor, frequencies)
    return torch.where((wavelengths >= shortest) & (wavelengths <= longest), between, scaled)


def _yarn(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Interpolation for slow dimensions, extrapolation for fast ones, a ramp between (Peng et al. 2023, "YaRN").

    Returns [head_dim / 2] float32.
    """

    def dimension_of(num_rotations: float) -> float:
        return head_dim * math.log(rope.original_context / (num_rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    wavelengths = rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return (1.0 / (rope.factor * wavelengths)) * ramp + (1.0 / wavelengths) * (1 - ramp)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
