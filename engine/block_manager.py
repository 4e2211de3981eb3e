"""Who owns which KV block: free list, reference counts, prefix cache. Block ids only, no tensors.

A block is in exactly one of three conditions:
    used      at least one sequence or reservation refers to it
    cached    nothing refers to it, but it holds the KV of a known prefix and is given out last, oldest first
    free      nothing refers to it, and its content has no meaning
free + cached + used = all, always (`check`).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from engine.sequence import Sequence


class OutOfBlocks(Exception):
    """Fewer blocks are free than were asked for; nothing was allocated."""


class BlockManager:
    """Gives out blocks of `block_size` tokens from a cache of `num_blocks`.

    The prefix cache is a hash chain over full blocks: a block's key covers its own tokens, all tokens before it and the
    salt, so a hit on block i implies hits on all blocks before it.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced blocks with content, oldest first
        self._ref_counts = [0] * num_blocks
        self._block_by_hash: dict[bytes, int] = {}
        self._hash_by_block: dict[int, bytes] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be given out now, those of the prefix cache included."""
        return len(self._free) + len(self._cached)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - self.num_free_blocks

    @property
    def num_cached_blocks(self) -> int:
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks needed to hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes `num_blocks` blocks with reference count 1. Raises OutOfBlocks and takes none when there are fewer."""
        if num_blocks > self.num_free_blocks:
            raise OutOfBlocks
        blocks = [self._pop_free() for _ in range(num_blocks)]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each block: a fork, or a prefix hit."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._cached[block]  # a KeyError here means that somebody kept the id of a freed block
            self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drops a reference to each block; content that the prefix cache knows stays until the space is needed.

        Raises:
            ValueError: a block has no reference.
        """
        for block in reversed(list(blocks)):  # so that the end of a prefix is evicted before its beginning
            count = self._ref_counts[block] - 1
            if count < 0:
                raise ValueError(f"block {block} was released twice")
            self._ref_counts[block] = count
            if count == 0:
                if block in self._hash_by_block:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def is_shared(self, block: int) -> bool:
        """True when writing to the block would be seen by another owner."""
        return self._ref_counts[block] > 1

    def match_prefix(self, token_ids: Seq[int], salt: str = "") -> list[int]:
        """The cached blocks that hold the longest known beginning of `token_ids`, without taking references.

        Never covers the last token: a forward pass needs at least one token to have logits.
        """
        if not self._prefix_caching:
            return []
        blocks: list[int] = []
        key = _root(salt)
        for i in range((len(token_ids) - 1) // self.block_size):
            key = _chain(key, token_ids[i * self.block_size : (i + 1) * self.block_size])
            block = self._block_by_hash.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def allocate_prompt(self, sequence: Sequence, *, may_skip: bool = True) -> bool:
        """Gives a sequence blocks for all its tokens; with `may_skip` it shares those of its known beginning, which
        then counts as computed. False, and nothing is given, when too few are free."""
        cached = self.match_prefix(sequence.token_ids, sequence.cache_salt) if may_skip else []
        self.share(cached)
        missing = self.blocks_for(sequence.num_tokens) - len(cached)
        if missing > self.num_free_blocks:
            self.release(cached)
            return False
        sequence.block_table = cached + self.allocate(missing)
        sequence.num_computed_tokens = len(cached) * self.block_size
        return True

    def hash_ahead(self, sequence: Sequence, num_tokens: int) -> None:
        """Computes the hashes that `publish` needs of the first so many tokens, while the device computes these tokens.

        Hashes take some 2 us a block, which the first token of a prompt would wait for otherwise.
        """
        size, tokens, hashes = self.block_size, sequence.token_ids, sequence.block_hashes
        num_full = min(num_tokens, len(tokens)) // size if self._prefix_caching else 0
        for i in range(len(hashes), num_full):
            previous = hashes[-1] if hashes else _root(sequence.cache_salt)
            hashes.append(_chain(previous, tokens[i * size : (i + 1) * size]))

    def publish(self, sequence: Sequence) -> None:
        """Makes the sequence's full computed blocks findable for others."""
        num_full = sequence.num_computed_tokens // self.block_size
        if not self._prefix_caching or num_full == sequence.num_published_blocks:
            return
        self.hash_ahead(sequence, sequence.num_computed_tokens)
        for i in range(sequence.num_published_blocks, num_full):
            key, block = sequence.block_hashes[i], sequence.block_table[i]
            if key not in self._block_by_hash and block not in self._hash_by_block:
                self._block_by_hash[key] = block
                self._hash_by_block[block] = key
        sequence.num_published_blocks = num_full

    def unpublish(self, blocks: Iterable[int]) -> None:
        """Makes what these blocks hold unfindable: it may be wrong. Sequences that refer to them keep them."""
        for block in blocks:
            key = self._hash_by_block.pop(block, None)
            if key is not None:
                del self._block_by_hash[key]

    def check(self) -> None:
        """Raises AssertionError unless every block is accounted for exactly once."""
        used = {block for block, count in enumerate(self._ref_counts) if count > 0}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not (used & free or used & cached or free & cached), "a block is in two conditions"
        assert len(used) + len(free) + len(cached) == self.num_blocks, "a block is lost"
        assert set(self._hash_by_block) == set(self._block_by_hash.values()), "the prefix cache is torn"
        assert cached <= set(self._hash_by_block), "a cached block has no content"

    def _pop_free(self) -> int:
        if self._free:
            return self._free.popleft()
        block, _ = self._cached.popitem(last=False)
        del self._block_by_hash[self._hash_by_block.pop(block)]
        return block


def _root(salt: str) -> bytes:
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


def _chain(previous: bytes, token_ids: Seq[int]) -> bytes:
    return hashlib.blake2b(previous + array("i", token_ids).tobytes(), digest_size=16).digest()
