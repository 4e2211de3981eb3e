"""Text ↔ token ids, and the exact bytes of every token id. Three kinds: `tokenizers`, plain bytes, ids only.

Decoding here is byte-exact: the text of ids is the UTF-8 decoding of their bytes in a row. For the decoders of Hugging
Face tokenizers that is what they give, too, but it can be done token by token.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tokenizers import Tokenizer

from phasewise.core.errors import InvalidRequest, ModelLoadError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

LeadingSpace = Literal["keep", "strip_one", "strip_all"]
"""What happens to the space that SentencePiece puts before the first word: of the first token that has a text."""


class Vocabulary(Protocol):
    """What `TextTokenizer` needs to know about ids and text."""

    special_ids: frozenset[int]
    leading_space: LeadingSpace

    def encode(self, text: str, add_special: bool) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class EndTokens:
    """Ids put before and after a text, where the files say so outright; None leaves it to the post-processor."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


class TokenizersVocabulary:
    """A `tokenizers.Tokenizer` and the rule by which its tokens become bytes.

    Raises:
        ModelLoadError: the tokenizer's decoder is of a kind whose tokens have no bytes of their own.
    """

    def __init__(self, tokenizer: Tokenizer, *, ends: EndTokens | None, where: str) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._ends = ends
        self._rule = _byte_rule(tokenizer, where)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.leading_space: LeadingSpace = self._rule.leading_space
        self.num_ids = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, add_special: bool) -> list[int]:
        try:
            if not add_special or self._ends is not None:
                ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
                return [*self._ends.before, *ids, *self._ends.after] if add_special and self._ends else ids
            return list(self._tokenizer.encode(text, add_special_tokens=True).ids)
        except (UnicodeEncodeError, TypeError):  # the library says TypeError for a lone surrogate
            raise InvalidRequest("the text holds a lone surrogate, which no UTF-8 text can", field="text") from None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; none for an id that the tokenizer does not know (padding rows of the logits)."""
        token = self._tokenizer.id_to_token(token_id)
        return b"" if token is None else self._rule.apply(token)


class ByteVocabulary:
    """Ids 0 to 255 are the bytes of UTF-8 text; other ids print as `<id>`. For random models without a tokenizer."""

    special_ids: frozenset[int] = frozenset()
    leading_space: LeadingSpace = "keep"

    def encode(self, text: str, add_special: bool) -> list[int]:
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError:
            raise InvalidRequest("the text holds a lone surrogate, which no UTF-8 text can", field="text") from None

    def token_bytes(self, token_id: int) -> bytes:
        return bytes((token_id,)) if token_id < 256 else b"<%d>" % token_id


class IdVocabulary:
    """A vocabulary too small for bytes: it serves token ids, and prints each as `<id>`."""

    special_ids: frozenset[int] = frozenset()
    leading_space: LeadingSpace = "keep"

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def encode(self, text: str, add_special: bool) -> list[int]:
        raise InvalidRequest(
            f"this model has {self._vocab_size} token ids, too few for bytes of text, and no tokenizer; send the "
            "prompt as a list of token ids",
            field="text",
        )

    def token_bytes(self, token_id: int) -> bytes:
        return b"<%d>" % token_id


def byte_alphabet() -> dict[int, str]:
    """GPT-2's spelling of bytes as printable characters (openai/gpt-2 `encoder.py`): byte → character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spelling = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in spelling)
    spelling.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    return spelling


@dataclass(slots=True)
class _ByteRule:
    """Token text → bytes. `alphabet` is set for byte-level vocabularies, the others for SentencePiece ones."""

    alphabet: dict[str, int] | None = None
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    leading_space: LeadingSpace = "keep"

    def apply(self, token: str) -> bytes:
        if self.alphabet is not None:
            try:
                return bytes([self.alphabet[character] for character in token])
            except KeyError:  # an added token with characters of its own
                return token.encode("utf-8")
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes((int(match[1], 16),))
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode("utf-8")


def _byte_rule(tokenizer: Tokenizer, where: str) -> _ByteRule:
    if tokenizer.decoder is None:
        raise ModelLoadError(f"{where} names no decoder; save the tokenizer again with transformers")
    rule = _ByteRule()
    _add_decoder(rule, json.loads(tokenizer.decoder.__getstate__()), where)
    return rule


def _add_decoder(rule: _ByteRule, state: dict[str, Any], where: str) -> None:
    """Folds one decoder of tokenizer.json into `rule`."""
    kind = state.get("type")
    if kind == "Sequence":
        for part in state["decoders"]:
            _add_decoder(rule, part, where)
    elif kind == "ByteLevel":
        rule.alphabet = {character: byte for byte, character in byte_alphabet().items()}
    elif kind == "ByteFallback":
        rule.byte_fallback = True
    elif kind == "Replace" and "String" in state["pattern"]:
        rule.replacements += ((state["pattern"]["String"], state["content"]),)
    elif kind == "Metaspace":
        rule.replacements += ((state["replacement"], " "),)
        rule.leading_space = "keep" if state.get("prepend_scheme") == "never" else "strip_all"
    elif kind == "Strip" and state["content"] == " " and state["start"] in (0, 1) and state["stop"] == 0:
        rule.leading_space = "strip_one" if state["start"] else rule.leading_space
    elif kind != "Fuse":
        raise ModelLoadError(
            f"{where} has a decoder that is not supported: {json.dumps(state)[:200]}; supported are ByteLevel, "
            "Metaspace, and Replace, ByteFallback, Fuse, Strip as Llama's tokenizers have them"
        )
