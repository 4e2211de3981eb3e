"""Text of one model: encode, decode, chat. Without torch and without transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from control_plane.gateway.text.bounded_encoding import NO_LIMIT, TokenLimit, encode_in_slices, refuse_by_length
from control_plane.gateway.text.chat_template import ChatTemplate, plain_messages
from control_plane.gateway.text.detokenizer import LeadingSpace
from control_plane.gateway.text.message_tokens import MessageEncoding, SpecialTokensInMessages, TemplateTokensOnly
from control_plane.gateway.text.tokenizer_files import read_text_files
from control_plane.gateway.text.vocabulary import NO_ENDS, TokenizersVocabulary, Vocabulary
from phasewise.core.clock import Clock, MonotonicClock
from phasewise.core.errors import InvalidRequest
from phasewise.core.model_source import ModelSource, model_facts

_RENDERED_ANYWAY = 1_000_000  # characters of messages; below this a template costs next to nothing


class TextTokenizer:
    """Text ↔ token ids of one model, its end tokens and its chat template.

    `vocab_size` is the number of rows of the model's logits; a tokenizer may know fewer ids. `special_ids` are
    the ids that are no part of a text: they are skipped in decoding.

    Args:
        message_encoding: what encodes rendered messages; None: special tokens in them are special tokens.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        chat_template: ChatTemplate | None,
        message_encoding: MessageEncoding | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._message_encoding = message_encoding or SpecialTokensInMessages(vocabulary)
        self._bytes = _TokenBytes(vocabulary)
        self._text_bytes = _TextBytes(self._bytes, vocabulary.special_ids)
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template

    @property
    def special_ids(self) -> frozenset[int]:
        return self._vocabulary.special_ids

    @property
    def longest_token_bytes(self) -> int:
        """The bytes of the longest token: a text of b bytes has b / this tokens or more."""
        return max((len(self._bytes[token_id]) for token_id in range(self.vocab_size)), default=1)

    @property
    def leading_space(self) -> LeadingSpace:
        return self._vocabulary.leading_space

    @property
    def text_bytes(self) -> Mapping[int, bytes]:
        """Token id → its bytes in a text: `token_bytes`, but nothing for special tokens. Fast; for hot paths."""
        return self._text_bytes

    def encode(self, text: str, add_special: bool = True, limit: TokenLimit = NO_LIMIT) -> list[int]:
        """Token ids of a text. `add_special` puts the ids around it that the model wants, such as a BOS.

        Raises:
            InvalidRequest: the model takes no text (field `text`), the text is not valid Unicode, or too long.
        """
        refuse_by_length(self._vocabulary, text, limit, field="text")
        ends = self._vocabulary.ends() if add_special else NO_ENDS
        return encode_in_slices(self._vocabulary, text, limit, field="text", ends=ends)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], limit: TokenLimit = NO_LIMIT) -> list[int]:
        """Token ids of a chat up to where the answer begins.

        Raises:
            InvalidRequest: the model has no chat template, or the messages do not fit it, or are too long (field
                `messages…`).
        """
        if self.chat_template is None:
            raise InvalidRequest(
                "this model has no chat template, so it takes no messages; send a prompt to /v1/completions",
                field="messages",
            )
        plain = plain_messages(messages)
        texts = [text.strip() for message in plain for text in message.values()]  # templates strip what they write
        if sum(map(len, texts)) > _RENDERED_ANYWAY:
            # Beyond this a template's own work counts, so a part that it would leave out counts as well.
            refuse_by_length(self._vocabulary, "".join(texts), limit, field="messages")
        # A template writes the special tokens itself.
        return self._message_encoding.encode(self.chat_template.at_one_time(), plain, limit)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are skipped, bytes that are no UTF-8 become U+FFFD."""
        lookup = self._text_bytes
        raw = b"".join([lookup[token_id] for token_id in token_ids])
        # `strip_all` concerns the first token alone, which the incremental way knows.
        if self.leading_space == "strip_one":
            raw = raw.removeprefix(b" ")
        elif self.leading_space == "strip_all":
            first = next((lookup[token_id] for token_id in token_ids if lookup[token_id]), b"")
            raw = first.replace(b" ", b"") + raw[len(first) :]
        return raw.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token, special or not. Empty for an id that the tokenizer does not know."""
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """One token alone as text; U+FFFD stands for a part of a character."""
        return self._bytes[token_id].decode("utf-8", "replace")


class _TokenBytes(dict[int, bytes]):
    """Computes each entry once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self._vocabulary = vocabulary

    def __missing__(self, token_id: int) -> bytes:
        raw = self[token_id] = self._vocabulary.token_bytes(token_id)
        return raw


class _TextBytes(dict[int, bytes]):
    """As `_TokenBytes`, with nothing for special tokens."""

    def __init__(self, token_bytes: _TokenBytes, special_ids: frozenset[int]) -> None:
        super().__init__(dict.fromkeys(special_ids, b""))
        self._token_bytes = token_bytes

    def __missing__(self, token_id: int) -> bytes:
        raw = self[token_id] = self._token_bytes[token_id]
        return raw


def load_tokenizer(
    source: ModelSource, clock: Clock | None = None, *, special_tokens_in_messages: bool = False
) -> TextTokenizer:
    """Reads the tokenizer of a Hugging Face directory, a GGUF file or a random model.

    Args:
        clock: tells chat templates the date; the real one when None.
        special_tokens_in_messages: the text of a special token in a message becomes the token.

    Raises:
        ModelLoadError: a file is missing, damaged or of a kind that is not supported.
    """
    facts = model_facts(source)
    files = read_text_files(source, facts.vocab_size)
    vocabulary = files.vocabulary
    template, message_encoding = None, None
    if files.chat_template is not None:
        template = ChatTemplate(files.chat_template, files.special_tokens, (clock or MonotonicClock()).unix_s)
        if isinstance(vocabulary, TokenizersVocabulary) and not special_tokens_in_messages:
            message_encoding = TemplateTokensOnly(vocabulary, facts.eos_token_ids, template.source)
    return TextTokenizer(
        vocabulary,
        vocab_size=facts.vocab_size,
        eos_token_ids=facts.eos_token_ids,
        chat_template=template,
        message_encoding=message_encoding,
    )
