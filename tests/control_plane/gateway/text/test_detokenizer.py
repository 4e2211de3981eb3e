"""Incremental text: equal to the text of the whole, however the tokens come; stop strings across all borders."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from control_plane.gateway.text.detokenizer import SampleText, StopStrings, token_info
from control_plane.gateway.text.tokenizer import TextTokenizer, load_tokenizer
from phasewise.core.model_source import resolve_model
from phasewise.core.request import FinishReason, SampledToken

TEXT = "naïve 👩‍🚀 日本語 ☕️\n  def f(x): return '€9' — 🇩🇪"


def sampled(ids: Sequence[int]) -> tuple[SampledToken, ...]:
    return tuple(SampledToken(i) for i in ids)


def run(tokenizer: TextTokenizer, ids: Sequence[int], cuts: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    """The pieces of text that come when `ids` are pushed in pieces that end at `cuts`."""
    sample, pieces, start = SampleText(tokenizer, stop), [], 0
    for end in [*cuts, len(ids)]:
        text, hit = sample.push(sampled(ids[start:end]), FinishReason.LENGTH if end == len(ids) else None)
        pieces.append(text)
        start = end
        if hit is not None:
            break
    return pieces


def byte_tokenizer(directory: Path) -> TextTokenizer:
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64, "vocab_size": 300}
    (directory / "config.json").write_text(json.dumps(config))
    return load_tokenizer(resolve_model(f"random:{directory}"))


def sentencepiece_tokenizer(directory: Path, decoder: decoders.Decoder) -> TextTokenizer:
    """Ids: 0 to 255 are `<0x00>` …, then a few words with the SentencePiece space."""
    words = ["▁", "▁▁", "▁Hello", "▁wor", "ld", "é", "▁<", "s>"]
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64, "vocab_size": 300}
    (directory / "config.json").write_text(json.dumps(config))
    return load_tokenizer(resolve_model(f"random:{directory}"))


LLAMA_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


@pytest.fixture(params=["smollm2", "bytes", "llama", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path, smollm2_tokenizer: TextTokenizer) -> TextTokenizer:
    if request.param == "smollm2":
        return smollm2_tokenizer
    if request.param == "bytes":
        return byte_tokenizer(tmp_path)
    decoder = LLAMA_DECODER if request.param == "llama" else decoders.Metaspace()
    return sentencepiece_tokenizer(tmp_path, decoder)


def test_any_tokens_in_any_pieces_give_the_text_of_the_whole(tokenizer: TextTokenizer) -> None:
    rng = random.Random(7)
    for _ in range(300):
        ids = [rng.randrange(min(tokenizer.vocab_size, 3000)) for _ in range(rng.randrange(1, 24))]
        cuts = sorted(rng.sample(range(len(ids)), rng.randrange(len(ids))))
        assert "".join(run(tokenizer, ids, cuts)) == tokenizer.decode(ids), (ids, cuts)


def test_decode_of_sentencepiece_is_that_of_tokenizers(tmp_path: Path) -> None:
    ours = sentencepiece_tokenizer(tmp_path, LLAMA_DECODER)
    oracle = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    special = oracle.token_to_id("</s>")
    hello = [258, 259, 260]
    for ids in (
        hello,
        [256, *hello],
        [257, *hello],
        [special, *hello],
        [0xC3, 0xA9, *hello],
        [32, 258],
        [*hello, special],
    ):
        assert ours.decode(ids) == oracle.decode(ids), ids


def test_no_replacement_character_for_characters_that_span_tokens(smollm2_tokenizer: TextTokenizer) -> None:
    ids = smollm2_tokenizer.encode(TEXT)
    assert any("\ufffd" in smollm2_tokenizer.token_text(i) for i in ids), "the text must have characters in pieces"
    pieces = run(smollm2_tokenizer, ids, range(1, len(ids)))
    assert "".join(pieces) == TEXT
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


def test_what_stays_invalid_is_replaced_at_the_end_only(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    sample = SampleText(tokenizer)
    assert sample.push(sampled([97, 0xF0, 0x9F])) == ("a", None)
    assert sample.push(sampled([0x98]), FinishReason.LENGTH) == ("\ufffd", None)
    assert sample.is_done and sample.num_tokens == 4


def test_special_tokens_are_skipped(smollm2_tokenizer: TextTokenizer) -> None:
    ids = [1, *smollm2_tokenizer.encode("Hi"), 2, *smollm2_tokenizer.encode(" you"), 0]
    assert "".join(run(smollm2_tokenizer, ids, [1, 2, 3])) == "Hi you"


def test_a_stop_token_is_no_part_of_the_text(tmp_path: Path) -> None:
    sample = SampleText(byte_tokenizer(tmp_path))
    assert sample.push(sampled([97, 98]), FinishReason.STOP) == ("a", None)
    assert sample.num_tokens == 2
    with pytest.raises(ValueError, match="after the end"):
        sample.push(sampled([97]))


def test_a_continuation_keeps_its_leading_space(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer(tmp_path, LLAMA_DECODER)
    assert SampleText(tokenizer).push(sampled([258]))[0] == "Hello"
    assert SampleText(tokenizer, continues_text=True).push(sampled([258]))[0] == " Hello"


# ---- stop strings


def expected_cut(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """By definition: reading character by character, the first stop string to be complete (the longer of two)."""
    for end in range(1, len(text) + 1):
        hits = [s for s in stop if text[:end].endswith(s)]
        if hits:
            longest = max(hits, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_stop_strings_in_any_pieces() -> None:
    rng = random.Random(3)
    for _ in range(3000):
        text = "".join(rng.choice("aab\n") for _ in range(rng.randrange(20)))
        stop = ["".join(rng.choice("aab\n") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        finder, got, hit, start = StopStrings(stop), "", None, 0
        while start < len(text) and hit is None:
            end = min(len(text), start + rng.randrange(1, 5))
            more, hit = finder.push(text[start:end])
            got, start = got + more, end
            assert text.startswith(got)
            if hit is None:  # what waits could still become a stop string, and no more than that waits
                waiting = text[len(got) : end]
                assert not waiting or any(s.startswith(waiting) for s in stop)
        if hit is None:
            got += finder.flush()
        assert (got, hit) == expected_cut(text, stop), (text, stop)


def test_the_stop_string_and_the_tokens_behind_it_are_cut(smollm2_tokenizer: TextTokenizer) -> None:
    ids = smollm2_tokenizer.encode("One two\n\nUser: three")
    sample = SampleText(smollm2_tokenizer, ["\nUser:"])
    text, hit = sample.push(sampled(ids))
    assert (text, hit) == ("One two\n", "\nUser:")
    assert sample.is_done
    whole = smollm2_tokenizer.decode(ids[: sample.num_tokens])
    assert whole.endswith("User:") and len(ids) > sample.num_tokens


def test_the_beginning_of_a_stop_string_waits_and_comes_back(tmp_path: Path) -> None:
    sample = SampleText(byte_tokenizer(tmp_path), ["END"])
    assert sample.push(sampled(b"a E")) == ("a ", None)
    assert sample.push(sampled(b"N")) == ("", None)
    assert sample.push(sampled(b"T")) == ("ENT", None)
    assert sample.push(sampled(b"EN"), FinishReason.LENGTH) == ("EN", None)


def test_a_stop_string_of_characters_that_span_tokens(smollm2_tokenizer: TextTokenizer) -> None:
    ids = smollm2_tokenizer.encode("go 👩‍🚀 on")
    pieces = run(smollm2_tokenizer, ids, range(1, len(ids)), ["🚀"])
    assert "".join(pieces) == "go 👩‍"


def test_stop_strings_within_min_tokens_are_text_like_any_other() -> None:
    """By definition: cut as `expected_cut`, but only at ends behind the first so many characters."""
    rng = random.Random(5)
    for _ in range(3000):
        text = "".join(rng.choice("aab\n") for _ in range(rng.randrange(20)))
        stop = ["".join(rng.choice("aab\n") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        exempt = rng.randrange(12)
        finder, got, hit, start = StopStrings(stop), "", None, 0
        while start < len(text) and hit is None:
            end = min(len(text), start + rng.randrange(1, 5))
            if start < exempt:
                end = min(end, exempt)
            more, hit = finder.push(text[start:end], may_hit=end > exempt)
            got, start = got + more, end
            assert text.startswith(got)
        if hit is None:
            got += finder.flush()
        wanted: tuple[str, str | None] = (text, None)
        for end in range(exempt + 1, len(text) + 1):
            if hits := [s for s in stop if text[:end].endswith(s)]:
                longest = max(hits, key=len)
                wanted = (text[: end - len(longest)], longest)
                break
        assert (got, hit) == wanted, (text, stop, exempt)


@pytest.mark.parametrize("cuts", [[], [3], [4, 7], range(1, 11)])
def test_min_tokens_holds_for_stop_strings(tmp_path: Path, cuts: Sequence[int]) -> None:
    tokenizer = byte_tokenizer(tmp_path)

    def end(min_tokens: int) -> tuple[str, str | None, int]:
        sample = SampleText(tokenizer, ["ab"], min_tokens=min_tokens)
        text, hit = "", None
        for first, last in pairwise([0, *cuts, 11]):
            if hit is None:
                more, hit = sample.push(
                    sampled(b"abcabcabcab"[first:last]), FinishReason.LENGTH if last == 11 else None
                )
                text += more
        return text, hit, sample.num_tokens

    assert end(0) == end(1) == ("", "ab", 2)
    assert end(2) == end(4) == ("abc", "ab", 5), "one that is completed behind min_tokens counts"
    assert end(5) == ("abcabc", "ab", 8)
    assert end(10) == ("abcabcabc", "ab", 11)
    assert end(11) == ("abcabcabcab", None, 11)


def test_work_is_in_the_new_tokens_only(tmp_path: Path) -> None:
    """Text that is certain is not kept: nothing grows with the length of the output."""
    sample = SampleText(byte_tokenizer(tmp_path), ["\n\nUser:"])
    for _ in range(2000):
        assert sample.push(sampled(b"word ")) == ("word ", None)
    assert sample.push(sampled(b"\n"))[0] == ""


def test_token_info_is_exact(smollm2_tokenizer: TextTokenizer) -> None:
    part = next(i for i in smollm2_tokenizer.encode("👩") if "\ufffd" in smollm2_tokenizer.token_text(i))
    info = token_info(smollm2_tokenizer, SampledToken(part, -0.5, ((part, -0.5), (2, -1.5))))
    assert info.raw == smollm2_tokenizer.token_bytes(part) and info.logprob == -0.5 and not info.is_special
    assert info.top_logprobs[1] == (2, "<|im_end|>", b"<|im_end|>", -1.5)
    assert token_info(smollm2_tokenizer, SampledToken(2)).is_special
