"""The server under load, over HTTP: what it serves, and one request to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from cli.addresses import http_url
from cli.bench.sse import CompletionStream, StreamFault, error_in
from cli.bench.summary import RequestRow
from cli.errors import CommandError, no_cluster_at, one_line

PROBE_TEXT = (
    "Disaggregated serving runs prefill and decode on different machines, because reading a prompt is bound by "
    "arithmetic and writing an answer is bound by memory: 1, 2, 3 and so on; what else would one do?"
)
CONNECT_TIMEOUT_S = 30.0
TOKEN_COUNTING: tuple[Mapping[str, Any], ...] = (
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"return_token_ids": True},
)
"""Fields by which servers (vLLM and its kin) are asked to say in each event which or how many tokens it brings."""


@dataclass(frozen=True, slots=True)
class Served:
    """What the server says of itself. `token_ids` are those that a prompt may be made of."""

    model: str
    token_ids: Sequence[int]
    token_source: str
    status: dict[str, Any] | None


class Target:
    """An OpenAI-compatible server. Open it with `async with`; it may carry any number of requests at once."""

    def __init__(self, address: str, *, headers: Mapping[str, str], timeout_s: float, extra: Mapping[str, Any]) -> None:
        self.url = http_url(address, flag="--http").removesuffix("/v1")
        self._address = address
        self._timeout_s = timeout_s
        self._extra = dict(extra)
        self._counting: dict[str, Any] = {}
        self._model = ""
        self.counts_tokens = True
        self.error_details: dict[str, str] = {}  # reason → the first message with it
        # Answers come compressed only when asked for, and a proxy that holds events back would spoil every gap.
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"accept-encoding": "identity", **headers},
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )

    async def __aenter__(self) -> Target:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._client.aclose()

    async def discover(self, *, model: str | None, vocab_size: int | None) -> Served:
        """Asks for the model and its token ids. Raises CommandError when nobody answers or the model is not served."""
        cards = await self._get_models()
        known = [str(card.get("id")) for card in cards]
        if model is None and len(cards) != 1:
            raise CommandError(f"{self.url} serves {len(cards)} models ({', '.join(known)}); name one with --model")
        if model is not None and model not in known:
            raise CommandError(f"{self.url} does not serve {model!r}; it serves {', '.join(known)}: see --model")
        card = cards[0] if model is None else cards[known.index(model)]
        self._model = str(card["id"])
        size = vocab_size or card.get("vocab_size")
        if size:
            ids: Sequence[int] = range(int(size))
            source = "--vocab-size" if vocab_size else "vocab_size of /v1/models"
        else:
            ids, source = await self._known_token_ids(), "ids that /tokenize gave for a text"
        await self._choose_token_counting([ids[0]])
        return Served(self._model, ids, source, await self._status())

    def body(self, prompt: Sequence[int], num_output_tokens: int) -> bytes:
        """The request for exactly `num_output_tokens` tokens after `prompt`."""
        fields = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": num_output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._counting,
            **self._extra,
        }
        return json.dumps(fields, separators=(",", ":")).encode()

    async def send(self, row: RequestRow, body: bytes, clock_s: Callable[[], float]) -> None:
        """Sends one request, now, and fills `row` in. Failures end in `row.error`; nothing but a cancel is raised."""
        stream = CompletionStream(row)
        row.sent_s = clock_s()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._stream(stream, body, clock_s)
        except StreamFault as fault:
            self._fail(row, fault.reason, fault.detail)
        except TimeoutError:
            self._fail(row, "timeout", f"no complete answer within {self._timeout_s:g} s")
        except httpx.ConnectError as error:
            self._fail(row, "cannot connect", one_line(str(error)))
        except httpx.TransportError as error:
            self._fail(row, "connection lost", one_line(f"{type(error).__name__} {error}"))
        row.end_s = clock_s()
        self.counts_tokens &= stream.counts_tokens

    async def _stream(self, stream: CompletionStream, body: bytes, clock_s: Callable[[], float]) -> None:
        headers = {"content-type": "application/json"}
        async with self._client.stream("POST", "/v1/completions", content=body, headers=headers) as response:
            if response.status_code != 200:
                raise StreamFault(*error_in(_json_or_text(await response.aread()), f"HTTP {response.status_code}"))
            async for data in response.aiter_raw():
                stream.feed(data, clock_s())
        stream.finish(clock_s())

    def _fail(self, row: RequestRow, reason: str, detail: str) -> None:
        row.error = reason
        self.error_details.setdefault(reason, detail)

    async def _get_models(self) -> list[dict[str, Any]]:
        try:
            response = await self._client.get("/v1/models", timeout=CONNECT_TIMEOUT_S)
        except httpx.ConnectError:
            raise no_cluster_at(self._address, flag="--http") from None
        except httpx.TransportError as error:
            raise CommandError(f"{self.url} does not answer as an HTTP server: {one_line(str(error))}") from None
        if response.status_code != 200:
            reason, detail = error_in(_json_or_text(response.content), f"HTTP {response.status_code}")
            raise CommandError(f"{self.url}/v1/models answers {reason}: {detail}; is it an OpenAI-compatible server?")
        body = _json_or_text(response.content)
        cards = body.get("data") if isinstance(body, dict) else None
        if not isinstance(cards, list) or not cards:
            raise CommandError(f"{self.url}/v1/models lists no model; is it an OpenAI-compatible server?")
        return cards

    async def _choose_token_counting(self, prompt: Sequence[int]) -> None:
        """Tries the ways in which servers tell the tokens of an event, and keeps the first that works."""
        for fields in TOKEN_COUNTING:
            self._counting = dict(fields)
            row = RequestRow(0, len(prompt), 2, 0.0, 0.0)
            probe = CompletionStream(row)
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._stream(probe, self.body(prompt, 2), lambda: 0.0)
            except StreamFault:
                continue  # refused: the next way may be known; the last one asks for nothing special
            except (TimeoutError, httpx.TransportError) as error:
                raise CommandError(
                    f"{self.url} did not answer a first request of 1 + 2 tokens ({type(error).__name__}); "
                    "see whether it is ready, or raise --timeout"
                ) from None
            if probe.counts_tokens:
                return
        self._counting = {}

    async def _known_token_ids(self) -> list[int]:
        fields = {"model": self._model, "prompt": PROBE_TEXT}
        response = await self._client.post("/tokenize", json=fields, timeout=CONNECT_TIMEOUT_S)
        body = _json_or_text(response.content) if response.status_code == 200 else None
        tokens = body.get("tokens") if isinstance(body, dict) else None
        if not tokens:
            raise CommandError(
                f"{self.url} tells its vocabulary neither in /v1/models nor through /tokenize; give --vocab-size N"
            )
        return sorted({int(token) for token in tokens})

    async def _status(self) -> dict[str, Any] | None:
        """The cluster's state for the report, from servers that have /status; others have no such thing."""
        response = await self._client.get("/status", timeout=CONNECT_TIMEOUT_S)
        body = _json_or_text(response.content) if response.status_code == 200 else None
        return body if isinstance(body, dict) else None


def _json_or_text(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return one_line(content.decode(errors="replace"))
