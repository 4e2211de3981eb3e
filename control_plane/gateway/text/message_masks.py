"""Masks the texts of messages, so that a rendered chat shows which characters are a message's and which the template's.

To mask a text is to replace its characters by one that stands nowhere in the chat, so the length stays. Masked are
letters, digits, all signs of which the protected tokens are made, and all that is not ASCII. Not masked are

- white space and other signs, so that a template may strip a text, split it at lines, or escape quotation marks
- strings of the template itself, such as `</think>` or `/no_think`, so that a template may search for them, cut them
  out or split a text there. A string that could be a part of a protected token, or overlap one, is masked.

So a protected token in a rendered masked chat is made of the template's characters alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from control_plane.gateway.text.token_places import Place, TokenPlaces, positions
from phasewise.core.errors import InvalidRequest

# Letters without upper or lower case, that few texts hold: templates treat them as other letters. First those that
# leave a string at one byte a character; then the syllables of Yi and Vai.
_MASKS = tuple(map(chr, (0xAA, 0xBA, *range(0xA000, 0xA48D), *range(0xA500, 0xA60C))))
_COMPARED = 1 << 20  # characters at a time


class TextMask:
    """Masks texts. `contents` are the texts of the protected tokens, `places` finds them."""

    def __init__(self, contents: Iterable[str], places: TokenPlaces, template_strings: Iterable[str]) -> None:
        signs = set("".join(contents))
        signs |= {sign for sign in map(chr, range(128)) if sign.isalnum()}
        self._runs = re.compile(rf"(?:[{re.escape(''.join(sorted(signs)))}]|[^\x00-\x7f\s])+")
        self._is_sign = bytes(chr(code) in signs for code in range(128))
        kept = (string for string in template_strings if not string.isidentifier() and self._runs.search(string))
        self._kept = [string for string in kept if _is_apart(string, places)]

    def masked(self, text: str, mask: str) -> str:
        kept = [string for string in self._kept if string in text]
        spans = [(start, start + len(string)) for string in kept for start in positions(string, text)]
        return overlaid(self._all_masked(text, mask), text, spans)

    def _all_masked(self, text: str, mask: str) -> str:
        if text.isascii() and ord(mask) < 256:
            table = bytes(ord(mask) if is_sign else code for code, is_sign in enumerate(self._is_sign))
            return text.encode().translate(table + bytes(128)).decode("latin-1")
        return self._runs.sub(lambda run: mask * (run.end() - run.start()), text)


def unused_mask(texts: Sequence[str]) -> str:
    """A character for masks that none of `texts` holds.

    Raises:
        InvalidRequest: there is none.
    """
    mask = next((sign for sign in _MASKS if not any(sign in text for text in texts)), None)
    if mask is None:
        raise InvalidRequest(
            "messages hold all of the characters ª, º, U+A000 to U+A48C and U+A500 to U+A60B, of which one is needed "
            "to tell messages from the model's chat template; leave one out",
            field="messages",
        )
    return mask


def overlaid(text: str, other: str, places: Iterable[Place]) -> str:
    """`text` with what `other`, a text of the same length, has at `places`."""
    parts, done = [], 0
    for start, end in sorted(places):
        if end > done:
            parts += [text[done:start], other[max(start, done) : end]]
            done = end
    return "".join([*parts, text[done:]]) if parts else text


def differ_in_masks_only(text: str, masked: str, mask: str) -> bool:
    """Whether the two texts are equal but for where `masked` has `mask`."""
    if len(text) != len(masked):
        return False
    for start in range(0, len(text), _COMPARED):
        ours, others = _codes(text[start : start + _COMPARED]), _codes(masked[start : start + _COMPARED])
        if not ((ours == others) | (others == ord(mask))).all():
            return False
    return True


def have_same_frame(text: str, masked: str, mask: str, places: TokenPlaces) -> bool:
    """Whether both have the same tokens, and next to them the same text as far as it is not masked."""
    ours, others = list(_pieces(text, places.spans(text))), list(_pieces(masked, places.spans(masked)))
    same = (_has_frame(piece, other, mask) for piece, other in zip(ours, others, strict=False))
    return len(ours) == len(others) and all(same)


def _has_frame(text: str, masked: str, mask: str) -> bool:
    if mask not in masked:
        return text == masked
    first, last = masked[: masked.index(mask)], masked[masked.rindex(mask) + 1 :]
    return len(text) >= len(first) + len(last) and text.startswith(first) and text.endswith(last)


def _pieces(text: str, places: Sequence[Place]) -> Iterator[str]:
    """Tokens, and what stands between them."""
    done = 0
    for start, end in places:
        yield text[done:start]
        yield text[start:end]
        done = end
    yield text[done:]


def _is_apart(string: str, places: TokenPlaces) -> bool:
    """Whether no token that stands in a text with this string can hold a character of it."""
    forms = {string, string.lower(), string.upper()}
    return not any(places.within(form) or places.at_ends(form) for form in forms)


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
