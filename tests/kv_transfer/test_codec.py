"""Sizes on the wire, which codec is used when, and what each does to values."""

from __future__ import annotations

import math

import pytest
import torch

from kv_transfer.codec import Codec, WireLayout, choose, is_lossless, wire_dtype
from kv_transfer.staging import DTYPES, decode, encode, scales_of, values_of
from phasewise.core.kv_spec import DTYPE_BYTES, FP8


def through(values: torch.Tensor, dtype: str, codec: Codec, target: torch.dtype) -> torch.Tensor:
    """Encoded and decoded: [..., head_dim] as one layer of one head."""
    rows = values.view(1, 2, -1, 1, values.shape[-1])
    layout = WireLayout(1, rows.shape[2], 1, rows.shape[4], dtype, codec)
    wire = torch.full((layout.num_bytes,), 0xFF, dtype=torch.uint8)
    encode(rows, layout, wire)
    return decode(wire, layout, target).reshape(values.shape)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_sizes_are_those_of_the_parts(codec: Codec, dtype: str) -> None:
    for layers, tokens, heads, dim in ((1, 1, 1, 2), (3, 5, 3, 6), (32, 2048, 8, 128)):
        layout = WireLayout(layers, tokens, heads, dim, dtype, codec)
        rows = layers * 2 * tokens * heads
        bytes_of_row = {Codec.NONE: dim * DTYPE_BYTES[dtype], Codec.FP8: dim, Codec.INT8: dim + 4}[codec]
        assert layout.content_bytes == rows * bytes_of_row
        assert layout.num_bytes == math.ceil(rows * bytes_of_row / 16) * 16 + 16


def test_what_cannot_be_laid_out_is_refused() -> None:
    with pytest.raises(ValueError, match="'float8' is unknown; use one of float32"):
        WireLayout(1, 1, 1, 2, "float8", Codec.NONE)
    for shape in ((0, 1, 1, 2), (1, 0, 1, 2), (1, 1, -1, 2), (1, 1, 1, 0)):
        with pytest.raises(ValueError, match="empty"):
            WireLayout(*shape, "float32", Codec.NONE)
    with pytest.raises(ValueError, match="even head_dim, not 3"):
        WireLayout(1, 1, 1, 3, "float32", Codec.INT8)


def test_the_narrower_dtype_travels() -> None:
    for source, source_bytes in DTYPE_BYTES.items():
        for target, target_bytes in DTYPE_BYTES.items():
            wire = wire_dtype(source, target)
            assert wire in (source, target)
            assert DTYPE_BYTES[wire] == min(source_bytes, target_bytes)


def every_number(dtype: str) -> torch.Tensor:
    """All numbers of a dtype; of float32 those with other low bits than narrower ones have."""
    if DTYPE_BYTES[dtype] == 1:
        return torch.arange(256, dtype=torch.uint8).view(DTYPES[dtype])
    if DTYPE_BYTES[dtype] == 2:
        return torch.arange(65536).to(torch.uint16).view(DTYPES[dtype])
    return ((torch.arange(1 << 18) << 14) + (torch.arange(1 << 18) % 3)).to(torch.uint32).view(DTYPES[dtype])


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("source", DTYPE_BYTES)
@pytest.mark.parametrize("target", DTYPE_BYTES)
def test_lossless_is_what_changes_no_number(codec: Codec, source: str, target: str) -> None:
    wire = wire_dtype(source, target)
    if codec is not Codec.NONE and wire == FP8:
        return  # refused: see below
    numbers = every_number(source)
    numbers = numbers[numbers.float().isfinite()]
    numbers = numbers[: len(numbers) // 16 * 16].view(-1, 8)
    arrived = through(numbers, wire, codec, DTYPES[target])
    same = torch.equal(arrived.double(), numbers.double())
    assert same == is_lossless(codec, source, target)


@pytest.mark.parametrize("codec", [Codec.FP8, Codec.INT8])
def test_fp8_values_are_not_encoded_again(codec: Codec) -> None:
    with pytest.raises(ValueError, match=f"codec {codec} for values that are fp8_e4m3; use codec none"):
        through(torch.zeros(2, 8).to(DTYPES[FP8]), FP8, codec, torch.float32)
    assert choose(codec, 1000, 1000, 1e6, 1e12) is Codec.NONE


def test_a_codec_is_used_where_it_makes_the_part_arrive_earlier() -> None:
    for codec in (Codec.FP8, Codec.INT8):
        assert choose(codec, 2000, 1000, 1e9, 100e9) is codec  # saves 1 µs for 0.02 µs of work
        assert choose(codec, 2000, 1000, 360e9, 700e9) is Codec.NONE  # 2.8 ns saved for 2.9 ns
        assert choose(codec, 2000, 1000, 360e9, 730e9) is codec
        assert choose(codec, 2000, 1000, 0.0, 100e9) is Codec.NONE
        assert choose(codec, 2000, 1000, 1e9, 0.0) is Codec.NONE
    assert choose(Codec.NONE, 2000, 2000, 1e9, 100e9) is Codec.NONE


def rows_to_encode(dtype: torch.dtype) -> torch.Tensor:
    """Random rows of all magnitudes, and awkward ones.  # [num_rows, 64]"""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(600, 64, generator=generator, dtype=torch.float64)
    rows *= 10.0 ** torch.linspace(-44, 37, 600, dtype=torch.float64).unsqueeze(1)
    spike, ramp = torch.zeros(64, dtype=torch.float64), torch.arange(-32, 32, dtype=torch.float64)
    spike[7] = -3.0
    halves = torch.cat((torch.tensor([127.0]), torch.arange(-126.5, -63.5)))  # all but one between two steps
    others = torch.stack((spike, ramp, halves, halves / 3, torch.zeros(64), -torch.zeros(64), torch.full((64,), 448.5)))
    largest = torch.finfo(dtype).max * (1 - 2.0**-22)  # the very largest of float32 can round up to infinity
    return (
        torch.cat((rows, others, torch.full((1, 64), largest, dtype=torch.float64))).clamp(-largest, largest).to(dtype)
    )


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", list(DTYPES.values()))
def test_int8_is_within_half_a_step_of_each_row(source: torch.dtype, target: torch.dtype) -> None:
    rows = rows_to_encode(source)
    largest = rows.double().abs().amax(dim=1, keepdim=True)
    exact = through(rows, "float32", Codec.INT8, torch.float32).double()
    step = torch.where(largest < 127 * 2.0**-126, 2 * largest, largest / 127)  # too small to have a scale: zeros
    assert ((exact - rows.double()).abs() <= step * (0.5 + 1e-4)).all()
    arrived = through(rows, "bfloat16", Codec.INT8, target)
    rounded = (exact.clamp(-448, 448) if target == DTYPES[FP8] else exact).to(torch.float32).to(target)
    assert torch.equal(bits(arrived), bits(rounded)), "rounded once more, to the target's dtype"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_makes_nan_of_a_row_that_is_not_finite_and_of_no_other(bad: float, source: torch.dtype) -> None:
    values = torch.randn(4, 16).to(source)
    values[1, 5] = bad
    for target in DTYPES.values():
        arrived = through(values, "bfloat16", Codec.INT8, target).float()
        assert arrived[1].isnan().all()
        assert arrived[[0, 2, 3]].isfinite().all()


def test_int8_rows_of_zeros_have_the_scale_zero() -> None:
    layout = WireLayout(1, 2, 1, 4, "bfloat16", Codec.INT8)
    values = torch.randn(1, 2, 2, 1, 4)
    values[0, 1, 0] = 0
    wire = torch.full((layout.num_bytes,), 0xFF, dtype=torch.uint8)
    encode(values, layout, wire)
    scales = scales_of(layout, wire)
    assert scales is not None
    assert scales[0, 1, 0, 0] == 0 and (scales.flatten()[[0, 1, 3]] > 0).all()
    assert (values_of(layout, wire)[0, 1, 0] == 0).all()
    assert (decode(wire, layout, torch.float32)[0, 1, 0] == 0).all()


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", list(DTYPES.values()))
def test_fp8_is_within_a_sixteenth_or_saturated(source: torch.dtype, target: torch.dtype) -> None:
    rows = rows_to_encode(source)
    arrived = through(rows, "float32", Codec.FP8, target).double()
    wanted = rows.double().clamp(-448, 448)
    assert ((arrived - wanted).abs() <= (wanted.abs() / 16).clamp(min=2.0**-10)).all()
    odd = torch.tensor([[math.nan, math.inf, -math.inf, 500.0]] * 2).to(source)
    assert torch.equal(through(odd, "float32", Codec.FP8, target)[0].float()[1:], torch.tensor([448.0, -448.0, 448.0]))
    assert through(odd, "float32", Codec.FP8, target)[0].float()[0].isnan()
