"""From the messages of a chat to token ids: special tokens come from the template, the text of messages is text.

Tokenizers encode `<|im_end|>` in any text as the special token, so the author of a message could end its turn and begin
another one. Here such text in a message is encoded as its characters. Protected are the special tokens (of a GGUF file:
the control tokens), the model's end tokens, and added tokens that are spelled like special ones (`_CONTROL_SPELLING`).
Other added tokens (`<think>`, runs of spaces) may stand in a message, as in llama.cpp.

1. A chat is encoded as it is if none of its strings holds a protected token, or a part of one at its beginning or end.
2. For any other chat the template is rendered twice: as it is, and with each such place covered. To cover a place is to
   replace each of its characters by one that stands nowhere in the messages. The places that are covered in the second
   text are a message's text in the first. A token outside of them was written by the template.
3. Each token of the template is replaced by a stand-in. A copy of the tokenizer knows the stand-ins as added tokens,
   and encodes the protected tokens as text. So only the forged tokens are encoded differently.

A template may depend on the text and write something else when it is covered. Then the renderings cannot be compared,
and the chat is refused. It is taken only if no message holds a whole protected token and both renderings have the same
number of them: then none was forged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from tokenizers import AddedToken, Tokenizer

from control_plane.gateway.bounded_encoding import TokenLimit, encode_in_slices, refuse_by_length
from control_plane.gateway.text_slices import text_slicer
from control_plane.gateway.vocabulary import TokenizersVocabulary, Vocabulary, encode_with
from phasewise.core.errors import InvalidRequest

Message = Mapping[str, str]
Render = Callable[[Sequence[Message]], str]

_CONTROL_SPELLING = re.compile(r"<[|｜].*[|｜]>|</?s>|\[/?INST\]|<(start|end)_of_turn>", re.DOTALL)
_USUAL_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "model"})
_STAND_INS = range(0x10F000, 0x10FFFE)  # private use
_COVERS = range(0x100000, 0x10F000)  # private use


class MessageEncoding(Protocol):
    """How rendered messages become token ids."""

    def encode(self, render: Render, messages: Sequence[Message], limit: TokenLimit) -> list[int]:
        """Raises InvalidRequest (field `messages`)."""


class SpecialTokensInMessages:
    """Text that spells a special token becomes one, also in a message, as in transformers."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def encode(self, render: Render, messages: Sequence[Message], limit: TokenLimit) -> list[int]:
        text = render(messages)
        refuse_by_length(self._vocabulary, text, limit, field="messages")
        return encode_in_slices(self._vocabulary, text, limit, field="messages")


class TemplateTokensOnly:
    """Special tokens come from the template alone.

    Args:
        end_ids: the model's end tokens, protected also where they are not marked as special.
        template: the source of the chat template; a role that it names is the template's own word.
    """

    def __init__(self, vocabulary: TokenizersVocabulary, end_ids: Iterable[int], template: str) -> None:
        protected = _protected_tokens(vocabulary.tokenizer, frozenset(end_ids))
        self._vocabulary = vocabulary
        self._as_it_is = SpecialTokensInMessages(vocabulary)
        self._template = template
        self._places = TokenPlaces(token.content for token in protected.values())
        self._copy = _CopyWithStandIns(vocabulary.tokenizer, protected)
        # A normalizer may turn other texts into tokens, which the text does not show: then the copy encodes every chat.
        self._is_readable = vocabulary.tokenizer.normalizer is None or not any(t.normalized for t in protected.values())

    def encode(self, render: Render, messages: Sequence[Message], limit: TokenLimit) -> list[int]:
        text = render(messages)
        refuse_by_length(self._vocabulary, text, limit, field="messages")
        cover = _unused_character([text, *(value for message in messages for value in message.values())])
        covered, holds_token = self._covered(messages, cover)
        if covered == messages and self._is_readable:
            return encode_in_slices(self._vocabulary, text, limit, field="messages")
        other = render(covered)
        spans = self._places.spans(text)
        if _differ_in_covered_only(text, other, cover):
            own = [(start, end) for start, end in spans if cover not in other[start:end]]
            guarded = self._copy.with_stand_ins(text, own)
            return encode_in_slices(self._copy, guarded, limit, field="messages")
        if holds_token or len(spans) != len(self._places.spans(other)):
            raise InvalidRequest(
                "messages hold the text of a special token, and the model's chat template changes that text, so that "
                "it cannot be told from the template's own tokens; leave it out",
                field="messages",
            )
        return encode_in_slices(self._vocabulary, text, limit, field="messages")

    def _covered(self, messages: Sequence[Message], cover: str) -> tuple[list[Message], bool]:
        """The messages with each place covered from which a token could be made; whether one holds a whole token."""
        covered: list[Message] = []
        holds_token = False
        for message in messages:
            parts = dict(message)
            for key, value in message.items():
                if key == "role" and self._is_own_word(value):
                    continue
                whole = self._places.within(value)
                holds_token = holds_token or bool(whole)
                parts[key] = _cover(value, [*whole, *self._places.at_ends(value)], cover)
            covered.append(parts)
        return covered, holds_token

    def _is_own_word(self, role: str) -> bool:
        named = re.fullmatch(r"\w+", role) and (f"'{role}'" in self._template or f'"{role}"' in self._template)
        return role in _USUAL_ROLES or bool(named)


class TokenPlaces:
    """Finds the texts of tokens in a text. `contents` are those texts."""

    def __init__(self, contents: Iterable[str]) -> None:
        self._contents = sorted(contents, key=len, reverse=True)
        self._longest = len(self._contents[0]) if self._contents else 0
        self._begins = {content[:n] for content in self._contents for n in range(1, len(content))}
        self._ends = {content[n:] for content in self._contents for n in range(1, len(content))}

    def within(self, text: str) -> list[tuple[int, int]]:
        """Where a token's whole text stands, overlaps included."""
        # One search for each: an expression of hundreds of alternatives holds the interpreter's lock for seconds.
        found = (content for content in self._contents if content in text)
        return [(start, start + len(content)) for content in found for start in _positions(content, text)]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where tokens are matched: from left to right, of two at one place the longer."""
        spans: list[tuple[int, int]] = []
        for start, end in sorted(self.within(text), key=lambda span: (span[0], -span[1])):
            if not spans or start >= spans[-1][1]:
                spans.append((start, end))
        return spans

    def at_ends(self, text: str) -> list[tuple[int, int]]:
        """Where `text` may become a part of a token when it stands, as it is or stripped, between other texts."""
        first = len(text) - len(text.lstrip())
        last = len(text.rstrip())
        if any(text and text in content for content in self._contents):
            return [(0, len(text))]
        if first < last and any(text[first:last] in content for content in self._contents):
            return [(first, last)]
        spans: list[tuple[int, int]] = []
        for end in {len(text), last}:
            sizes = (n for n in range(min(self._longest, end), 0, -1) if text[end - n : end] in self._begins)
            spans += [(end - n, end) for n in list(sizes)[:1]]
        for start in {0, first}:
            room = min(self._longest, len(text) - start)
            sizes = (n for n in range(room, 0, -1) if text[start : start + n] in self._ends)
            spans += [(start, start + n) for n in list(sizes)[:1]]
        return spans


class _CopyWithStandIns:
    """A copy of a tokenizer that encodes the protected tokens as text, and knows a stand-in for each of them.

    A stand-in is one private character, matched in the same way as its token. `protected`: id → token.
    """

    def __init__(self, tokenizer: Tokenizer, protected: Mapping[int, AddedToken]) -> None:
        contents = {token.content for token in protected.values()}
        state = json.loads(tokenizer.to_str())
        for token in state["added_tokens"]:
            token["special"] = token["content"] in contents
        self._tokenizer = Tokenizer.from_str(json.dumps(state))
        self._tokenizer.encode_special_tokens = True  # as text, that is
        self._stand_ins = {
            token.content: chr(code) for code, token in zip(_STAND_INS, protected.values(), strict=False)
        }
        self._tokenizer.add_tokens([_stand_in(self._stand_ins[token.content], token) for token in protected.values()])
        self._meant = {
            self._tokenizer.token_to_id(self._stand_ins[token.content]): token_id
            for token_id, token in protected.items()
        }
        self._slicer = text_slicer(self._tokenizer, apart_from=contents)

    def with_stand_ins(self, text: str, spans: Sequence[tuple[int, int]]) -> str:
        """`text` with stand-ins in the place of the tokens at `spans`.

        Raises:
            InvalidRequest: the text holds a stand-in already.
        """
        used = next((sign for sign in self._stand_ins.values() if sign in text), None)
        if used is not None:
            raise InvalidRequest(
                f"messages hold the private character U+{ord(used):X} and the text of a special token; leave out one",
                field="messages",
            )
        parts, done = [], 0
        for start, end in spans:
            parts += [text[done:start], self._stand_ins[text[start:end]]]
            done = end
        return "".join([*parts, text[done:]])

    def slices(self, text: str) -> Iterable[str]:
        return self._slicer.slices(text)

    def encode(self, text: str) -> list[int]:
        return [self._meant.get(token_id, token_id) for token_id in encode_with(self._tokenizer, text)]


def _protected_tokens(tokenizer: Tokenizer, end_ids: frozenset[int]) -> dict[int, AddedToken]:
    """Added tokens that only a template may write, by id."""
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    return {
        token_id: token
        for token_id, token in added[: len(_STAND_INS)]
        if (token.special or token_id in end_ids or _CONTROL_SPELLING.fullmatch(token.content))
        and token.content.strip()  # blanks are in every text
    }


def _stand_in(sign: str, token: AddedToken) -> AddedToken:
    return AddedToken(
        sign,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=False,
    )


def _positions(content: str, text: str) -> Iterator[int]:
    start = text.find(content)
    while start >= 0:
        yield start
        start = text.find(content, start + 1)


def _unused_character(texts: Sequence[str]) -> str:
    return next(sign for sign in map(chr, _COVERS) if not any(sign in text for text in texts))


def _cover(text: str, spans: Sequence[tuple[int, int]], cover: str) -> str:
    parts, done = [], 0
    for start, end in sorted(spans):
        if end > done:
            parts += [text[done:start], cover * (end - max(start, done))]
            done = end
    return "".join([*parts, text[done:]])


def _differ_in_covered_only(text: str, other: str, cover: str) -> bool:
    done = 0
    for run in re.finditer(f"{cover}+", other):
        if text[done : run.start()] != other[done : run.start()]:
            return False
        done = run.end()
    return len(text) == len(other) and text[done:] == other[done:]
