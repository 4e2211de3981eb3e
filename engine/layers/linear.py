"""y = x Wᵀ + b, with the weight laid out for the device, or quantised, once it is loaded."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.layers.fp8 import Fp8Weight, quantize_weight

# oneDNN adds up all products of an output one after the other. Over the layers of SmolLM2 its logits are then up to
# 1.7e-4 away from transformers'; summed in pieces of this length, as MKL does, 0.8e-4. bfloat16 rounds more anyway.
_SUM_LENGTH = 192


class Linear:
    """One product, or several that share an input, fused: the rows of `weight` are the outputs, one below the other.

    Attributes:
        weight: [out_features, in_features], to be filled by the loader; gone (None) once `quantize` or `finish_loading`
            replaced it.
        fp8: what `quantize` replaced it with, or None.
        bias: [out_features] or None.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.out_features = out_features
        self.weight: torch.Tensor | None = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.fp8: Fp8Weight | None = None
        self._packed: _PackedWeight | None = None

    def rows(self, first: int, count: int) -> torch.Tensor:
        """The weight of one of the fused products, [count, in_features], for the loader to fill."""
        assert self.weight is not None, "the weight is packed already"
        return self.weight[first : first + count]

    def bias_rows(self, first: int, count: int) -> torch.Tensor:
        """The bias of one of the fused products, [count], for the loader to fill."""
        assert self.bias is not None, "this product has no bias"
        return self.bias[first : first + count]

    def scale_inputs(self, scales: torch.Tensor) -> None:
        """Multiplies factors of the inputs [in_features] into the weight: W diag(scales)."""
        assert self.weight is not None, "the weight is packed already"
        for rows in self.weight.split(4096):  # in float32, without a second copy of the whole
            rows.copy_(rows.float() * scales)

    def quantize(self, input_scales: torch.Tensor | None = None) -> None:
        """Replaces the filled weight by its fp8 form, factors of the inputs multiplied in before as by `scale_inputs`.

        Raises ConfigError for a shape that fp8 products do not take.
        """
        assert self.weight is not None, "the weight is packed already"
        self.fp8, self.weight = quantize_weight(self.weight, input_scales), None

    def finish_loading(self) -> None:
        """Call once, when weight and bias are filled."""
        if self.fp8 is not None:
            return
        assert self.weight is not None, "the weight is packed already"
        if can_pack(self.weight.dtype, self.weight.device):
            self._packed = _PackedWeight(self.weight)
            self.weight = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in_features] → [num_tokens, out_features]"""
        if self._packed is not None:
            return self._packed.multiply(x, self.bias)
        if self.fp8 is not None:  # the plain twin of engine/cuda/fp8.py
            return F.linear(x, self.fp8.dequantized().to(x.dtype), self.bias)
        assert self.weight is not None
        return F.linear(x, self.weight, self.bias)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """True when oneDNN computes this dtype at full speed here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _PackedWeight:
    """A weight in the layout of oneDNN: at batch 8 about twice as fast as F.linear (MKL) on the CPUs at hand."""

    def __init__(self, weight: torch.Tensor) -> None:
        # Looked up here, because a torch without oneDNN does not define them.
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._multiply_add = torch.ops.mkldnn._linear_pointwise.binary
        step = _SUM_LENGTH if weight.dtype == torch.float32 else weight.shape[1]
        self._pieces: list[tuple[int, int, torch.Tensor]] = []  # (first input, last + 1, packed)
        for first in range(0, weight.shape[1], step):
            columns = weight[:, first : first + step].contiguous()
            packed = torch.ops.mkldnn._reorder_linear_weight(columns)
            self._pieces.append((first, first + columns.shape[1], packed))

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[num_tokens, in_features] → [num_tokens, out_features]"""
        first, end, packed = self._pieces[0]
        output = self._multiply(x[:, first:end], packed, bias, "none", [], "")
        for first, end, packed in self._pieces[1:]:
            output = self._multiply_add(x[:, first:end], output, packed, None, "add")
        return output
