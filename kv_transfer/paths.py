"""What a part looks like on the way to a peer, and what is known of that way. Thread-safe: it only looks."""

from __future__ import annotations

from dataclasses import dataclass

from kv_transfer.codec import Codec, WireLayout, choose, is_lossless, part_layout, wire_dtype
from kv_transfer.link import Link
from kv_transfer.plan import PartSpan
from phasewise.core.handoff_cost import HandoffPath
from phasewise.core.kv_spec import FP8, KVCacheSpec
from phasewise.core.links import LinkFacts
from phasewise.core.placement import WorkerId


@dataclass(frozen=True, slots=True)
class SendLimits:
    """What the sending half needs of the configuration.

    Attributes:
        window_bytes: bounds what is in flight for the whole worker; one part may always go.
        timeout_s: bounds a computed prompt's handoff, from the acceptance on.
        codec: the one that may be used on a link which is slower than it.
        codec_bytes_per_s: at which this worker encodes, measured; 0.0: not known, and none is used.
        num_groups, chunk_tokens, threshold_tokens: how prompts are pushed layer by layer, as HandoffPath has it.
    """

    window_bytes: int
    timeout_s: float = float("inf")
    codec: Codec = Codec.NONE
    codec_bytes_per_s: float = 0.0
    num_groups: int = 1
    chunk_tokens: int = 2**31
    threshold_tokens: int | None = None


class Paths:
    """From a worker whose cache is `spec` to all others."""

    def __init__(self, spec: KVCacheSpec, link: Link, limits: SendLimits) -> None:
        self._spec = spec
        self._link = link
        self._limits = limits
        self._one_token = PartSpan(0, spec.num_layers, 0, 1)

    def layout(self, peer: WorkerId, span: PartSpan, dtype: str) -> WireLayout:
        """Of a part whose values go out as `dtype`: with the codec where that is worth it on the link as it is now."""
        layout = part_layout(self._spec, span, dtype, Codec.NONE)
        may_be_encoded = self._limits.codec is not Codec.NONE and dtype != FP8
        return self._encoded(peer, span, layout) if may_be_encoded else layout

    def is_layerwise(self, peer: WorkerId, num_tokens: int, dtype: str) -> bool:
        """Whether a prompt should be pushed layer by layer, by what the link is now."""
        link, limits = self._link, self._limits
        return HandoffPath(
            self.layout(peer, self._one_token, dtype).content_bytes,
            link.bytes_per_s(peer),
            link.part_s(peer),
            link.max_part_bytes(peer),
            limits.num_groups,
            limits.chunk_tokens,
            limits.threshold_tokens,
        ).is_layerwise(num_tokens)

    def facts(self, peer: WorkerId, spec: KVCacheSpec) -> LinkFacts:
        """What is known of the way to a worker whose cache is `spec`."""
        ours = self._spec
        dtype = wire_dtype(ours.dtype, spec.dtype)
        layout = self.layout(peer, self._one_token, dtype)
        fits = ours.content_fingerprint == spec.content_fingerprint
        return LinkFacts(
            peer,
            self._link.name(peer),
            self._link.bytes_per_s(peer),
            self._link.part_s(peer),
            self._link.max_part_bytes(peer),
            dtype,
            layout.codec.value,
            layout.content_bytes,
            is_lossless(layout.codec, ours.dtype, spec.dtype),
            "" if fits else "; ".join(ours.differences(spec)),
        )

    def _encoded(self, peer: WorkerId, span: PartSpan, raw: WireLayout) -> WireLayout:
        """`raw`, or with the codec where that is worth it."""
        limits = self._limits
        encoded = part_layout(self._spec, span, raw.dtype, limits.codec)
        rates = self._link.bytes_per_s(peer), limits.codec_bytes_per_s
        return encoded if choose(limits.codec, raw.num_bytes, encoded.num_bytes, *rates) is limits.codec else raw
