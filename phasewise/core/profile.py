"""Measured times of one (device, model, parallelism), and predictions from them: what routing is based on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Linear cost model of a worker, measured by `workers/profiler.py` when the worker starts.

    prefill of t tokens takes      prefill_base_s + t * prefill_token_s
    a decode step of b sequences   decode_base_s + b * decode_sequence_s
    """

    prefill_base_s: float
    prefill_token_s: float
    decode_base_s: float
    decode_sequence_s: float

    def prefill_s(self, num_tokens: int) -> float:
        """Predicted seconds to compute `num_tokens` prompt tokens in one go."""
        return self.prefill_base_s + num_tokens * self.prefill_token_s

    def decode_step_s(self, num_sequences: int) -> float:
        """Predicted seconds of one decode step over `num_sequences` sequences."""
        return self.decode_base_s + num_sequences * self.decode_sequence_s
