"""One prompt on a prefill worker."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.sequence import Sequence
from kv_transfer.outgoing import Handoff
from kv_transfer.state import SendStatus
from phasewise.core.lifecycle import RequestStatus, check_transition
from phasewise.core.messages import NewTokens, PrefillTask, PromptLogprobs
from phasewise.core.request import FinishReason, SampledToken


@dataclass(slots=True, eq=False)
class PrefillJob:
    """One prompt on this worker, from its arrival until its KV has left, or decoding begins here."""

    task: PrefillTask
    sequence: Sequence
    deadline_s: float
    status: RequestStatus = RequestStatus.PLACED
    needs_handoff: bool = field(init=False)  # not when decoding happens here, or with at most one token to come
    handoff: Handoff = field(init=False)
    num_cached_tokens: int = 0  # of the prompt, found in this worker's prefix cache
    num_failures: int = 0  # of the handoff, as far as they are counted
    has_begun: bool = False  # its first chunk was planned
    has_pushed: bool = False
    pushed_end: int = 0  # the end of the last chunk behind which KV was given to the sender
    prompt_logprobs: list[SampledToken] = field(default_factory=list)
    ended_samples: set[int] = field(default_factory=set)  # cancelled one by one

    def __post_init__(self) -> None:
        task = self.task
        self.needs_handoff = not task.placement.is_local and task.request.max_new_tokens > 1
        self.handoff = Handoff(task.placement.decode_worker, task.request, task.gateway_id, self.deadline_s)

    @property
    def request_id(self) -> str:
        return self.task.request.request_id

    @property
    def num_samples(self) -> int:
        return self.task.request.sampling.n

    @property
    def is_unanswered(self) -> bool:
        """Whether its decode worker has neither accepted nor refused the newest offer."""
        return self.handoff.status is SendStatus.OFFERED

    def move(self, status: RequestStatus) -> None:
        check_transition(self.status, status)
        self.status = status

    def described_prompt(self) -> PromptLogprobs:
        """The prompt's tokens with their log-probabilities, once all of it is computed."""
        first = SampledToken(self.sequence.token_ids[0])
        return PromptLogprobs(self.request_id, (first, *self.prompt_logprobs))

    def empty_outputs(self) -> list[NewTokens]:
        """One per sample, when no output is wanted: the tokens only showed that the prompt's logits are usable."""
        position = self.sequence.num_output_tokens
        indices = self.task.request.sample_indices
        return [NewTokens(self.request_id, index, position, (), FinishReason.LENGTH) for index in indices]
