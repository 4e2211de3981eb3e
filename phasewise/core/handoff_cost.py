"""Pure: how long a handoff takes, how much of that is seen, and from which prompt length on it pays."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from phasewise.core.profile import DeviceProfile

MESSAGE_S = 0.0005
"""One way of a message between two workers: half of an actor's call and answer, 0.97 ms with Ray 2.60 on one host."""
UNMEASURED_THRESHOLD_TOKENS = 512
"""From here on prompts are pushed layer by layer where the link's rate is not known (Splitwise, on H100)."""


@dataclass(frozen=True, slots=True)
class HandoffPath:
    """A pair of workers as a handoff meets it.

    Attributes:
        bytes_per_token: KV of all layers, as it is on the wire.
        bytes_per_s: of the link; 0.0 when not known.
        part_s: what each part costs its sender besides the time of its bytes.
        max_part_bytes: the link takes no larger parts.
        num_groups: of layers: so many parts for a chunk that is pushed layer by layer.
        chunk_tokens: most prompt tokens that are computed in one step.
        threshold_tokens: prompts from this length are pushed layer by layer; None: where that is predicted to pay.
        latency_s: from a part's last byte to the receiver's word; of parts behind each other seen once.
    """

    bytes_per_token: float
    bytes_per_s: float
    part_s: float
    max_part_bytes: int
    num_groups: int
    chunk_tokens: int
    threshold_tokens: int | None = None
    latency_s: float = 0.0

    def is_layerwise(self, num_tokens: int) -> bool:
        """Whether a prompt is pushed while it is computed.

        At once all is seen: `k` parts as large as the link takes them, and all bytes. Layer by layer, in n parts, one
        part is seen and its bytes; for that the sender pays for n - k more parts, if that many. So it pays where
        (k - 1) * part_s + bytes_s * (n - 1) / n > (n - k) * part_s: of one part's KV where its nth takes longer than a
        part costs, and of more always if n is not much larger than k.
        """
        if self.threshold_tokens is not None:
            return num_tokens >= self.threshold_tokens
        if self.bytes_per_s <= 0:
            return num_tokens >= UNMEASURED_THRESHOLD_TOKENS
        n, k = self._num_layerwise_parts(num_tokens), self._num_largest_parts(num_tokens)
        if n <= 1:
            return False
        bytes_s = num_tokens * self.bytes_per_token / self.bytes_per_s
        hidden_s = (k - 1) * self.part_s + bytes_s * (n - 1) / n
        return hidden_s > max(n - k, 0) * self.part_s

    def total_s(self, num_tokens: int) -> float:
        """From the first part's start to the last one's arrival, were all of the KV there at once.

        Raises ValueError when the link's rate is not known.
        """
        return self._sending_s(num_tokens) + self.latency_s

    def visible_s(self, num_tokens: int, prefill_s: float) -> float:
        """What of `total_s` comes after the prompt, whose computing takes `prefill_s`.

        All of it where the prompt is pushed at once. Layer by layer, with n equal parts that are ready one after the
        other, the link is either idle before the last part or has been busy since the first one was ready:
        latency + max(sending / n, sending - prefill * (n - 1) / n). At least the time of the commit's own
        message beside the last part. The reservation is not in it: prompts that queue ask for it before their turn.
        """
        seen_s = self._sending_s(num_tokens)
        if self.is_layerwise(num_tokens):
            n = self._num_layerwise_parts(num_tokens)
            seen_s = max(seen_s / n, seen_s - prefill_s * (n - 1) / n)
        return max(seen_s + self.latency_s, MESSAGE_S)

    def _sending_s(self, num_tokens: int) -> float:
        """Raises ValueError when the link's rate is not known."""
        if self.bytes_per_s <= 0:
            raise ValueError("the link's rate is not known; measure it first")
        num_bytes = num_tokens * self.bytes_per_token
        num_parts = self._num_largest_parts(num_tokens)
        if self.is_layerwise(num_tokens):
            num_parts = max(num_parts, self._num_layerwise_parts(num_tokens))
        return num_parts * self.part_s + num_bytes / self.bytes_per_s

    def _num_largest_parts(self, num_tokens: int) -> int:
        return ceil(num_tokens * self.bytes_per_token / self.max_part_bytes)

    def _num_layerwise_parts(self, num_tokens: int) -> int:
        return self.num_groups * ceil(num_tokens / self.chunk_tokens)


def decode_delay_s(profile: DeviceProfile, num_tokens: int) -> float:
    """By how much a prompt delays each sequence that decodes on the same worker, were it computed there.

    A step with a chunk of a prompt and with decodes takes about as long as the chunk's step and the decodes' step, less
    one reading of the weights, which they share. That reading is the step of one short decode:
    prefill - chunks * decode_step(1 sequence), at least 0.
    """
    num_chunks = ceil(num_tokens / profile.prefill.largest_size)
    return max(profile.prefill_s(num_tokens) - num_chunks * profile.decode_step_s(1), 0.0)


def pays(
    path: HandoffPath, prefill: DeviceProfile, decode: DeviceProfile, num_tokens: int, num_decodes: float = 1.0
) -> bool:
    """Whether a handoff costs its request less time than the prompt would cost `num_decodes` sequences together.

    visible handoff < num_decodes * decode delay, with the profiles of the two workers.
    """
    visible_s = path.visible_s(num_tokens, prefill.prefill_s(num_tokens))
    return visible_s < num_decodes * decode_delay_s(decode, num_tokens)


def pays_from_tokens(
    path: HandoffPath, prefill: DeviceProfile, decode: DeviceProfile, limit: int, num_decodes: float = 1.0
) -> int | None:
    """The smallest prompt that `pays`, of 1 … `limit` tokens; None when none does.

    Powers of two are tried, then the gap below the first that pays is halved: a length that pays by itself, below one
    that does not, may be missed.
    """

    def does(num_tokens: int) -> bool:
        return pays(path, prefill, decode, num_tokens, num_decodes)

    low, high = 0, 1
    while not does(high):
        if high >= limit:
            return None
        low, high = high, min(2 * high, limit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if does(middle) else (middle, high)
    return high
