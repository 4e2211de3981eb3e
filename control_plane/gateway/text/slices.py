"""Cuts a long text where its token ids are certainly those of its parts in a row.

A slice is encoded by itself, so that a long text needs little memory at once and can be abandoned in the middle. Cuts
are certain only for these kinds of tokenizers:

bytes   GPT-2's expression, Llama 3's and Qwen2's, alone or after a split of digits. None of them looks back. In each, a
        run of letters ends before a sign, a digit or white space (except an apostrophe, which may begin `'s`), and the
        rest is split as at the beginning of a text.
spaces  BPE over whole texts whose spaces are written `▁`, with a token for every byte. A space after a letter is a cut
        where no token of the vocabulary has a `▁` after a letter, because then no merge can reach over it. A text that
        begins with a space gets no second one.

In both, no added token may be near a cut, because its text may hold one. A text of another tokenizer is one slice, and
so is a stretch without a cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer

from control_plane.gateway.text.length import parts

SLICE_CHARACTERS = 131_072
"""A slice ends at the first cut after so many characters."""

_SEARCHED_AT_ONCE = 65_536  # characters, in about a millisecond; other threads run between two searches

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
_KNOWN_SPLITS = frozenset({GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT})

_LETTER = "A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_BYTES_CUT = re.compile(rf"[{_LETTER}](?=[\x00-&(-@\[-`{{-\x7f。，、！？；：「」（）])")
_SPACES_CUT = re.compile(rf"[{_LETTER}](?= )")
_REACHES_OVER = re.compile(rf"[{_LETTER}]▁")
_NO_CUT = re.compile(r"(?!)")


class TextSlicer:
    """Cuts texts of one tokenizer.

    Args:
        cut: matches the character before a cut.
        added: texts of the added tokens, none of which may be near a cut.
    """

    def __init__(self, cut: re.Pattern[str], added: Iterable[str], slice_characters: int = SLICE_CHARACTERS) -> None:
        self._cut = cut
        contents = sorted(filter(None, added), key=len, reverse=True)
        self._margin = len(contents[0]) if contents else 0
        self._added = re.compile("|".join(map(re.escape, contents)) or r"(?!)")
        self._slice_characters = slice_characters

    def slices(self, text: str) -> Iterator[str]:
        """The text in parts, in order."""
        start = 0
        while len(text) - start > self._slice_characters:
            end = self._next_cut(text, start + self._slice_characters)
            yield text[start:end]
            start = end
        if start < len(text):
            yield text[start:]

    def _next_cut(self, text: str, start: int) -> int:
        if self._cut is _NO_CUT:
            return len(text)
        for begin in range(start, len(text), _SEARCHED_AT_ONCE):
            # One more character, for the look ahead of the last one.
            for found in self._cut.finditer(text, begin, begin + _SEARCHED_AT_ONCE + 1):
                cut = found.end()
                if self._added.search(text, max(0, cut - self._margin), cut + self._margin) is None:
                    return cut
        return len(text)


def text_slicer(tokenizer: Tokenizer, *, apart_from: Collection[str] = ()) -> TextSlicer:
    """Cuts as the tokenizer's kind allows. `apart_from`: added tokens that it encodes as text."""
    state = json.loads(tokenizer.to_str())
    contents = [token["content"] for token in state["added_tokens"]]
    return TextSlicer(_cut_of(state), [content for content in contents if content not in apart_from])


def _cut_of(state: dict[str, Any]) -> re.Pattern[str]:
    model = state["model"]
    if model["type"] != "BPE" or model.get("dropout"):
        return _NO_CUT
    normalizers, splits = parts(state["normalizer"], "normalizers"), parts(state["pre_tokenizer"], "pretokenizers")
    if splits and splits[-1]["type"] == "ByteLevel":
        # NFC composes nothing across a cut: no character that combines follows it.
        known = all(step["type"] == "NFC" for step in normalizers) and _splits_bytes(splits)
        return _BYTES_CUT if known else _NO_CUT
    known = all(step["type"] == "Replace" and step["pattern"] == {"String": " "} for step in normalizers)
    known = known and all(step["content"] == "▁" for step in normalizers) and all(map(_splits_at_spaces, splits))
    writes_spaces = bool(normalizers) or any(step["type"] == "Metaspace" for step in splits)
    every_byte = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    if known and writes_spaces and every_byte and not any(map(_REACHES_OVER.search, model["vocab"])):
        return _SPACES_CUT
    return _NO_CUT


def _splits_bytes(splits: list[dict[str, Any]]) -> bool:
    *before, last = splits
    if last["add_prefix_space"]:
        return False
    rest = [step for step in before if step["type"] != "Digits"]
    if not rest:
        return bool(last["use_regex"])
    expression = rest[0].get("pattern", {}).get("Regex") if len(rest) == 1 else None
    return expression in _KNOWN_SPLITS and rest[0]["behavior"] == "Isolated" and not rest[0]["invert"]


def _splits_at_spaces(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step["replacement"] == "▁")
    return step["type"] == "Split" and step["pattern"] == {"String": " "} and step["behavior"] != "Removed"
