"""An engine without arithmetic: the time of a step comes from a measured profile, its tokens from a formula."""

from __future__ import annotations

import random
from array import array
from functools import lru_cache
from zlib import crc32

from engine.batch import ScheduledBatch, ScheduledSequence, StepResult
from engine.sequence import Sequence
from phasewise.core.profile import DeviceProfile
from phasewise.core.request import SampledToken
from tests.virtual_cluster.cache import VirtualCache

VOCABULARY = 2**16  # as prompts are made of 16 bits a token
_CONTEXT_STEP = 1024


def client_name(request_id: str) -> str:
    """The client's id of a request, by the id of any attempt at it."""
    return request_id.rsplit("~", 1)[0]


@lru_cache(512)  # the engine compares what the client has asked for a moment ago
def prompt_of(seed: int, name: str, num_tokens: int) -> tuple[int, ...]:
    """The prompt of a request."""
    return tuple(array("H", random.Random(f"{seed} {name}").randbytes(2 * num_tokens)))


def token_of(seed: int, name: str, position: int) -> int:
    """The output token of a request at a position: the same in every attempt."""
    return (crc32(name.encode(), seed) + 2_654_435_761 * (position + 1)) % 2_147_483_647 % VOCABULARY


class ScriptedEngine:
    """Computes the batches of one worker. It looks at all tokens and all KV that a real engine would read."""

    def __init__(self, profile: DeviceProfile, cache: VirtualCache, seed: int) -> None:
        self._cache = cache
        self._seed = seed
        self._prefill_s = lru_cache(4096)(profile.prefill_s)
        self._decode_step_s = lru_cache(4096)(profile.decode_step_s)

    def step_s(self, batch: ScheduledBatch) -> float:
        """How long the device takes. Contexts are rounded up."""
        prompts = [item for item in batch.items if item.sequence.is_prefilling]
        decodes = [item for item in batch.items if not item.sequence.is_prefilling]
        seconds = 0.0
        if prompts:
            seconds += self._prefill_s(sum(item.num_tokens for item in prompts), _rounded(prompts))
        if decodes:
            seconds += self._decode_step_s(len(decodes), _rounded(decodes))
        return seconds

    def run(self, batch: ScheduledBatch) -> StepResult:
        """Reads and writes the KV of a batch. The tokens are known when the step is over."""
        tokens = []
        for item in batch.items:
            sequence, name = item.sequence, client_name(item.sequence.request_id)
            start = item.start
            if start <= sequence.num_prompt_tokens or start % self._cache.spec.block_size == 0:
                self._cache.check(name, sequence.block_table, start)
            else:
                self._cache.check_last(name, sequence.block_table, start)
            if sequence.is_prefilling and item.num_samples:
                self._check_tokens(name, sequence)
            self._cache.write(name, sequence.block_table, start, item.num_tokens)
            position = start + item.num_tokens - sequence.first_output
            token = SampledToken(token_of(self._seed, name, position))
            tokens.append((token,) * item.num_samples)
        return StepResult(tuple(tokens), ((),) * len(tokens))

    def _check_tokens(self, name: str, sequence: Sequence) -> None:
        """That a sequence has its request's prompt, and behind it the output of earlier attempts."""
        prompt = prompt_of(self._seed, name, sequence.first_output)
        output = (token_of(self._seed, name, position) for position in range(sequence.num_resumed_tokens))
        assert sequence.token_ids == [*prompt, *output], f"{name} has come with other tokens"


def _rounded(items: list[ScheduledSequence]) -> int:
    context = sum(item.start for item in items)
    return -(-context // _CONTEXT_STEP) * _CONTEXT_STEP
