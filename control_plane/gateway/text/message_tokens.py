"""From the messages of a chat to token ids: special tokens come from the template, the text of messages is text.

Tokenizers encode `<|im_end|>` in any text as the special token, so the author of a message could end its turn and begin
another one. Here such text in a message is encoded as its characters. Protected are the special tokens (of a GGUF file:
the control tokens), the model's end tokens, and added tokens that are spelled like special ones (`_CONTROL_SPELLING`).
Other added tokens (`<think>`, runs of spaces) may stand in a message, as in llama.cpp.

1. The template is rendered twice: as it is, and with the texts of messages masked (message_masks.py). Where the second
   rendering is masked, the first one has a message's text. A token of which no character is masked is the template's.
2. If all tokens are the template's, the text is encoded as it is.
3. Else each token of the template is replaced by a stand-in. A copy of the tokenizer knows the stand-ins as added
   tokens, and encodes the protected tokens as text. So only the forged tokens are encoded differently.

A template may depend on the text and write something else when it is masked: it escapes `<`, or looks for a word. Then
the renderings cannot be compared, and less is masked: whole tokens, and what may become a part of one at the beginning
or end of a text. The tokens outside of these places must be those of the masked rendering. If that cannot be compared
either, all tokens must be those of the masked rendering; and if a message holds a whole token, each must stand in the
same place between texts of the template. Any other chat is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from tokenizers import AddedToken, Tokenizer

from control_plane.gateway.text.bounded_encoding import TokenLimit, encode_in_slices, refuse_by_length
from control_plane.gateway.text.chat_template import template_strings
from control_plane.gateway.text.message_masks import (
    TextMask,
    differ_in_masks_only,
    have_same_frame,
    overlaid,
    unused_mask,
)
from control_plane.gateway.text.slices import text_slicer
from control_plane.gateway.text.token_places import Place, TokenPlaces, matched
from control_plane.gateway.text.vocabulary import TokenizersVocabulary, Vocabulary, encode_with
from phasewise.core.errors import InvalidRequest

Message = Mapping[str, str]
Render = Callable[[Sequence[Message]], str]

_CONTROL_SPELLING = re.compile(r"<[|｜].*[|｜]>|</?s>|\[/?INST\]|<(start|end)_of_turn>", re.DOTALL)
_USUAL_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "model"})
_STAND_INS = range(0x10F000, 0x10FFFE)  # private use


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
        contents = [token.content for token in protected.values()]
        self._vocabulary = vocabulary
        self._template = template
        self._places = TokenPlaces(contents)
        self._mask = TextMask(contents, self._places, template_strings(template))
        self._copy = _CopyWithStandIns(vocabulary.tokenizer, protected)
        # A normalizer may turn other texts into tokens, which the text does not show: then the copy encodes every chat.
        self._is_readable = vocabulary.tokenizer.normalizer is None or not any(t.normalized for t in protected.values())

    def encode(self, render: Render, messages: Sequence[Message], limit: TokenLimit) -> list[int]:
        text = render(messages)
        refuse_by_length(self._vocabulary, text, limit, field="messages")
        mask = unused_mask([text, *(value for message in messages for value in message.values())])
        try:
            masked = render(self._changed(messages, lambda value: self._mask.masked(value, mask)))
        except InvalidRequest:  # the template takes certain texts only
            raise _cannot_be_told() from None
        places = self._places.within(text)
        if differ_in_masks_only(text, masked, mask):
            own = [(start, end) for start, end in places if mask not in masked[start:end]]
        else:
            own = self._own_in_changed(render, messages, text, masked, mask)
        if self._is_readable and len(own) == len(places):
            return encode_in_slices(self._vocabulary, text, limit, field="messages")
        guarded = self._copy.with_stand_ins(text, matched(own))
        return encode_in_slices(self._copy, guarded, limit, field="messages")

    def _own_in_changed(
        self, render: Render, messages: Sequence[Message], text: str, masked: str, mask: str
    ) -> list[Place]:
        """The places of the template's own tokens in `text`, of a template that writes something else for masked texts.

        Raises:
            InvalidRequest: they cannot be told from those of messages.
        """
        places = self._places.within(text)
        covered = self._changed(messages, lambda value: self._covered(value, mask))
        other = text if covered == messages else render(covered)
        are_followed = differ_in_masks_only(text, other, mask)
        own = [(start, end) for start, end in places if mask not in other[start:end]] if are_followed else places
        holds_token = any(self._places.within(value) for message in messages for value in message.values())
        if self._tokens(text, own) != self._tokens(masked, self._places.within(masked)):
            raise _cannot_be_told()
        if not are_followed and holds_token and not have_same_frame(text, masked, mask, self._places):
            raise _cannot_be_told()
        return own

    def _tokens(self, text: str, places: Iterable[Place]) -> list[str]:
        return [text[start:end] for start, end in matched(places)]

    def _changed(self, messages: Sequence[Message], change: Callable[[str], str]) -> list[Message]:
        """The messages with their texts changed, all but roles that are the template's own words."""
        return [
            {k: v if k == "role" and self._is_own_word(v) else change(v) for k, v in message.items()}
            for message in messages
        ]

    def _covered(self, text: str, mask: str) -> str:
        """`text` with each place masked that is a token, or may become a part of one as the text stands."""
        spans = [*self._places.within(text), *self._places.at_ends(text)]
        return overlaid(text, mask * len(text), spans) if spans else text

    def _is_own_word(self, role: str) -> bool:
        named = re.fullmatch(r"\w+", role) and (f"'{role}'" in self._template or f'"{role}"' in self._template)
        return role in _USUAL_ROLES or bool(named)


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


def _cannot_be_told() -> InvalidRequest:
    return InvalidRequest(
        "messages hold text that is a special token or could become one, and the model's chat template changes that "
        "text, so that it cannot be told from the template's own tokens; leave it out",
        field="messages",
    )
