"""What the server refuses, and how it tells: OpenAI's error form, the right status, the field and the remedy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from control_plane.gateway.bodies import Bodies
from control_plane.gateway.http_front.openai_server import build_app
from phasewise.core.errors import (
    DeadlineExceeded,
    InternalError,
    Overloaded,
    ServingError,
    TransferFailed,
    Unavailable,
    WorkerLost,
)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def http(base_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_url, timeout=60) as client:
        yield client


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": HI, "temperature": "5"}, "temperature", ["must be a number", '"5"']),
        ({"messages": HI, "max_tokens": 2.5}, "max_tokens", ["whole number"]),
        ({"messages": HI, "n": True}, "n", ["whole number"]),
        ({"messages": HI, "stream": 1}, "stream", ["true or false"]),
        ({"messages": "Hi"}, "messages", ["must be a list"]),
        ({}, "messages", ["required"]),
        ({"messages": []}, "messages", ["empty"]),
        ({"messages": [*HI, {"role": "user", "content": 7}]}, "messages[1].content", ["messages[1].content", "string"]),
        ({"messages": HI, "temprature": 1}, "temprature", ["did you mean 'temperature'"]),
        ({"messages": HI, "stream_options": {"include_usag": 1}}, "stream_options.include_usag", ["'include_usage'"]),
        ({"messages": HI, "zzz": 1}, "zzz", ["unknown", "leave it out"]),
        ({"messages": HI, "tools": [{"type": "function"}]}, "tools", ["not support"]),
        ({"messages": HI, "response_format": {"type": "json_object"}}, "response_format", ["not support"]),
        ({"messages": HI, "audio": {"voice": "x"}}, "audio", ["not support"]),
        ({"messages": HI, "modalities": ["text", "audio"]}, "modalities", ["not support"]),
        ({"messages": HI, "reasoning_effort": "high"}, "reasoning_effort", ["not support"]),
        ({"messages": HI, "stream_options": {"include_usage": True}}, "stream_options", ["needs stream"]),
        ({"messages": HI, "top_logprobs": 2}, "top_logprobs", ["logprobs: true"]),
        ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs", ["top_logprobs must be 0 to 20"]),
        ({"messages": HI, "logprobs": 3}, "logprobs", ["true or false"]),
        ({"messages": HI, "max_completion_tokens": 0}, "max_completion_tokens", ["max_completion_tokens must be"]),
        ({"messages": HI, "max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", ["not both"]),
        ({"messages": HI, "max_tokens": 10**6}, "max_tokens", ["context", "lower"]),
        ({"messages": HI, "temperature": 2.5}, "temperature", ["0 to 2"]),
        ({"messages": HI, "top_p": 1.5}, "top_p", ["0 to 1"]),
        ({"messages": HI, "min_tokens": 3, "max_completion_tokens": 2}, "min_tokens", ["min_tokens 3", "max_tokens 2"]),
        ({"messages": HI, "n": 129}, "n", ["1 to 128"]),
        ({"messages": HI, "stop": ["a", 5]}, "stop[1]", ["must be a string"]),
        ({"messages": HI, "stop": ""}, "stop[0]", ["empty"]),
        ({"messages": HI, "stop": {"a": 1}}, "stop", ["string or a list"]),
        ({"messages": HI, "logit_bias": {"x": 1}}, "logit_bias", ["token ids"]),
        ({"messages": HI, "logit_bias": {"1": 101}}, "logit_bias", ["-100 to 100"]),
        ({"messages": HI, "seed": 2**63}, "seed", ["9223372036854775807"]),
        ({"messages": HI, "timeout": 0}, "timeout", ["timeout must be above 0"]),
        ({"messages": HI, "stop_token_ids": [1, "2"]}, "stop_token_ids[1]", ["whole number"]),
    ],
)  # fmt: skip
def test_wrong_chat_bodies(http: httpx.Client, body: dict[str, Any], param: str, words: list[str]) -> None:
    error = refused(http.post(CHAT, json=body))
    assert error["param"] == param and error["code"] == "invalid_request" and error["type"] == "invalid_request_error"
    assert all(word in error["message"] for word in words), error["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", ["required"]),
        ({"prompt": None}, "prompt", ["null"]),
        ({"prompt": []}, "prompt", ["empty list"]),
        ({"prompt": ["a", 1]}, "prompt", ["all strings"]),
        ({"prompt": [1, True]}, "prompt", ["all token ids"]),
        ({"prompt": [[1], [2.5]]}, "prompt", ["prompt[1]"]),
        ({"prompt": [[1], []]}, "prompt", ["empty"]),
        ({"prompt": ""}, "prompt", ["empty"]),
        ({"prompt": [0, 10**7]}, "prompt[1]", ["prompt[1] is 10000000"]),
        ({"prompt": "word " * 9000}, "prompt", ["the context is", "shorten prompt"]),
        ({"prompt": "a", "logprobs": True}, "logprobs", ["whole number"]),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", ["at least 1", "echo"]),
        ({"prompt": "a", "max_tokens": 0, "echo": False, "logprobs": 1}, "max_tokens", ["at least 1", "echo"]),
        ({"prompt": "a", "min_tokens": 17}, "min_tokens", ["min_tokens 17", "max_tokens 16"]),
        ({"prompt": "a", "best_of": 3}, "best_of", ["equals n"]),
        ({"prompt": "a", "suffix": "b"}, "suffix", ["not support"]),
        ({"prompt": ["a"] * 200, "n": 6}, "prompt", ["1024 choices"]),
        ({"prompt": "a", "messages": HI}, "messages", ["unknown"]),
    ],
)
def test_wrong_completion_bodies(http: httpx.Client, body: dict[str, Any], param: str, words: list[str]) -> None:
    error = refused(http.post(COMPLETIONS, json=body))
    assert error["param"] == param
    assert all(word in error["message"] for word in words), error["message"]


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"messages": [{"role": "user", "content": "\\ud800"}]}']
)
def test_bodies_that_are_no_json_object(http: httpx.Client, raw: bytes) -> None:
    assert "body" in refused(http.post(CHAT, content=raw))["message"] or b"ud800" in raw


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none(http: httpx.Client, number: str) -> None:
    error = refused(http.post(COMPLETIONS, content=f'{{"prompt": "a", "temperature": {number}}}'))
    assert error["param"] == "temperature" and "finite" in error["message"]


def test_harmless_fields_are_accepted(http: httpx.Client) -> None:
    body = {
        "messages": HI, "max_tokens": 2, "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto",
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
        "functions": None, "stop": None, "logit_bias": None, "stream_options": None, "parallel_tool_calls": True,
    }  # fmt: skip
    assert http.post(CHAT, json=body).status_code == 200


def test_another_model(http: httpx.Client) -> None:
    for path, body in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "a"})):
        error = refused(http.post(path, json={**body, "model": "gpt-5"}), 404)
        assert error["code"] == "model_not_found" and error["param"] == "model" and "use '" in error["message"]


def test_bodies_that_are_too_large(http: httpx.Client) -> None:
    error = refused(http.post(COMPLETIONS, json={"prompt": "a" * (2 << 20)}), 413)
    assert "1048576 bytes" in error["message"] and error["code"] == "body_too_large"

    def chunked() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 65536

    assert http.post(COMPLETIONS, content=chunked()).status_code == 413


@pytest.mark.parametrize(
    ("header", "value"),
    [("x-phasewise-timeout-s", "soon"), ("x-phasewise-timeout-s", "-1"), ("x-phasewise-timeout-s", "nan")],
)
def test_wrong_headers(http: httpx.Client, header: str, value: str) -> None:
    error = refused(http.post(COMPLETIONS, json={"prompt": "a"}, headers={header: value}))
    assert error["param"] == header and "seconds above 0" in error["message"]


FAILURES = [
    (Overloaded("full", retry_after_s=2.2), 429, "3", "true", openai.RateLimitError),
    (Unavailable("draining"), 503, "1", "true", openai.InternalServerError),
    (WorkerLost("gone"), 503, "1", "true", openai.InternalServerError),
    (TransferFailed("bad sum"), 503, "1", "true", openai.InternalServerError),
    (DeadlineExceeded("late"), 504, None, "false", openai.InternalServerError),
    (InternalError("oops"), 500, None, "false", openai.InternalServerError),
    (RuntimeError("a secret detail"), 500, None, "false", openai.InternalServerError),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize(("error", "status", "retry_after", "should_retry", "kind"), FAILURES)
def test_failures_before_the_first_token_have_their_status(
    http: httpx.Client, service: Any, base_url: str, error: Exception, status: int, retry_after: str | None,
    should_retry: str, kind: type[openai.APIStatusError], at_start: bool, stream: bool,
) -> None:  # fmt: skip
    if at_start:
        service.refuse_with = error
    else:
        service.fail_after = (0, error)
    answer = http.post(CHAT, json={"messages": HI, "stream": stream})
    body = refused(answer, status)
    assert answer.headers.get("retry-after") == retry_after
    assert answer.headers["x-should-retry"] == should_retry
    assert "secret" not in body["message"]
    if isinstance(error, ServingError):
        assert body["code"] == error.code and body["message"] == error.message
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client, pytest.raises(kind):
        client.chat.completions.create(model=service.model.name, messages=HI, stream=stream)
    assert not service.open


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("error", [WorkerLost("worker decode-0 was lost"), RuntimeError("a secret detail")])
def test_a_failure_in_the_middle_of_a_stream(
    http: httpx.Client, service: Any, base_url: str, error: Exception, prompts: int
) -> None:
    service.fail_after = (4, error)
    body = {"prompt": ["The sea"] * prompts, "stream": True, "max_tokens": 9}
    events = http.post(COMPLETIONS, json=body).text.strip().split("\n\n")
    assert len(events) > 1 and "[DONE]" not in events[-1]
    last = json.loads(events[-1].removeprefix("data: "))["error"]
    assert last["code"] == ("worker_lost" if isinstance(error, WorkerLost) else "internal")
    assert "secret" not in last["message"]
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model=service.model.name, prompt="The sea", max_tokens=9, stream=True)
        with pytest.raises(openai.APIError):
            list(stream)
    assert not service.open


def test_a_failure_in_the_middle_of_a_whole_answer(http: httpx.Client, service: Any) -> None:
    service.fail_after = (4, WorkerLost("worker decode-0 was lost"))
    refused(http.post(COMPLETIONS, json={"prompt": ["a", "b"], "max_tokens": 9}), 503)
    assert not service.open


def test_a_refused_prompt_ends_those_before_it(http: httpx.Client, service: Any) -> None:
    error = refused(http.post(COMPLETIONS, json={"prompt": ["fine", ""]}))
    assert error["param"] == "prompt" and not service.open


def test_a_request_id_that_is_open_already(http: httpx.Client, base_url: str) -> None:
    body = {"prompt": "The sea", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    headers = {"x-request-id": "twice"}
    with (
        httpx.Client(base_url=base_url) as other,
        other.stream("POST", COMPLETIONS, json=body, headers=headers) as first,
    ):
        lines = first.iter_lines()  # held: an iterator that is thrown away closes the connection
        assert next(lines).startswith("data: ")
        error = refused(http.post(COMPLETIONS, json=body, headers=headers), 409)
        assert error["code"] == "duplicate_request"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_sends", [0, 1, 2])
async def test_a_client_that_left_at_once_leaves_nothing_open(service: Any, stream: bool, num_sends: int) -> None:
    """Straight through ASGI, where the moment is exact: gone when the body is read, or after so many messages."""
    body = json.dumps({"prompt": ["The sea", "The sky"], "max_tokens": 500, "stream": stream}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    gone = asyncio.Event()
    sent: list[Any] = []
    if not num_sends:
        gone.set()

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) >= num_sends:
            gone.set()

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": COMPLETIONS,
        "raw_path": COMPLETIONS.encode(), "query_string": b"", "headers": [], "scheme": "http",
    }  # fmt: skip
    await build_app(service, Bodies(1 << 20, 10))(scope, receive, send)
    assert not service.open
    if num_sends == 0:
        assert sent[0]["status"] == 499
    elif stream:
        assert len(sent) < 50, "it stopped long before the end"


def test_health_while_not_ready(http: httpx.Client, service: Any) -> None:
    service.unready_reason = "no decode worker is ready"
    for path in ("/health", "/health/ready"):
        answer = http.get(path)
        refused(answer, 503)
        assert answer.json()["error"]["message"] == "no decode worker is ready"
        assert answer.headers["retry-after"] == "1"
        assert http.head(path).status_code == 503
    assert http.get("/health/live").json() == {"status": "ok"}
    assert http.head("/health/live").status_code == 200
    refused(http.post(CHAT, json={"messages": HI}), 503)
