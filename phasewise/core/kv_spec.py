"""The shape of a worker's KV cache, and the fingerprint by which two workers know that they fit together."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

FP8 = "fp8_e4m3"  # torch.float8_e4m3fn, values as they are, saturated at 448
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, FP8: 1}


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """Layers, heads and dtype of a KV cache.

    `model_fingerprint` stands for the weights: KV computed by other weights must never be decoded.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    model_fingerprint: str = ""

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of all layers for one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.block_size

    @property
    def content(self) -> str:
        """What `content_fingerprint` stands for, in words."""
        heads = f"{self.num_kv_heads} KV heads of {self.head_dim}"
        return f"{self.num_layers} layers, {heads}, weights {self.model_fingerprint}"

    @property
    def content_fingerprint(self) -> str:
        """Equal on two workers exactly when the KV of one means the same on the other.

        Block size and dtype may differ: parts are repacked, and converted, on their way.
        """
        return hashlib.sha256(self.content.encode()).hexdigest()[:16]

    def differences(self, other: KVCacheSpec) -> list[str]:
        """What makes a handoff impossible, in words; empty when it is possible."""
        names = ("num_layers", "num_kv_heads", "head_dim", "model_fingerprint")
        return [
            f"{name}: {getattr(self, name)} here, {getattr(other, name)} there"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]
