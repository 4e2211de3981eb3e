"""Text ↔ token ids, and the exact bytes of every token id. Three kinds: `tokenizers`, plain bytes, ids only.

Encoding leaves the interpreter to other threads: `encode_batch_fast` lets go of its lock. `encode` keeps it, for some
seconds with a text of megabytes, and computes offsets, which are not used here.

Decoding here is byte-exact: the text of ids is the UTF-8 decoding of their bytes in a row. For the decoders of Hugging
Face tokenizers that is what they give, too, but it can be done token by token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer

from control_plane.gateway.text.detokenizer import LeadingSpace
from control_plane.gateway.text.length import length_bound
from control_plane.gateway.text.slices import SLICE_CHARACTERS, text_slicer
from phasewise.core.errors import InvalidRequest, ModelLoadError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class EndTokens:
    """Ids put before and after a text, where the files say so outright; None leaves it to the post-processor."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


NO_ENDS = EndTokens()


class Vocabulary(Protocol):
    """What `TextTokenizer` needs to know about ids and text. Texts with a lone surrogate are an InvalidRequest."""

    special_ids: frozenset[int]
    leading_space: LeadingSpace

    def encode(self, text: str) -> list[int]:
        """The ids of a text, nothing around them."""

    def ends(self) -> EndTokens:
        """What the model wants around a text."""

    def slices(self, text: str) -> Iterable[str]:
        """Parts of a long text: the ids of each in a row are those of the whole."""

    def least_tokens(self, text: str, enough: int) -> int:
        """So many tokens the text has at least, without encoding it; no more than just above `enough` is found out."""

    def token_bytes(self, token_id: int) -> bytes: ...


class TokenizersVocabulary:
    """A `tokenizers.Tokenizer` and the rule by which its tokens become bytes.

    Raises:
        ModelLoadError: the tokenizer's decoder is of a kind whose tokens have no bytes of their own.
    """

    def __init__(self, tokenizer: Tokenizer, *, ends: EndTokens | None, where: str) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._rule = _byte_rule(tokenizer, where)
        self._ends = _post_processed_ends(tokenizer) if ends is None else ends
        self._bound = length_bound(tokenizer, byte_alphabet())
        self._slicer = text_slicer(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.leading_space: LeadingSpace = self._rule.leading_space
        self.num_ids = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def tokenizer(self) -> Tokenizer:
        """For others that encode with it, too."""
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        return encode_with(self._tokenizer, text)

    def ends(self) -> EndTokens:
        return self._ends

    def slices(self, text: str) -> Iterable[str]:
        return self._slicer.slices(text)

    def least_tokens(self, text: str, enough: int) -> int:
        try:
            return self._bound.least_tokens(text, enough)
        except (UnicodeEncodeError, TypeError):
            raise lone_surrogate() from None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; none for an id that the tokenizer does not know (padding rows of the logits)."""
        token = self._tokenizer.id_to_token(token_id)
        return b"" if token is None else self._rule.apply(token)


class ByteVocabulary:
    """Ids 0 to 255 are the bytes of UTF-8 text; other ids print as `<id>`. For random models without a tokenizer."""

    special_ids: frozenset[int] = frozenset()
    leading_space: LeadingSpace = "keep"

    def encode(self, text: str) -> list[int]:
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError:
            raise lone_surrogate() from None

    def ends(self) -> EndTokens:
        return NO_ENDS

    def slices(self, text: str) -> Iterable[str]:
        return (text[start : start + SLICE_CHARACTERS] for start in range(0, len(text), SLICE_CHARACTERS))

    def least_tokens(self, text: str, enough: int) -> int:
        return len(text)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes((token_id,)) if token_id < 256 else b"<%d>" % token_id


class IdVocabulary:
    """A vocabulary too small for bytes: it serves token ids, and prints each as `<id>`."""

    special_ids: frozenset[int] = frozenset()
    leading_space: LeadingSpace = "keep"

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        raise InvalidRequest(
            f"this model has {self._vocab_size} token ids, too few for bytes of text, and no tokenizer; send the "
            "prompt as a list of token ids",
            field="text",
        )

    def ends(self) -> EndTokens:
        return NO_ENDS

    def slices(self, text: str) -> Iterable[str]:
        return (text,)

    def least_tokens(self, text: str, enough: int) -> int:
        return 0

    def token_bytes(self, token_id: int) -> bytes:
        return b"<%d>" % token_id


def encode_with(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, nothing around them; other threads go on meanwhile."""
    try:
        ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    except (UnicodeEncodeError, TypeError):  # the library says TypeError for a lone surrogate
        raise lone_surrogate() from None
    return ids


def lone_surrogate() -> InvalidRequest:
    return InvalidRequest("the text holds a lone surrogate, which no UTF-8 text can", field="text")


def _post_processed_ends(tokenizer: Tokenizer) -> EndTokens:
    """What the post-processor puts around any text: what it puts around this one."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer.encode("a", add_special_tokens=True).ids
    cut = next(i for i in range(len(ids) + 1) if ids[i : i + len(bare)] == bare)
    return EndTokens(tuple(ids[:cut]), tuple(ids[cut + len(bare) :]))


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
