"""One prompt on a prefill worker."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from engine.sequence import Sequence
from kv_transfer.outgoing import Handoff
from kv_transfer.state import SendStatus
from phasewise.core.lifecycle import RequestStatus, check_transition
from phasewise.core.messages import PrefillTask
from phasewise.core.placement import WorkerId
from phasewise.core.request import SampledToken


@dataclass(slots=True, eq=False)
class PrefillJob:
    """One prompt on this worker, from its arrival until its KV has left, or decoding begins here."""

    task: PrefillTask
    sequence: Sequence
    deadline_s: float
    status: RequestStatus = RequestStatus.PLACED
    handoff: Handoff = field(init=False)
    num_cached_tokens: int = 0  # of the prompt, found in this worker's prefix cache
    num_failures: int = 0  # of the handoff, as far as they are counted
    has_pushed: bool = False
    prompt_logprobs: list[SampledToken] = field(default_factory=list)
    ended_samples: set[int] = field(default_factory=set)  # cancelled one by one

    def __post_init__(self) -> None:
        task = self.task
        self.handoff = Handoff(task.placement.decode_worker, task.request, task.gateway_id, self.deadline_s)

    @property
    def request_id(self) -> str:
        return self.task.request.request_id

    @property
    def decode_worker(self) -> WorkerId:
        return self.task.placement.decode_worker

    @property
    def num_samples(self) -> int:
        return self.task.request.sampling.n

    @property
    def needs_handoff(self) -> bool:
        """False when decoding happens on this worker, or when the first token is the last or there is none."""
        return not self.task.placement.is_local and self.task.request.max_new_tokens > 1

    @property
    def is_unanswered(self) -> bool:
        """Whether its decode worker has neither accepted nor refused the newest offer."""
        return self.handoff.status is SendStatus.OFFERED

    def move(self, status: RequestStatus) -> None:
        check_transition(self.status, status)
        self.status = status

    def fork(self, sample_index: int, token: SampledToken) -> Sequence:
        """The sequence of one sample: the prompt and its first token. Blocks are shared by the caller."""
        sequence = self.sequence
        return replace(
            sequence,
            sample_index=sample_index,
            token_ids=[*sequence.token_ids, token.token_id],
            block_table=list(sequence.block_table),
            block_hashes=list(sequence.block_hashes),
        )
