"""Lines by the thousand become one a second, and none of them is lost."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Iterator

import pytest

from control_plane.gateway.line_sums import Kind, LineSums
from control_plane.gateway.service import GenerateInput, SamplingInput
from control_plane.gateway.summed_log import SummedLog
from phasewise.core.clock import ManualClock, MonotonicClock
from phasewise.core.errors import DeadlineExceeded, InternalError
from phasewise.core.messages import RequestFailed, WorkerOutput
from tests.control_plane.gateway.test_inference import Cluster

OVERLOADED: Kind = ("loop", logging.WARNING, "overloaded")
EXPIRED: Kind = ("loop", logging.WARNING, "deadline_exceeded")


def test_the_first_is_said_at_once_and_the_others_once_a_second() -> None:
    clock = ManualClock(100.0)
    sums = LineSums(clock)
    assert sums.next_due_s() == math.inf
    assert sums.is_first(OVERLOADED, "full", "r0")
    assert sums.next_due_s() == 101.0
    for number in range(1, 1000):
        assert not sums.is_first(OVERLOADED, "full", f"r{number}")
    assert sums.is_first(EXPIRED, "late", "x"), "another kind"
    assert sums.due() == []
    clock.advance(1.0)
    (told,) = sums.due()
    assert (told.kind, told.count, told.seconds, told.message, told.request_id) == (
        OVERLOADED,
        999,
        1.0,
        "full",
        "r999",
    )
    assert sums.is_first(EXPIRED, "late", "y"), "a second without any has passed"
    assert not sums.is_first(OVERLOADED, "full", "r1000"), "it goes on"
    clock.advance(2.0)  # the loop was busy
    assert [(told.count, told.seconds) for told in sums.due()] == [(1, 2.0)]
    clock.advance(1.0)
    assert sums.due() == []
    assert sums.next_due_s() == math.inf, "nothing wakes the loop when there is nothing to tell"


def test_the_rest_is_told_at_the_end() -> None:
    clock = ManualClock()
    sums = LineSums(clock)
    for number in range(5):
        sums.is_first(OVERLOADED, "full", f"r{number}")
    sums.is_first(EXPIRED, "late", "x")
    clock.advance(0.25)
    assert [(told.kind, told.count, told.seconds) for told in sums.rest()] == [(OVERLOADED, 4, 0.25)]
    assert sums.rest() == []
    assert sums.is_first(OVERLOADED, "full", "r")


def test_every_line_is_told_or_counted_once() -> None:
    rng = random.Random(1)
    clock = ManualClock()
    sums = LineSums(clock)
    num_told, num_lines = 0, 0
    for number in range(3000):
        num_told += sums.is_first(rng.choice((OVERLOADED, EXPIRED)), "m", f"r{number}")
        clock.advance(rng.choice((0.0, 0.001, 0.4, 1.5)) if rng.random() < 0.1 else 0.0)
        told = sums.due() if rng.random() < 0.1 else []
        num_told += sum(each.count for each in told)
        num_lines += len(told)
    num_told += sum(each.count for each in sums.rest())
    assert num_told == 3000
    assert num_lines < 2 * clock.now_s() + 2


class Heard(logging.Handler):
    """What a logger said, and an event at each line."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str, str]] = []
        self.has_more = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        request_id = vars(record)["request_id"].split("~")[0]  # less what tells attempts apart
        self.lines.append((record.levelname, record.getMessage(), request_id))
        self.has_more.set()


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler, loggers = Heard(), logging.getLogger("control_plane.gateway")
    loggers.addHandler(handler)
    yield handler
    loggers.removeHandler(handler)


async def test_the_sum_of_a_second_comes_by_itself(heard: Heard) -> None:
    log = SummedLog(MonotonicClock(), period_s=0.05)
    logger = logging.getLogger("control_plane.gateway.any")
    for number in range(100):
        log.log(logger, logging.WARNING, "overloaded", "queues are full", f"r{number}")
    assert heard.lines == [("WARNING", "queues are full", "r0")]
    heard.has_more.clear()
    await asyncio.wait_for(heard.has_more.wait(), 10)
    ((level, text, request_id),) = heard.lines[1:]
    assert (level, request_id) == ("WARNING", "r99")
    assert text.startswith("queues are full (one of 99 such lines in ")
    log.flush()
    assert len(heard.lines) == 2
    assert log._timer is None


async def test_an_overloaded_gateway_says_so_in_few_lines_and_faults_one_by_one(heard: Heard) -> None:
    cluster = Cluster()
    options = SamplingInput(max_tokens=4)
    for number in range(300):
        stream = await cluster.loop.generate(GenerateInput(text="a", request_id=f"r{number}", sampling=options))
        error = InternalError("broken") if number % 100 == 0 else DeadlineExceeded("too late")
        failure = RequestFailed(stream.record.request_id, error.code, error.message)
        cluster.loop.deliver(WorkerOutput("decode-0", failures=(failure,)))
    faults = [line for line in heard.lines if line[0] == "ERROR"]
    assert faults == [("ERROR", "request failed: broken", f"r{number}") for number in (0, 100, 200)]
    await cluster.loop.drain(1.0)
    first, last = [line for line in heard.lines if line[0] == "WARNING"]
    assert first == ("WARNING", "request failed: too late", "r1")
    assert last[1].startswith("request failed: too late (one of 296 such lines in ")
    assert last[2] == "r299"
