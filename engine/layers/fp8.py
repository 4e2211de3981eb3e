"""fp8 (e4m3) numbers: saturating conversion, and weights with one scale per output channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from phasewise.core.errors import ConfigError

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0  # its largest number; beyond it e4m3fn has NaN, not infinity
_MULTIPLE = 16  # of rows and columns, for torch's scaled product


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """values [out_features, in_features] e4m3, scales [out_features] float32: the weight is values * scales."""

    values: torch.Tensor
    scales: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """[out_features, in_features] float32"""
        return self.values.float() * self.scales.unsqueeze(1)


def saturate(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x, of any shape, in `dtype`; what is too large for fp8 becomes its largest number, and NaN stays NaN."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(dtype) if dtype == FP8_DTYPE else x.to(dtype)


def quantize_weight(weight: torch.Tensor, input_scales: torch.Tensor | None = None) -> Fp8Weight:
    """W [rows, columns], or W diag(input_scales [columns]), rounded once: each row's largest value becomes 448.

    Raises ConfigError for a shape that the scaled product does not take.
    """
    if any(size % _MULTIPLE for size in weight.shape):
        shape = " x ".join(map(str, weight.shape))
        raise ConfigError(
            f"model.weights fp8 needs products whose sizes are multiples of {_MULTIPLE}, and this model has one of "
            f"{shape}; use model.weights auto",
            field="model.weights",
        )
    values = torch.empty(weight.shape, dtype=FP8_DTYPE, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for first in range(0, len(weight), 4096):  # in float32, without a second copy of the whole
        rows = weight[first : first + 4096].float()
        if input_scales is not None:
            rows = rows * input_scales
        scale = rows.abs().amax(dim=1).clamp(min=1e-12) / FP8_MAX
        values[first : first + 4096] = saturate(rows / scale.unsqueeze(1), FP8_DTYPE)
        scales[first : first + 4096] = scale
    return Fp8Weight(values, scales)
