"""Gather, scatter and checksum: the same part, whatever the blocks."""

from __future__ import annotations

import random

import pytest
import torch

from kv_transfer.checksum import checksum
from kv_transfer.plan import PartSpan, clip_tokens
from kv_transfer.staging import gather, scatter, slots_of
from phasewise.core.kv_spec import KVCacheSpec

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


def storage_of(num_slots: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 2, num_slots, 2, 8, generator=generator).to(dtype)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes: torch compares no fp8."""
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("source_block", "target_block"), [(16, 16), (16, 32), (32, 8)])
def test_a_part_arrives_bit_for_bit_between_different_block_sizes(
    dtype: torch.dtype, source_block: int, target_block: int
) -> None:
    rng = random.Random(source_block * target_block)
    for _ in range(20):
        length = rng.randrange(1, 150)
        first, count = sorted(rng.sample(range(length + 1), 2))[0], 0
        count = rng.randrange(1, length - first + 1) if first < length else 0
        if not count:
            continue
        source, target = storage_of(256, dtype), storage_of(256, dtype, seed=1)
        before = target.clone()
        source_table = rng.sample(range(256 // source_block), -(-length // source_block))
        target_table = rng.sample(range(256 // target_block), -(-length // target_block))
        payload = gather(source, slots_of(source_table, source_block, first, count, CPU), 1, 3)
        assert payload.shape == (3, 2, count, 2, 8) and payload.dtype == dtype
        assert payload.is_contiguous()
        target_slots = slots_of(target_table, target_block, first, count, CPU)
        scatter(target, target_slots, 1, payload)
        source, target, before = raw(source), raw(target), raw(before)
        for i, slot in enumerate(target_slots.tolist()):
            token = first + i
            origin = source_table[token // source_block] * source_block + token % source_block
            assert torch.equal(target[1:4, :, slot], source[1:4, :, origin])
        untouched = torch.ones(256, dtype=torch.bool)
        untouched[target_slots] = False
        assert torch.equal(target[:, :, untouched], before[:, :, untouched])
        assert torch.equal(target[0], before[0])
        assert torch.equal(target[4], before[4])


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksum_sees_every_single_changed_value_and_every_exchange(dtype: torch.dtype) -> None:
    payload = storage_of(3, dtype)[:2].contiguous()
    right = checksum(payload)
    assert checksum(payload.clone()) == right
    flat = payload.view(-1)
    for i in range(flat.numel()):
        changed = payload.clone()
        changed.view(-1)[i] = -changed.view(-1)[i].float()
        assert checksum(changed) != right
    for dim in range(4):
        flipped = payload.float().flip(dim).to(dtype).contiguous()
        assert checksum(flipped) != right, f"rows exchanged along dimension {dim}"
    assert checksum(torch.zeros_like(payload)) != right


def test_clip_leaves_out_what_the_receiver_has() -> None:
    span = PartSpan(2, 3, 10, 20)
    assert clip_tokens(span, 0) == span
    assert clip_tokens(span, 16) == PartSpan(2, 3, 16, 14)
    assert clip_tokens(span, 30) is None


def test_fingerprint_ignores_block_size_and_nothing_else() -> None:
    spec = KVCacheSpec(4, 2, 64, 16, "float32", "weights")
    assert spec.content_fingerprint == KVCacheSpec(4, 2, 64, 32, "float32", "weights").content_fingerprint
    for other in (
        KVCacheSpec(5, 2, 64, 16, "float32", "weights"),
        KVCacheSpec(4, 1, 64, 16, "float32", "weights"),
        KVCacheSpec(4, 2, 32, 16, "float32", "weights"),
        KVCacheSpec(4, 2, 64, 16, "bfloat16", "weights"),
        KVCacheSpec(4, 2, 64, 16, "fp8_e4m3", "weights"),
        KVCacheSpec(4, 2, 64, 16, "float32", "others"),
    ):
        assert spec.content_fingerprint != other.content_fingerprint
        assert len(spec.differences(other)) == 1


def test_a_payload_of_another_device_is_taken() -> None:
    storage = storage_of(32, torch.float32).to("meta")  # as strict about devices as a GPU
    slots = slots_of([1, 0], 16, 3, 20, storage.device)
    scatter(storage, slots, 1, torch.ones(3, 2, 20, 2, 8))
