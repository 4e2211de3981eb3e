"""The OpenAI-compatible server through the official client and over the bare wire.

What is asserted holds for any model behind the fixture `service` (conftest.py), so the same file runs against a
cluster. The tests that need a service of their own kind (failing, refusing) are in test_openai_failures.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

QUESTION: list[Any] = [{"role": "user", "content": "Tell me of the sea ☕"}]
PROMPT = "The capital of France is"


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def http(base_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_url, timeout=120) as client:
        yield client


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def open_requests(http: httpx.Client) -> int:
    number = http.get("/status").json()["gateway"]["open_requests"]
    assert isinstance(number, int)
    return number


def wait_until_idle(http: httpx.Client, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while open_requests(http):
        assert time.monotonic() < deadline, "requests are still open"


# ---- chat


def test_chat(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert answer.object == "chat.completion" and answer.model == model and answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint and answer.created > 1_600_000_000
    assert choice.message.role == "assistant" and isinstance(choice.message.content, str)
    assert choice.finish_reason in ("length", "stop") and choice.logprobs is None
    usage = answer.usage
    assert usage is not None and usage.prompt_tokens > 5 and 1 <= usage.completion_tokens <= 12
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None and usage.prompt_tokens_details.cached_tokens is not None
    if choice.finish_reason == "length":
        assert usage.completion_tokens == 12


def test_chat_stream_is_the_answer_in_pieces(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": QUESTION, "max_tokens": 24, "temperature": 0.8, "seed": 5}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    *body, last = chunks
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1
    assert body[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in body[1:])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in body)
    assert text == whole.choices[0].message.content
    finishes = [chunk.choices[0].finish_reason for chunk in body]
    assert finishes[-1] == whole.choices[0].finish_reason and not any(finishes[:-1])
    assert all(chunk.usage is None for chunk in body)
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


def test_n_samples_differ_and_are_numbered(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": QUESTION, "max_tokens": 16, "seed": 11, "n": 3}
    whole = client.chat.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) > 1
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_seed_decides(client: openai.OpenAI, model: str) -> None:
    def text(seed: int) -> str | None:
        answer = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=16, seed=seed)
        return answer.choices[0].message.content

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_token_ids_come_with_every_event(http: httpx.Client, model: str) -> None:
    body: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    body["return_token_ids"] = True
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    assert len(choice["token_ids"]) == 12
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
    events = [json.loads(line)["choices"][0] for line in lines]
    assert [token_id for event in events for token_id in event["token_ids"]] == choice["token_ids"]
    assert "".join(event["text"] for event in events) == choice["text"]
    del body["return_token_ids"]
    assert "token_ids" not in http.post("/v1/completions", json=body).json()["choices"][0]


def test_stop_string_is_cut(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 60}
    asked["extra_body"] = {"ignore_eos": True}  # an answer long enough to be cut, whatever the model
    full = client.chat.completions.create(**asked).choices[0].message.content
    assert full is not None and len(full) > 12
    middle = len(full) // 2
    stop = full[middle : middle + 3]
    whole = client.chat.completions.create(**asked, stop=[stop, "\0never"])
    choice = whole.choices[0]
    assert choice.message.content == full[: full.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.model_extra is not None and choice.model_extra["stop_reason"] == stop
    pieces = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stop=stop, stream=True)]
    assert "".join(piece.delta.content or "" for piece in pieces) == choice.message.content
    assert pieces[-1].finish_reason == "stop"


def test_chat_logprobs(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": QUESTION, "max_tokens": 10, "temperature": 0}
    choice = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    content = choice.logprobs.content
    for entry in content:
        assert entry.logprob <= 0 and entry.bytes is not None and len(entry.top_logprobs) == 3
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert entry.token == bytes(entry.bytes).decode("utf-8", "replace")
    if choice.finish_reason == "length":
        raw = b"".join(bytes(entry.bytes or []) for entry in content)
        assert raw.decode("utf-8", "replace") == choice.message.content
    streamed = [
        entry
        for chunk in client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True)
        for entry in (chunk.choices[0].logprobs.content or [] if chunk.choices[0].logprobs else [])
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    bare = client.chat.completions.create(**asked, logprobs=True).choices[0].logprobs
    assert bare is not None and bare.content is not None and bare.content[0].top_logprobs == []


def test_text_parts_are_one_text(client: openai.OpenAI, http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "of the sea ☕"}]
    joined = http.post("/tokenize", json={"messages": [{"role": "user", "content": parts}]}).json()
    assert joined == http.post("/tokenize", json={"messages": QUESTION}).json()


# ---- completions


def test_completion_of_text_and_of_ids(client: openai.OpenAI, http: httpx.Client, model: str) -> None:
    ids = http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    by_text = client.completions.create(model=model, prompt=PROMPT, temperature=0)
    by_ids = client.completions.create(model=model, prompt=ids, temperature=0)
    assert by_text.object == "text_completion" and by_text.id.startswith("cmpl-")
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert by_text.usage is not None and by_text.usage.prompt_tokens == len(ids)
    assert by_text.usage.completion_tokens <= 16, "OpenAI's default"
    streamed = list(client.completions.create(model=model, prompt=PROMPT, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == by_text.choices[0].text
    assert streamed[-1].choices[0].finish_reason == by_text.choices[0].finish_reason


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_are_numbered_as_openai_does(
    client: openai.OpenAI, http: httpx.Client, model: str, stream: bool
) -> None:
    prompts = [PROMPT, "Two and two are", "Red, green and"]
    asked: dict[str, Any] = {"model": model, "max_tokens": 6, "temperature": 0}
    single = [client.completions.create(**asked, prompt=prompt).choices[0].text for prompt in prompts]
    ids = [http.post("/tokenize", json={"prompt": prompt}).json()["tokens"] for prompt in prompts]
    for several in (prompts, ids):
        texts = [""] * 6
        if stream:
            for chunk in client.completions.create(**asked, prompt=several, n=2, stream=True):
                texts[chunk.choices[0].index] += chunk.choices[0].text
        else:
            answer = client.completions.create(**asked, prompt=several, n=2)
            assert [choice.index for choice in answer.choices] == list(range(6))
            texts = [choice.text for choice in answer.choices]
            assert answer.usage is not None and answer.usage.prompt_tokens == sum(map(len, ids))
        assert texts == [text for text in single for _ in range(2)]


def test_completion_logprobs_and_offsets(client: openai.OpenAI, model: str) -> None:
    choice = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=2).choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.text_offset is not None
    assert logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    for name, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[name] == value and 2 <= len(top) <= 3
    for name, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if not name.startswith(("bytes:", "<")):
            assert choice.text[offset : offset + len(name)] in (name, "")


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_prompt_logprobs(client: openai.OpenAI, http: httpx.Client, model: str, stream: bool) -> None:
    asked: dict[str, Any] = {"model": model, "max_tokens": 4, "temperature": 0, "logprobs": 1}
    ids = http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    plain = client.completions.create(**asked, prompt=PROMPT).choices[0]
    tokens: list[str] = []
    values: list[float | None] = []
    offsets: list[int] = []
    if stream:
        text = ""
        for chunk in client.completions.create(**asked, prompt=ids, echo=True, stream=True):
            text += chunk.choices[0].text
            if (part := chunk.choices[0].logprobs) is not None:
                tokens += part.tokens or []
                values += part.token_logprobs or []
                offsets += part.text_offset or []
    else:
        choice = client.completions.create(**asked, prompt=PROMPT, echo=True).choices[0]
        text, part = choice.text, choice.logprobs
        assert part is not None
        tokens, values, offsets = part.tokens or [], list(part.token_logprobs or []), part.text_offset or []
    assert text == PROMPT + plain.text
    assert plain.logprobs is not None and plain.logprobs.tokens is not None
    assert len(tokens) == len(ids) + len(plain.logprobs.tokens) and tokens[len(ids) :] == plain.logprobs.tokens
    assert values[0] is None and None not in values[1:]
    assert offsets[0] == 0 and offsets[len(ids)] == len(PROMPT)


def test_echo_without_output(client: openai.OpenAI, http: httpx.Client, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    prompts = [PROMPT, "Two and two are"]
    counts = [http.post("/tokenize", json={"prompt": prompt}).json()["count"] for prompt in prompts]
    answer = client.completions.create(**asked, prompt=prompts)
    for choice, prompt, count in zip(answer.choices, prompts, counts, strict=True):
        assert (choice.text, choice.finish_reason) == (prompt, "length") and choice.logprobs is not None
        assert len(choice.logprobs.token_logprobs or []) == len(choice.logprobs.top_logprobs or []) == count
    assert answer.usage is not None and answer.usage.completion_tokens == 0
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(counts)
    chunks = list(client.completions.create(**asked, prompt=PROMPT, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT
    assert chunks[0].choices[0].logprobs == answer.choices[0].logprobs
    assert chunks[-1].choices[0].finish_reason == "length"


def test_echo_without_logprobs(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    plain = client.completions.create(**asked).choices[0].text
    assert client.completions.create(**asked, echo=True).choices[0].text == PROMPT + plain
    streamed = client.completions.create(**asked, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == PROMPT + plain


def test_stop_token_ids_end_a_sample(client: openai.OpenAI, http: httpx.Client, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 0}
    full = client.completions.create(**asked).choices[0]
    assert full.logprobs is not None and full.logprobs.tokens is not None
    stop = next(name for name in full.logprobs.tokens if not name.startswith("bytes:"))
    (stop_id,) = http.post("/tokenize", json={"prompt": stop}).json()["tokens"]
    choice = client.completions.create(**asked, extra_body={"stop_token_ids": [stop_id]}).choices[0]
    assert choice.finish_reason == "stop" and full.text.startswith(choice.text) and choice.text != full.text


# ---- the other endpoints


def test_models(client: openai.OpenAI, model: str) -> None:
    card = client.models.retrieve(model)
    assert card.id == model and card.object == "model" and card.owned_by == "phasewise" and card.created > 0
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("org/other")


def test_tokenize_and_detokenize(http: httpx.Client) -> None:
    text = "naïve ☕ tokens"
    answer = http.post("/tokenize", json={"prompt": text}).json()
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] > 0
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    both = http.post("/tokenize", json={"prompt": "a", "messages": QUESTION})
    assert both.status_code == 400 and both.json()["error"]["param"] == "prompt"
    wrong = http.post("/detokenize", json={"tokens": [1, 10**9]})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "tokens[1]"


def test_health_status_metrics(http: httpx.Client) -> None:
    for path in ("/health", "/health/ready", "/health/live"):
        assert http.get(path).json() == {"status": "ok"}
        head = http.head(path)
        assert (head.status_code, head.content) == (200, b"")
    assert "workers" in http.get("/status").json()
    metrics = http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain") and "# TYPE" in metrics.text


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    assert http.get("/v2/nothing").status_code == 404
    answer = http.get("/v1/chat/completions")
    assert answer.status_code == 405
    assert answer.json()["error"]["type"] == "invalid_request_error"


# ---- headers


def test_request_id_is_kept(http: httpx.Client, model: str) -> None:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1}
    answer = http.post("/v1/completions", json=body, headers={"x-request-id": "my-id-7"})
    assert answer.headers["x-request-id"] == "my-id-7" and answer.json()["id"] == "cmpl-my-id-7"
    made = [http.post("/v1/completions", json=body).headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    bad = http.post("/v1/completions", json=body, headers={"x-request-id": "a b"})
    assert bad.status_code == 400 and bad.json()["error"]["param"] == "request_id"


def test_timeline_on_request(http: httpx.Client, model: str) -> None:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 3, "ignore_eos": True}
    assert "timeline" not in http.post("/v1/completions", json=body).json()
    headers = {"x-phasewise-timeline": "1"}
    timeline = http.post("/v1/completions", json=body, headers=headers).json()["timeline"]
    assert timeline["prefill_worker"] and timeline["decode_worker"]
    stages = [event["stage"] for event in timeline["events"]]
    assert "received" in stages
    assert [e["at_unix_s"] for e in timeline["events"]] == sorted(e["at_unix_s"] for e in timeline["events"])
    lines = http.post("/v1/completions", json={**body, "stream": True}, headers=headers).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    last = json.loads(lines[-2].removeprefix("data: "))
    assert [event["stage"] for event in last["timeline"]["events"]] == stages and last["choices"] == []


def test_event_stream_form(http: httpx.Client, model: str) -> None:
    answer = http.post("/v1/completions", json={"model": model, "prompt": PROMPT, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    events = answer.text.split("\n\n")
    assert events.pop() == "" and events.pop() == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events)


# ---- a client that leaves


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(http: httpx.Client, base_url: str, model: str, stream: bool) -> None:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, "stream": stream, "n": 2}
    with httpx.Client(base_url=base_url, timeout=60) as leaving:
        if stream:
            with leaving.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()  # held: an iterator that is thrown away closes the connection
                assert next(lines).startswith("data: ")
                assert open_requests(http) == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post("/v1/completions", json=body, timeout=0.5)
    wait_until_idle(http, within_s=3.0)


def test_a_client_that_leaves_ends_all_its_prompts(http: httpx.Client, base_url: str, model: str) -> None:
    body = {"model": model, "prompt": [PROMPT, "And"], "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=base_url, timeout=60) as leaving,
        leaving.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()  # held: an iterator that is thrown away closes the connection
        assert next(lines).startswith("data: ")
        assert open_requests(http) == 2
    wait_until_idle(http, within_s=3.0)
