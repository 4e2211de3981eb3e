"""Every check of a request: the field is named, the remedy is said, and what is right passes."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from control_plane.gateway.preparation import RequestLimits, RequestPreparer
from control_plane.gateway.service import GenerateInput, ModelCard, SampleSoFar, SamplingInput
from control_plane.gateway.text.tokenizer import TextTokenizer
from phasewise.core.errors import InvalidRequest, ModelNotFound
from phasewise.core.request import FinishReason
from phasewise.core.sampling_defaults import SamplingDefaults


@pytest.fixture
def card(smollm2_card: ModelCard) -> ModelCard:
    return replace(smollm2_card, context_length=64)


@pytest.fixture
def preparer(smollm2_tokenizer: TextTokenizer, card: ModelCard) -> RequestPreparer:
    return RequestPreparer(smollm2_tokenizer, card, RequestLimits(), random.Random(1))


def given(text: str | None = "Hello world", **sampling: Any) -> GenerateInput:
    return GenerateInput(text=text, sampling=SamplingInput(**sampling))


def test_defaults_of_a_completion(preparer: RequestPreparer) -> None:
    prepared = preparer.prepare(given())
    sampling = prepared.request.sampling
    assert (sampling.n, sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (
        1,
        16,
        1.0,
        1.0,
        0,
    )
    assert sampling.stop_token_ids == (2, 0)
    assert prepared.timeout_s == 600.0 and prepared.continues_text
    assert len(prepared.request.request_id) == 32
    assert preparer.prepare(given()).request.sampling.seed != sampling.seed


def test_defaults_of_a_chat(preparer: RequestPreparer, smollm2_tokenizer: TextTokenizer, card: ModelCard) -> None:
    chat = GenerateInput(messages=({"role": "user", "content": "Hi"},))
    prepared = preparer.prepare(chat)
    assert prepared.request.sampling.max_tokens == 64 - len(prepared.request.prompt_token_ids)
    assert not prepared.continues_text
    limited = RequestPreparer(smollm2_tokenizer, card, RequestLimits(default_max_tokens=5, default_timeout_s=9.0))
    assert limited.prepare(chat).request.sampling.max_tokens == 5
    assert limited.prepare(chat).timeout_s == 9.0


def test_defaults_of_the_model(smollm2_tokenizer: TextTokenizer, card: ModelCard) -> None:
    own = SamplingDefaults(temperature=0.6, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.1, max_tokens=7)
    preparer = RequestPreparer(smollm2_tokenizer, replace(card, sampling=own), RequestLimits(default_max_tokens=None))
    sampling = preparer.prepare(given()).request.sampling
    values = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.repetition_penalty)
    assert values == (0.6, 0.9, 20, 0.05, 1.1)
    assert sampling.max_tokens == 16, "of a completion that names none"
    asked = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    sampling = preparer.prepare(given(**asked)).request.sampling
    assert {name: getattr(sampling, name) for name in asked} == asked, "what is given wins, also where it is 0"
    chat = GenerateInput(messages=({"role": "user", "content": "Hi"},))
    assert preparer.prepare(chat).request.sampling.max_tokens == 7
    longer = replace(chat, sampling=SamplingInput(max_tokens=9))
    assert preparer.prepare(longer).request.sampling.max_tokens == 9, "a default and no limit"
    preparer = RequestPreparer(smollm2_tokenizer, replace(card, sampling=own), RequestLimits(default_max_tokens=3))
    assert preparer.prepare(chat).request.sampling.max_tokens == 3, "the operator's word goes before the model's"


def test_everything_given_is_kept(preparer: RequestPreparer) -> None:
    sampling = SamplingInput(
        n=2, max_tokens=3, min_tokens=3, temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, presence_penalty=-2,
        frequency_penalty=2, repetition_penalty=1.5, logit_bias={7: -100, 3: 1.5}, seed=-(2**63), logprobs=20,
        prompt_logprobs=0, stop=("x",), stop_token_ids=(9, 2, 9), ignore_eos=True,
    )  # fmt: skip
    prepared = preparer.prepare(
        GenerateInput(token_ids=(5, 6), sampling=sampling, request_id="r-1", timeout_s=2.5, cache_salt="t")
    )
    request, params = prepared.request, prepared.request.sampling
    assert (request.request_id, request.prompt_token_ids, request.cache_salt) == ("r-1", (5, 6), "t")
    assert (prepared.stop, prepared.timeout_s) == (("x",), 2.5)
    assert params.logit_bias == ((3, 1.5), (7, -100.0))
    assert (params.top_k, params.seed, params.stop_token_ids) == (0, -(2**63), (9, 2))
    assert (params.n, params.max_tokens, params.min_tokens) == (2, 3, 3)
    assert (params.logprobs, params.prompt_logprobs) == (20, 0)
    assert (params.temperature, params.top_p, params.min_p, params.repetition_penalty) == (0.5, 0.9, 0.1, 1.5)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("n", 0, "1 to 128"),
        ("n", 129, "1 to 128"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", -1, "at least 1"),
        ("min_tokens", -1, "at least 0"),
        ("min_tokens", 17, "max_tokens 16, which is the default here"),
        ("temperature", -0.1, "0 to 2"),
        ("temperature", 2.01, "0 to 2"),
        ("temperature", math.nan, "finite"),
        ("temperature", math.inf, "finite"),
        ("top_p", -0.01, "0 to 1"),
        ("top_p", 1.01, "0 to 1"),
        ("top_k", -2, "at least -1"),
        ("min_p", 1.5, "0 to 1"),
        ("presence_penalty", -2.1, "-2 to 2"),
        ("frequency_penalty", 2.1, "-2 to 2"),
        ("repetition_penalty", 0.0, "0.01 to 100"),
        ("repetition_penalty", 1e-40, "0.01 to 100"),
        ("repetition_penalty", math.inf, "finite"),
        ("logit_bias", {49152: 1.0}, "0 to 49151"),
        ("logit_bias", {-1: 1.0}, "0 to 49151"),
        ("logit_bias", {1: 100.5}, "-100 to 100"),
        ("logit_bias", {1: math.nan}, "finite"),
        ("seed", 2**63, "9223372036854775807"),
        ("logprobs", 21, "0 to 20"),
        ("logprobs", -1, "0 to 20"),
        ("prompt_logprobs", 21, "0 to 20"),
        ("stop", ("a",) * 17, "at most 16"),
    ],
)
def test_values_out_of_range(preparer: RequestPreparer, field: str, value: Any, remedy: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        preparer.prepare(given(**{field: value}))
    assert caught.value.field == field
    assert field in caught.value.message and remedy in caught.value.message


@pytest.mark.parametrize(
    ("request_", "field", "words"),
    [
        (GenerateInput(), "text", ["exactly one", "none"]),
        (GenerateInput(text="a", token_ids=(1,)), "text", ["exactly one", "text and token_ids"]),
        (given(""), "text", ["empty"]),
        (GenerateInput(token_ids=()), "token_ids", ["empty"]),
        (GenerateInput(messages=()), "messages", ["empty"]),
        (GenerateInput(token_ids=(1, 49152)), "token_ids[1]", ["49152", "0 to 49151"]),
        (GenerateInput(token_ids=(-1,)), "token_ids[0]", ["-1"]),
        (GenerateInput(token_ids=(5,) * 64), "token_ids", ["64 tokens", "context is 64"]),
        (GenerateInput(token_ids=(5,) * 60, sampling=SamplingInput(max_tokens=5)), "max_tokens", ["65", "64", "to 4"]),
        (given(min_tokens=5, max_tokens=4), "min_tokens", ["min_tokens 5", "max_tokens 4", "lower min_tokens"]),
        (given(stop_token_ids=(1, 60000)), "stop_token_ids[1]", ["60000"]),
        (given(stop=("a", "")), "stop[1]", ["empty"]),
        (given(stop=("a" * 1001,)), "stop[0]", ["1001", "1000"]),
        (GenerateInput(text="a", request_id="a b"), "request_id", ["printable"]),
        (GenerateInput(text="a", request_id=""), "request_id", ["1 to 128"]),
        (GenerateInput(text="a", timeout_s=0.0), "timeout_s", ["above 0"]),
        (GenerateInput(text="a", timeout_s=math.nan), "timeout_s", ["finite"]),
    ],
)
def test_wrong_requests(preparer: RequestPreparer, request_: GenerateInput, field: str, words: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        preparer.prepare(request_)
    assert caught.value.field == field
    assert all(word in caught.value.message for word in words), caught.value.message


def test_a_context_that_is_used_up_exactly(preparer: RequestPreparer) -> None:
    exact = GenerateInput(token_ids=(5,) * 60, sampling=SamplingInput(max_tokens=4))
    assert preparer.prepare(exact).request.sampling.max_tokens == 4
    assert preparer.prepare(GenerateInput(token_ids=(5,) * 60)).request.sampling.max_tokens == 4
    assert preparer.prepare(GenerateInput(token_ids=(5,) * 63)).request.sampling.max_tokens == 1


@pytest.mark.parametrize("number", [5e-324, 1e-308, 1e-45, 1e-38, 1e-10, 9.99e-6, 0.0, -0.0])
def test_a_temperature_next_to_0_is_greedy(preparer: RequestPreparer, number: float) -> None:
    assert preparer.prepare(given(temperature=number)).request.sampling.temperature == 0.0
    assert preparer.prepare(given(temperature=1e-5)).request.sampling.temperature == 1e-5


def test_top_p_0_is_greedy(preparer: RequestPreparer) -> None:
    assert preparer.prepare(given(top_p=0.0, temperature=1.5)).request.sampling.temperature == 0.0
    assert preparer.prepare(given(top_p=5e-324, temperature=1.5)).request.sampling.temperature == 1.5


def test_top_k_of_the_whole_vocabulary_and_more_is_off(preparer: RequestPreparer) -> None:
    for top_k in (49152, 10**18, 10**400):
        assert preparer.prepare(given(top_k=top_k)).request.sampling.top_k == 0
    assert preparer.prepare(given(top_k=49151)).request.sampling.top_k == 49151


def test_no_output_is_for_those_who_ask_for_the_prompt(preparer: RequestPreparer) -> None:
    for asked in (replace(given(max_tokens=0), echo=True), given(max_tokens=0, prompt_logprobs=0)):
        params = preparer.prepare(asked).request.sampling
        assert (params.max_tokens, params.min_tokens) == (0, 0)
        full = replace(asked, text=None, token_ids=(5,) * 64)
        assert len(preparer.prepare(full).request.prompt_token_ids) == 64
        with pytest.raises(InvalidRequest, match="65 tokens, but the context is 64 tokens; shorten token_ids"):
            preparer.prepare(replace(full, token_ids=(5,) * 65))
        with pytest.raises(InvalidRequest, match="min_tokens 1 is more than max_tokens 0;"):
            preparer.prepare(replace(asked, sampling=replace(asked.sampling, min_tokens=1)))
    with pytest.raises(InvalidRequest, match="at least one of them for the output"):
        preparer.prepare(replace(full, sampling=SamplingInput(max_tokens=1, prompt_logprobs=0)))


def test_what_ends_a_sample(smollm2_tokenizer: TextTokenizer, card: ModelCard) -> None:
    small = RequestPreparer(smollm2_tokenizer, replace(card, vocab_size=4, eos_token_ids=(2, 9, -1)), RequestLimits())

    def ends(**sampling: Any) -> tuple[int, ...]:
        asked = GenerateInput(token_ids=(1, 2), sampling=SamplingInput(**sampling))
        return small.prepare(asked).request.sampling.stop_token_ids

    assert ends(min_tokens=1) == (2,)  # 9 and -1 are no tokens of this model
    assert ends(min_tokens=1, stop_token_ids=(0, 1)) == (2, 0, 1)
    assert ends(stop_token_ids=(0, 1, 3)) == (2, 0, 1, 3)
    assert ends(min_tokens=1, stop_token_ids=(0, 1, 3), ignore_eos=True) == (0, 1, 3)
    with pytest.raises(InvalidRequest, match="all 4 tokens of this model end a sample; give fewer stop_token_ids") as e:
        ends(min_tokens=1, stop_token_ids=(0, 1, 3, 3))
    assert e.value.field == "min_tokens"


def test_more_samples_than_a_worker_can_hold(smollm2_tokenizer: TextTokenizer, card: ModelCard) -> None:
    preparer = RequestPreparer(smollm2_tokenizer, card, RequestLimits(num_kv_blocks=4, block_size=16))
    fits = GenerateInput(token_ids=(5,) * 33, sampling=SamplingInput(n=2, max_tokens=30))
    assert preparer.prepare(fits).request.sampling.n == 2
    with pytest.raises(InvalidRequest, match=r"need 5 KV blocks, but a worker has 4; lower n") as caught:
        preparer.prepare(replace(fits, sampling=SamplingInput(n=3, max_tokens=30)))
    assert caught.value.field == "n"


def test_another_model_is_not_found(preparer: RequestPreparer, card: ModelCard) -> None:
    with pytest.raises(ModelNotFound, match=f"'gpt-5'.*use '{card.name}'"):
        preparer.prepare(replace(given(), model="gpt-5"))
    assert preparer.prepare(replace(given(), model=card.name)).request.prompt_token_ids


def test_lists_of_ids_are_refused_by_their_number_before_anyone_looks_at_an_id(preparer: RequestPreparer) -> None:
    class Many(Sequence[int]):
        def __len__(self) -> int:
            return 8_000_000

        def __getitem__(self, index: Any) -> Any:
            raise AssertionError("an id was looked at")

    with pytest.raises(InvalidRequest, match="at most 256"):
        preparer.prepare(given(stop_token_ids=Many()))
    with pytest.raises(InvalidRequest, match="8000000 tokens"):
        preparer.prepare(GenerateInput(token_ids=Many()))
    with pytest.raises(InvalidRequest, match="8000000 ids"):
        preparer.check_detokenize(Many())


@pytest.mark.parametrize(
    ("samples", "match"),
    [
        ([SampleSoFar(1, [97])], "names sample 1"),
        ([SampleSoFar(0, [97]), SampleSoFar(0, [98])], "names sample 0"),
        ([SampleSoFar(0, [])], "0 tokens"),
        ([SampleSoFar(0, [97] * 4)], "4 tokens and goes on"),
        ([SampleSoFar(0, [97] * 5, FinishReason.LENGTH)], "5 tokens"),
        ([SampleSoFar(0, [97], FinishReason.ABORT)], "aborted"),
        ([SampleSoFar(0, [-1])], r"resume_after\[0\] is -1"),
    ],
)
def test_an_answer_that_cannot_have_come_is_refused(
    samples: list[SampleSoFar], match: str, preparer: RequestPreparer
) -> None:
    sampling = SamplingInput(max_tokens=4, stop=("lo wo",))
    with pytest.raises(InvalidRequest, match=match) as caught:
        preparer.prepare(GenerateInput(token_ids=(1, 2), sampling=sampling, resume_after=samples))
    assert caught.value.field.startswith("resume_after")


def test_an_answer_does_not_go_on_behind_a_stop_string(
    preparer: RequestPreparer, smollm2_tokenizer: TextTokenizer
) -> None:
    so_far = [SampleSoFar(0, smollm2_tokenizer.encode("Hello world"))]
    for stop, is_taken in (("lo wo", False), ("lo wa", True)):
        sampling = SamplingInput(max_tokens=8, stop=(stop,))
        asked = GenerateInput(text="a", sampling=sampling, resume_after=so_far)
        if is_taken:
            assert preparer.prepare(asked).samples[0].token_ids == list(so_far[0].token_ids)
        else:
            with pytest.raises(InvalidRequest, match="behind a stop string"):
                preparer.prepare(asked)
