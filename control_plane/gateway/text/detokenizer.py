"""The text of one sample while its tokens come: incremental, byte-exact, with stop strings. Pure.

Tokens become bytes, bytes become whole characters (a character whose bytes are not all here waits), characters become
text that is certain: what could be the beginning of a stop string waits, too. Work is in the new tokens only.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, Protocol

from control_plane.gateway.service import TokenInfo
from phasewise.core.request import FinishReason, SampledToken

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")

LeadingSpace = Literal["keep", "strip_one", "strip_all"]
"""What happens to the space that SentencePiece puts before the first word: of the first token that has a text."""


class TokenTexts(Protocol):
    """What the tokens of a model mean as text; a part of `TextTokenizer`."""

    @property
    def leading_space(self) -> LeadingSpace: ...

    @property
    def special_ids(self) -> Collection[int]:
        """The tokens that are no part of a text."""

    @property
    def text_bytes(self) -> Mapping[int, bytes]:
        """Token id → its bytes in a text; nothing for special tokens."""

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token, special or not."""

    def token_text(self, token_id: int) -> str:
        """One token alone as text; U+FFFD stands for a part of a character."""


class SampleText:
    """The text of one sample.

    Args:
        stop: stop strings; none of them is empty.
        continues_text: the sample goes on from a text, so a space before its first word belongs to it. Otherwise the
            sample is a text of its own, equal to `tokenizer.decode` of all its tokens.
        min_tokens: a stop string that is complete with one of the first so many tokens ends nothing, as in vLLM. One
            that begins in their text and is completed by a later token does.

    Attributes:
        num_tokens: tokens used so far. After a stop string was hit it counts those up to the end of that string.
        is_done: True after a stop string or a finish reason; nothing may be pushed any more.
    """

    def __init__(
        self, texts: TokenTexts, stop: Sequence[str] = (), *, continues_text: bool = False, min_tokens: int = 0
    ) -> None:
        self._bytes = texts.text_bytes
        self._decode = _Utf8Decoder("replace").decode
        self._stop = StopStrings(stop) if stop else None
        self._leading_space = "keep" if continues_text else texts.leading_space
        self._min_tokens = min_tokens
        self.num_tokens = 0
        self.is_done = False

    def push(self, tokens: Sequence[SampledToken], finish_reason: FinishReason | None = None) -> tuple[str, str | None]:
        """Takes the next tokens; returns (text that is certain now, the stop string that was hit or None).

        With `FinishReason.STOP` the last token is a stop token, which is no part of the text. After a finish reason
        all text is returned; bytes that never became a character come as U+FFFD. Tokens behind a stop string are
        not looked at.
        """
        if self.is_done:
            raise ValueError("push after the end of a sample")
        self.is_done = finish_reason is not None
        ids = [token.token_id for token in tokens]
        if finish_reason is FinishReason.STOP and ids:
            ids.pop()
        if self._stop is not None:
            return self._push_until_hit(self._stop, ids, len(tokens))
        self.num_tokens += len(tokens)
        text = self._decode(self._join(ids))
        return (text + self._decode(b"", True) if self.is_done else text), None

    def _push_until_hit(self, stop: StopStrings, ids: list[int], num_tokens: int) -> tuple[str, str | None]:
        """As `push`, with stop strings. `ids` are those of `num_tokens` tokens that may have a text."""
        text, hit = "", None
        for token_id in ids:  # one at a time, so that num_tokens says which one completed a stop string
            self.num_tokens += 1
            more, hit = stop.push(self._decode(self._join((token_id,))), may_hit=self._may_end)
            text += more
            if hit is not None:
                break
        if hit is None and self.is_done:
            self.num_tokens += num_tokens - len(ids)
            more, hit = stop.push(self._decode(b"", True), may_hit=self._may_end)
            text += more if hit is not None else more + stop.flush()
        self.is_done = self.is_done or hit is not None
        return text, hit

    @property
    def _may_end(self) -> bool:
        return self.num_tokens > self._min_tokens

    def _join(self, ids: Iterable[int]) -> bytes:
        lookup = self._bytes
        if self._leading_space == "keep":
            return b"".join([lookup[token_id] for token_id in ids])
        return self._join_first([raw for raw in [lookup[token_id] for token_id in ids] if raw])

    def _join_first(self, parts: list[bytes]) -> bytes:
        """The first bytes of a sample, without the space before its first word."""
        if parts:
            parts[0] = (
                parts[0].removeprefix(b" ") if self._leading_space == "strip_one" else parts[0].replace(b" ", b"")
            )
            self._leading_space = "keep"
        return b"".join(parts)


class StopStrings:
    """Finds stop strings in a text that comes in pieces; the result does not depend on how it is cut.

    The stop string whose end comes first wins; of two that end together, the longer.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._first_characters = frozenset(string[0] for string in stop)
        self._longest = max(len(string) for string in stop)
        self._held = ""
        self._num_exempt = 0  # characters at the beginning of the held text in which no stop string may end

    def push(self, text: str, *, may_hit: bool = True) -> tuple[str, str | None]:
        """Returns (text that is certain, stop string or None). The stop string and what follows it are cut off.

        Without `may_hit` a stop string that ends in `text` is text like any other.
        """
        if not text:
            return "", None
        text = self._held + text
        if not may_hit:
            self._num_exempt = len(text)
        hit = self._first_hit(text)
        if hit is not None:
            self._held = ""
            start, string = hit
            return text[:start], string
        cut = self._safe_length(text)
        self._held = text[cut:]
        self._num_exempt = max(0, self._num_exempt - cut)
        return text[:cut], None

    def flush(self) -> str:
        """What was held back; the text is over."""
        held, self._held = self._held, ""
        return held

    def _first_hit(self, text: str) -> tuple[int, str] | None:
        exempt = self._num_exempt
        found = [(i + len(s), i, s) for s in self._stop if (i := text.find(s, max(0, exempt + 1 - len(s)))) >= 0]
        if not found:
            return None
        _, start, string = min(found)
        return start, string

    def _safe_length(self, text: str) -> int:
        """Length of the text without the longest tail that a stop string could begin with."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_characters:
                tail = text[start:]
                if any(string.startswith(tail) for string in self._stop):
                    return start
        return len(text)


def token_info(texts: TokenTexts, token: SampledToken) -> TokenInfo:
    """A token with its text and bytes, as clients see it when they ask for log-probabilities."""
    return TokenInfo(
        token_id=token.token_id,
        text=texts.token_text(token.token_id),
        raw=texts.token_bytes(token.token_id),
        logprob=token.logprob,
        top_logprobs=tuple(
            (token_id, texts.token_text(token_id), texts.token_bytes(token_id), logprob)
            for token_id, logprob in token.top_logprobs
        ),
        is_special=token.token_id in texts.special_ids,
    )
