"""y = x Wᵀ + b, with the weight laid out for the device once it is loaded."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# oneDNN's product with a weight that was reordered once. On the CPUs at hand it reads weights at 23 GB/s where
# F.linear (MKL) reaches 9 GB/s at batch 8.
_packed_linear = torch.ops.mkldnn._linear_pointwise.default
_add_packed_linear = torch.ops.mkldnn._linear_pointwise.binary
_reorder_weight = torch.ops.mkldnn._reorder_linear_weight.default

# oneDNN adds up all products of an output one after the other. Over the layers of SmolLM2 that makes a float32 error
# of 1.6e-4 in the logits; in pieces of this length, which is how MKL sums, it is below 1e-4.
_SUM_LENGTH = 192


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """True when oneDNN computes this dtype at full speed here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Linear:
    """One product, or several that share an input, fused: the rows of `weight` are the outputs, one below the other.

    Attributes:
        weight: [out_features, in_features], to be filled by the loader; gone (None) once `finish_loading` packed it.
        bias: [out_features] or None.

    `short_sums` False saves time where no later layer amplifies the rounding of a long sum.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        short_sums: bool = True,
    ) -> None:
        self.out_features = out_features
        self._sum_length = _SUM_LENGTH if short_sums and dtype == torch.float32 else in_features
        self.weight: torch.Tensor | None = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self._pieces: list[tuple[int, int, torch.Tensor]] = []  # (first input, last + 1, packed weight)

    def rows(self, first: int, count: int) -> torch.Tensor:
        """The weight of one of the fused products, for the loader to fill."""
        assert self.weight is not None, "the weight is packed already"
        return self.weight[first : first + count]

    def bias_rows(self, first: int, count: int) -> torch.Tensor:
        assert self.bias is not None
        return self.bias[first : first + count]

    def finish_loading(self) -> None:
        """Call once, when weight and bias are filled."""
        assert self.weight is not None, "the weight is packed already"
        if can_pack(self.weight.dtype, self.weight.device):
            for first in range(0, self.weight.shape[1], self._sum_length):
                columns = self.weight[:, first : first + self._sum_length]
                self._pieces.append((first, first + columns.shape[1], _reorder_weight(columns.contiguous())))
            self.weight = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in_features] → [num_tokens, out_features]"""
        if self.weight is not None:
            return F.linear(x, self.weight, self.bias)
        first, end, packed = self._pieces[0]
        output = _packed_linear(x[:, first:end], packed, self.bias, "none", [], "")
        for first, end, packed in self._pieces[1:]:
            output = _add_packed_linear(x[:, first:end], output, packed, None, "add")
        return output
