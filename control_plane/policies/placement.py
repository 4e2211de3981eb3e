"""Pure: which pair of workers gets a request (Splitwise's cluster level, section 4.1, in predicted time).

The queue to join is the one whose pending work is done soonest, in seconds by each worker's own measured profile, so a
slow GPU gets less. Both workers are chosen together, at arrival.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from phasewise.core.placement import WorkerId
from phasewise.core.profile import DeviceProfile


@dataclass(frozen=True, slots=True)
class Arrival:
    """What placement needs to know of a request. `num_expected_tokens` is the expected output per sample."""

    request_id: str
    num_prompt_tokens: int
    num_samples: int
    num_expected_tokens: float

    @property
    def num_kv_tokens(self) -> float:
        """Tokens of KV that the request is expected to reach; the samples share the prompt's."""
        return self.num_prompt_tokens + self.num_samples * self.num_expected_tokens


@dataclass(slots=True)
class Candidate:
    """A worker and the work that is placed on it and not done.

    Attributes:
        capacity_tokens: tokens of KV that the worker's cache holds.
        num_pending_prompts: prompts without a first token, with `num_pending_prompt_tokens` tokens in all.
        num_decoding: samples that decode here now or will.
        num_pledged_tokens: tokens of KV that those samples are expected to reach.
        num_placed: requests ever placed here; it spreads requests among equal candidates.
    """

    worker_id: WorkerId
    profile: DeviceProfile
    capacity_tokens: int
    num_pending_prompts: int = 0
    num_pending_prompt_tokens: int = 0
    num_decoding: int = 0
    num_pledged_tokens: float = 0.0
    num_placed: int = 0

    def add_prompt(self, arrival: Arrival, sign: int) -> None:
        """Counts the prompt of a request in (+1) or out (-1)."""
        self.num_pending_prompts += sign
        self.num_pending_prompt_tokens += sign * arrival.num_prompt_tokens

    def add_decode(self, arrival: Arrival, sign: int) -> None:
        """Counts the samples of a request in (+1) or out (-1)."""
        self.num_decoding += sign * arrival.num_samples
        self.num_pledged_tokens += sign * arrival.num_kv_tokens

    def prefill_wait_s(self, arrival: Arrival) -> float:
        """Seconds until the first token, were the request placed here."""
        return self._queue_s() + self.profile.prefill_s(arrival.num_prompt_tokens)

    def _queue_s(self) -> float:
        """Seconds for the pending prompts; as many short ones share a step as fit into the largest measured one."""
        if not self.num_pending_prompts:
            return 0.0
        mean = self.num_pending_prompt_tokens / self.num_pending_prompts
        sharing = min(max(self.profile.prefill.largest_size / mean, 1.0), self.num_pending_prompts)
        return self.num_pending_prompts / sharing * self.profile.prefill_s(sharing * mean)

    def decode_s(self, arrival: Arrival) -> float:
        """Seconds for the expected output, were it decoded here, the wait for missing KV space included."""
        pledged = self.num_pledged_tokens + arrival.num_kv_tokens
        context = min(pledged, float(self.capacity_tokens))
        step_s = self.profile.decode_step_s(self.num_decoding + arrival.num_samples, context)
        output = arrival.num_expected_tokens
        excess = max(pledged - self.capacity_tokens, 0.0)
        # The batch frees about what it has pledged in the time that it takes to write its expected output.
        rounds = excess / max(float(self.capacity_tokens), 1.0)
        return step_s * output * (1.0 + rounds)


def choose_pair(
    arrival: Arrival, prefills: Sequence[Candidate], decodes: Sequence[Candidate], mixed: Iterable[Candidate]
) -> tuple[WorkerId, WorkerId] | None:
    """The (prefill, decode) pair with the least predicted time to the end; a mixed worker is a pair with itself.

    `prefills` and `decodes` are workers of those roles, `mixed` those that do both. None when there is no pair.
    """
    options: list[tuple[float, int, WorkerId, WorkerId]] = []
    for m in mixed:
        # On a mixed worker every pending prompt token also delays the decodes, and the other way round.
        prefill_s, decode_s = m.prefill_wait_s(arrival), m.decode_s(arrival)
        options.append((prefill_s + decode_s, m.num_placed, m.worker_id, m.worker_id))
    if prefills and decodes:
        prefill = min(prefills, key=lambda c: (c.prefill_wait_s(arrival), c.num_placed, c.worker_id))
        decode = min(decodes, key=lambda c: (c.decode_s(arrival), c.num_placed, c.worker_id))
        time_s = prefill.prefill_wait_s(arrival) + decode.decode_s(arrival)
        options.append((time_s, prefill.num_placed, prefill.worker_id, decode.worker_id))
    if not options:
        return None
    _, _, prefill_id, decode_id = min(options)
    return prefill_id, decode_id
