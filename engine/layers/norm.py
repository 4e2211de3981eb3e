"""RMSNorm, always computed in float32: in bfloat16 near ties between tokens flip."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class RMSNorm:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension (Zhang and Sennrich 2019), in the dtype of x.

    `weight` is [size] float32, to be filled by the loader.
    """

    def __init__(self, size: int, eps: float, device: torch.device) -> None:
        self.weight = torch.empty(size, dtype=torch.float32, device=device)
        self._shape = (size,)
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] → the same."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, self._shape, self.weight, self._eps)
        return F.rms_norm(x.float(), self._shape, self.weight, self._eps).to(x.dtype)
