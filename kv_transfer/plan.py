"""Pure: which parts a handoff is made of."""

from __future__ import annotations

from dataclasses import dataclass

WIRE_VERSION = 1
"""Of the handoff's messages and payload. Both ends must have the same; raise it when either changes."""

CODEC_RAW = "raw"
"""The payload is the cache's own dtype, unchanged; lossless."""


@dataclass(frozen=True, slots=True)
class PartSpan:
    """The layers and tokens of one part."""

    first_layer: int
    num_layers: int
    first_token: int
    num_tokens: int

    @property
    def num_cells(self) -> int:
        """Layer-token pairs; the cells of all parts must add up to those of the prompt."""
        return self.num_layers * self.num_tokens


def clip_tokens(span: PartSpan, first_token: int) -> PartSpan | None:
    """The part of `span` from `first_token` on: what the receiver does not have already. None when nothing is left."""
    start = max(span.first_token, first_token)
    end = span.first_token + span.num_tokens
    if start >= end:
        return None
    return PartSpan(span.first_layer, span.num_layers, start, end - start)
