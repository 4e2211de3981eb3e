"""Long texts: refused by their bytes before they are tokenised, else encoded off the loop, in slices, one at a time."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from control_plane.gateway.bodies import Bodies
from control_plane.gateway.grpc_front.server import start_grpc_server
from control_plane.gateway.http_front.openai_server import build_app
from control_plane.gateway.preparation import MAX_TOKENIZED
from control_plane.gateway.service import GenerateInput
from control_plane.gateway.text.bounded_encoding import TokenLimit, encode_in_slices, refuse_by_length
from control_plane.gateway.text.chat_template import ChatTemplate
from control_plane.gateway.text.length import NoLengthBound, length_bound
from control_plane.gateway.text.message_tokens import TemplateTokensOnly
from control_plane.gateway.text.slices import SLICE_CHARACTERS, TextSlicer, text_slicer
from control_plane.gateway.text.threads import LARGE_TEXT, SHORT_TEXT, TextThreads, num_text_characters
from control_plane.gateway.text.tokenizer import TextTokenizer
from control_plane.gateway.text.vocabulary import TokenizersVocabulary, byte_alphabet, encode_with
from phasewise.core.errors import InvalidRequest, Overloaded
from phasewise.rpc import phasewise_pb2 as pb
from phasewise.rpc.phasewise_pb2_grpc import InferenceStub
from tests.support.local_cluster import local_cluster
from tests.support.tiny_model import save_tiny_model
from tests.support.tokenizers_made import KINDS, make_tokenizer

WAIT_S = 30
PIECES = [
    "hello", " world", " ", "   ", "\n", "\r\n", "\t", "'s", "don't", "'", "12", "3", ".", "。", "中文", "한국", "é",
    "e\u0301", "\u1100\u1161\u11a8", "_", "<|im_end|>", "<|im_end", "<think>", "A", "B-C", "\x00\x04", "▁", "aaaaaaaa",
    "\u00a0", "☕", "=\u0338", "--------", "q",
]  # fmt: skip


def some_text(rng: random.Random, num_pieces: int) -> str:
    few = rng.sample(PIECES, rng.randrange(1, len(PIECES)))
    return "".join(rng.choices(few, k=num_pieces))


# ---- the lower bound


def bound_of(tokenizer: Tokenizer) -> Any:
    return length_bound(tokenizer, byte_alphabet())


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_text_has_fewer_tokens_than_its_bound(kind: str, strips: bool) -> None:
    rng = random.Random(kind)
    tokenizer = make_tokenizer(kind, strips=strips)
    bound = bound_of(tokenizer)
    useful = 0
    for size in (*[30] * 40, 1000, 1000, 40_000):
        text = some_text(rng, size)
        num_tokens = len(encode_with(tokenizer, text))
        least = bound.least_tokens(text, num_tokens)
        assert least <= num_tokens, text[:200]
        useful += least > num_tokens / 20
    assert useful, "a bound of nothing would pass, too"


@pytest.mark.parametrize("normalizer", [normalizers.NFKC(), normalizers.Strip(), normalizers.StripAccents()])
def test_the_bound_counts_what_the_normalizer_leaves(normalizer: Any) -> None:
    rng = random.Random(5)
    tokenizer = make_tokenizer("gpt2")
    tokenizer.normalizer = normalizer
    bound = bound_of(tokenizer)
    for text in (some_text(rng, 30_000), " " * 200_000, "\u0301" * 100_000, "𝐚" * 50_000):
        assert bound.least_tokens(text, 100) <= len(encode_with(tokenizer, text))


def test_bytes_without_a_token_do_not_count() -> None:
    state = json.loads(make_tokenizer("gpt2").to_str())
    for byte in (0, 4):
        del state["model"]["vocab"][byte_alphabet()[byte]]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    text = "\x00\x04" * 50_000
    assert encode_with(tokenizer, text) == []
    assert bound_of(tokenizer).least_tokens(text, 10) == 0


def test_nothing_is_said_of_tokenizers_that_may_drop_any_length() -> None:
    unknown = Tokenizer(models.BPE(vocab={"a": 0, "<unk>": 1}, merges=[], unk_token="<unk>", fuse_unk=True))
    assert len(encode_with(unknown, "b" * 50_000)) == 1
    dropping = make_tokenizer("gpt2")
    dropping.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), dropping.pre_tokenizer])
    replacing = make_tokenizer("gpt2")
    replacing.normalizer = normalizers.Replace(pattern=Regex("x+"), content="")
    for tokenizer in (unknown, dropping, replacing):
        assert isinstance(bound_of(tokenizer), NoLengthBound)


@pytest.mark.parametrize(
    "text",
    ["hello world " * 1_400_000, "a" * 2**24, " " * 2**24, "1" * 2**24, "é" * 2**23, "qzjx" * 2**22],
    ids=["words", "a letter", "spaces", "digits", "accents", "letters"],
)
def test_what_holds_a_server_for_seconds_is_refused_unread(text: str, smollm2_tokenizer: TextTokenizer) -> None:
    """At a context of 128K, where the bytes of all tokens together allow 10 MB; the first one has no such shape."""
    bound = bound_of(Tokenizer.from_str(smollm2_tokenizer._vocabulary.tokenizer.to_str()))  # type: ignore[attr-defined]
    assert bound.least_tokens(text, 131_072) > 131_072


# ---- slices


@pytest.mark.parametrize("kind", KINDS)
def test_slices_have_the_ids_of_the_whole(kind: str) -> None:
    rng = random.Random(kind)
    tokenizer = make_tokenizer(kind)
    slicer = text_slicer(tokenizer)
    slicer._slice_characters = 20
    num_slices = 0
    for _ in range(150):
        text = some_text(rng, rng.randrange(120))
        slices = list(slicer.slices(text))
        num_slices += len(slices)
        assert "".join(slices) == text
        assert [i for part in slices for i in encode_with(tokenizer, part)] == encode_with(tokenizer, text), slices
    assert (num_slices > 300) is (kind != "llama2"), "with a prefix before every text there is no cut"


@pytest.mark.parametrize("what", ["reaches over", "expression", "prefix space", "dropout"])
def test_a_tokenizer_without_certain_cuts_gets_the_whole(what: str) -> None:
    state = json.loads(make_tokenizer("gemma" if what == "reaches over" else "llama3").to_str())
    if what == "reaches over":
        state["model"]["vocab"]["a▁b"] = len(state["model"]["vocab"])
    elif what == "expression":
        state["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"(?<=a) |\p{L}+"}
    elif what == "prefix space":
        state["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    else:
        state["model"]["dropout"] = 0.1
    text = "hello world " * 50_000
    assert list(text_slicer(Tokenizer.from_str(json.dumps(state))).slices(text)) == [text]


def test_an_added_token_is_not_cut() -> None:
    slicer = text_slicer(make_tokenizer("gpt2"))
    slicer._slice_characters = 4
    assert list(slicer.slices("aa bb<|im_end|>cc dd")) == ["aa bb<|im_end|>cc dd"]
    slicer._added = TextSlicer(slicer._cut, [])._added
    assert list(slicer.slices("aa bb<|im_end|>cc dd"))[1:], "without it there would be a cut"


def test_other_threads_go_on_while_a_text_is_encoded() -> None:
    class Encoding:
        ids = (1, 2)

    class OnlyBatches:  # `encode` would keep the interpreter's lock
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[Encoding]:
            assert texts == ["x"] and not add_special_tokens
            return [Encoding()]

    assert list(encode_with(OnlyBatches(), "x")) == [1, 2]


class Recording(TokenizersVocabulary):
    """Remembers the thread and the length of each encoding."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, ends=None, where="test")
        self.calls: list[tuple[int, int]] = []

    def encode(self, text: str) -> list[int]:
        self.calls.append((threading.get_ident(), len(text)))
        return super().encode(text)


def test_encoding_stops_where_the_tokens_are_too_many() -> None:
    vocabulary = Recording(make_tokenizer("gpt2"))
    text = "a-" * SLICE_CHARACTERS * 3
    with pytest.raises(InvalidRequest, match=r"text has at least \d+ tokens, but so; shorten text") as caught:
        encode_in_slices(vocabulary, text, TokenLimit(1000, "so"), field="text")
    assert caught.value.field == "text" and len(vocabulary.calls) == 1
    vocabulary.calls.clear()
    with pytest.raises(InvalidRequest, match="at least"):
        refuse_by_length(vocabulary, text, TokenLimit(1000, "so"), field="text")
    assert not vocabulary.calls
    ids = encode_in_slices(vocabulary, text, TokenLimit(10**9, "so"), field="text")
    assert ids == encode_with(vocabulary.tokenizer, text) and len(vocabulary.calls) > 2


# ---- threads


async def test_large_texts_are_tokenised_one_at_a_time_and_a_waiter_can_leave() -> None:
    threads = TextThreads()
    began: list[str] = []
    started, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        began.append("slow")
        started.set()
        assert go_on.wait(WAIT_S)
        began.append("slow ended")
        return "s"

    def quick() -> str:
        began.append("quick")
        return "q"

    first = asyncio.create_task(threads.run(LARGE_TEXT + 1, slow))
    assert await asyncio.to_thread(started.wait, WAIT_S)
    waiting = [asyncio.create_task(threads.run(LARGE_TEXT + 1, quick)) for _ in range(2)]
    assert await threads.run(LARGE_TEXT, quick) == "q", "what is not large does not wait"
    assert await threads.run(SHORT_TEXT, threading.get_ident) == threading.get_ident()
    assert await threads.run(SHORT_TEXT + 1, threading.get_ident) != threading.get_ident()
    waiting[0].cancel()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert began == ["slow", "quick"] and not waiting[1].done(), "the work goes on, and keeps its turn"
    go_on.set()
    assert await asyncio.wait_for(waiting[1], WAIT_S) == "q"
    assert began == ["slow", "quick", "slow ended", "quick"]


async def test_waiting_for_a_turn_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.gateway.text.threads._TURN_TIMEOUT_S", 0.0)
    threads = TextThreads()
    await threads._turn.acquire()
    with pytest.raises(Overloaded):
        await threads.run(LARGE_TEXT + 1, lambda: None)
    threads._turn.release()
    with pytest.raises(InvalidRequest):
        await threads.run(LARGE_TEXT + 1, _refuse)
    assert not threads._turn.locked()


def _refuse() -> None:
    raise InvalidRequest("no")


@pytest.mark.parametrize("num_characters", [LARGE_TEXT, LARGE_TEXT + 1])
async def test_whatever_work_raises_ends_its_call_and_its_turn(num_characters: int) -> None:
    """asyncio's futures refuse a StopIteration: who waits for one waits for ever."""
    threads = TextThreads()
    for iterator, error in ((iter(()), RuntimeError), (map(int, "x"), ValueError)):
        with pytest.raises(error):
            await asyncio.wait_for(threads.run(num_characters, iterator.__next__), WAIT_S)
    assert await asyncio.wait_for(threads.run(LARGE_TEXT + 1, lambda: "next"), WAIT_S) == "next"


async def test_a_turn_ends_where_no_thread_can_be_started() -> None:
    threads, executor = TextThreads(), ThreadPoolExecutor(1)
    executor.shutdown()
    asyncio.get_running_loop().set_default_executor(executor)
    with pytest.raises(RuntimeError, match="after shutdown"):
        await threads.run(LARGE_TEXT + 1, lambda: None)
    assert not threads._turn.locked()


def test_the_size_of_a_request_is_that_of_all_its_strings() -> None:
    parts = [{"type": "text", "text": "x" * 500}, {"text": 5}, "y" * 50, None]
    assert 550 < num_text_characters(None, [{"role": "user", "content": parts}]) < 750
    assert num_text_characters(None, ["odd", {"content": {"text": "x" * 90}}]) > 90  # type: ignore[list-item]
    assert num_text_characters(None, [{"name": "x" * 500}]) >= 500
    assert num_text_characters("x" * 7, None) == 7 and num_text_characters(None, None) == 0


def test_messages_and_parts_count_also_where_they_are_empty() -> None:
    """A template renders each message. Of very many the counting ends early, since it is done on the loop."""
    empty = {"role": "user", "content": ""}
    assert num_text_characters(None, [empty] * 20) <= SHORT_TEXT < num_text_characters(None, [empty] * 100)
    part = {"type": "text", "text": ""}
    assert num_text_characters(None, [{"role": "user", "content": [part] * 400}]) > SHORT_TEXT
    for many in ([empty] * LARGE_TEXT, [{"content": [part] * LARGE_TEXT}], [{str(n): "" for n in range(LARGE_TEXT)}]):
        assert LARGE_TEXT < num_text_characters(None, many) < LARGE_TEXT + 200


# ---- the whole way


async def test_a_long_text_is_encoded_off_the_loop_in_slices(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    async with local_cluster(tmp_path, pools={"mixed": {"workers": 1}}) as cluster:
        vocabulary = Recording(make_tokenizer("qwen2"))
        source = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        cluster.service._preparer._tokenizer = TextTokenizer(
            vocabulary,
            vocab_size=320,
            eos_token_ids=(),
            chat_template=ChatTemplate(source, {}, lambda: 0.0),
            message_encoding=TemplateTokensOnly(vocabulary, (), source),
        )
        text = "self user " * 60_000
        expected = encode_with(vocabulary.tokenizer, text)
        assert SLICE_CHARACTERS < len(text) < LARGE_TEXT and len(expected) <= MAX_TOKENIZED
        assert await cluster.service.tokenize(text, None, None) == expected
        chat = await cluster.service.tokenize(None, ({"role": "user", "content": text},), None)
        assert chat[1:-1] == encode_with(vocabulary.tokenizer, text)
        assert len(vocabulary.calls) >= 8
        assert all(thread != threading.get_ident() for thread, _ in vocabulary.calls)
        assert max(length for _, length in vocabulary.calls) < SLICE_CHARACTERS + 200
        vocabulary.calls.clear()
        for given in (GenerateInput(text=text), GenerateInput(messages=({"role": "user", "content": text},))):
            with pytest.raises(InvalidRequest, match="context is 8192"):
                await cluster.service.generate(given)
        assert not vocabulary.calls, "the bytes say it"


async def test_both_protocols_refuse_by_length_and_name_the_field(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    long = "hello world " * 100_000
    chat = [{"role": "user", "content": [{"type": "text", "text": long}]}]
    async with local_cluster(tmp_path, pools={"mixed": {"workers": 1}}) as cluster:
        bodies = Bodies(1 << 24, 10)
        app = build_app(cluster.service, bodies)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60) as http:
            for path, body, param in (
                ("/v1/completions", {"prompt": long}, "prompt"),
                ("/v1/chat/completions", {"messages": chat}, "messages"),
                ("/tokenize", {"prompt": long}, "prompt"),
                ("/tokenize", {"messages": chat}, "messages"),
                ("/detokenize", {"tokens": [1] * (MAX_TOKENIZED + 1)}, "tokens"),
            ):
                answer = await http.post(path, json=body)
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (400, param), path
                assert f"shorten {param}" in error["message"] or "send less" in error["message"]
            short = "hello world " * 5000
            tokens = (await http.post("/tokenize", json={"prompt": short})).json()["tokens"]
            assert tokens == cluster.tokenizer.encode(short) and len(tokens) == 60_000
            assert (await http.post("/detokenize", json={"tokens": tokens})).json()["prompt"] == short
        server, port = await start_grpc_server(cluster.service, "127.0.0.1:0", max_message_bytes=1 << 24, bodies=bodies)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = InferenceStub(channel)
            messages = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=long)])
            for call in (
                lambda: stub.Tokenize(pb.TokenizeRequest(text=long)),
                lambda: stub.Tokenize(pb.TokenizeRequest(messages=messages)),
                lambda: stub.Generate(pb.GenerateRequest(text=long)).read(),
                lambda: stub.Detokenize(pb.DetokenizeRequest(token_ids=[1] * (MAX_TOKENIZED + 1))),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call()
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await server.stop(None)
        bodies.close()
        assert cluster.service.is_idle
