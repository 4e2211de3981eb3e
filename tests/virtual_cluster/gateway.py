"""A gateway in virtual time: the attempts of a real one (control_plane/gateway/attempts.py), and clients that look at
every token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from control_plane.gateway.attempts import Attempts
from control_plane.gateway.open_requests import Attempt, OpenRequest, PreparedRequest
from phasewise.core.errors import ServingError
from phasewise.core.lifecycle import RequestStatus
from phasewise.core.messages import PeerLost, WorkerMessage, WorkerOutput
from phasewise.core.placement import Placement, WorkerId
from phasewise.core.request import Request, SamplingParams
from tests.virtual_cluster.clock import VirtualTime
from tests.virtual_cluster.engine import token_of
from tests.virtual_cluster.network import Network, about
from tests.virtual_cluster.worker import CONTROL_PLANE


@dataclass(frozen=True, slots=True)
class FirstToken:
    """To the control plane: an attempt's prompt is done."""

    attempt_id: str


@dataclass(frozen=True, slots=True)
class Finished:
    """To the control plane: an attempt is over."""

    attempt_id: str
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class PlaceAnswer:
    """From the control plane: where an attempt goes, or why nowhere."""

    attempt_id: str
    placement: Placement | ServingError


@dataclass(slots=True)
class Ends:
    """How requests ended, and what it took: by the name of the status, and of the error where there is one."""

    statuses: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    num_ended: int = 0
    num_tokens: int = 0
    num_given_up: int = 0
    num_handoffs: int = 0
    num_preempted: int = 0


class TokenBytes(dict[int, bytes]):
    """Every token is the text `x`. Part of TokenTexts (control_plane/gateway/text/detokenizer.py)."""

    def __missing__(self, token_id: int) -> bytes:
        return b"x"


class Texts:
    """TokenTexts of a vocabulary without words."""

    leading_space: Literal["keep"] = "keep"
    special_ids: frozenset[int] = frozenset()
    text_bytes = TokenBytes()

    def token_bytes(self, token_id: int) -> bytes:
        return b"x"

    def token_text(self, token_id: int) -> str:
        return "x"


class VirtualGateway:
    """Takes requests by `submit`. Raises AssertionError at the first token that is wrong, missing or too much."""

    def __init__(self, gateway_id: str, seed: int, time: VirtualTime, network: Network) -> None:
        self.ends = Ends()
        self.attempts = Attempts(gateway_id, f"{seed:x}.", Texts(), self, self, self, self, time)
        self._gateway_id = gateway_id
        self._seed = seed
        self._time = time
        self._network = network
        self._unplaced: dict[str, Attempt] = {}
        self._ended: set[str] = set()
        network.join(gateway_id, self.receive)

    def submit(self, name: str, prompt: tuple[int, ...], num_output_tokens: int, timeout_s: float) -> None:
        """A client's request arrives. No two have the same name."""
        request = Request(name, prompt, SamplingParams(max_tokens=num_output_tokens))
        attempt = self.attempts.open(PreparedRequest(request, (), timeout_s, continues_text=True))
        record_id = attempt.record.request_id

        def expire() -> None:
            for record in [r for r in self.attempts.open_requests if r.request_id == record_id]:
                self.attempts.expire(record)

        self._time.after(timeout_s, f"deadline {record_id}", expire)
        self._place(attempt)

    @property
    def num_left(self) -> int:
        """Requests, attempts and questions that are not over."""
        return len(self.attempts.open_requests) + self.attempts.num_attempts + len(self._unplaced)

    # ---- messages

    def receive(self, message: Any) -> None:
        match message:
            case WorkerOutput():
                again = self.attempts.deliver(message)
            case PeerLost(worker_id):
                again = self.attempts.worker_lost(worker_id)
            case PlaceAnswer(attempt_id, ServingError() as error):
                self.attempts.refused(self._unplaced.pop(attempt_id), error)
                again = []
            case PlaceAnswer(attempt_id, Placement() as placement):
                instead = self.attempts.placed(self._unplaced.pop(attempt_id), placement)
                again = [] if instead is None else [instead]
            case _:
                raise TypeError(f"a gateway gets no {type(message).__name__}")
        for attempt in again:
            self._place(attempt)

    def _place(self, attempt: Attempt) -> None:
        self._unplaced[attempt.attempt_id] = attempt
        self._network.send(CONTROL_PLANE, attempt.wanted, f"{self._gateway_id} {attempt.attempt_id}")

    # ---- ports of the attempts: workers, the placement ledger, metrics

    def send(self, worker_id: WorkerId, message: WorkerMessage) -> None:
        self._network.send(worker_id, message, f"{self._gateway_id} {about(message)}")

    def first_token(self, attempt_id: str) -> None:
        self._network.send(CONTROL_PLANE, FirstToken(attempt_id), attempt_id)

    def finished(self, attempt_id: str, num_output_tokens: int) -> None:
        self._network.send(CONTROL_PLANE, Finished(attempt_id, num_output_tokens), attempt_id)

    def placed(self, *, is_local: bool) -> None: ...

    def handoff(self, num_bytes: int, seconds: float) -> None:
        self.ends.num_handoffs += 1

    def preempted(self) -> None:
        self.ends.num_preempted += 1

    def inter_token(self, gap_s: float, num_tokens: int = 1) -> None: ...

    # ---- the owner of the requests

    def has_news(self, record: OpenRequest) -> None:
        """The client reads what has come, and compares."""
        num_new = sum(len(delta.token_ids) for delta in record.pending)
        position = record.num_output_tokens - num_new
        for delta in record.pending:
            for token_id in delta.token_ids:
                expected = token_of(self._seed, record.client_id, position)
                assert token_id == expected, f"{record.client_id}: token {position} is {token_id}, not {expected}"
                position += 1
        self.ends.num_tokens += num_new
        record.pending.clear()

    def given_up(self, attempt: Attempt, error: ServingError) -> None:
        self.ends.num_given_up += 1

    def ended(self, record: OpenRequest) -> None:
        assert record.client_id not in self._ended, f"{record.client_id} ended twice"
        self._ended.add(record.client_id)
        self.has_news(record)  # what has not been read yet
        self.ends.num_ended += 1
        if record.status is RequestStatus.FINISHED:
            wanted, came = record.request.sampling.max_tokens, record.num_output_tokens
            assert came == wanted, f"{record.client_id} finished with {came} of {wanted} tokens"
        _count(self.ends.statuses, record.status.value)
        if record.error is not None:
            _count(self.ends.errors, record.error.code)


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1
