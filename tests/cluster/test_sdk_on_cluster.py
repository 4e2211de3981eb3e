"""The SDK against a real cluster of processes: errors, cancellation, tokenising, log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import phasewise
from phasewise.rpc import phasewise_pb2 as pb
from tests.support.served import Served, held, until

pytestmark = pytest.mark.cluster


@pytest.fixture
def client(cluster: Served) -> Iterator[phasewise.Client]:
    with phasewise.Client(cluster.grpc, timeout_s=60, max_retries=0) as client:
        yield client


BAD_REQUESTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "prompt too long": ({"token_ids": [1] * 9000}, "token_ids", "9000.*8192"),
    "prompt and output too long": ({"token_ids": [1] * 100, "max_tokens": 9000}, "max_tokens", "9100.*8192"),
    "empty prompt": ({"prompt": ""}, "text", "empty"),
    "no tokens": ({"token_ids": []}, "token_ids", "empty"),
    "unknown model": ({"prompt": "a", "model": "gpt-9"}, "model", "gpt-9"),
    "token id out of range": ({"token_ids": [1, 320]}, "token_ids", "320"),
    "negative token id": ({"token_ids": [-1]}, "token_ids", "-1"),
    "negative temperature": ({"prompt": "a", "temperature": -0.5}, "temperature", "-0.5"),
    "nan": ({"prompt": "a", "top_p": float("nan")}, "top_p", "nan"),
    "huge n": ({"prompt": "a", "n": 100_000}, "n", "128"),
    "zero max_tokens": ({"prompt": "a", "max_tokens": 0}, "max_tokens", "at least 1"),
    "huge logprobs": ({"prompt": "a", "logprobs": 1000}, "logprobs", "20"),
    "empty stop": ({"prompt": "a", "stop": [""]}, "stop", "empty"),
    "logit bias out of range": ({"prompt": "a", "logit_bias": {5000: 1.0}}, "logit_bias", "5000"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request_names_field_and_remedy_and_the_cluster_serves_on(client: phasewise.Client, name: str) -> None:
    request, field, pattern = BAD_REQUESTS[name]
    with pytest.raises(phasewise.InvalidRequest, match=f"(?s){pattern}") as caught:
        client.generate(**request)
    assert caught.value.field.startswith(field)
    assert not caught.value.retry_safe
    assert client.generate(token_ids=[1, 2], max_tokens=2, ignore_eos=True).usage.num_output_tokens == 2


def test_unknown_fields_are_refused_and_not_ignored(cluster: Served) -> None:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]))
    top = request.SerializeToString() + b"\xf8\x3f\x01"  # field 1023, a varint
    request.sampling.max_tokens = 3
    sampling = request.sampling.SerializeToString() + b"\xf8\x3f\x01"
    nested = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), sampling=pb.Sampling.FromString(sampling))
    with grpc.insecure_channel(cluster.grpc) as channel:
        call = channel.unary_stream("/phasewise.v1.Inference/Generate")
        for body, place in ((top, "GenerateRequest"), (nested.SerializeToString(), "sampling")):
            with pytest.raises(grpc.RpcError) as caught:
                list(call(body, timeout=30))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "1023" in caught.value.details()
            assert place in caught.value.details()


def test_wrong_role_order_in_chat(client: phasewise.Client) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(phasewise.InvalidRequest, match="roles must alternate") as caught:
        client.chat(messages)
    assert caught.value.field.startswith("messages")


def test_deadline(client: phasewise.Client, cluster: Served) -> None:
    with pytest.raises(phasewise.DeadlineExceeded):
        client.generate(token_ids=[1] * 4000, max_tokens=4000, ignore_eos=True, timeout_s=0.5)
    until(lambda: not held(cluster.status()), 10.0)


def test_tokenize_and_back(client: phasewise.Client) -> None:
    text = "naïve ☕ 👩‍🚀"
    ids = client.tokenize(text)
    assert client.detokenize(ids) == text
    chat = client.tokenize(messages=[{"role": "user", "content": "hi"}])
    assert client.detokenize(chat) == "<user>hi\n<assistant>"


def test_prompt_logprobs_and_logprobs_over_a_handoff(client: phasewise.Client) -> None:
    done = client.generate(token_ids=[5, 6, 7, 8], max_tokens=4, logprobs=2, prompt_logprobs=1, temperature=0.0)
    assert [token.token_id for token in done.prompt_tokens] == [5, 6, 7, 8]
    assert done.prompt_tokens[0].logprob is None
    assert all(token.logprob is not None and token.logprob < 0 for token in done.prompt_tokens[1:])
    for token in done.samples[0].tokens:
        assert token.top_logprobs[0].token_id == token.token_id, "greedy takes the most likely"
        assert len(token.top_logprobs) == 2


def test_health_and_model(client: phasewise.Client, cluster: Served) -> None:
    with grpc.insecure_channel(cluster.grpc) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert client.model().context_length == 8192


def test_metrics_add_up(client: phasewise.Client, cluster: Served) -> None:
    import urllib.request

    from prometheus_client.parser import text_string_to_metric_families

    def scrape() -> dict[str, float]:
        with urllib.request.urlopen(f"http://{cluster.http}/metrics", timeout=30) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
        return {s.name: s.value for family in families for s in family.samples if not set(s.labels) - {"model_name"}}

    before = scrape()
    client.generate(token_ids=list(range(100)), max_tokens=10, ignore_eos=True)
    after = scrape()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["vllm:generation_tokens_total"] == 10
    assert grown["vllm:prompt_tokens_total"] == 100
    assert grown["vllm:time_to_first_token_seconds_count"] == 1
    assert grown["vllm:inter_token_latency_seconds_count"] == 9
    assert grown["phasewise_handoff_bytes_count"] == 1
