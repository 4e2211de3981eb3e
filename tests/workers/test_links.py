"""What becomes of handoffs when a link breaks, is full, or is not up: both ends clean, the same tokens in the end."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kv_transfer.link import DeviceFull, Link
from kv_transfer.loopback_link import LoopbackLink
from kv_transfer.routed_link import RoutedLink
from phasewise.core.config import build_config
from phasewise.core.errors import ConfigError
from phasewise.core.handles import WorkerHandles
from phasewise.core.messages import KVCommit, KVPart, KVPartAck, LinkLost
from phasewise.core.placement import WorkerRole
from tests.support.host_wire import HostDevice
from tests.support.scripted_engine import expected_tokens
from tests.support.worker_box import WorkerBox
from tests.workers.test_request_life import PAIR, prompt_of
from workers import links
from workers.link_sizes import link_sizes
from workers.links import Links
from workers.settings import WorkerSettings

LAYERWISE = {"layerwise_threshold_tokens": 16, "layers_per_part": 1}


class Direct(LoopbackLink):
    """A direct link that a test breaks. `deliver` = False keeps parts for ever; `num_buffers` bounds what is out."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.up = True
        self.num_delivered = 2**31
        self.num_buffers = 2**31
        self.num_sent = 0
        self.num_out = 0
        self.most_out = 0
        self.kept: set[str] = set()

    def is_up(self, peer: str) -> bool:
        return self.up

    def buffer(self, peer: str, num_bytes: int) -> torch.Tensor | None:
        return super().buffer(peer, num_bytes) if self.num_out < self.num_buffers else None

    def send_part(self, peer: str, part: KVPart, wire: torch.Tensor) -> None:
        self.num_sent += 1
        self.num_out += 1
        self.most_out = max(self.most_out, self.num_out)
        if self.num_sent <= self.num_delivered:
            super().send_part(peer, part, wire)
        else:
            self.kept.add(part.transfer_id)


class LinkedBox(WorkerBox):
    """A prefill and a decode worker with a direct link beside the other one."""

    def __init__(self, **sections: Any) -> None:
        mailboxes: dict[str, Any] = {}
        self.direct = Direct("prefill-0", mailboxes)
        self._routed = RoutedLink(self.direct, LoopbackLink("prefill-0", mailboxes, self._count))
        self.parts_beside = 0
        super().__init__(PAIR, **sections)
        mailboxes |= {name: worker.post for name, worker in self.workers.items()}
        self.direct.writers = {name: worker.prepare_write for name, worker in self.workers.items() if self.links_write}

        def post(message: Any, arrived: Any = None) -> None:
            if isinstance(message, KVPartAck):
                self.direct.num_out -= 1
            self.workers["prefill-0"].post(message, arrived)

        mailboxes["prefill-0"] = post

    def link_of(self, worker_id: str, link: LoopbackLink) -> Link:
        return self._routed if worker_id == "prefill-0" else link

    def _count(self, part: KVPart, wire: torch.Tensor) -> torch.Tensor:
        self.parts_beside += 1
        return wire

    def break_link(self, *sides: str) -> None:
        """As a link does: down first, then the news, to those that noticed."""
        self.direct.up = False
        for side in sides:
            other = "decode-0" if side == "prefill-0" else "prefill-0"
            self.workers[side].post(LinkLost(other, "the test broke it", frozenset(self.direct.kept)))


def committed(box: WorkerBox) -> bool:
    return any(isinstance(m, KVCommit) for _, m in box.sent)


@pytest.mark.parametrize("sides", [("prefill-0",), ("decode-0",), ("prefill-0", "decode-0")])
@pytest.mark.parametrize("num_delivered", [1, 3])
@pytest.mark.parametrize("after_commit", [False, True])
def test_parts_lost_with_the_link_are_sent_again_beside_it(
    sides: tuple[str, ...], num_delivered: int, after_commit: bool
) -> None:
    box = LinkedBox(transfer=LAYERWISE)
    box.direct.num_delivered = num_delivered
    box.submit("r", prompt_of(300), "prefill-0", "decode-0", max_tokens=8)
    box.run_until(lambda: committed(box) if after_commit else box.direct.num_sent > num_delivered)
    box.round()
    box.break_link(*sides)
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(300), 8)
    assert box.parts_beside > 0
    assert box.workers["prefill-0"].load().counters["handoff_failures"] == 1
    assert not box.failures
    box.assert_empty()


@pytest.mark.parametrize("arrives", [True, False])
def test_a_commit_lost_with_the_link_is_sent_beside_it(arrives: bool) -> None:
    """Behind parts that had arrived, so that nothing else of its handoff was lost."""
    box = LinkedBox()
    on_link: list[KVCommit] = []

    def send_commit(peer: str, commit: KVCommit) -> bool:
        on_link.append(commit)
        if arrives:
            box.workers[peer].post(commit)
        return True

    box.direct.send_commit = send_commit  # type: ignore[method-assign]
    box.submit("r", prompt_of(100), "prefill-0", "decode-0", max_tokens=8)
    for _ in range(10):
        box.round()
    assert on_link and not committed(box)
    assert box.workers["prefill-0"].load().num_handoffs_out == (not arrives)
    box.break_link("prefill-0")
    box.break_link("prefill-0")  # the news may come twice
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(100), 8)
    assert sum(isinstance(m, KVCommit) for _, m in box.sent) == (not arrives)
    assert box.workers["prefill-0"].load().counters["handoff_failures"] == 0
    box.assert_empty()


def test_a_link_that_breaks_with_nothing_on_it_costs_nothing() -> None:
    box = LinkedBox()
    box.submit("a", prompt_of(100), "prefill-0", "decode-0", max_tokens=8)
    box.run_until(lambda: committed(box) and not box.outgoing("prefill-0").window.num_bytes_in_flight)
    box.break_link("prefill-0", "decode-0")
    box.submit("b", prompt_of(90), "prefill-0", "decode-0", max_tokens=8)
    box.run()
    assert box.output("a") == expected_tokens(prompt_of(100), 8)
    assert box.output("b") == expected_tokens(prompt_of(90), 8)
    assert box.parts_beside == 1
    assert box.workers["prefill-0"].load().counters["handoff_failures"] == 0
    box.assert_empty()


@pytest.mark.parametrize("late", ["prefill-0", "decode-0"])
def test_news_of_a_break_that_come_twice_or_late_leave_the_second_attempt_alone(late: str) -> None:
    """An abort takes its time on each side, and `send_part` tells at once what the end of the epoch tells again."""
    box = LinkedBox(transfer=LAYERWISE)
    box.direct.num_delivered = 0
    box.submit("r", prompt_of(300), "prefill-0", "decode-0", max_tokens=8)
    box.run_until(lambda: committed(box))
    box.break_link("prefill-0")
    prefill, decode = box.workers["prefill-0"], box.workers["decode-0"]
    outgoing = box.outgoing("prefill-0")
    outgoing.window.num_bytes = 1  # a part at a time
    for _ in range(10):
        prefill.round()
        if box.parts_beside:
            break
        decode.round()
    assert outgoing.window.num_bytes_in_flight
    for _ in range(3):
        box.break_link(late)
        box.round()
    box.run()
    assert not box.failures
    assert prefill.load().counters["handoff_failures"] == 1
    assert box.output("r") == expected_tokens(prompt_of(300), 8)
    box.assert_empty()


def test_parts_that_took_another_road_outlive_the_link() -> None:
    box = LinkedBox()
    box.direct.up = False  # broken, but its end is not told yet
    box.submit("r", prompt_of(100), "prefill-0", "decode-0", max_tokens=8)
    outgoing = box.outgoing("prefill-0")
    box.run_until(lambda: outgoing.window.num_bytes_in_flight)
    box.break_link("prefill-0", "decode-0")
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(100), 8)
    assert box.workers["prefill-0"].load().counters["handoff_failures"] == 0
    box.assert_empty()


def test_the_link_is_used_again_when_it_is_up_again() -> None:
    box = LinkedBox()
    box.direct.up = False
    box.submit("a", prompt_of(50), "prefill-0", "decode-0", max_tokens=4)
    box.run()
    box.direct.up = True
    box.submit("b", prompt_of(60), "prefill-0", "decode-0", max_tokens=4)
    box.run()
    assert (box.parts_beside, box.direct.num_sent) == (1, 1)
    box.assert_empty()


def test_a_full_link_holds_parts_back_and_drops_none() -> None:
    box = LinkedBox(num_blocks=512, transfer=LAYERWISE)
    box.direct.num_buffers = 2
    for i in range(6):
        box.submit(f"r{i}", prompt_of(200, seed=i), "prefill-0", "decode-0", max_tokens=5)
    box.run()
    assert box.direct.most_out == 2
    assert box.direct.num_sent >= 6 * 4
    for i in range(6):
        assert box.output(f"r{i}") == expected_tokens(prompt_of(200, seed=i), 5)
    assert (box.direct.num_out, box.parts_beside) == (0, 0)
    box.assert_empty()


@pytest.mark.parametrize("is_full_for_ever", [False, True])
def test_a_full_device_fails_a_handoff_and_not_the_worker(
    is_full_for_ever: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = LinkedBox(transfer=LAYERWISE)
    buffer = box.direct.buffer

    def full(peer: str, num_bytes: int) -> torch.Tensor | None:
        if is_full_for_ever or box.direct.num_out:
            raise DeviceFull
        return buffer(peer, num_bytes)

    with monkeypatch.context() as patched:
        patched.setattr(box.direct, "buffer", full)
        box.submit("a", prompt_of(300), "prefill-0", "decode-0", max_tokens=4)
        box.run()
    if is_full_for_ever:
        assert "bytes left for a part; lower transfer.window_mib" in box.failures["a"].message
    else:
        assert box.output("a") == expected_tokens(prompt_of(300), 4)
    box.submit("b", prompt_of(50), "prefill-0", "decode-0", max_tokens=4)
    box.run()
    assert box.output("b") == expected_tokens(prompt_of(50), 4)
    box.assert_empty()


def test_large_parts_are_cut_to_what_the_link_takes() -> None:
    box = LinkedBox(num_blocks=512)
    box.direct.largest_part_bytes = 1000
    box.submit("r", prompt_of(300), "prefill-0", "decode-0", max_tokens=5)
    box.run()
    assert box.output("r") == expected_tokens(prompt_of(300), 5)
    kv_bytes = 300 * box.workers["prefill-0"].info.kv_spec.bytes_per_token
    assert box.direct.num_sent >= kv_bytes // 1000
    box.assert_empty()


def test_slabs_that_do_not_fit_are_said_with_their_key(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(HostDevice):
        def allocate(self, num_bytes: int) -> torch.Tensor:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(links, "wire_device", lambda settings, link, host: Full())
    config = build_config({"transfer": {"link": "tcp", "slab_mib": 4096}}, source="test")
    settings = WorkerSettings("decode-0", WorkerRole.DECODE, "cpu", 1, config, secret="of the cluster")
    with pytest.raises(ConfigError, match="no room for 4 slabs of 4096 MiB") as caught:
        Links(settings, WorkerHandles(), lambda *_: None, lambda *_: False)
    assert caught.value.field == "transfer.slab_mib"
    assert "of the cluster" not in repr(settings)


def test_channels_become_fewer_with_peers_and_are_the_same_at_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each link takes memory for each of its channels; two ends with different numbers refuse each other."""
    made: list[int] = []

    class Device(HostDevice):
        def __init__(self, index: int, channels: int, *, is_only_user: bool) -> None:
            super().__init__()
            made.append(channels)

    monkeypatch.setitem(sys.modules, "kv_transfer.nccl_wire", SimpleNamespace(NcclDevice=Device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def channels(prefill: int, decode: int, **transfer: Any) -> set[int]:
        pools = {"prefill": {"workers": prefill}, "decode": {"workers": decode}}
        config = build_config({"pools": pools, "transfer": transfer}, source="test")
        made.clear()
        for role in (WorkerRole.PREFILL, WorkerRole.DECODE):
            links.wire_device(WorkerSettings(role.value, role, "cuda", 1, config), "nccl", "127.0.0.1")
        return set(made)

    assert [channels(1, count) for count in (1, 2, 3, 4, 5, 64)] == [{16}, {16}, {8}, {8}, {4}, {4}]
    assert channels(8, 1) == {4}
    assert channels(8, 1, nccl_channels=16) == {16}


def test_staging_becomes_less_with_peers_and_is_what_the_configuration_says() -> None:
    def staging(decode: int, **transfer: Any) -> tuple[int, int]:
        pools = {"prefill": {"workers": 1}, "decode": {"workers": decode}}
        sizes = link_sizes(build_config({"pools": pools, "transfer": transfer}, source="test"))
        return sizes.num_slabs, sizes.slab_mib

    assert [staging(count) for count in (1, 2, 3, 4, 5, 64)] == [(4, 128)] * 2 + [(2, 128)] * 2 + [(2, 96)] * 2
    assert staging(64, num_slabs=3) == (3, 96) and staging(1, slab_mib=7) == (4, 7)
