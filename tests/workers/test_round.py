"""A worker's decisions, driven by hand: messages in, steps out, results in, messages out."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from kv_transfer.codec import Codec, part_layout
from kv_transfer.link import ArrivedPart
from kv_transfer.plan import WIRE_VERSION, PartSpan
from phasewise.core.messages import (
    AbortRequest,
    GatewayLost,
    KVAbort,
    KVAccepted,
    KVCommit,
    KVDone,
    KVFailed,
    KVOffer,
    KVPart,
    KVPartAck,
    PeerLost,
)
from phasewise.core.placement import WorkerState
from phasewise.core.request import FinishReason, Request, SampledToken, SamplingParams
from tests.support.pure_worker import SPEC, PureWorker
from workers.round import Step


def shape(step: Step | None) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(request, tokens) of the decodes and of the prompts."""
    assert step is not None
    decodes, prompts = (
        [(item.sequence.request_id, item.num_tokens) for item in items] for items in (step.decodes, step.prompts)
    )
    return decodes, prompts


def offer_of(name: str, num_tokens: int, sender: str = "prefill-0") -> KVOffer:
    request = Request(name, tuple(range(num_tokens)), SamplingParams(max_tokens=4))
    return KVOffer(f"{name}#1", WIRE_VERSION, sender, SPEC, request, "gateway-0", 60.0)


def part_of(name: str, index: int, span: PartSpan) -> KVPart:
    layout = part_layout(SPEC, span, SPEC.dtype, Codec.NONE)
    where = (span.first_layer, span.num_layers, span.first_token, span.num_tokens)
    return KVPart(f"{name}#1", index, *where, layout.num_bytes, SPEC.dtype, Codec.NONE)


ARRIVED = ArrivedPart(object(), lambda: None)


# ---- a step


def test_a_request_from_its_prompt_to_its_last_token() -> None:
    worker = PureWorker()
    worker.ask("r", 10, max_tokens=3)
    for expected in (([], [("r", 10)]), ([("r", 1)], []), ([("r", 1)], [])):
        step = worker.begin()
        assert shape(step) == expected
        worker.end(step)  # type: ignore[arg-type]
    assert worker.begin() is None
    assert worker.output("r") == [10, 11, 12]
    assert worker.chunks[-1].finish_reason is FinishReason.LENGTH
    worker.assert_empty()


def test_decodes_come_first_and_prompts_have_what_they_leave_of_the_budget() -> None:
    worker = PureWorker(scheduler={"token_budget": 16})
    for i in range(3):
        worker.ask(f"d{i}", 4, max_tokens=50)
    worker.end(worker.begin())  # type: ignore[arg-type]
    worker.ask("long", 40, max_tokens=5)
    decodes, prompts = shape(worker.begin())
    assert [tokens for _, tokens in decodes] == [1, 1, 1]
    assert prompts == [("long", 13)]


def test_a_step_begins_while_the_one_before_is_computed_and_its_results_come_in_order() -> None:
    worker = PureWorker()
    worker.ask("r", 6, max_tokens=4)
    worker.ask("other", 5, max_tokens=9)
    worker.end(worker.begin())  # type: ignore[arg-type]
    flights = [worker.begin(), worker.begin()]
    starts = [[item.start for item in step.decodes] for step in flights if step is not None]
    assert starts == [[6, 5], [7, 6]]
    assert worker.output("r") == [6]
    for step in flights:
        worker.end(step)  # type: ignore[arg-type]
    assert worker.output("r") == [6, 7, 8]
    flights = [worker.begin(), worker.begin()]
    assert [len(step.decodes) for step in flights if step is not None] == [2, 1], "the last token of r is on its way"
    for step in flights:
        worker.end(step)  # type: ignore[arg-type]
    worker.run()
    worker.assert_empty()


def test_what_was_computed_for_a_sequence_that_has_ended_is_dropped() -> None:
    worker = PureWorker()
    worker.ask("r", 6, max_tokens=9, stop_token_ids=(7,))
    worker.end(worker.begin())  # type: ignore[arg-type]
    first, second = worker.begin(), worker.begin()
    worker.end(first)  # type: ignore[arg-type]
    worker.assert_empty()
    worker.end(second)  # type: ignore[arg-type]
    assert worker.output("r") == [6, 7]
    assert worker.chunks[-1].finish_reason is FinishReason.STOP


def test_a_request_that_fails_alone_again_ends_and_its_blocks_are_hidden() -> None:
    worker = PureWorker()
    worker.ask("r", 40, max_tokens=9)
    worker.end(worker.begin())  # type: ignore[arg-type]
    step = worker.begin()
    assert step is not None
    worker.ask("later", 6, max_tokens=2)
    assert worker.rounds.failed(step, [step]) is None
    again = worker.begin()
    assert again is not None and [item.sequence.request_id for item in again.items] == ["r"]
    assert worker.begin() is None, "what comes next depends on the trial"
    assert worker.rounds.failed(again, [again]) == "r"
    worker.flush()
    assert [(failure.request_id, failure.code) for failure in worker.failures] == [("r", "internal")]
    worker.ask("same", 40, max_tokens=2)
    worker.run()
    assert worker.rounds.load().counters["prefix_hit_tokens"] == 0
    assert len(worker.output("later")) == len(worker.output("same")) == 2
    worker.assert_empty()


@pytest.mark.parametrize("when", ["prompt", "decode"])
def test_unusable_logits_fail_their_own_request_alone(when: str) -> None:
    worker = PureWorker()
    worker.ask("bad", 6, max_tokens=9)
    worker.ask("good", 6, max_tokens=3)
    if when == "decode":
        worker.end(worker.begin())  # type: ignore[arg-type]
    worker.end(worker.begin(), unusable=["bad"])  # type: ignore[arg-type]
    worker.run()
    assert [failure.request_id for failure in worker.failures] == ["bad"]
    assert "NaN or infinite logits" in worker.failures[0].message
    assert worker.output("good") == [6, 7, 8]
    worker.assert_empty()


def test_prompts_that_stay_leave_seats_to_reserved_handoffs_and_the_other_way_round() -> None:
    worker = PureWorker(scheduler={"max_running": 2})
    worker.rounds.take(offer_of("in0", 6))
    worker.ask("own0", 6, max_tokens=9)
    worker.ask("own1", 6, max_tokens=9)
    assert shape(worker.begin()) == ([], [("own0", 6)])
    assert len(worker.said(KVAccepted)) == 1
    worker.rounds.take(offer_of("in1", 6))
    worker.begin()
    assert len(worker.said(KVAccepted)) == 1, "one seat is reserved, and own0 is about to take the other"


def test_there_is_more_to_do_at_once_behind_a_preemption() -> None:
    worker = PureWorker(num_blocks=4, scheduler={"reserve_headroom": 0.0})
    worker.ask("a", 7, max_tokens=9)
    worker.ask("b", 7, max_tokens=5)
    assert not worker.rounds.has_more
    while not worker.rounds.load().num_preempted:
        worker.end(worker.begin())  # type: ignore[arg-type]
    assert worker.rounds.has_more
    worker.run()
    assert not worker.rounds.has_more and (len(worker.output("a")), len(worker.output("b"))) == (9, 5)
    worker.assert_empty()


# ---- messages


def test_a_round_may_follow_the_last_word_of_a_handoff_and_no_part_before_it() -> None:
    worker = PureWorker("decode")
    assert worker.rounds.take(offer_of("r", 8))
    worker.begin()
    parts = [part_of("r", i, PartSpan(i, 1, 0, 8)) for i in range(2)]
    assert not worker.rounds.take(parts[0], ARRIVED)
    assert not worker.rounds.take(KVCommit("r#1", 2, 8, (SampledToken(8),), 0.0))
    assert worker.rounds.take(parts[1], ARRIVED)
    assert worker.rounds.take(AbortRequest("somebody else"))
    assert shape(worker.begin()) == ([("r", 1)], [])
    assert len(worker.said(KVDone)) == 1


def test_a_commit_behind_its_parts_is_the_last_word() -> None:
    worker = PureWorker("decode")
    worker.rounds.take(offer_of("r", 8))
    worker.begin()
    assert not worker.rounds.take(part_of("r", 0, PartSpan(0, 2, 0, 8)), ARRIVED)
    assert worker.rounds.take(KVCommit("r#1", 1, 8, (SampledToken(8),), 0.0))


def test_computed_kv_that_is_held_back_leaves_when_a_part_has_arrived() -> None:
    worker = PureWorker("prefill", transfer={"layerwise_threshold_tokens": 1, "layers_per_part": 1})
    worker.link.num_buffers = 1
    worker.ask("r", 8, "decode-0", max_tokens=4)
    worker.begin()
    (offer,) = worker.said(KVOffer)
    assert not worker.rounds.is_held_back, "nothing is on its way whose arrival could help"
    worker.rounds.take(KVAccepted(offer.transfer_id, 0, SPEC.dtype))
    assert worker.rounds.is_held_back
    worker.link.num_buffers = 2
    worker.rounds.take(KVPartAck(offer.transfer_id, 0))
    assert [part.first_layer for part in worker.link.parts] == [0, 1]
    assert not worker.rounds.is_held_back


@pytest.mark.parametrize("end", [AbortRequest("r"), GatewayLost("gateway-0")])
def test_a_task_that_was_overtaken_by_its_end_does_not_begin(end: AbortRequest | GatewayLost) -> None:
    worker = PureWorker()
    worker.rounds.take(end)
    worker.ask("r", 6)
    assert worker.begin() is None
    worker.assert_empty()


@pytest.mark.parametrize(
    "end", [AbortRequest("r"), GatewayLost("gateway-0"), PeerLost("prefill-0"), KVAbort("r#1", "its sender gave up")]
)
def test_an_offer_that_was_overtaken_by_its_end_is_answered_at_once(end: AbortRequest | GatewayLost) -> None:
    worker = PureWorker("decode")
    worker.rounds.take(end)
    worker.rounds.take(offer_of("r", 6))
    assert worker.sent == [("prefill-0", KVFailed("r#1", "it was cancelled"))]
    worker.rounds.take(replace(offer_of("next", 6, sender="prefill-1"), gateway_id="gateway-1"))
    worker.begin()
    assert len(worker.said(KVAccepted)) == 1


@pytest.mark.parametrize(
    "end", [AbortRequest("gateway-0"), GatewayLost("r"), PeerLost("r"), KVAbort("r", "as"), PeerLost("gateway-0")]
)
def test_an_end_concerns_its_own_kind_of_thing_only(end: AbortRequest | GatewayLost | PeerLost | KVAbort) -> None:
    worker = PureWorker()
    worker.rounds.take(end)
    worker.ask("r", 6, max_tokens=2)
    worker.rounds.take(offer_of("s", 6, sender="r"[: not isinstance(end, PeerLost)] or "prefill-0"))
    worker.run()
    assert len(worker.output("r")) == 2
    assert len(worker.said(KVAccepted)) == 1


def test_the_abort_of_a_sample_does_not_keep_its_request_from_beginning() -> None:
    worker = PureWorker()
    worker.rounds.take(AbortRequest("r", 1))
    worker.ask("r", 6, max_tokens=2)
    worker.run()
    assert len(worker.output("r")) == 2


def test_a_role_refuses_what_is_not_its_own() -> None:
    prefill, decode = PureWorker("prefill"), PureWorker("decode")
    prefill.rounds.take(offer_of("r", 6))
    assert "takes no handoffs now" in prefill.said(KVFailed)[0].reason
    decode.ask("r", 6)
    decode.flush()
    assert [failure.code for failure in decode.failures] == ["unavailable"]


# ---- time


def test_the_next_deadline_is_the_first_of_all_and_a_heartbeat_at_the_latest() -> None:
    worker = PureWorker()
    now_s, heartbeat_s = worker.clock.now_s(), worker.rounds.limits.heartbeat_s
    assert worker.rounds.next_deadline_s() == now_s + heartbeat_s
    worker.ask("r", 6, time_left_s=0.5 * heartbeat_s)
    worker.rounds.take(replace(offer_of("s", 6), time_left_s=0.4 * heartbeat_s))
    assert worker.rounds.next_deadline_s() == pytest.approx(now_s + 0.4 * heartbeat_s)
    worker.clock.advance(0.45 * heartbeat_s)
    worker.begin()
    assert worker.rounds.next_deadline_s() == pytest.approx(now_s + 0.5 * heartbeat_s)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_a_request_whose_time_is_over_ends_when_the_next_round_begins(num_steps: int) -> None:
    worker = PureWorker()
    worker.ask("r", 6, max_tokens=50, n=2, time_left_s=5.0)
    worker.ask("patient", 6, max_tokens=50, time_left_s=50.0)
    for _ in range(num_steps):
        worker.end(worker.begin())  # type: ignore[arg-type]
    worker.clock.advance(4.9)
    worker.begin()
    assert worker.failures == []
    worker.clock.advance(0.1)
    worker.begin()
    assert [(failure.request_id, failure.code) for failure in worker.failures] == [("r", "deadline_exceeded")]
    worker.clock.advance(45.0)
    worker.begin()
    assert [failure.request_id for failure in worker.failures] == ["r", "patient"]
    worker.assert_empty()


def test_the_load_is_reported_when_it_changed_not_too_often_and_as_a_heartbeat() -> None:
    worker = PureWorker()
    rounds, interval_s = worker.rounds, worker.rounds.limits.report_interval_s

    def reports(*, idle: bool) -> int:
        before = len(worker.loads)
        rounds.report(idle=idle)
        return len(worker.loads) - before

    assert reports(idle=False) == 1
    worker.ask("r", 6)
    assert reports(idle=False) == 0, "too soon"
    worker.clock.advance(1.01 * interval_s)
    assert reports(idle=False) == 1
    worker.clock.advance(1.01 * interval_s)
    assert reports(idle=False) == 0, "nothing has changed"
    worker.begin()
    assert reports(idle=False) == 1
    worker.ask("s", 6)
    assert reports(idle=False) == 0
    assert reports(idle=True) == 1, "an idle worker has time to say so at once"
    assert reports(idle=True) == 0
    worker.clock.advance(rounds.limits.heartbeat_s)
    assert reports(idle=False) == 1
    assert [load.number for load in worker.loads] == [1, 2, 3, 4, 5]


def test_a_worker_that_stops_says_so_and_takes_nothing_more() -> None:
    worker = PureWorker()
    worker.rounds.stop()
    assert worker.loads[-1].state is WorkerState.STOPPED
    worker.ask("r", 6)
    assert worker.begin() is None
    assert [failure.code for failure in worker.failures] == ["unavailable"]


# ---- what it needs

_WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "ray", "grpc", "numpy"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Blocker())
import workers.round, workers.assemble, prefill_workers.phase, decode_workers.phase
from tests.support.pure_worker import PureWorker
worker = PureWorker()
worker.ask("r", 10, max_tokens=3)
worker.run()
print(worker.output("r"))
"""


def test_a_worker_decides_where_neither_torch_nor_ray_nor_grpc_can_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", _WITHOUT], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[10, 11, 12]\n", done.stderr
