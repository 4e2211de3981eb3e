"""Every block is accounted for, whatever happens in whatever order."""

from __future__ import annotations

import random

import pytest

from engine.block_manager import BlockManager, OutOfBlocks
from engine.sequence import Sequence
from phasewise.core.request import SamplingParams


def sequence_of(tokens: list[int], blocks: list[int], computed: int, salt: str = "") -> Sequence:
    return Sequence(
        "r",
        SamplingParams(),
        tokens,
        len(tokens),
        cache_salt=salt,
        num_computed_tokens=computed,
        block_table=blocks,
    )


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_random_operations_lose_nothing(seed: int, prefix_caching: bool) -> None:
    """Sequences over a tiny vocabulary come, share prefixes, grow, fork and go; a plain model keeps the references."""
    rng = random.Random(seed)
    size, total = 4, 24
    manager = BlockManager(total, size, prefix_caching=prefix_caching)
    content: dict[int, tuple[int, ...]] = {}  # block → all tokens up to its end, as last written
    live: list[Sequence] = []
    for _ in range(600):
        action = rng.random()
        if action < 0.45:
            tokens = [rng.randint(0, 1) for _ in range(rng.randint(1, 20))]
            hit = manager.match_prefix(tokens)
            for i, block in enumerate(hit):
                assert content[block] == tuple(tokens[: (i + 1) * size]), "a hit on the wrong prefix"
            assert len(hit) * size < len(tokens)
            manager.share(hit)
            missing = manager.blocks_for(len(tokens)) - len(hit)
            free = manager.num_free_blocks
            if missing > free:
                with pytest.raises(OutOfBlocks):
                    manager.allocate(missing)
                assert manager.num_free_blocks == free
                manager.release(hit)
            else:
                new = manager.allocate(missing)
                sequence = sequence_of(tokens, hit + new, len(tokens))
                for i in range(len(hit), len(tokens) // size):
                    content[sequence.block_table[i]] = tuple(tokens[: (i + 1) * size])
                manager.publish(sequence)
                live.append(sequence)
        elif action < 0.6 and live:
            original = rng.choice(live)
            manager.share(original.block_table)
            fork = sequence_of(list(original.token_ids), list(original.block_table), original.num_computed_tokens)
            assert all(manager.is_shared(block) for block in fork.block_table)
            live.append(fork)
        elif live:
            manager.release(live.pop(rng.randrange(len(live))).block_table)
        manager.check()
        assert manager.num_used_blocks == len({block for sequence in live for block in sequence.block_table})
    for sequence in live:
        manager.release(sequence.block_table)
    manager.check()
    assert manager.num_used_blocks == 0 and manager.num_free_blocks == total
    assert (manager.num_cached_blocks > 0) == prefix_caching


def test_salts_separate_caches() -> None:
    manager = BlockManager(8, 4)
    tokens = list(range(9))
    manager.publish(sequence_of(tokens, manager.allocate(3), 9, salt="a"))
    assert manager.match_prefix(tokens, "a") == [0, 1]
    assert manager.match_prefix(tokens, "b") == [] == manager.match_prefix(tokens)


def test_what_is_hashed_ahead_is_found_only_when_it_is_computed() -> None:
    manager, tokens = BlockManager(8, 4), list(range(20))
    sequence = sequence_of(tokens, manager.allocate(5), 0)
    for computed in (6, 13, 20):
        manager.hash_ahead(sequence, computed)
        assert len(sequence.block_hashes) == computed // 4
        before = sequence.num_computed_tokens
        assert manager.match_prefix([*tokens, 0]) == sequence.block_table[: before // 4]
        sequence.num_computed_tokens = computed
        manager.publish(sequence)
        assert manager.match_prefix([*tokens, 0]) == sequence.block_table[: computed // 4]
    manager.hash_ahead(sequence, 99)
    assert len(sequence.block_hashes) == 5, "of no token that is not known"
    at_once, not_hashed = sequence_of(tokens, [], 0), sequence_of(tokens, [], 0)
    manager.hash_ahead(at_once, len(tokens))
    assert sequence.block_hashes == at_once.block_hashes
    BlockManager(8, 4, prefix_caching=False).hash_ahead(not_hashed, len(tokens))
    assert not_hashed.block_hashes == []


def test_blocks_that_are_hashed_and_not_computed_are_not_published() -> None:
    manager, tokens = BlockManager(8, 4), list(range(20))
    sequence = sequence_of(tokens, manager.allocate(5), 0)
    manager.hash_ahead(sequence, 20)
    sequence.num_computed_tokens = 6
    manager.publish(sequence)
    assert manager.match_prefix([*tokens, 0]) == sequence.block_table[:1]


def test_the_last_token_is_never_covered() -> None:
    manager = BlockManager(8, 4)
    manager.publish(sequence_of(list(range(8)), manager.allocate(2), 8))
    assert len(manager.match_prefix(list(range(8)))) == 1
    assert len(manager.match_prefix(list(range(9)))) == 2


def test_oldest_content_is_evicted_first_and_ends_before_beginnings() -> None:
    manager = BlockManager(4, 4)
    old, new = manager.allocate(2), manager.allocate(2)
    manager.publish(sequence_of([1] * 8, old, 8))
    manager.publish(sequence_of([2] * 8, new, 8))
    manager.release(old)
    manager.release(new)
    assert manager.allocate(1) == [old[1]]
    assert manager.match_prefix([1] * 9) == old[:1]
    assert manager.match_prefix([2] * 9) == new


def test_releasing_twice_is_an_error() -> None:
    manager = BlockManager(2, 4)
    blocks = manager.allocate(1)
    manager.release(blocks)
    with pytest.raises(ValueError, match="released twice"):
        manager.release(blocks)
    manager_of_freed = BlockManager(2, 4)
    with pytest.raises(KeyError):
        manager_of_freed.share([0])
