"""The same tokens however a prompt is computed: alone, batched, in chunks, from the prefix cache, after a swap."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.batch import ScheduledBatch, ScheduledSequence
from engine.kv_cache import PagedKVCache
from engine.model_runner import ModelRunner
from phasewise.core.errors import ConfigError
from phasewise.core.request import SamplingParams

LENGTHS = (1, 3, 8, 17, 40, 64, 65, 90)
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def expected(llama: Any, kit: Any) -> list[list[int]]:
    return [kit.oracle_tokens(llama[0], kit.random_prompt(n, seed=n), NUM_TOKENS) for n in LENGTHS]


def outputs(sequences: list[Any]) -> list[list[int]]:
    return [sequence.token_ids[sequence.num_prompt_tokens :] for sequence in sequences]


def test_one_at_a_time(engine: Any, kit: Any, expected: list[list[int]]) -> None:
    assert [engine.generate(kit.random_prompt(n, seed=n), NUM_TOKENS) for n in LENGTHS] == expected


def test_all_in_one_batch(engine: Any, kit: Any, expected: list[list[int]]) -> None:
    sequences = [engine.sequence(kit.random_prompt(n, seed=n)) for n in LENGTHS]
    engine.step(*((sequence, sequence.num_tokens) for sequence in sequences))
    engine.decode(sequences, NUM_TOKENS)
    assert outputs(sequences) == expected
    for sequence in sequences:
        engine.release(sequence)


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunks_beside_decodes(engine: Any, kit: Any, expected: list[list[int]], chunk: int) -> None:
    """Sequences join one by one: chunks of the newest run in the same batches as the decodes of the others."""
    sequences: list[Any] = []
    for n in LENGTHS:
        newest = engine.sequence(kit.random_prompt(n, seed=n))
        while newest.num_output_tokens == 0:
            running = [(sequence, 1) for sequence in sequences if sequence.num_output_tokens < NUM_TOKENS]
            engine.step(*running, (newest, min(chunk, newest.num_unscheduled_tokens)))
        sequences.append(newest)
    engine.decode(sequences, NUM_TOKENS)
    assert outputs(sequences) == expected
    for sequence in sequences:
        engine.release(sequence)


def test_prefix_cache(engine: Any, kit: Any, expected: list[list[int]]) -> None:
    for n, tokens in zip(LENGTHS, expected, strict=True):
        prompt = kit.random_prompt(n, seed=n)
        engine.generate(prompt, 1)
        cached = engine.blocks.match_prefix(prompt)
        assert len(cached) == (n - 1) // engine.cache.block_size
        engine.blocks.share(cached)
        sequence = engine.sequence(
            prompt, block_table=list(cached), num_computed_tokens=len(cached) * engine.cache.block_size
        )
        engine.prefill(sequence)
        engine.decode([sequence], NUM_TOKENS)
        assert outputs([sequence]) == [tokens]
        engine.release(sequence)


def test_swap_out_and_in_to_other_blocks(engine: Any, kit: Any, expected: list[list[int]]) -> None:
    prompt = kit.random_prompt(LENGTHS[4], seed=LENGTHS[4])
    sequence = engine.sequence(prompt)
    engine.prefill(sequence)
    engine.decode([sequence], 9)
    old = list(sequence.block_table)
    others = engine.cache.swap.take(2)
    engine.cache.swap.give_back(others[:1])  # so that the places are no neighbours
    places = engine.cache.copy_out(old)
    assert places[:2] == [0, 2]
    blocker = engine.blocks.allocate(3)
    engine.release(sequence)
    engine.cache.blocks_view()[:, :, old] = torch.nan
    sequence.block_table = engine.blocks.allocate(len(old))
    assert sequence.block_table != old
    engine.cache.copy_in(places, sequence.block_table)
    engine.decode([sequence], NUM_TOKENS)
    assert outputs([sequence]) == [expected[4]]
    engine.release(sequence)
    engine.blocks.release(blocker)
    engine.cache.swap.give_back(others[1:])
    assert engine.cache.swap.num_free == 96


def test_copied_block_serves_a_fork(engine: Any, kit: Any, expected: list[list[int]]) -> None:
    """Two sequences share full blocks and write to their own copy of the last one."""
    sequence = engine.sequence(kit.random_prompt(LENGTHS[3], seed=LENGTHS[3]))
    engine.prefill(sequence)
    shared, last = sequence.block_table[:-1], sequence.block_table[-1]
    engine.blocks.share(shared)
    copy = engine.blocks.allocate(1)[0]
    engine.cache.copy_block(last, copy)
    fork = engine.sequence(sequence.token_ids[:-1], block_table=[*shared, copy])
    fork.num_computed_tokens, fork.num_prompt_tokens = sequence.num_computed_tokens, sequence.num_prompt_tokens
    fork.token_ids = list(sequence.token_ids)
    engine.decode([sequence, fork], NUM_TOKENS)
    assert outputs([sequence, fork]) == [expected[3]] * 2
    engine.release(sequence)
    engine.release(fork)


@pytest.mark.parametrize(
    ("layers_per_group", "calls"), [(0, [(0, 3)]), (1, [(0, 1), (1, 1), (2, 1)]), (2, [(0, 2), (2, 1)])]
)
def test_kv_is_written_when_a_layer_group_is_reported(
    engine: Any, kit: Any, layers_per_group: int, calls: list[tuple[int, int]]
) -> None:
    sequence = engine.sequence(kit.random_prompt(20))
    seen: list[tuple[int, int]] = []

    def on_layers_done(first: int, count: int) -> None:
        seen.append((first, count))
        slots = torch.tensor([b * 8 + i for b in sequence.block_table for i in range(8)][:20])
        kv = engine.cache.storage[:, :, slots]
        assert not kv[: first + count].isnan().any()
        assert kv[first + count :].isnan().all()

    engine.step((sequence, 20), on_layers_done=on_layers_done, layers_per_group=layers_per_group)
    assert seen == calls
    engine.release(sequence)


def test_the_runner_does_not_change_sequences(engine: Any, kit: Any) -> None:
    sequence = engine.sequence(kit.random_prompt(12))
    engine.reserve(sequence, 12)
    table = list(sequence.block_table)
    engine.runner.run(ScheduledBatch((ScheduledSequence(sequence, 12, 1),)))
    assert (sequence.num_tokens, sequence.num_computed_tokens, sequence.block_table) == (12, 0, table)
    engine.release(sequence)


def test_several_samples_of_one_prompt_are_those_of_their_own_sequences(engine: Any, kit: Any) -> None:
    sampling = SamplingParams(temperature=1.5, seed=7, n=4)
    prompt = kit.random_prompt(12)
    sequence = engine.sequence(prompt, sampling)
    engine.reserve(sequence, 12)
    together = engine.runner.run(ScheduledBatch((ScheduledSequence(sequence, 12, 4),))).tokens[0]
    singles = []
    for index in range(4):
        sequence.sample_index = index
        singles.append(engine.runner.run(ScheduledBatch((ScheduledSequence(sequence, 12, 1),))).tokens[0][0])
    assert list(together) == singles
    assert len({token.token_id for token in together}) > 1
    engine.release(sequence)


@pytest.mark.parametrize("chunk", [40, 9])
def test_prompt_logprobs_are_the_oracles(llama: Any, engine: Any, kit: Any, chunk: int) -> None:
    prompt = kit.random_prompt(40)
    sequence = engine.sequence(prompt, SamplingParams(temperature=0.0, prompt_logprobs=3, logprobs=2))
    described = []
    while sequence.num_computed_tokens < 40:
        count = min(chunk, sequence.num_unscheduled_tokens)
        engine.reserve(sequence, count)
        last = count == sequence.num_unscheduled_tokens
        result = engine.runner.run(ScheduledBatch((ScheduledSequence(sequence, count, int(last)),)))
        described += result.prompt_logprobs[0]
        sequence.num_computed_tokens += count
    with torch.inference_mode():
        logprobs = llama[0](torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert [token.token_id for token in described] == prompt[1:]
    for position, token in enumerate(described):
        assert token.logprob == pytest.approx(logprobs[position, token.token_id].item(), abs=1e-4)
        assert [t for t, _ in token.top_logprobs] == logprobs[position].topk(3).indices.tolist()
    sampled = result.tokens[0][0]
    assert sampled.token_id == logprobs[-1].argmax().item()
    assert [value for _, value in sampled.top_logprobs] == pytest.approx(logprobs[-1].topk(2).values.tolist(), abs=1e-4)
    engine.release(sequence)


def test_seeded_samples_do_not_depend_on_the_batch(engine: Any, kit: Any) -> None:
    def run(together: bool) -> list[list[int]]:
        sequences = [
            engine.sequence(kit.random_prompt(n, seed=n), SamplingParams(temperature=1.0, top_p=0.9, seed=n, top_k=50))
            for n in LENGTHS
        ]
        for group in [sequences] if together else [[sequence] for sequence in sequences]:
            engine.step(*((sequence, sequence.num_tokens) for sequence in group))
            engine.decode(group, NUM_TOKENS)
        for sequence in sequences:
            engine.release(sequence)
        return outputs(sequences)

    alone = run(together=False)
    assert alone == run(together=True)
    assert len({tuple(tokens) for tokens in alone}) == len(LENGTHS)


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), SamplingParams(seed=3, n=2, logprobs=1)])
def test_a_damaged_block_leaves_only_its_own_sequence_without_token(
    engine: Any, kit: Any, sampling: SamplingParams
) -> None:
    sequences = [engine.sequence(kit.random_prompt(n, seed=n), sampling) for n in (20, 33, 9)]
    for sequence in sequences:
        engine.prefill(sequence)
    newcomer = engine.sequence(kit.random_prompt(12), sampling)
    for sequence in (*sequences, newcomer):
        engine.reserve(sequence, sequence.num_unscheduled_tokens)
    items = [ScheduledSequence(sequence, 1, 1) for sequence in sequences]
    batch = ScheduledBatch((*items, ScheduledSequence(newcomer, 12, sampling.n)))
    right = engine.runner.run(batch).tokens
    engine.cache.blocks_view()[1, :, sequences[1].block_table[0]] = torch.nan
    assert engine.runner.run(batch).tokens == (right[0], None, *right[2:])
    for sequence in (*sequences, newcomer):
        engine.release(sequence)


def test_mistakes_of_a_scheduler_are_refused(engine: Any, kit: Any) -> None:
    sequence = engine.sequence(kit.random_prompt(20))
    with pytest.raises(ValueError, match="has 0 blocks, needs 3"):
        engine.runner.run(ScheduledBatch((ScheduledSequence(sequence, 20, 1),)))
    engine.reserve(sequence, 20)
    with pytest.raises(ValueError, match="cannot compute 21 more"):
        engine.runner.run(ScheduledBatch((ScheduledSequence(sequence, 21, 1),)))
    engine.release(sequence)
    assert engine.runner.run(ScheduledBatch(())).tokens == ()


def test_a_cache_of_another_model_is_refused(engine: Any, llama: Any, tmp_path: Any, kit: Any) -> None:
    llama[0].save_pretrained(tmp_path)
    other = kit.load(tmp_path, dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype: float32 here, bfloat16 there"):
        ModelRunner(other, engine.cache, 256)


def test_swaps_that_do_not_fit_are_refused_and_change_nothing(llama: Any) -> None:
    cache = PagedKVCache(llama[1].kv_cache_spec(8), 4, "cpu", num_swap_blocks=2)
    assert (cache.storage == 0).all()
    places = cache.copy_out([0, 1])
    with pytest.raises(ValueError, match="2 places were given for 1 blocks"):
        cache.copy_in(places, [2])
    with pytest.raises(ValueError, match="1 blocks are to be swapped out, and 0 places are free"):
        cache.copy_out([3])
    assert cache.swap.num_free == 0 and (cache.storage == 0).all()
    cache.copy_in(places, [3, 2])
    assert cache.swap.num_free == 2
    with pytest.raises(ConfigError, match=r"cache\.swap_gib: .* and this host has less memory; lower it"):
        PagedKVCache(cache.spec, 1, "cpu", num_swap_blocks=2**40)
