"""Reads an answer in server-sent events: which tokens came when, how it ended. Pure: bytes and times in, a row out."""

from __future__ import annotations

import json
from typing import Any

from cli.bench.summary import RequestRow


class StreamFault(Exception):
    """The answer is not what an OpenAI-compatible server sends, or holds an error. The message is a short reason."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class CompletionStream:
    """Feeds on the bytes of one streamed completion and fills in its row.

    How many tokens an event brought is read from its `usage` (running totals, where the server sends them), else
    from `token_ids` or `logprobs`, else it counts as one; `counts_tokens` says which.
    """

    def __init__(self, row: RequestRow) -> None:
        self._row = row
        self._pending = b""
        self._num_seen = 0
        self._done = False
        self._usage_tokens: int | None = None
        self.counts_tokens = True

    def feed(self, data: bytes, at_s: float) -> None:
        """Takes what came at `at_s`; all events in it came then. Raises StreamFault."""
        lines = (self._pending + data).split(b"\n")
        self._pending = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), at_s)

    def finish(self, at_s: float) -> None:
        """The stream has ended. Raises StreamFault when the answer is not whole."""
        self._row.end_s = at_s
        self._row.num_output_tokens = self._num_seen if self._usage_tokens is None else self._usage_tokens
        if not self._done or not self._row.finish_reason:
            raise StreamFault("stream cut short", "it ended without a finish_reason and [DONE]")
        if not self._row.token_times_s:
            raise StreamFault("no tokens", "the answer ended well but brought no token")

    def _event(self, payload: bytes, at_s: float) -> None:
        if payload == b"[DONE]":
            self._done = True
            return
        try:
            event = json.loads(payload)
        except ValueError:
            raise StreamFault("bad event", f"not JSON: {payload[:80]!r}") from None
        try:
            self._take(event, at_s)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise StreamFault("bad event", f"not a completion chunk: {payload[:200]!r}") from None

    def _take(self, event: dict[str, Any], at_s: float) -> None:
        if event.get("error"):
            raise StreamFault(*error_in(event, "stream error"))
        usage = event.get("usage") or {}
        choices = event.get("choices") or ()
        count = self._count_tokens(choices[0], usage) if choices else 0
        if usage:
            self._usage_tokens = int(usage["completion_tokens"])
            details = usage.get("prompt_tokens_details") or {}
            self._row.num_cached_tokens = int(details.get("cached_tokens") or 0)
        if choices and choices[0].get("finish_reason"):
            self._row.finish_reason = str(choices[0]["finish_reason"])
        if count > 0:
            self._num_seen += count
            self._row.token_times_s.append((at_s, count))

    def _count_tokens(self, choice: dict[str, Any], usage: dict[str, Any]) -> int:
        if usage:
            return int(usage["completion_tokens"]) - self._num_seen
        if choice.get("token_ids") is not None:
            return len(choice["token_ids"])
        if choice.get("logprobs"):
            return len(choice["logprobs"]["tokens"])
        # An event may carry no text and yet a token (half a character), but one that only says "finished" has none.
        if choice.get("text") or not choice.get("finish_reason"):
            self.counts_tokens = False
            return 1
        return 0


def error_in(body: Any, what: str) -> tuple[str, str]:
    """(short reason, message) of an error in OpenAI's form, `{"error": {"message", "type", "code"}}`, or like it."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return what, str(error)[:500]
    kind = error.get("code") or error.get("type") or ""
    return f"{what} {kind}".strip(), str(error.get("message", error))[:500]
