"""The blocking SDK against a real server."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice

import grpc
import pytest

import phasewise
from phasewise.client import Client
from phasewise.core.errors import (
    ConfigError,
    DeadlineExceeded,
    DuplicateRequest,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RequestCancelled,
    ServingError,
    Unavailable,
    WorkerLost,
)
from phasewise.core.request import FinishReason
from phasewise.results import Model, PlacedOn, TimelineEvent, Usage
from phasewise.rpc.status import from_status
from tests.phasewise.scripted_service import (
    WAIT_S,
    Attempt,
    ScriptedService,
    Serving,
    all_errors,
    chat_text,
    serve_in_thread,
)


def test_generate_gives_everything_of_every_sample(client: Client) -> None:
    completion = client.generate(
        "abcd", n=2, max_tokens=3, logprobs=2, prompt_logprobs=0, timeline=True, request_id="mine"
    )
    assert completion.request_id == "mine"
    assert completion.texts == ("dcb", "dcb")
    assert completion.text == "dcb" and completion.token_ids == (100, 99, 98)
    assert completion.finish_reasons == (FinishReason.LENGTH, FinishReason.LENGTH)
    assert completion.usage == Usage(num_prompt_tokens=4, num_output_tokens=6, num_cached_tokens=1)
    first = completion.tokens[0]
    assert (first.token_id, first.text, first.raw, first.logprob) == (100, "d", b"d", -0.5)
    assert [(t.token_id, t.raw, t.logprob) for t in first.top_logprobs] == [(100, b"d", -0.5), (101, b"e", -1.5)]
    assert [t.logprob for t in completion.prompt_tokens] == [None, -0.5, -0.5, -0.5]
    assert completion.placement == PlacedOn("prefill-0", "decode-0", attempt=2)
    assert completion.timeline[1] == TimelineEvent("handoff_end", 1000.75, "decode-0", 4096, 0.125)


def test_timeline_comes_only_on_request(client: Client) -> None:
    completion = client.generate("ab", max_tokens=1)
    assert completion.timeline == () and completion.placement is None and completion.tokens == ()


def test_every_option_reaches_the_service(client: Client, service: ScriptedService) -> None:
    client.generate(
        token_ids=[7, 8],
        n=1,
        max_tokens=2,
        temperature=0.7,
        top_p=0.9,
        top_k=-1,
        min_p=0.05,
        presence_penalty=0.1,
        frequency_penalty=-0.1,
        repetition_penalty=1.1,
        logit_bias={5: -100.0},
        seed=-(2**63),
        logprobs=0,
        prompt_logprobs=0,
        stop="end",
        stop_token_ids=[9],
        ignore_eos=True,
        model="bytes",
        cache_salt="tenant",
        timeout_s=30,
    )
    (request,) = service.requests
    assert list(request.token_ids or ()) == [7, 8] and request.text is None and request.messages is None
    assert (request.model, request.cache_salt) == ("bytes", "tenant")
    assert request.timeout_s is not None and 0 < request.timeout_s < 31
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.7, 0.9, 0.05), "doubles, bit for bit"
    assert (sampling.top_k, sampling.seed, sampling.logprobs, sampling.n) == (-1, -(2**63), 0, 1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.1, -0.1, 1.1)
    assert sampling.logit_bias == {5: -100.0} and sampling.stop == ("end",) and sampling.stop_token_ids == (9,)
    assert sampling.prompt_logprobs == 0 and sampling.ignore_eos


def test_what_is_not_given_stays_absent(client: Client, service: ScriptedService) -> None:
    client.generate("ab", max_tokens=None, timeout_s=None)
    (request,) = service.requests
    assert request.sampling.seed is not None, "an answer must be able to go on elsewhere"
    assert request.sampling.max_tokens is None and request.sampling.logit_bias is None
    assert request.timeout_s is None and request.model is None
    assert request.request_id is not None, "a retry must be recognisable"


def test_stream_gives_deltas_and_then_the_whole(client: Client) -> None:
    with client.stream("abc", max_tokens=5) as stream:
        text = "".join(delta.text for delta in stream)
        assert text == "cbacb"
        assert stream.completion().text == text
        assert stream.completion().usage.num_output_tokens == 5
        with pytest.raises(StopIteration):
            next(stream)


def test_chat_whole_and_streamed(client: Client, service: ScriptedService) -> None:
    messages = [{"role": "user", "content": "grüß"}]
    prompt = chat_text(tuple(messages))
    expected = prompt.encode()[::-1][:4].decode()
    assert client.chat(messages, max_tokens=4).text == expected
    assert "".join(delta.text for delta in client.chat(messages, stream=True, max_tokens=4)) == expected
    assert service.requests[0].messages == tuple(messages)


def test_tokenize_detokenize_model(client: Client) -> None:
    assert client.tokenize("abc") == [97, 98, 99]
    assert client.tokenize(messages=[{"role": "user", "content": "x"}]) == list(b"user:x\nassistant:")
    assert client.detokenize([97, 98]) == "ab"
    assert client.model() == Model("bytes", 4096, 256, "float32", 1_700_000_000, (0,), True)
    with pytest.raises(ModelNotFound) as caught:
        client.tokenize("a", model="other")
    assert caught.value.field == "model"


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: error.code)
def test_every_error_class_comes_back_as_itself(
    error: ServingError, serving: Serving, service: ScriptedService
) -> None:
    service.script(Attempt(error, refuse=True), Attempt(error, num_tokens=1))
    with Client(serving.target, max_retries=0) as client:
        with pytest.raises(type(error)) as refused:
            client.generate("ab")
        stream = client.stream("ab")
        assert next(stream).text == "b", "what came before the error is not lost"
        with pytest.raises(type(error)) as failed:
            next(stream)
    for caught in (refused.value, failed.value):
        assert type(caught) is type(error)
        assert (caught.message, caught.field, caught.retry_after_s) == (error.message, error.field, 1.5)
        assert caught.retry_safe == error.retry_safe


def test_a_fault_of_the_server_is_told_without_its_inside(client: Client, service: ScriptedService) -> None:
    service.script(Attempt(ZeroDivisionError("secret path"), num_tokens=1))
    with pytest.raises(InternalError) as caught:
        client.generate("ab", request_id="r-77")
    assert "r-77" in str(caught.value) and "secret" not in str(caught.value)


def test_a_long_error_message_still_arrives(client: Client, service: ScriptedService) -> None:
    service.script(Attempt(InvalidRequest("ü" * 20_000, field="f" * 20_000), refuse=True))
    with pytest.raises(InvalidRequest) as caught:
        client.generate("ab")
    assert caught.value.message.startswith("üüü") and caught.value.field.startswith("fff")


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "token_ids": [1]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"token_ids": [-1]}, "token_ids"),
        ({"token_ids": ["a"]}, "token_ids"),
        ({"prompt": "a", "max_tokens": 2**40}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"prompt": "a", "stop": [1]}, "stop"),
        ({"prompt": "a", "timeout_s": 0}, "timeout_s"),
        ({"prompt": "a" * (2 << 20)}, "prompt"),
    ],
)
def test_wrong_input_names_its_field(kwargs: dict[str, object], field: str, client: Client) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate(**kwargs)  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": "x", "name": "y"}, "text"])
def test_wrong_messages_name_their_place(message: dict[str, str], client: Client) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.chat([{"role": "user", "content": "x"}, message])
    assert caught.value.field == "messages[1]"


def test_an_unknown_keyword_is_refused_with_the_nearest(client: Client) -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        client.generate("a", max_token=3)  # type: ignore[call-arg]


def test_break_cancels_although_the_stream_is_kept(client: Client, service: ScriptedService) -> None:
    service.script(Attempt(num_tokens=2))
    stream = client.stream("abc")
    for _ in stream:
        break
    assert service.last.closed.wait(WAIT_S)
    with pytest.raises(RequestCancelled):
        next(stream)
    with pytest.raises(RequestCancelled):
        stream.completion()


def test_an_exception_in_the_loop_cancels(client: Client, service: ScriptedService) -> None:
    service.script(Attempt(num_tokens=1))

    def consume() -> None:
        for _ in client.stream("abc"):
            raise KeyError("the caller's own")

    with pytest.raises(KeyError):
        consume()
    assert service.last.closed.wait(WAIT_S)


def test_generator_with_islice_dropped_and_never_read_all_cancel(client: Client, service: ScriptedService) -> None:
    service.script(Attempt(num_tokens=3), Attempt(num_tokens=3))
    assert [delta.text for delta in islice(client.stream("abc"), 2)] == ["c", "b"]
    assert service.accepted.acquire(timeout=WAIT_S)
    assert service.last.closed.wait(WAIT_S)
    stream = client.stream("abc")
    assert service.accepted.acquire(timeout=WAIT_S), "sent at once, before the first next"
    del stream
    gc.collect()
    assert service.last.closed.wait(WAIT_S)


def test_close_from_another_thread_ends_a_blocked_read(client: Client, service: ScriptedService) -> None:
    service.script(Attempt(num_tokens=1))
    stream = client.stream("abc")
    assert next(stream).text == "c"
    closer = threading.Thread(target=lambda: (service.last.silent.wait(WAIT_S), stream.close()))
    closer.start()
    with pytest.raises(RequestCancelled):
        next(stream)
    closer.join(WAIT_S)
    assert service.last.closed.wait(WAIT_S)


def test_closing_the_client_ends_what_is_open(serving: Serving, service: ScriptedService) -> None:
    service.script(Attempt(num_tokens=1))
    client = Client(serving.target)
    stream = client.stream("abc")
    next(stream)
    client.close()
    client.close()
    with pytest.raises(RequestCancelled):
        next(stream)
    assert service.last.closed.wait(WAIT_S)
    with pytest.raises(RuntimeError, match="closed"):
        client.generate("a")


def test_the_deadline_reaches_the_server_and_ends_the_request(client: Client, service: ScriptedService) -> None:
    service.script(Attempt(num_tokens=1))
    with pytest.raises(DeadlineExceeded, match="timeout_s"):
        client.generate("abc", timeout_s=0.5)
    assert service.last.closed.wait(WAIT_S)
    (request,) = service.requests
    assert request.timeout_s is not None and 0 < request.timeout_s < 0.6, "gRPC rounds a little"


def test_a_safe_error_is_retried_with_the_same_request_id(client: Client, service: ScriptedService) -> None:
    service.script(Attempt(Overloaded("full"), refuse=True), Attempt(WorkerLost("gone"), num_tokens=2))
    completion = client.generate("abc", max_tokens=3)
    assert completion.text == "cba" and completion.token_ids == (99, 98, 97)
    assert len(service.requests) == 3
    (so_far,) = service.requests[-1].resume_after
    assert list(so_far.token_ids) == [99, 98], "the failed attempt brought them"
    assert {request.request_id for request in service.requests} == {completion.request_id}


def test_a_stream_that_its_gateway_has_given_up_is_not_tried_again(client: Client, service: ScriptedService) -> None:
    service.script(Attempt(Unavailable("starting"), refuse=True), Attempt(WorkerLost("gone"), num_tokens=1))
    stream = client.stream("abc")
    assert next(stream).text == "c"
    with pytest.raises(WorkerLost):
        next(stream)
    with pytest.raises(WorkerLost):
        next(stream)
    assert len(service.requests) == 2


@pytest.mark.parametrize("error", [InternalError("bug"), InvalidRequest("no"), DuplicateRequest("open")])
def test_an_unsafe_error_is_not_retried(error: ServingError, client: Client, service: ScriptedService) -> None:
    service.script(Attempt(error, refuse=True))
    with pytest.raises(type(error)):
        client.generate("abc")
    assert len(service.requests) == 1


def test_retries_are_bounded(client: Client, service: ScriptedService) -> None:
    service.script(*[Attempt(Overloaded("full"), refuse=True)] * 10)
    with pytest.raises(Overloaded):
        client.generate("abc")
    assert len(service.requests) == 4


def test_a_hint_beyond_the_deadline_ends_the_call_at_once(client: Client, service: ScriptedService) -> None:
    service.script(Attempt(Overloaded("full", retry_after_s=3600), refuse=True))
    with pytest.raises(Overloaded) as caught:
        client.generate("abc", timeout_s=30)
    assert caught.value.retry_after_s == 3600 and len(service.requests) == 1


def test_failover_to_another_target(serving: Serving) -> None:
    with serve_in_thread(ScriptedService()) as other:
        dead = other.target
    with Client(f"{dead}, {serving.target}", max_retries=1) as client:
        for _ in range(4):
            assert client.generate("ab", max_tokens=2).text == "ba"
            assert client.model().name == "bytes"
    with Client(dead, max_retries=0) as client, pytest.raises(Unavailable, match=dead):
        client.model()


def test_calls_are_spread_over_all_targets(serving: Serving, service: ScriptedService) -> None:
    other_service = ScriptedService()
    with serve_in_thread(other_service) as other, Client([serving.target, other.target]) as client:
        for _ in range(8):
            client.generate("ab", max_tokens=1)
    assert len(service.requests) == len(other_service.requests) == 4


@contextmanager
def two_gateways(*attempts: Attempt) -> Iterator[tuple[Client, Callable[[], tuple[ScriptedService, ScriptedService]]]]:
    """A client of two gateways, and a function that waits until one of them has accepted the client's request and is
    silent, stops that one, and returns both services, that one first. `attempts` are what becomes of the request there,
    and of the next ones at the other."""
    services = [ScriptedService(num_deltas_at_once=1) for _ in range(2)]
    services[1].accepted = services[0].accepted
    for service in services:
        service.script(attempts[0])
    with (
        serve_in_thread(services[0]) as one,
        serve_in_thread(services[1]) as two,
        Client([one.target, two.target]) as client,
    ):

        def stop_gateway() -> tuple[ScriptedService, ScriptedService]:
            assert services[0].accepted.acquire(timeout=WAIT_S)
            dying = 0 if services[0].streams else 1
            other = services[1 - dying]
            other.forget_script()
            other.script(*attempts[1:])
            assert services[dying].last.silent.wait(WAIT_S)
            (one, two)[dying].stop()
            return services[dying], other

        yield client, stop_gateway


def test_a_dead_gateway_is_survived_by_a_whole_generation() -> None:
    with two_gateways(Attempt(num_tokens=2)) as (client, stop_gateway), ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.generate, "abc", max_tokens=4)
        dead, other = stop_gateway()
        assert future.result(WAIT_S).text == "cbac"
    assert dead.last.closed.is_set()
    assert other.requests[0].request_id == dead.requests[0].request_id


def test_a_stream_goes_on_when_its_gateway_dies() -> None:
    busy = Attempt(Overloaded("full"), refuse=True)
    with two_gateways(Attempt(num_tokens=3), busy) as (client, stop_gateway):
        stream = client.stream("abcdefg", n=2, max_tokens=7, logprobs=0, prompt_logprobs=0)
        deltas = [next(stream) for _ in range(6)]
        dead, other = stop_gateway()
        deltas += stream
        completion = stream.completion()
    for index in range(2):
        ids = [token_id for delta in deltas if delta.sample_index == index for token_id in delta.token_ids]
        assert bytes(ids).decode() == "gfedcba" == completion.samples[index].text
        assert len(completion.samples[index].tokens) == 7, "log-probabilities, too"
    assert len(completion.prompt_tokens) == 7 and completion.usage.num_output_tokens == 14
    before, (_, after) = dead.requests[0], other.requests
    assert before.request_id == after.request_id and before.sampling.seed == after.sampling.seed is not None
    assert [(s.sample_index, len(s.token_ids)) for s in after.resume_after] == [(0, 3), (1, 3)]


def test_many_threads_share_a_client(client: Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: client.generate(f"{i:03}", max_tokens=3).text, range(40)))
    assert texts == [f"{i:03}"[::-1] for i in range(40)]


def test_a_target_that_serves_something_else_is_a_config_error(serving: Serving) -> None:
    with grpc.insecure_channel(serving.target) as channel:
        call = channel.unary_unary("/phasewise.v1.Inference/NoSuchMethod")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=WAIT_S)
    error = from_status(caught.value.code(), caught.value.details(), (), target=serving.target)  # type: ignore[attr-defined]
    assert type(error) is ConfigError and error.field == "target"


@pytest.mark.parametrize("target", ["", [], ["a:1", ""]])
def test_a_wrong_target_is_refused(target: str | list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Client(target)
    assert caught.value.field == "target"


def test_the_public_names_are_there() -> None:
    assert all(hasattr(phasewise, name) for name in phasewise.__all__)
    assert phasewise.Client is Client
    with pytest.raises(AttributeError):
        _ = phasewise.NoSuchName
