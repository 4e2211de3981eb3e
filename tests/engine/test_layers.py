"""The packed product against the plain one, and the parts of the rotary embedding that no model test reaches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.layers.linear import Linear, can_pack

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("in_features", "out_features"), [(576, 96), (200, 31), (16, 8), (1536, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_equals_plain(dtype: torch.dtype, in_features: int, out_features: int, bias: bool) -> None:
    if not can_pack(dtype, CPU):
        pytest.skip(f"no fast {dtype} product on this CPU")
    torch.manual_seed(0)
    linear = Linear(in_features, out_features, bias=bias, dtype=dtype, device=CPU)
    linear.rows(0, out_features).normal_()
    if bias:
        linear.bias_rows(0, out_features).normal_()
    weight, x = linear.weight, torch.randn(33, in_features).to(dtype)
    plain = linear(x)
    linear.finish_loading()
    assert linear.weight is None
    exact = F.linear(x.double(), weight.double(), None if linear.bias is None else linear.bias.double())
    scale = exact.abs().max().item()
    tolerance = scale * (1e-6 if dtype == torch.float32 else 1e-2)
    torch.testing.assert_close(linear(x).double(), exact, atol=tolerance, rtol=0)
    torch.testing.assert_close(linear(x), plain, atol=tolerance, rtol=0)


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    """What keeps a request's tokens the same in any batch."""
    torch.manual_seed(0)
    linear = Linear(576, 960, bias=False, dtype=torch.float32, device=CPU)
    linear.rows(0, 960).normal_()
    linear.finish_loading()
    x = torch.randn(64, 576)
    whole = linear(x)
    for count in (1, 2, 5, 8, 33):
        torch.testing.assert_close(linear(x[:count]), whole[:count], atol=0, rtol=0)


def test_a_device_without_packing_keeps_the_plain_weight() -> None:
    linear = Linear(8, 4, bias=False, dtype=torch.float16, device=CPU)
    linear.rows(0, 4).normal_()
    linear.finish_loading()
    assert linear.weight is not None and linear(torch.ones(1, 8, dtype=torch.float16)).shape == (1, 4)
