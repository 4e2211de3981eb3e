"""The kernels of the transfer on a GPU against the plain form: the same bytes, and no host that waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch

from kv_transfer.checksum import word_sums
from kv_transfer.codec import Codec, WireLayout
from kv_transfer.staging import DTYPES, decode, encode, is_intact, pack, unpack, values_of
from phasewise.core.kv_spec import DTYPE_BYTES, FP8

pytest.importorskip("triton")

from kv_transfer import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore"),  # of other versions of torch and Triton than the pinned ones
]

NUM_SLOTS = 160
# (num_kv_heads, head_dim, numbers of tokens): each compiles its kernels, so the odd shapes get few dtypes.
USUAL = (8, 128, (1, 150))
ODD = [(3, 40, (1, 70)), (1, 2, (1, 160)), (32, 80, (5, 64))]
FEW = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", FP8), (FP8, "bfloat16")]


@contextmanager
def nobody_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cache
def storage_of(dtype: str, heads: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Every magnitude that the dtype has, rows of zeros, ties between two numbers of fp8.  # on the CPU"""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 2, NUM_SLOTS, heads, dim, generator=generator)
    values *= 10.0 ** torch.linspace(-38, 38, NUM_SLOTS).roll(seed)[:, None, None]
    values[:, :, ::3] = values[:, :, ::3].clamp(-500, 500)
    values[:, :, 1::7] = torch.arange(dim) * 0.25 - 8
    values[:, :, 2::9] = 0
    largest = 448.0 if dtype == FP8 else torch.finfo(DTYPES[dtype]).max
    return values.clamp(-largest, largest).to(DTYPES[dtype])


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


def check(source: str, wire: str, codec: Codec, heads: int, dim: int, num_tokens: int) -> None:
    layout = WireLayout(3, num_tokens, heads, dim, wire, codec)
    storage = storage_of(source, heads, dim)
    slots = torch.randperm(NUM_SLOTS, generator=torch.Generator().manual_seed(num_tokens))[:num_tokens]
    plain = torch.full((layout.num_bytes,), 0xFF, dtype=torch.uint8)
    fast, joined = plain.cuda(), plain.cuda()
    on_gpu, slots_on_gpu = storage.cuda(), slots.cuda()
    pack(storage, slots, 1, layout, plain)
    with nobody_waits():
        pack(on_gpu, slots_on_gpu, 1, layout, fast)
        intact = is_intact(fast)
    assert intact
    assert torch.equal(fast.cpu(), plain)
    gathered = storage.view(torch.uint8)[1:, :, slots].view(storage.dtype).contiguous().cuda()
    with nobody_waits():
        encode(gathered, layout, joined)
    assert torch.equal(joined, fast)
    for target in DTYPE_BYTES if (heads, dim) == USUAL[:2] else {source, wire}:
        before = storage_of(target, heads, dim, seed=1)
        wanted, got = before.clone(), before.cuda()
        unpack(wanted, slots, 1, layout, plain)
        with nobody_waits():
            unpack(got, slots_on_gpu, 1, layout, fast)
            values = decode(fast, layout, DTYPES[target])
        assert torch.equal(raw(got), raw(wanted)), target  # the slots beside it too
        assert torch.equal(raw(values), raw(decode(plain, layout, DTYPES[target]))), target


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("source", DTYPE_BYTES)
@pytest.mark.parametrize("wire", DTYPE_BYTES)
def test_the_same_bytes_as_the_plain_form(source: str, wire: str, codec: Codec) -> None:
    if codec is not Codec.NONE and wire == FP8:
        return
    for num_tokens in USUAL[2]:
        check(source, wire, codec, *USUAL[:2], num_tokens)


@pytest.mark.parametrize(("heads", "dim", "lengths"), ODD)
@pytest.mark.parametrize(("source", "wire"), FEW)
def test_odd_shapes(source: str, wire: str, heads: int, dim: int, lengths: tuple[int, ...]) -> None:
    if source == FP8 and dim % 8:
        return
    for num_tokens in lengths:
        check(source, wire, Codec.NONE, heads, dim, num_tokens)
        if source == wire == "bfloat16":
            check(source, wire, Codec.INT8, heads, dim, num_tokens)


@pytest.mark.parametrize("codec", Codec)
def test_what_is_not_finite_arrives_as_by_the_plain_form(codec: Codec) -> None:
    for source in ("float32", "bfloat16", "float16"):
        storage = storage_of(source, 8, 128).clone()
        storage[1, 0, 5, 2, 7], storage[2, 1, 9, 0, 0], storage[3, 0, 20, 7, 127] = torch.nan, torch.inf, -torch.inf
        layout = WireLayout(4, NUM_SLOTS, 8, 128, "bfloat16", codec)
        slots = torch.arange(NUM_SLOTS)
        plain = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        fast = plain.cuda()
        pack(storage, slots, 0, layout, plain)
        pack(storage.cuda(), slots.cuda(), 0, layout, fast)
        assert is_intact(fast) and is_intact(fast.cpu())
        for target in DTYPES.values():
            wanted, got = decode(plain, layout, target).float(), decode(fast, layout, target).cpu().float()
            assert wanted.isnan().sum() == (3 * 128 if codec is Codec.INT8 else 1)
            assert torch.equal(wanted.nan_to_num(0.5, 1e9, -1e9), got.nan_to_num(0.5, 1e9, -1e9))


def test_a_changed_bit_anywhere_is_seen_on_the_gpu() -> None:
    layout = WireLayout(2, 37, 3, 40, "bfloat16", Codec.INT8)
    wire = torch.zeros(layout.num_bytes, dtype=torch.uint8, device="cuda")
    pack(storage_of("bfloat16", 3, 40).cuda(), torch.arange(37, device="cuda"), 1, layout, wire)
    assert is_intact(wire)
    seen = []
    with nobody_waits():
        for byte in range(0, layout.num_bytes, 97):
            wire[byte] ^= 1 << byte % 8
            seen.append(is_intact(wire))
            wire[byte] ^= 1 << byte % 8
    assert not torch.stack(seen).any()
    assert is_intact(wire)
    for num_bytes in (0, 8, 24):
        assert not is_intact(wire[:num_bytes])


@pytest.mark.parametrize("num_words", [2, 14, 16, 30, 4096, 4098, 1056 * 256 * 16 + 4096 + 2])
def test_sums_of_every_length(num_words: int) -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (num_words,), generator=torch.Generator().manual_seed(1))
    wire = torch.cat((words, torch.tensor([5, -3]))).cuda().view(torch.uint8)
    assert not is_intact(wire)
    for _ in range(3):  # each finds the scratch as the one before left it
        kernels.seal(wire)
        assert torch.equal(wire[-16:].view(torch.int64).cpu(), word_sums(words))
        assert is_intact(wire)
    answer = torch.zeros(1, dtype=torch.bool, pin_memory=True)
    kernels.check(wire, answer)
    torch.cuda.synchronize()
    assert answer


def test_a_cache_beyond_32_bit_places() -> None:
    slots_per_plane = 2**31 // 1024 + 64
    try:
        storage = torch.empty(2, 2, slots_per_plane, 8, 128, dtype=DTYPES[FP8], device="cuda")
    except torch.cuda.OutOfMemoryError:
        pytest.skip("needs 9 GB of GPU memory")
    words = storage.view(torch.int64)
    slots = torch.tensor([0, slots_per_plane - 1, 7, slots_per_plane - 40], device="cuda")
    wanted = torch.randint(0, 2**62, (2, 2, 4, 8, 16), device="cuda") & 0x3F3F3F3F3F3F3F3F  # no NaN
    words[:, :, slots] = wanted
    layout = WireLayout(2, 4, 8, 128, "bfloat16", Codec.NONE)  # converted, so that places count elements
    wire = torch.zeros(layout.num_bytes, dtype=torch.uint8, device="cuda")
    pack(storage, slots, 0, layout, wire)
    assert torch.equal(values_of(layout, wire).float(), wanted.view(DTYPES[FP8]).float())
    words[:, :, slots] = 0
    unpack(storage, slots.flip(0), 0, layout, wire)
    assert torch.equal(words[:, :, slots.flip(0)], wanted)


def test_no_length_compiles_a_kernel_again() -> None:
    storage = storage_of("bfloat16", 5, 128).cuda()
    counts = []
    for num_tokens in (1, 2, 16, 33, 160):
        layout = WireLayout(3, num_tokens, 5, 128, "bfloat16", Codec.INT8)
        wire = torch.zeros(layout.num_bytes, dtype=torch.uint8, device="cuda")
        slots = torch.arange(NUM_SLOTS + 1, device="cuda")[1:][:num_tokens] - 1  # 8-byte aligned
        pack(storage, slots, 1, layout, wire)
        unpack(storage, slots.clone(), 1, layout, wire)
        assert is_intact(wire)
        each = (kernels._pack_kernel, kernels._unpack_kernel, kernels._sums_kernel)
        counts.append([len(kernel.device_caches[0][0]) for kernel in each])
    assert counts == counts[:1] * len(counts)
