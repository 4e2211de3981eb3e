"""Pure: what KV looks like on the wire, and when it is worth making it smaller.

A part is one buffer: values in the order [num_layers, 2 (K, V), num_tokens, num_kv_heads, head_dim], then the codec's
scales, zeros up to a multiple of 16 bytes, and the checksum's 16 bytes (kv_transfer/checksum.py).

    none   values in the layout's dtype
    fp8    e4m3, without a scale, saturated at 448: what an fp8 cache would keep
    int8   per head and token: a float32 scale = largest magnitude / 127, and round(value / scale). A row with NaN or
           infinity gets the scale NaN, so all of it arrives as NaN; a row whose scale would be below float32's normal
           numbers (largest magnitude < 1.5e-36) arrives as zeros. Else no value is off by more than half a scale, and
           its rounding in the target's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import prod

from kv_transfer.plan import PartSpan
from phasewise.core.kv_spec import DTYPE_BYTES, FP8, KVCacheSpec

CHECKSUM_BYTES = 16
ALIGNMENT = 16
FP8_MAX = 448.0  # the largest number of e4m3
SMALLEST_MAGNITUDE = 127 * 2.0**-126  # of an int8 row that has a scale
_SCALE_BYTES = 4
# The dtypes that have every number of the key.
_EXACT_IN = {
    "float32": {"float32"},
    "bfloat16": {"bfloat16", "float32"},
    "float16": {"float16", "float32"},
    FP8: set(DTYPE_BYTES),
}


class Codec(StrEnum):
    """How values are made smaller for the wire."""

    NONE = "none"
    FP8 = "fp8"
    INT8 = "int8"


@dataclass(frozen=True, slots=True)
class WireLayout:
    """Shape and coding of one part; equal on both sides.

    `dtype` is that of the values on the wire when the codec is none. The codecs encode the cache's own values.
    Raises ValueError for an unknown dtype, a size below one, and int8 with an odd head_dim (scales lie on words).
    """

    num_layers: int
    num_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    codec: Codec

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"a part's dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPE_BYTES)}")
        if min(self.shape) < 1:
            raise ValueError(f"a part of shape {self.shape} is empty; send layers, tokens and heads, or no part")
        if self.codec is Codec.INT8 and self.head_dim % 2:
            raise ValueError(f"codec int8 needs an even head_dim, not {self.head_dim}; use codec none")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of the values."""
        return self.num_layers, 2, self.num_tokens, self.num_kv_heads, self.head_dim

    @property
    def values_bytes(self) -> int:
        element_bytes = DTYPE_BYTES[self.dtype] if self.codec is Codec.NONE else 1
        return prod(self.shape) * element_bytes

    @property
    def content_bytes(self) -> int:
        """Values and scales."""
        return self.values_bytes + (prod(self.shape[:-1]) * _SCALE_BYTES if self.codec is Codec.INT8 else 0)

    @property
    def num_bytes(self) -> int:
        """The whole buffer: values, scales, padding, checksum."""
        return -(-self.content_bytes // ALIGNMENT) * ALIGNMENT + CHECKSUM_BYTES


def part_layout(spec: KVCacheSpec, span: PartSpan, dtype: str, codec: Codec) -> WireLayout:
    """What a part of a cache looks like on the wire."""
    return WireLayout(span.num_layers, span.num_tokens, spec.num_kv_heads, spec.head_dim, dtype, codec)


def wire_dtype(source: str, target: str) -> str:
    """The narrower of two cache dtypes: a conversion is done on the side where it saves bytes."""
    return source if DTYPE_BYTES[source] <= DTYPE_BYTES[target] else target


def is_lossless(codec: Codec, source_dtype: str, target_dtype: str) -> bool:
    """Whether the target cache gets exactly the numbers of the source cache."""
    wire = FP8 if codec is Codec.FP8 else wire_dtype(source_dtype, target_dtype)
    return codec is not Codec.INT8 and wire in _EXACT_IN[source_dtype] and target_dtype in _EXACT_IN[wire]


def choose(codec: Codec, raw_bytes: int, wire_bytes: int, link_bytes_per_s: float, codec_bytes_per_s: float) -> Codec:
    """`codec` where a part is predicted to arrive earlier with it, else none.

    `raw_bytes` and `wire_bytes` are the part without and with the codec; `codec_bytes_per_s` is the rate, in raw bytes,
    of encoding and decoding together. A rate of 0 is one that nobody has measured: none.
    """
    if link_bytes_per_s <= 0 or codec_bytes_per_s <= 0:
        return Codec.NONE
    saved_s = (raw_bytes - wire_bytes) / link_bytes_per_s
    return codec if saved_s > raw_bytes / codec_bytes_per_s else Codec.NONE
