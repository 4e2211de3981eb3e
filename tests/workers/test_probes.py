"""Probes of links beside real handoffs: measured, answered once whatever happens, and never in anybody's way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kv_transfer.link import DeviceFull
from kv_transfer.prober import ProbeLink
from kv_transfer.staging import is_intact
from phasewise.core.links import LinkProbe
from phasewise.core.messages import KVPart, KVPartAck, LinkLost, PeerLost
from tests.support.scripted_engine import SPEC, expected_tokens
from tests.support.worker_box import WorkerBox, corrupt
from tests.workers.test_links import LAYERWISE, LinkedBox
from tests.workers.test_request_life import PAIR, prompt_of


def probe(box: WorkerBox, num_bytes: int = 4096, timeout_s: float = 5.0, peer: str = "decode-0") -> list[LinkProbe]:
    """Orders a probe from prefill-0; what it is answered comes into the list."""
    answers: list[LinkProbe] = []
    box.workers["prefill-0"].post(ProbeLink(peer, num_bytes, timeout_s, answers.append))
    return answers


def test_a_probe_takes_the_time_until_its_acknowledgement() -> None:
    parts: list[KVPart] = []

    def slow(part: KVPart, wire: torch.Tensor) -> torch.Tensor:
        parts.append(part)
        assert is_intact(wire)
        box.clock.advance(0.25)
        return wire

    box = WorkerBox(PAIR, fault=slow)
    for num_bytes in (32, 1 << 20, 48):
        answers = probe(box, num_bytes)
        box.run_until(lambda answers=answers: answers)
        assert answers == [LinkProbe(num_bytes, pytest.approx(0.25))]
    assert [part.num_bytes for part in parts] == [32, 1 << 20, 48]
    counters = box.workers["decode-0"].load().counters
    assert (counters["late_parts"], counters["handoff_bytes_in"], counters["checksum_failures"]) == (0, 0, 0)
    assert box.workers["prefill-0"].load().counters["handoff_bytes_out"] == 0
    box.assert_empty()


@pytest.mark.parametrize("num_bytes", [0, 16, 40, -32, 2048])
def test_a_size_that_the_link_does_not_take_is_refused(num_bytes: int) -> None:
    box = LinkedBox()
    box.direct.largest_part_bytes = 1024
    answers = probe(box, num_bytes)
    box.run()
    (answer,) = answers
    assert answer.seconds is None
    assert f"multiple of 16 from 32 to 1024, not {num_bytes}" in answer.failure
    assert box.direct.num_sent == 0


@pytest.mark.parametrize("num_buffers", [1, 2, 2**31])
def test_probes_beside_running_handoffs_leave_them_alone(num_buffers: int) -> None:
    box = LinkedBox(num_blocks=512, transfer=LAYERWISE)
    box.direct.num_buffers = num_buffers
    answers = []
    for i in range(6):
        box.submit(f"r{i}", prompt_of(200, seed=i), "prefill-0", "decode-0", max_tokens=5)
        answers.append(probe(box))
        box.round()
    box.run()
    box.run_until(lambda: all(answers))
    assert [[a.failure for a in got] for got in answers] == [[""]] * 6
    assert box.direct.most_out <= num_buffers
    for i in range(6):
        assert box.output(f"r{i}") == expected_tokens(prompt_of(200, seed=i), 5)
    assert box.workers["decode-0"].load().counters["late_parts"] == 0
    box.assert_empty()


def test_a_probe_for_which_there_is_no_buffer_waits_no_longer_than_its_time() -> None:
    box = LinkedBox()
    box.direct.num_buffers = 0
    answers = probe(box, timeout_s=2.0)
    box.round()
    assert box.workers["prefill-0"].rounds.parts.prober.next_deadline_s() == box.clock.now_s() + 2.0
    box.clock.advance(1.9)
    box.round()
    assert answers == []
    box.clock.advance(0.2)
    box.round()
    assert answers == [LinkProbe(4096, None, "every buffer of the link was in use for 2 s")]
    assert box.direct.num_sent == 0
    box.direct.num_buffers = 1
    answers = probe(box)
    box.run_until(lambda: answers)
    assert answers[0].failure == ""


def test_a_full_device_fails_the_probe_and_not_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    box = LinkedBox()

    def buffer(*_: Any) -> None:
        raise DeviceFull

    with monkeypatch.context() as patched:
        patched.setattr(box.direct, "buffer", buffer)
        answers = probe(box)
        box.round()
    assert answers == [LinkProbe(4096, None, "the device has no 4096 bytes left for a buffer")]
    box.submit("r", prompt_of(50), "prefill-0", "decode-0", max_tokens=4)
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(50), 4)


def test_a_lost_probe_is_given_up_and_its_late_acknowledgement_ignored() -> None:
    box = LinkedBox()
    box.direct.num_delivered = 0
    answers = probe(box, timeout_s=2.0)
    box.round()
    box.clock.advance(2.0)
    box.round()
    assert answers == [LinkProbe(4096, None, "it did not arrive for 2 s")]
    box.workers["prefill-0"].post(KVPartAck("probe prefill-0.1", 0))
    box.run()
    assert len(answers) == 1
    box.assert_empty()


@pytest.mark.parametrize("is_sent", [False, True])
def test_loss_of_the_peer_answers_its_probes(is_sent: bool) -> None:
    box = LinkedBox()
    box.direct.num_delivered = 0
    box.direct.num_buffers = 1 if is_sent else 0
    answers = probe(box)
    box.round()
    assert box.direct.num_sent == is_sent
    box.lost.add("decode-0")
    box.workers["prefill-0"].post(PeerLost("decode-0"))
    box.run()
    assert answers == [LinkProbe(4096, None, "worker decode-0 was lost")]


def test_a_broken_link_fails_what_was_on_it_and_the_next_probe_takes_the_other_road() -> None:
    box = LinkedBox()
    box.direct.num_delivered = 0
    answers = probe(box)
    box.round()
    box.break_link("prefill-0")
    box.workers["prefill-0"].post(LinkLost("decode-1", "another one", frozenset()))
    box.run()
    assert answers == [LinkProbe(4096, None, "the link to decode-0 broke: the test broke it")]
    answers = probe(box)
    box.run_until(lambda: answers)
    assert answers[0].failure == ""
    assert box.parts_beside == 1


def test_a_damaged_probe_is_counted() -> None:
    box = WorkerBox(PAIR, fault=lambda part, wire: corrupt(wire))
    probe(box)
    box.run()
    assert box.workers["decode-0"].load().counters["checksum_failures"] == 1
    box.assert_empty()


def test_what_a_worker_tells_of_its_links() -> None:
    box = LinkedBox(transfer={"layers_per_part": 2})
    box.direct.largest_part_bytes = 1 << 20
    box.direct.rate, box.direct.seconds_per_part = 5e9, 1e-4
    worker, peer = box.workers["prefill-0"], box.workers["decode-0"].info
    narrow, odd_spec = replace(SPEC, dtype="bfloat16", block_size=32), replace(SPEC, num_layers=7)
    others = [replace(peer, worker_id="narrow", kv_spec=narrow), replace(peer, worker_id="odd", kv_spec=odd_spec)]
    links = worker.links([peer, *others])
    assert (links.worker_id, links.layers_per_part, links.chunk_tokens) == ("prefill-0", 2, 128)
    same, half, odd = links.links
    assert (same.peer, same.link, same.bytes_per_s, same.part_s) == ("decode-0", "loopback", 5e9, 1e-4)
    assert (same.max_part_bytes, same.dtype, same.codec) == (1 << 20, "float32", "none")
    assert same.bytes_per_token == SPEC.bytes_per_token
    assert (same.is_lossless, same.refusal) == (True, "")
    assert (half.dtype, half.is_lossless, half.refusal) == ("bfloat16", False, "")
    assert half.bytes_per_token == SPEC.bytes_per_token / 2
    assert odd.refusal == "num_layers: 4 here, 7 there"


@pytest.mark.parametrize(("rate", "part_s", "num_parts"), [(1e6, 1e-6, 4), (1e6, 1.0, 1), (0.0, 1e-6, 1)])
def test_prompts_are_pushed_layer_by_layer_where_the_link_makes_that_pay(
    rate: float, part_s: float, num_parts: int
) -> None:
    box = LinkedBox(transfer={"layers_per_part": 1})
    box.direct.rate, box.direct.seconds_per_part = rate, part_s
    box.submit("r", prompt_of(100), "prefill-0", "decode-0", max_tokens=5)
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(100), 5)
    assert box.direct.num_sent == num_parts
    box.assert_empty()


def test_a_prompt_goes_on_as_it_began_when_the_rate_becomes_known_meanwhile() -> None:
    box = LinkedBox(num_blocks=512, transfer={"layers_per_part": 1})
    box.direct.seconds_per_part = 1.0

    def learn(part: Any, wire: torch.Tensor) -> torch.Tensor:
        box.direct.rate = 1e9  # from here on nothing would be pushed layer by layer
        return wire

    box.direct.fault = learn
    box.submit("r", prompt_of(600), "prefill-0", "decode-0", max_tokens=5)
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(600), 5)
    assert box.direct.num_sent == 4 * 5  # groups * chunks of 128
    box.assert_empty()
