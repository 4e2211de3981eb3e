"""Decisions about attempts, without a loop, a thread or a tokenizer: events in, what is asked and sent out."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from typing import Any

import pytest

from control_plane.gateway.attempts import MAX_ATTEMPTS, Attempts
from control_plane.gateway.open_requests import Attempt, OpenRequest, PreparedRequest
from phasewise.core.clock import ManualClock
from phasewise.core.errors import (
    DeadlineExceeded,
    InternalError,
    Overloaded,
    RequestCancelled,
    ServingError,
    Unavailable,
    WorkerLost,
)
from phasewise.core.lifecycle import RequestStatus, Stage
from phasewise.core.messages import AbortRequest, NewTokens, PrefillTask, RequestFailed, TimelineEvent, WorkerOutput
from phasewise.core.placement import Placement
from phasewise.core.request import FinishReason, Request, SampledToken, SamplingParams

PROMPT = (7, 8, 9)


class Letters:
    """Token 97 is the text "a", and so on."""

    def __init__(self) -> None:
        self.leading_space = "keep"
        self.special_ids: frozenset[int] = frozenset()
        self.text_bytes = {token_id: bytes([token_id]) for token_id in range(128)}

    def token_bytes(self, token_id: int) -> bytes:
        return self.text_bytes[token_id]

    def token_text(self, token_id: int) -> str:
        return chr(token_id)


class Gateway:
    """`Attempts` with ports that write down what they are told. Whatever is to be placed lies in `to_place`."""

    def __init__(self) -> None:
        self.clock = ManualClock(100.0)
        self.attempts = Attempts("g", "n", Letters(), self, self, self, self, self.clock)  # type: ignore[arg-type]
        self.to_place: list[Attempt] = []
        self.sent: list[tuple[str, Any]] = []
        self.firsts: list[str] = []
        self.given_back: dict[str, int] = {}
        self.news: list[int] = []
        self.recoveries: list[str] = []
        self.ends: list[OpenRequest] = []
        self.counts: defaultdict[str, list[Any]] = defaultdict(list)

    # ---- the ports

    def send(self, worker_id: str, message: Any) -> None:
        self.sent.append((worker_id, message))

    def first_token(self, attempt_id: str) -> None:
        self.firsts.append(attempt_id)

    def finished(self, attempt_id: str, num_output_tokens: int) -> None:
        assert attempt_id not in self.given_back, "a placement is given back once"
        self.given_back[attempt_id] = num_output_tokens

    def has_news(self, record: OpenRequest) -> None:
        assert record not in self.ends
        self.news.append(len(record.pending))

    def given_up(self, attempt: Attempt, error: ServingError) -> None:
        self.recoveries.append(error.code)

    def ended(self, record: OpenRequest) -> None:
        assert record not in self.ends
        self.ends.append(record)

    def placed(self, *, is_local: bool) -> None:
        self.counts["placed"].append(is_local)

    def handoff(self, num_bytes: int, seconds: float) -> None:
        self.counts["handoff"].append((num_bytes, seconds))

    def preempted(self) -> None:
        self.counts["preempted"].append(None)

    def inter_token(self, gap_s: float, num_tokens: int = 1) -> None:
        self.counts["inter_token"].append((gap_s, num_tokens))

    # ---- what happens

    def open(self, *, n: int = 1, stop: tuple[str, ...] = (), timeout_s: float = 60.0) -> OpenRequest:
        request = Request("r", PROMPT, SamplingParams(n=n, max_tokens=9))
        attempt = self.attempts.open(PreparedRequest(request, stop, timeout_s, continues_text=True))
        self.to_place.append(attempt)
        return attempt.record

    def place(self, prefill: str = "p0", decode: str = "d0") -> Attempt:
        """Grants the oldest placement that is asked for."""
        attempt = self.to_place.pop(0)
        again = self.attempts.placed(attempt, Placement(attempt.attempt_id, prefill, decode, attempt.number))
        if again is not None:
            self.to_place.append(again)
        return attempt

    def say(self, attempt: Attempt, position: int, text: str, *, sample: int = 0, end: str = "") -> None:
        tokens = tuple(SampledToken(ord(letter)) for letter in text)
        reason = FinishReason(end) if end else None
        new = NewTokens(attempt.attempt_id, sample, position, tokens, reason)
        self.to_place += self.attempts.deliver(WorkerOutput("d0", chunks=(new,)))

    def hear(self, attempt: Attempt, stage: Stage, **more: Any) -> None:
        event = TimelineEvent(attempt.attempt_id, stage, 0.0, "d0", **more)
        self.to_place += self.attempts.deliver(WorkerOutput("d0", events=(event,)))

    def fail(self, attempt: Attempt, code: str, worker_id: str = "p0") -> None:
        failure = RequestFailed(attempt.attempt_id, code, "why")
        self.to_place += self.attempts.deliver(WorkerOutput(worker_id, failures=(failure,)))

    def lose(self, worker_id: str) -> None:
        self.to_place += self.attempts.worker_lost(worker_id)

    def tasks(self) -> list[Request]:
        return [message.request for _, message in self.sent if isinstance(message, PrefillTask)]

    def aborts(self) -> list[tuple[str, str, int | None]]:
        return [(w, m.request_id, m.sample_index) for w, m in self.sent if isinstance(m, AbortRequest)]

    def assert_over(self, record: OpenRequest, status: RequestStatus) -> None:
        """The request has ended once, so, and every placement was given back."""
        assert self.ends == [record] and record.status is status
        assert not self.attempts.open_requests and not self.attempts.num_attempts
        assert set(self.given_back) >= {request.request_id for request in self.tasks()}


def text_of(record: OpenRequest, sample: int = 0) -> str:
    return "".join(delta.text for delta in record.pending if delta.sample_index == sample)


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


def test_a_request_from_its_beginning_to_its_end(gateway: Gateway) -> None:
    record = gateway.open()
    wanted = gateway.to_place[0].wanted
    assert (wanted.num_prompt_tokens, wanted.num_samples, wanted.max_tokens, wanted.attempt) == (3, 1, 9, 0)
    gateway.clock.advance(5.0)
    attempt = gateway.place()
    ((worker_id, task),) = gateway.sent
    assert worker_id == "p0" and task.gateway_id == "g" and task.time_left_s == pytest.approx(55.0)
    gateway.say(attempt, 0, "a")
    gateway.clock.advance(0.25)
    gateway.say(attempt, 1, "bc")
    gateway.say(attempt, 3, "d", end="length")
    assert text_of(record) == "abcd"
    assert gateway.firsts == [attempt.attempt_id] and gateway.given_back == {attempt.attempt_id: 4}
    assert gateway.counts["inter_token"] == [(0.25, 2), (0.0, 1)]
    assert gateway.aborts() == [], "its workers know that it is over"
    gateway.assert_over(record, RequestStatus.FINISHED)
    assert [event.stage for event in record.events] == [Stage.RECEIVED, Stage.PLACED, Stage.FINISHED]


def test_what_overtakes_waits_and_what_comes_late_is_ignored(gateway: Gateway) -> None:
    record = gateway.open()
    attempt = gateway.place()
    gateway.say(attempt, 1, "b")
    assert text_of(record) == "" and gateway.firsts == []
    gateway.say(attempt, 0, "a")
    gateway.say(attempt, 2, "c", end="length")
    gateway.say(attempt, 3, "d")
    gateway.fail(attempt, "internal")
    assert text_of(record) == "abc"
    gateway.assert_over(record, RequestStatus.FINISHED)


def test_a_refused_placement_ends_the_request(gateway: Gateway) -> None:
    record = gateway.open()
    gateway.attempts.refused(gateway.to_place.pop(), Overloaded("full"))
    assert isinstance(record.error, Overloaded) and gateway.given_back == {}
    gateway.assert_over(record, RequestStatus.FAILED)


@pytest.mark.parametrize("end", ["cancel", "expire", "fail"])
def test_a_placement_that_comes_after_the_end_is_given_back(gateway: Gateway, end: str) -> None:
    record = gateway.open()
    if end == "fail":
        gateway.attempts.fail(record, InternalError("broken"))
    else:
        getattr(gateway.attempts, end)(record)
    attempt = gateway.place()
    assert gateway.sent == [] and gateway.given_back == {attempt.attempt_id: 0}
    gateway.attempts.cancel(record)
    expected = {"cancel": RequestCancelled, "expire": DeadlineExceeded, "fail": InternalError}[end]
    assert isinstance(record.error, expected)
    gateway.assert_over(record, RequestStatus.CANCELLED if end == "cancel" else RequestStatus.FAILED)


def test_the_deadline_says_whether_the_request_was_placed(gateway: Gateway) -> None:
    first, second = gateway.open(), gateway.open()
    gateway.place()
    gateway.attempts.expire(second)
    gateway.attempts.expire(first)
    assert "before it was placed" in str(second.error) and "ask for fewer tokens" in str(first.error)
    assert [worker_id for worker_id, _, _ in gateway.aborts()] == ["p0", "d0"]


def test_a_worker_that_is_lost_while_placing_gets_no_task(gateway: Gateway) -> None:
    record = gateway.open()
    gateway.lose("d0")
    lost = gateway.place("p0", "d0")
    assert gateway.tasks() == [] and gateway.given_back == {lost.attempt_id: 0}
    assert gateway.to_place[0].wanted.attempt == 1
    gateway.place("p0", "d1")
    assert len(gateway.tasks()) == 1 and record.status is RequestStatus.PLACED


def test_nobody_left_after_a_loss_while_placing_is_what_the_client_is_told(gateway: Gateway) -> None:
    record = gateway.open()
    gateway.lose("d0")
    gateway.place("p0", "d0")
    gateway.attempts.refused(gateway.to_place.pop(), Unavailable("nobody is left"))
    assert isinstance(record.error, Unavailable), "no worker ever had it"


def test_nobody_left_after_a_fault_is_told_as_the_fault(gateway: Gateway) -> None:
    record = gateway.open()
    gateway.place()
    gateway.lose("d0")
    gateway.attempts.refused(gateway.to_place.pop(), Unavailable("nobody is left"))
    assert isinstance(record.error, WorkerLost)
    gateway.assert_over(record, RequestStatus.FAILED)


def test_a_lost_worker_with_tokens_goes_on_behind_them_under_a_new_id(gateway: Gateway) -> None:
    record = gateway.open()
    old = gateway.place()
    gateway.say(old, 0, "ab")
    gateway.lose("d0")
    assert record.status is RequestStatus.RECOVERING and gateway.recoveries == ["worker_lost"]
    assert [worker_id for worker_id, _, _ in gateway.aborts()] == ["p0", "d0"], "a silent worker may live"
    new = gateway.place("p1", "d1")
    request = gateway.tasks()[-1]
    assert request.prompt_token_ids == (*PROMPT, 97, 98) and request.num_resumed_tokens == 2
    assert request.request_id != old.attempt_id
    gateway.say(old, 2, "X")
    gateway.say(new, 2, "c", end="length")
    assert text_of(record) == "abc" and gateway.given_back == {old.attempt_id: 0, new.attempt_id: 3}
    gateway.assert_over(record, RequestStatus.FINISHED)


def test_lost_messages_of_a_worker_that_lives_are_made_good_by_other_attempts(gateway: Gateway) -> None:
    record = gateway.open()
    gateway.say(gateway.place(), 0, "ab")
    gateway.to_place += gateway.attempts.tokens_lost("elsewhere")
    assert not gateway.to_place
    gateway.to_place += gateway.attempts.tokens_lost("d0")
    assert [worker_id for worker_id, _, _ in gateway.aborts()] == ["p0", "d0"]
    new = gateway.place()  # the same workers: they live
    assert gateway.tasks()[-1].prompt_token_ids == (*PROMPT, 97, 98)
    gateway.say(new, 2, "c", end="length")
    assert text_of(record) == "abc"
    gateway.assert_over(record, RequestStatus.FINISHED)


def test_tokens_that_come_twice_are_taken_once(gateway: Gateway) -> None:
    record = gateway.open()
    attempt = gateway.place()
    gateway.say(attempt, 1, "b")
    gateway.say(attempt, 1, "b")
    gateway.say(attempt, 0, "a")
    gateway.say(attempt, 0, "a")
    gateway.say(attempt, 1, "b")
    assert not record.samples[0].early, "nothing of them is kept"
    gateway.say(attempt, 2, "c", end="length")
    assert text_of(record) == "abc"
    gateway.assert_over(record, RequestStatus.FINISHED)


def test_attempts_have_an_end(gateway: Gateway) -> None:
    record = gateway.open()
    for number in range(MAX_ATTEMPTS):
        gateway.place("p0", f"d{number}")
        gateway.lose(f"d{number}")
    assert not gateway.to_place and len(gateway.tasks()) == MAX_ATTEMPTS
    assert isinstance(record.error, WorkerLost)
    gateway.assert_over(record, RequestStatus.FAILED)


@pytest.mark.parametrize("has_first", [False, True])
@pytest.mark.parametrize("is_decoding", [False, True])
def test_a_prefill_worker_is_needed_until_its_token_is_here_and_decode_has_all(
    gateway: Gateway, has_first: bool, is_decoding: bool
) -> None:
    gateway.open()
    attempt = gateway.place()
    if has_first:
        gateway.say(attempt, 0, "a")
    if is_decoding:
        gateway.hear(attempt, Stage.HANDOFF_END, num_bytes=10, duration_s=0.5)
    gateway.lose("p0")
    assert bool(gateway.to_place) is not (has_first and is_decoding)
    gateway.lose("p0")
    gateway.lose("elsewhere")
    assert len(gateway.to_place) == (not (has_first and is_decoding))
    assert gateway.counts["handoff"] == ([(10, 0.5)] if is_decoding else [])


def test_each_sample_with_tokens_goes_on_by_itself(gateway: Gateway) -> None:
    record = gateway.open(n=3)
    first = gateway.place()
    gateway.say(first, 0, "a", sample=0)
    gateway.say(first, 0, "x", sample=1, end="length")
    gateway.say(first, 1, "lost", sample=2)  # its first token is not here
    gateway.lose("d0")
    assert [(a.request.sample_index, a.request.num_resumed_tokens) for a in gateway.to_place] == [(0, 1), (2, 0)]
    one, other = gateway.place("p0", "d1"), gateway.place("p0", "d2")
    gateway.lose("d1")  # another attempt, of this sample alone
    assert [a.request.sample_index for a in gateway.to_place] == [0] and gateway.to_place[0].number == 2
    gateway.say(other, 0, "z", sample=2)
    assert text_of(record, 2) == "z", "what came too early from the lost worker is forgotten"
    gateway.say(other, 1, "", sample=2, end="length")
    assert not gateway.ends
    gateway.say(gateway.place("p0", "d2"), 1, "b", sample=0, end="length")
    assert [text_of(record, i) for i in range(3)] == ["ab", "x", "z"]
    assert one.attempt_id in gateway.given_back
    gateway.assert_over(record, RequestStatus.FINISHED)


def test_one_attempt_too_many_of_a_sample_ends_all_of_them(gateway: Gateway) -> None:
    record = gateway.open(n=2)
    first = gateway.place()
    for sample in range(2):
        gateway.say(first, 0, "a", sample=sample)
    for number in range(MAX_ATTEMPTS):
        while gateway.to_place:
            gateway.place("p0", f"d{number}")
        gateway.lose(f"d{number}")
    assert isinstance(record.error, WorkerLost)
    gateway.assert_over(record, RequestStatus.FAILED)


@pytest.mark.parametrize(
    ("code", "avoided"), [("transfer_failed", {"p0", "d0"}), ("unavailable", {"p0"}), ("worker_lost", set())]
)
def test_a_failure_is_tried_elsewhere(gateway: Gateway, code: str, avoided: set[str]) -> None:
    gateway.open()
    gateway.fail(gateway.place(), code)
    assert gateway.to_place[0].wanted.avoid == avoided and gateway.recoveries == [code]


def test_a_request_outlives_any_number_of_drains(gateway: Gateway) -> None:
    record = gateway.open()
    for number in range(2 * MAX_ATTEMPTS):
        attempt = gateway.place(f"p{number}", f"d{number}")
        gateway.say(attempt, number, "a")
        gateway.fail(attempt, "unavailable")
        assert gateway.to_place[0].number == 1, "it is not refused for full queues"
    gateway.say(gateway.place("p", "d"), 2 * MAX_ATTEMPTS, "b", end="length")
    assert text_of(record, 0) == "a" * 2 * MAX_ATTEMPTS + "b"
    gateway.assert_over(record, RequestStatus.FINISHED)


@pytest.mark.parametrize("code", ["internal", "deadline_exceeded", "a_code_of_tomorrow"])
def test_a_failure_that_would_come_again_ends_the_request(gateway: Gateway, code: str) -> None:
    record = gateway.open()
    gateway.fail(gateway.place(), code)
    assert not gateway.to_place and record.error is not None
    assert record.error.code == (code if code != "a_code_of_tomorrow" else "internal")
    gateway.assert_over(record, RequestStatus.FAILED)


def test_a_stop_string_ends_its_sample_at_the_workers(gateway: Gateway) -> None:
    record = gateway.open(n=2, stop=("cd",))
    attempt = gateway.place()
    gateway.say(attempt, 0, "abcdef", sample=1)
    assert gateway.aborts() == [("p0", attempt.attempt_id, 1), ("d0", attempt.attempt_id, 1)]
    assert text_of(record, 1) == "ab" and record.num_output_tokens == 4
    gateway.say(attempt, 0, "cd", sample=0)
    assert gateway.aborts()[2:] == [("p0", attempt.attempt_id, None), ("d0", attempt.attempt_id, None)]
    assert gateway.given_back == {attempt.attempt_id: 6}
    gateway.assert_over(record, RequestStatus.FINISHED)


def test_one_worker_for_both_phases_is_told_once(gateway: Gateway) -> None:
    record = gateway.open()
    gateway.place("m0", "m0")
    gateway.attempts.cancel(record)
    assert [worker_id for worker_id, _, _ in gateway.aborts()] == ["m0"] and gateway.counts["placed"] == [True]


def test_cached_tokens_are_those_of_the_prompt(gateway: Gateway) -> None:
    record = gateway.open()
    first = gateway.place()
    gateway.hear(first, Stage.PREFILL_START, num_tokens=2)
    gateway.say(first, 0, "a")
    gateway.lose("d0")
    gateway.hear(gateway.place("p0", "d1"), Stage.PREFILL_START, num_tokens=4)
    assert record.usage.num_cached_tokens == 2


def test_news_are_told_when_there_is_something_to_read(gateway: Gateway) -> None:
    record = gateway.open()
    attempt = gateway.place()
    gateway.say(attempt, 1, "b")
    assert gateway.news == []
    gateway.say(attempt, 0, "a")
    gateway.say(attempt, 2, "c", end="length")
    assert gateway.news == [2, 3] and gateway.ends == [record]


def test_it_is_imported_without_asyncio_grpc_or_a_tokenizer() -> None:
    code = "import sys; import control_plane.gateway.attempts; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"asyncio", "grpc", "ray", "torch", "tokenizers", "starlette", "prometheus_client"}
