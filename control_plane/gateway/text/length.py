"""A lower bound of a text's tokens, from its bytes alone: a text that is certainly too long is not tokenised.

Every byte that a tokenizer sees belongs to exactly one token, and no token has more bytes than the longest of the
vocabulary. So the number of tokens is at least the bytes of the text / the bytes of the longest token. The same holds
for each kind of byte alone: the digits of a text make at least their number / the most digits in one token. The largest
of these counts.

With some tokenizers a byte may belong to no token, or one token may hold any number of bytes:

- a normalizer may shrink text: its result is counted, piece by piece. A cut between two pieces changes less than
  `_SLACK_BYTES`. With a normalizer or a split of another kind nothing is counted: it may drop text of any length
- a byte without a token is dropped, or is in a run that becomes a single "unknown" token: such bytes are not counted. A
  vocabulary of characters (not of bytes) counts only if it has a token for every byte
- an added token may eat the white space beside it (`lstrip`, `rstrip`): white space is not counted then

`least_tokens` is 0 where nothing can be said.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer

_PIECE_CHARACTERS = 32_768  # some milliseconds; other threads run between two pieces
_SLACK_BYTES = 64  # of a piece: a composed character, a replaced string or a prefix at its two ends
_KINDS = (
    string.ascii_letters.encode(),
    string.digits.encode(),
    b" \t\r\n",
    string.punctuation.encode(),
    bytes(range(0x80, 0x100)),
)
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip", "Prepend", "Precompiled", "Nmt"}
_SPLITS = {"ByteLevel", "Digits", "Metaspace", "Punctuation", "UnicodeScripts"}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class LengthBound:
    """A lower bound of the tokens of any text.

    Args:
        tokens: the bytes of every token, as the model's input spells them.
        uncounted: bytes of a text that may end up in no token.
        seen: a piece of text → what the model's tokens must spell of it.
    """

    def __init__(self, tokens: Iterable[bytes], uncounted: bytes, seen: Callable[[str], str]) -> None:
        spelled = list(tokens)
        self.longest = max(map(len, spelled), default=1)
        self._kinds = [
            (
                bytes(byte for byte in range(256) if byte not in kind),
                max(1, max(map(_counter(kind), spelled), default=1)),
            )
            for kind in _KINDS
        ]
        self._uncounted = uncounted
        self._seen = seen

    def least_tokens(self, text: str, enough: int) -> int:
        """A lower bound of the tokens of `text`; counting stops once it is above `enough`.

        Raises:
            UnicodeEncodeError: the text holds a lone surrogate.
        """
        # One token a byte would fit.
        return 0 if 4 * len(text) <= enough else self._least_of_long(text, enough)

    def _least_of_long(self, text: str, enough: int) -> int:
        all_bytes, by_kind, least = 0, [0] * len(self._kinds), 0
        for start in range(0, len(text), _PIECE_CHARACTERS):
            raw = self._seen(text[start : start + _PIECE_CHARACTERS]).encode("utf-8").translate(None, self._uncounted)
            all_bytes += max(0, len(raw) - _SLACK_BYTES)
            least = max(least, math.ceil(all_bytes / self.longest))
            for index, (others, most) in enumerate(self._kinds):
                by_kind[index] += max(0, len(raw.translate(None, others)) - _SLACK_BYTES)
                least = max(least, math.ceil(by_kind[index] / most))
            if least > enough:
                break
        return least


class NoLengthBound:
    """For tokenizers of which nothing is certain."""

    longest = 0

    def least_tokens(self, text: str, enough: int) -> int:
        return 0


def length_bound(tokenizer: Tokenizer, spelling: Mapping[int, str]) -> LengthBound | NoLengthBound:
    """The bound of a tokenizer; `spelling` is how ByteLevel writes each byte."""
    state = json.loads(tokenizer.to_str())
    model, added = state["model"], state["added_tokens"]
    normalizers, splits = parts(state["normalizer"], "normalizers"), parts(state["pre_tokenizer"], "pretokenizers")
    vocabulary = _spellings(model)
    if vocabulary is None or not all(map(_is_bounded_normalizer, normalizers)) or not all(map(_keeps_text, splits)):
        return NoLengthBound()
    uncounted = b""
    if any(split["type"] == "ByteLevel" for split in splits):
        alphabet = {character: byte for byte, character in spelling.items()}
        uncounted = bytes(byte for byte, character in spelling.items() if character not in vocabulary)
        tokens = [bytes(alphabet.get(character, 0) for character in token) for token in vocabulary]
    elif model.get("byte_fallback") and sum(_BYTE_TOKEN.fullmatch(token) is not None for token in vocabulary) == 256:
        tokens = [token.encode("utf-8") for token in vocabulary]
    else:
        return NoLengthBound()
    tokens += [token["content"].encode("utf-8") for token in added]
    eats_space = any(token["lstrip"] or token["rstrip"] for token in added)
    marks = [split["replacement"] for split in splits if split["type"] == "Metaspace"]
    return LengthBound(tokens, uncounted, _view(tokenizer, bool(normalizers), eats_space, marks))


def parts(state: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer of tokenizer.json, sequences unfolded."""
    if state is None:
        return []
    return [part for step in state[key] for part in parts(step, key)] if state["type"] == "Sequence" else [state]


def _counter(kind: bytes) -> Callable[[bytes], int]:
    return lambda token: len(token) - len(token.translate(None, kind))


def _spellings(model: dict[str, Any]) -> set[str] | None:
    """All tokens of a model; None for a kind that is not known, or that marks the ends of words."""
    if model["type"] == "BPE" and not model.get("continuing_subword_prefix") and not model.get("end_of_word_suffix"):
        return set(model["vocab"])
    return {token for token, _ in model["vocab"]} if model["type"] == "Unigram" else None


def _is_bounded_normalizer(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "x" * _SLACK_BYTES).encode()) < _SLACK_BYTES
    return step["type"] in _NORMALIZERS


def _keeps_text(step: dict[str, Any]) -> bool:
    return step["type"] in {*_SPLITS, "Split"} and step.get("behavior") != "Removed"


def _view(tokenizer: Tokenizer, has_normalizer: bool, eats_space: bool, marks: list[str]) -> Callable[[str], str]:
    def seen(piece: str) -> str:
        if eats_space:
            piece = "".join(piece.split())
        if has_normalizer:
            piece = tokenizer.normalizer.normalize_str(piece)
        for mark in marks:
            piece = piece.replace(" ", mark)
        return piece

    return seen
