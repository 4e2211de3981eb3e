"""Encodes a text without doing more work than its answer can use: refused by length first, then slice by slice.

1. a text that has certainly more tokens than the limit is refused before it is tokenised (text_length.py)
2. a long text is encoded in slices (text_slices.py) and refused as soon as their tokens are too many
3. so memory holds at most the tokens that fit and one slice, and other threads run between two slices
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from control_plane.gateway.text.slices import SLICE_CHARACTERS
from control_plane.gateway.text.vocabulary import NO_ENDS, EndTokens, Vocabulary
from phasewise.core.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class TokenLimit:
    """How many tokens are taken. `reason` ends the sentence "it has … tokens, but"."""

    max_tokens: int
    reason: str

    def refusal(self, field: str, num_tokens: int, *, is_exact: bool) -> InvalidRequest:
        count = f"{num_tokens} tokens" if is_exact else f"at least {num_tokens} tokens"
        return InvalidRequest(f"{field} has {count}, but {self.reason}; shorten {field}", field=field)


NO_LIMIT = TokenLimit(sys.maxsize, "")


class Encoder(Protocol):
    """Text → ids, in slices whose ids in a row are those of the whole. Every `Vocabulary` is one."""

    def encode(self, text: str) -> list[int]: ...

    def slices(self, text: str) -> Iterable[str]: ...


def refuse_by_length(vocabulary: Vocabulary, text: str, limit: TokenLimit, *, field: str) -> None:
    """Raises InvalidRequest for a text that has certainly more tokens than `limit` takes."""
    least = vocabulary.least_tokens(text, limit.max_tokens)
    if least > limit.max_tokens:
        raise limit.refusal(field, least, is_exact=False)


def encode_in_slices(
    encoder: Encoder, text: str, limit: TokenLimit, *, field: str, ends: EndTokens = NO_ENDS
) -> list[int]:
    """The ids of `text` between `ends`.

    Raises:
        InvalidRequest: it has more tokens than `limit` takes, or is not valid Unicode.
    """
    is_long = len(text) > SLICE_CHARACTERS
    ids = list(ends.before)
    for part in encoder.slices(text) if is_long else (text,):
        ids += encoder.encode(part)
        if len(ids) > limit.max_tokens:
            raise limit.refusal(field, len(ids), is_exact=not is_long)
    ids += ends.after
    return ids
