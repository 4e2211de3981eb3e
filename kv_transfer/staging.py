"""Between scattered blocks and one contiguous buffer for the wire: pack on the sending side, unpack on the receiving.

Both work on a paged cache's storage tensor [num_layers, 2, num_slots, num_kv_heads, head_dim], contiguous, where slot
`block * block_size + offset` belongs to one token. The two sides may differ in block size and dtype. Conversions round
to nearest, saturate to fp8 as its cache does, and overflow to infinity in float16. The buffer: kv_transfer/codec.py.

On CUDA the work is enqueued on the current stream, and no host waits for it (kv_transfer/kernels.py); this is the plain
form for the CPU. Both give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from kv_transfer.checksum import word_sums
from kv_transfer.codec import ALIGNMENT, CHECKSUM_BYTES, FP8_MAX, SMALLEST_MAGNITUDE, Codec, WireLayout
from phasewise.core.kv_spec import FP8

FP8_DTYPE = torch.float8_e4m3fn
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, FP8: FP8_DTYPE}


def slots_of(
    block_table: Sequence[int], block_size: int, first_token: int, num_tokens: int, device: torch.device
) -> torch.Tensor:
    """Slots of tokens first_token … first_token + num_tokens - 1 of a sequence.  # int64 [num_tokens]"""
    # Pinned: a copy from other memory waits for all that the stream has to do before it.
    slots = torch.empty(num_tokens, dtype=torch.int64, pin_memory=device.type == "cuda")
    tokens = np.arange(first_token, first_token + num_tokens)
    first_slots = np.asarray(block_table, dtype=np.int64) * block_size
    np.add(first_slots[tokens // block_size], tokens % block_size, out=slots.numpy())
    return slots.to(device, non_blocking=True)


def pack(storage: torch.Tensor, slots: torch.Tensor, first_layer: int, layout: WireLayout, wire: torch.Tensor) -> None:
    """Fills `wire`, uint8 [layout.num_bytes], with those layers and slots, checksum included.

    Raises ValueError when the buffer or the cache do not fit the layout, or fp8 values are to be encoded again.
    """
    _check(storage, slots, first_layer, layout, wire)
    if wire.device != storage.device:
        raise ValueError(f"the cache is on {storage.device}, the buffer to pack into on {wire.device}; use one device")
    if storage.is_cuda:
        _pack_on_device(storage, slots, first_layer, layout, wire)
        return
    rows = _slot_words(storage[first_layer : first_layer + layout.num_layers])
    values = values_of(layout, wire)
    if values.dtype == storage.dtype:
        torch.index_select(rows, 2, slots, out=_slot_words(values))
    else:
        gathered = rows.index_select(2, slots).view(torch.uint8).view(storage.dtype).view(layout.shape)
        _encode(gathered, values, scales_of(layout, wire))
    _seal(layout, wire)


def _pack_on_device(
    storage: torch.Tensor, slots: torch.Tensor, first_layer: int, layout: WireLayout, wire: torch.Tensor
) -> None:
    from kv_transfer import kernels

    kernels.pack(storage[first_layer:], slots, layout, values_of(layout, wire), scales_of(layout, wire))
    if layout.content_bytes % ALIGNMENT:
        wire[layout.content_bytes : -CHECKSUM_BYTES].zero_()
    kernels.seal(wire)


def unpack(
    storage: torch.Tensor, slots: torch.Tensor, first_layer: int, layout: WireLayout, wire: torch.Tensor
) -> None:
    """Writes a buffer made by `pack`, on any device, into these layers and slots, in the storage's dtype.

    The checksum is not looked at (`is_intact`). Raises ValueError as `pack` does.
    """
    unpacking(storage, slots, first_layer, layout, wire)()


def unpacking(
    storage: torch.Tensor, slots: torch.Tensor, first_layer: int, layout: WireLayout, wire: torch.Tensor
) -> Callable[[], None]:
    """`unpack`, made ready: what fills the buffer comes between this and the call. Raises ValueError as `pack` does."""
    _check(storage, slots, first_layer, layout, wire)
    if not storage.is_cuda:
        return partial(_unpack_on_host, storage, slots, first_layer, layout, wire)
    if not wire.is_cuda:
        return lambda: unpack(storage, slots, first_layer, layout, wire.to(storage.device, non_blocking=True))
    from kv_transfer import kernels

    return kernels.unpacking(storage[first_layer:], slots, layout, values_of(layout, wire), scales_of(layout, wire))


def _unpack_on_host(
    storage: torch.Tensor, slots: torch.Tensor, first_layer: int, layout: WireLayout, wire: torch.Tensor
) -> None:
    values = decode(wire.to(storage.device), layout, storage.dtype)
    rows = _slot_words(storage[first_layer : first_layer + layout.num_layers])
    rows.index_copy_(2, slots, _slot_words(values))


def encode(values: torch.Tensor, layout: WireLayout, wire: torch.Tensor) -> None:
    """`pack` for values [num_layers, 2, num_tokens, num_kv_heads, head_dim] that are contiguous already."""
    if values.is_cuda:
        pack(values, torch.arange(layout.num_tokens, device=values.device), 0, layout, wire)
        return
    _check(values, None, 0, layout, wire)
    _encode(values, values_of(layout, wire), scales_of(layout, wire))
    _seal(layout, wire)


def decode(wire: torch.Tensor, layout: WireLayout, dtype: torch.dtype) -> torch.Tensor:
    """The values of a buffer in the shape of `values_of`, on its device; they may share its memory."""
    if wire.is_cuda:
        values = torch.empty(layout.shape, dtype=dtype, device=wire.device)
        unpack(values, torch.arange(layout.num_tokens, device=wire.device), 0, layout, wire)
        return values
    _check(None, None, 0, layout, wire)
    values, scales = values_of(layout, wire), scales_of(layout, wire)
    if values.dtype == dtype:
        return values
    if scales is not None:
        return _converted(values.float().mul_(scales.unsqueeze(-1)), dtype)
    return _converted(values, dtype)


def is_intact(wire: torch.Tensor) -> torch.Tensor:
    """Whether the checksum at the buffer's end is that of the rest.  # bool [], on the buffer's device"""
    answer = torch.empty(1, dtype=torch.bool, device=wire.device)
    check(wire, answer)
    return answer[0]


def check(wire: torch.Tensor, answer: torch.Tensor) -> None:
    """As `is_intact`, into `answer`: bool [1], on the buffer's device or where that can write, as pinned memory is."""
    if wire.numel() < CHECKSUM_BYTES or wire.numel() % CHECKSUM_BYTES:
        answer.fill_(False)
    elif wire.is_cuda:
        from kv_transfer import kernels

        kernels.check(wire, answer)
    else:
        words = wire.view(torch.int64)
        answer.fill_(torch.equal(word_sums(words[:-2]), words[-2:]))


def values_of(layout: WireLayout, wire: torch.Tensor) -> torch.Tensor:
    """The buffer's values as they are on the wire.  # [num_layers, 2, num_tokens, num_kv_heads, head_dim]"""
    dtype = {Codec.NONE: DTYPES[layout.dtype], Codec.FP8: FP8_DTYPE, Codec.INT8: torch.int8}[layout.codec]
    return wire[: layout.values_bytes].view(dtype).view(layout.shape)


def scales_of(layout: WireLayout, wire: torch.Tensor) -> torch.Tensor | None:
    """The codec's scales.  # float32 [num_layers, 2, num_tokens, num_kv_heads]"""
    if layout.codec is not Codec.INT8:
        return None
    return wire[layout.values_bytes : layout.content_bytes].view(torch.float32).view(layout.shape[:-1])


def _encode(source: torch.Tensor, values: torch.Tensor, scales: torch.Tensor | None) -> None:
    if scales is None:
        _slot_words(values).copy_(_slot_words(_converted(source, values.dtype)))
        return
    source = source.float()
    largest = source.abs().amax(dim=-1)  # NaN where the row has one
    usable = (largest >= SMALLEST_MAGNITUDE) & (largest < torch.inf)
    scale = (largest / 127).masked_fill_(largest < SMALLEST_MAGNITUDE, 0.0)
    scales.copy_(scale.masked_fill_(~(largest < torch.inf), torch.nan))
    rounded = (source / scale.masked_fill_(~usable, 1.0).unsqueeze(-1)).round_()
    values.copy_(rounded.masked_fill_(~usable.unsqueeze(-1), 0.0))


def _converted(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if values.dtype == dtype:
        return values
    # Clamped, because fp8 has NaN beyond its largest number.
    return values.clamp(-FP8_MAX, FP8_MAX).to(dtype) if dtype == FP8_DTYPE else values.to(dtype)


def _seal(layout: WireLayout, wire: torch.Tensor) -> None:
    words = wire.view(torch.int64)
    wire[layout.content_bytes : -CHECKSUM_BYTES].zero_()
    words[-2:] = word_sums(words[:-2])


def _slot_words(tensor: torch.Tensor) -> torch.Tensor:
    """[num_layers, 2, num_slots, words]: torch's index operations do not know fp8, and are slow with small numbers."""
    slots = tensor.flatten(3).view(torch.uint8)
    return slots.view(torch.int64) if slots.shape[3] % 8 == 0 else slots


def _check(
    storage: torch.Tensor | None, slots: torch.Tensor | None, first_layer: int, layout: WireLayout, wire: torch.Tensor
) -> None:
    if wire.dtype != torch.uint8 or wire.shape != (layout.num_bytes,) or not wire.is_contiguous():
        raise ValueError(f"a part's buffer is {tuple(wire.shape)} {wire.dtype}; it needs uint8 ({layout.num_bytes},)")
    if layout.codec is not Codec.NONE and layout.dtype == FP8:
        raise ValueError(f"codec {layout.codec} for values that are {FP8}; use codec none")
    if storage is None:
        return
    num_tokens = storage.shape[2] if slots is None else len(slots)
    if (
        storage.shape[0] < first_layer + layout.num_layers
        or (storage.shape[1], num_tokens, *storage.shape[3:]) != layout.shape[1:]
        or not storage.is_contiguous()
    ):
        raise ValueError(
            f"a part of shape {layout.shape} from layer {first_layer} on does not fit {num_tokens} slots of a cache of "
            f"shape {tuple(storage.shape)}"
        )
