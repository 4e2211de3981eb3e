"""Pure: which parts a handoff is made of."""

from __future__ import annotations

from typing import NamedTuple

WIRE_VERSION = 3
"""Of the handoff's messages and of what parts look like. Both ends must have the same; raise it when either changes."""


class PartSpan(NamedTuple):
    """The layers and tokens of one part."""

    first_layer: int
    num_layers: int
    first_token: int
    num_tokens: int

    @property
    def end_layer(self) -> int:
        return self.first_layer + self.num_layers

    @property
    def end_token(self) -> int:
        return self.first_token + self.num_tokens

    @property
    def num_cells(self) -> int:
        """Layer-token pairs; the cells of all parts must add up to those of the prompt."""
        return self.num_layers * self.num_tokens


def clip_tokens(span: PartSpan, first_token: int) -> PartSpan | None:
    """The part of `span` from `first_token` on: what the receiver does not have already. None when nothing is left."""
    start = max(span.first_token, first_token)
    if start >= span.end_token:
        return None
    return span._replace(first_token=start, num_tokens=span.end_token - start)


def cut(span: PartSpan, max_cells: int) -> list[PartSpan]:
    """`span` in parts of at most `max_cells` cells, but at least one: by tokens, by layers too where needed."""
    layers = min(span.num_layers, max(max_cells, 1))
    tokens = max(max_cells // layers, 1)
    return [
        PartSpan(layer, min(layers, span.end_layer - layer), token, min(tokens, span.end_token - token))
        for layer in range(span.first_layer, span.end_layer, layers)
        for token in range(span.first_token, span.end_token, tokens)
    ]
