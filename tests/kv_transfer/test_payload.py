"""Pack, unpack and checksum: the same part, whatever the blocks and dtypes."""

from __future__ import annotations

import random

import pytest
import torch

from kv_transfer.codec import CHECKSUM_BYTES, Codec, WireLayout, wire_dtype
from kv_transfer.plan import PartSpan, clip_tokens, cut
from kv_transfer.staging import DTYPES, decode, encode, is_intact, pack, scales_of, slots_of, unpack
from phasewise.core.kv_spec import DTYPE_BYTES, FP8, KVCacheSpec

CPU = torch.device("cpu")
NUM_SLOTS = 96
FIRST_LAYER = 1
NAN = 0xFF  # a byte that makes NaN of every float dtype


def storage_of(dtype: str, heads: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Some beyond fp8, and with the low bits that narrower dtypes do not have.
    values = 200 * torch.randn(5, 2, NUM_SLOTS, heads, dim, generator=generator)
    return (values.clamp(-448, 448) if dtype == FP8 else values).to(DTYPES[dtype])


def poisoned(layout: WireLayout) -> torch.Tensor:
    return torch.full((layout.num_bytes,), NAN, dtype=torch.uint8)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes: torch compares no fp8."""
    return tensor.contiguous().view(torch.uint8)


def rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """float64 to the nearest number of a dtype, as float64, in plain arithmetic; fp8 saturates."""
    digits, lowest, largest = {
        "float32": (24, -149, 3.4028235e38),
        "bfloat16": (8, -133, 3.3895314e38),
        "float16": (11, -24, 65504.0),
        FP8: (4, -9, 448.0),
    }[dtype]
    step = torch.ldexp(torch.ones_like(values), (torch.frexp(values)[1] - digits).clamp(min=lowest))
    nearest = (values / step).round() * step
    if dtype == FP8:
        return nearest.clamp(-largest, largest)
    return nearest.where(nearest.abs() <= largest, torch.inf * nearest.sign())


def reference(values: torch.Tensor, wire: str, target: str, codec: Codec) -> torch.Tensor:
    """What arrives, value by value in float64, in the steps that the format prescribes."""
    exact = values.double()
    if codec is Codec.INT8:
        scale = rounded(exact.abs().amax(dim=-1, keepdim=True) / 127, "float32")
        steps = rounded(exact / scale, "float32").round()
        return rounded(rounded(steps * scale, "float32"), target)
    return rounded(rounded(exact, FP8 if codec is Codec.FP8 else wire), target)


def combinations() -> list[tuple[str, str, str, Codec]]:
    """(source, wire, target, codec): whatever the two ends agree on, and wires that are wider than needed."""
    every = []
    for source in DTYPE_BYTES:
        for target in DTYPE_BYTES:
            every += [(source, wire, target, Codec.NONE) for wire in DTYPE_BYTES]
            wire = wire_dtype(source, target)
            every += [(source, wire, target, codec) for codec in (Codec.FP8, Codec.INT8) if wire != FP8]
    return every


@pytest.mark.parametrize(("source", "wire", "target", "codec"), combinations())
@pytest.mark.parametrize(("heads", "dim"), [(2, 8), (3, 6), (1, 2)])
def test_a_part_arrives_where_it_should_and_nowhere_else(
    source: str, wire: str, target: str, codec: Codec, heads: int, dim: int
) -> None:
    rng = random.Random(f"{source}{wire}{target}{codec}{heads}")
    sent, before = storage_of(source, heads, dim), storage_of(target, heads, dim, seed=1)
    for source_block, target_block in ((16, 16), (16, 32), (32, 8)):
        length = rng.randrange(2, NUM_SLOTS - 32)
        first = rng.randrange(length)
        count = rng.randrange(1, length - first + 1)
        source_table = rng.sample(range(NUM_SLOTS // source_block), -(-length // source_block))
        target_table = rng.sample(range(NUM_SLOTS // target_block), -(-length // target_block))
        source_slots = slots_of(source_table, source_block, first, count, CPU)
        target_slots = slots_of(target_table, target_block, first, count, CPU)
        layout = WireLayout(3, count, heads, dim, wire, codec)
        buffer, arrived = poisoned(layout), before.clone()
        pack(sent, source_slots, FIRST_LAYER, layout, buffer)
        assert is_intact(buffer)
        assert (buffer[layout.content_bytes : -CHECKSUM_BYTES] == 0).all(), "padding is defined"
        unpack(arrived, target_slots, FIRST_LAYER, layout, buffer)
        for i in range(count):
            token = first + i
            origin = source_table[token // source_block] * source_block + token % source_block
            place = target_table[token // target_block] * target_block + token % target_block
            got = arrived[1:4, :, place]
            if source == wire == target and codec is Codec.NONE:
                assert torch.equal(raw(got), raw(sent[1:4, :, origin]))
            else:
                assert torch.equal(got.double(), reference(sent[1:4, :, origin], wire, target, codec))
        untouched = torch.ones(NUM_SLOTS, dtype=torch.bool)
        untouched[target_slots] = False
        arrived, there = raw(arrived), raw(before)
        assert torch.equal(arrived[:, :, untouched], there[:, :, untouched])
        assert torch.equal(arrived[[0, 4]], there[[0, 4]])


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("source", DTYPE_BYTES)
def test_the_halves_of_pack_and_unpack_give_the_same_bytes(source: str, codec: Codec) -> None:
    if codec is not Codec.NONE and source == FP8:
        return
    storage = storage_of(source, 2, 8)
    slots = slots_of([5, 0, 3], 16, 7, 30, CPU)
    layout = WireLayout(3, 30, 2, 8, source, codec)
    packed, encoded = poisoned(layout), poisoned(layout)
    pack(storage, slots, FIRST_LAYER, layout, packed)
    values = storage[1:4].view(torch.uint8)[:, :, slots].view(storage.dtype)
    before = raw(values).clone()
    encode(values, layout, encoded)
    assert torch.equal(packed, encoded)
    assert torch.equal(raw(values), before), "the values are the caller's"
    for target in DTYPES.values():
        joined = torch.zeros(5, 2, NUM_SLOTS, 2, 8).to(target)
        unpack(joined, slots, FIRST_LAYER, layout, packed)
        decoded = decode(packed, layout, target)
        assert decoded.shape == layout.shape and decoded.dtype == target
        assert torch.equal(raw(joined[1:4]).view(torch.uint8)[:, :, slots], raw(decoded))


@pytest.mark.parametrize("source", DTYPE_BYTES)
def test_what_is_not_converted_keeps_every_bit(source: str) -> None:
    """NaN with a payload, infinities, negative zero, numbers below the normal ones."""
    generator = torch.Generator().manual_seed(3)
    size = (1, 2, 16, 2, 8 * DTYPE_BYTES[source])
    content = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).view(DTYPES[source])
    layout = WireLayout(1, 16, 2, 8, source, Codec.NONE)
    wire, arrived = poisoned(layout), torch.zeros_like(content)
    slots = torch.randperm(16, generator=generator)
    pack(content, slots, 0, layout, wire)
    unpack(arrived, slots, 0, layout, wire)
    assert torch.equal(raw(arrived), raw(content))


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", FP8])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_every_single_changed_bit_is_seen(dtype: str, codec: Codec, tokens: int) -> None:
    if codec is not Codec.NONE and dtype == FP8:
        return
    layout = WireLayout(1, tokens, 3, 6, dtype, codec)
    wire = poisoned(layout)
    pack(storage_of(dtype, 3, 6), torch.arange(tokens), 2, layout, wire)
    assert is_intact(wire)
    for byte in range(len(wire)):  # values, scales, padding, the checksum itself
        for bit in range(8):
            wire[byte] ^= 1 << bit
            assert not is_intact(wire)
            wire[byte] ^= 1 << bit
    assert is_intact(wire)


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", FP8])
@pytest.mark.parametrize("dim", [8, 64, 80])
def test_every_exchange_is_seen(dtype: str, codec: Codec, dim: int) -> None:
    """Of layers, of keys and values, of tokens, of heads; in dense values, and in zeros but for one."""
    if codec is not Codec.NONE and dtype == FP8:
        return
    layout = WireLayout(3, 5, 3, dim, dtype, codec)
    dense = storage_of(dtype, 3, dim)[:3, :, :5].float()
    sparse = torch.zeros_like(dense)
    sparse[1, 0, 2, 1, dim // 2] = 1.0
    for values in (dense, sparse):
        wire, other = poisoned(layout), poisoned(layout)
        encode(values.to(DTYPES[dtype]).contiguous(), layout, wire)
        for exchanged in range(4):
            for distance in (1, 2):
                moved = values.roll(distance, exchanged)
                encode(moved.to(DTYPES[dtype]).contiguous(), layout, other)
                if torch.equal(other[:-CHECKSUM_BYTES], wire[:-CHECKSUM_BYTES]):
                    continue
                other[-CHECKSUM_BYTES:] = wire[-CHECKSUM_BYTES:]
                assert not is_intact(other), f"exchanged along dimension {exchanged}"
        torn = wire.clone()
        torn[len(wire) // 2 : -CHECKSUM_BYTES] = 0
        assert not is_intact(torn) or torch.equal(torn, wire)


def test_a_buffer_of_a_length_that_no_part_has_is_not_intact() -> None:
    for num_bytes in (0, 8, 15, 17, 40):
        assert not is_intact(torch.zeros(num_bytes, dtype=torch.uint8))


def test_a_buffer_or_cache_that_does_not_fit_is_refused() -> None:
    layout = WireLayout(2, 4, 2, 8, "float32", Codec.NONE)
    storage, slots, wire = storage_of("float32", 2, 8), torch.arange(4), poisoned(layout)
    for bad in (wire[:-1], wire.view(torch.int8), torch.cat((wire, wire))[::2]):
        for move in (pack, unpack):
            with pytest.raises(ValueError, match="a part's buffer is"):
                move(storage, slots, 0, layout, bad)
    for move in (pack, unpack):
        with pytest.raises(ValueError, match="does not fit 4 slots"):
            move(storage, slots, 4, layout, wire)
        with pytest.raises(ValueError, match="does not fit 5 slots"):
            move(storage, torch.arange(5), 0, layout, wire)
        with pytest.raises(ValueError, match="does not fit"):
            move(storage_of("float32", 2, 4), slots, 0, layout, wire)
        with pytest.raises(ValueError, match="does not fit"):
            move(storage.transpose(3, 4).contiguous().transpose(3, 4), slots, 0, layout, wire)


def test_a_buffer_on_another_device_is_taken_but_not_packed_into() -> None:
    storage = storage_of("float32", 2, 8).to("meta")  # as strict about devices as a GPU
    slots = slots_of([1, 0], 16, 3, 20, storage.device)
    layout = WireLayout(3, 20, 2, 8, "float32", Codec.NONE)
    unpack(storage, slots, 1, layout, poisoned(layout))
    with pytest.raises(ValueError, match="the cache is on meta, the buffer to pack into on cpu"):
        pack(storage, slots, 1, layout, poisoned(layout))


def test_scales_are_there_for_the_codec_that_has_them() -> None:
    for codec in (Codec.NONE, Codec.FP8):
        layout = WireLayout(3, 20, 2, 8, "float32", codec)
        assert scales_of(layout, poisoned(layout)) is None


def test_clip_leaves_out_what_the_receiver_has() -> None:
    span = PartSpan(2, 3, 10, 20)
    assert clip_tokens(span, 0) == span
    assert clip_tokens(span, 16) == PartSpan(2, 3, 16, 14)
    assert clip_tokens(span, 30) is None


def test_fingerprint_ignores_block_size_and_dtype_and_nothing_else() -> None:
    spec = KVCacheSpec(4, 2, 64, 16, "float32", "weights")
    assert spec.content_fingerprint == KVCacheSpec(4, 2, 64, 32, "bfloat16", "weights").content_fingerprint
    for other in (
        KVCacheSpec(5, 2, 64, 16, "float32", "weights"),
        KVCacheSpec(4, 1, 64, 16, "float32", "weights"),
        KVCacheSpec(4, 2, 32, 16, "float32", "weights"),
        KVCacheSpec(4, 2, 64, 16, "float32", "others"),
    ):
        assert spec.content_fingerprint != other.content_fingerprint
        assert len(spec.differences(other)) == 1


def test_a_span_is_cut_into_parts_that_fit_and_make_it_up() -> None:
    rng = random.Random(5)
    for _ in range(300):
        span = PartSpan(rng.randrange(4), rng.randrange(1, 9), rng.randrange(100), rng.randrange(1, 70))
        max_cells = rng.randrange(0, 300)
        parts = cut(span, max_cells)
        assert all(0 < part.num_cells <= max(max_cells, 1) for part in parts)
        cells = [
            (layer, token)
            for part in parts
            for layer in range(part.first_layer, part.first_layer + part.num_layers)
            for token in range(part.first_token, part.first_token + part.num_tokens)
        ]
        assert len(cells) == len(set(cells)) == span.num_cells
        assert min(cells) == (span.first_layer, span.first_token)
        assert max(cells) == (
            span.first_layer + span.num_layers - 1,
            span.first_token + span.num_tokens - 1,
        )
        assert len(parts) <= 2 * -(-span.num_cells // max(max_cells, 1)) + span.num_layers
