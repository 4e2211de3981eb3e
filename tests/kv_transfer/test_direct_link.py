"""Direct links over host memory: order, back-pressure, refusals, and every way in which an end can vanish."""

from __future__ import annotations

import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_transfer.channel import Channel, Left, Token
from kv_transfer.link import WriteOutcome, WriteReceived
from phasewise.core.errors import TransferFailed
from phasewise.core.messages import KVCommit, KVPart, KVPartAck, LinkLost
from phasewise.core.request import SampledToken
from tests.support import host_wire
from tests.support.host_wire import HostDevice, HostWire
from tests.support.link_node import SLAB_BYTES, LinkNode, NodeProcess, content, is_intact
from tests.support.served import until

CLEAN_WITHIN_S = 2.0

Make = Callable[..., Any]


def links_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-link")]


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    NodeProcess.prepare()


@pytest.fixture
def node() -> Iterator[Make]:
    """Makes nodes; after the test they leave no thread and no descriptor behind, and all their slabs are free."""
    num_files = len(list(Path("/proc/self/fd").iterdir()))
    nodes: list[LinkNode] = []

    def make(worker_id: str, *arguments: Any, **settings: Any) -> LinkNode:
        nodes.append(LinkNode(worker_id, *arguments, **settings))
        return nodes[-1]

    yield make
    for made in nodes:
        made.close()
    until(lambda: not links_threads(), CLEAN_WITHIN_S)  # an accepted connection may be ending still
    assert len(list(Path("/proc/self/fd").iterdir())) <= num_files
    assert all(made.is_clean for made in nodes)


@pytest.fixture
def process() -> Iterator[Make]:
    processes: list[NodeProcess] = []

    def make(*arguments: Any, **settings: Any) -> NodeProcess:
        processes.append(NodeProcess(*arguments, **settings))
        return processes[-1]

    yield make
    for made in processes:
        made.close()


def connect(sender: LinkNode, receiver: LinkNode, receiver_id: str = "decode-0") -> None:
    sender.links.open(receiver_id, receiver.links.address, 10.0)


# ---- while all goes well


def test_parts_of_any_size_arrive_bit_for_bit_in_order(node: Make) -> None:
    sender, receiver = node("prefill-0"), node("decode-0")
    connect(sender, receiver)
    assert sender.links.is_up("decode-0") and sender.links.bytes_per_s("decode-0") > 0
    rng = random.Random(0)
    sizes = [64, SLAB_BYTES] + [16 * rng.randrange(1, SLAB_BYTES // 16) for _ in range(60)]
    num_sent = num_taken = 0
    while num_taken < len(sizes):
        while num_sent < len(sizes) and sender.try_send("decode-0", num_sent, sizes[num_sent]):
            num_sent += 1
        receiver.take(num_taken, sizes[num_taken])
        assert sender.next(KVPartAck) == KVPartAck("t", num_taken)
        num_taken += 1
    assert sender.is_clean and receiver.is_clean


@pytest.mark.parametrize("token", [None, SampledToken(5), SampledToken(7, -0.25)])
def test_a_small_commit_comes_with_the_parts(node: Make, token: SampledToken | None) -> None:
    sender, receiver = node("prefill-0"), node("decode-0")
    connect(sender, receiver)
    commit = KVCommit("t", 2, 30, (token,), 1.5)
    assert sender.links.send_commit("decode-0", commit)
    assert receiver.next(KVCommit) == commit
    for large in ((token, token), (SampledToken(5, -1.0, ((5, -1.0), (6, -2.0))),)):
        assert not sender.links.send_commit("decode-0", KVCommit("t", 2, 30, large, 1.5))
    assert sender.try_send("decode-0", 0, 64)
    receiver.take(0, 64)  # and nothing before it: larger ones come by the workers' own way
    assert sender.next(KVPartAck) == KVPartAck("t", 0)
    assert not sender.links.send_commit("unknown", commit)


def test_both_directions_of_a_pair_at_once(node: Make) -> None:
    one, other = node("mixed-0"), node("mixed-1")
    one.links.open("mixed-1", other.links.address, 10.0)
    other.links.open("mixed-0", one.links.address, 10.0)
    assert one.try_send("mixed-1", 1, 4096) and other.try_send("mixed-0", 2, 4096)
    one.take_both(2, 4096), other.take_both(1, 4096)


def test_a_full_receiver_holds_the_sender_back_and_drops_nothing(node: Make) -> None:
    device = HostDevice()
    sender, receiver = node("prefill-0", device, num_slabs_out=4), node("decode-0")
    connect(sender, receiver)
    device.packed = threading.Event()  # none leaves before all four are out
    for index in range(4):
        assert sender.try_send("decode-0", index, SLAB_BYTES)
    assert not sender.try_send("decode-0", 4, SLAB_BYTES), "all buffers of the sender are in use"
    device.packed.set()
    held = [receiver.next(KVPart) for _ in range(2)]
    assert [sender.next(KVPartAck).part_index for _ in range(2)] == [0, 1]
    assert receiver.num_free[1] == 0 and receiver.mailbox.empty()
    for _, arrived in held:
        arrived.release()
    for index in (2, 3):
        receiver.take(index, SLAB_BYTES)
        assert sender.next(KVPartAck).part_index == index
    assert sender.is_clean


def test_a_receiver_that_grants_nothing_leaves_slabs_for_others(node: Make) -> None:
    sender, full, other = node("prefill-0"), node("decode-0"), node("decode-1")
    connect(sender, full)
    connect(sender, other, "decode-1")
    for index in range(2):
        assert sender.try_send("decode-0", index, SLAB_BYTES)
        assert sender.next(KVPartAck).part_index == index
    assert sender.try_send("decode-0", 2, SLAB_BYTES), "it waits for a grant"
    assert not sender.try_send("decode-0", 3, SLAB_BYTES), "and nothing behind it takes the last slab"
    assert sender.try_send("decode-1", 4, SLAB_BYTES)
    other.take(4, SLAB_BYTES)
    assert sender.next(KVPartAck).part_index == 4
    for index in range(3):
        full.take(index, SLAB_BYTES)
    assert sender.next(KVPartAck).part_index == 2


def test_a_buffer_that_could_not_be_filled_is_free_again(node: Make) -> None:
    sender, receiver = node("prefill-0"), node("decode-0")
    connect(sender, receiver)
    buffers = [sender.links.buffer("decode-0", SLAB_BYTES) for _ in range(2)]
    assert sender.links.buffer("decode-0", SLAB_BYTES) is None
    for buffer in buffers:
        assert buffer is not None
        sender.links.give_back(buffer)
    assert sender.try_send("decode-0", 1, SLAB_BYTES)
    receiver.take(1, SLAB_BYTES)
    sender.next(KVPartAck)


def test_slabs_go_to_the_sender_that_asked_first(node: Make) -> None:
    receiver = node("decode-0", num_slabs_in=1)
    first, second = node("prefill-0"), node("prefill-1")
    for sender in (first, second):
        connect(sender, receiver)
    assert first.try_send("decode-0", 0, SLAB_BYTES)
    _, held = receiver.next(KVPart)
    pool = receiver.links.incoming.pool
    for number, (sender, index) in enumerate([(second, 1), (first, 2), (second, 3)], start=1):
        assert sender.try_send("decode-0", index, SLAB_BYTES)
        until(lambda number=number: pool.num_waiting == number, 5.0)
    held.release()
    for index in (1, 2, 3):
        receiver.take(index, SLAB_BYTES)


def test_a_part_is_sent_only_when_the_device_has_packed_it(node: Make) -> None:
    device = HostDevice()
    sender, receiver = node("prefill-0", device), node("decode-0")
    connect(sender, receiver)
    device.packed = threading.Event()
    assert sender.try_send("decode-0", 0, SLAB_BYTES)
    until(lambda: receiver.num_free[1] == 1, 5.0)  # granted meanwhile
    assert receiver.mailbox.empty()
    device.packed.set()
    receiver.take(0, SLAB_BYTES)
    sender.next(KVPartAck)


def test_a_receive_waits_on_the_device_for_the_last_use_of_its_slab(node: Make) -> None:
    device = HostDevice()
    sender, receiver = node("prefill-0"), node("decode-0", device)
    connect(sender, receiver)
    for index in range(2):
        assert sender.try_send("decode-0", index, SLAB_BYTES)
    arrived = [receiver.next(KVPart)[1] for _ in range(2)]
    first = arrived[0].wire.clone()
    device.packed = threading.Event()
    arrived[0].release()
    sender.next(KVPartAck)
    assert sender.try_send("decode-0", 2, SLAB_BYTES)
    until(lambda: receiver.num_free[1] == 0, 5.0)
    assert receiver.mailbox.empty() and torch.equal(arrived[0].wire, first)
    device.packed.set()
    receiver.take(2, SLAB_BYTES)
    arrived[1].release()


def test_nothing_is_received_into_new_memory_before_the_device_is_done_with_its_last_owner(node: Make) -> None:
    seen: list[str] = []

    class Device(HostDevice):
        def allocate(self, num_bytes: int) -> torch.Tensor:
            seen.append("allocate")
            return super().allocate(num_bytes)

        def mark(self) -> Any:
            seen.append("mark")
            return super().mark()

        def make(self, token: bytes, rank: int) -> HostWire:
            seen.append("make")
            return super().make(token, rank)

    sender, receiver = node("prefill-0"), node("decode-0", Device())
    connect(sender, receiver)
    before = seen[: seen.index("make")]
    assert before[-1] == "mark" and "allocate" in before, before


def test_corrupted_bytes_are_told_and_cost_no_slab(node: Make) -> None:
    def alter(part: int, data: bytearray) -> None:
        if part == 1:
            data[100] ^= 1

    sender, receiver = node("prefill-0", HostDevice(alter=alter)), node("decode-0")
    connect(sender, receiver)
    for index in range(3):
        assert sender.try_send("decode-0", index, 4096) or sender.next(KVPartAck)
        if index == 1:
            part, arrived = receiver.next(KVPart)
            assert part.part_index == 1 and arrived.wire is None
            arrived.release()
        else:
            receiver.take(index, 4096)
        assert sender.next(KVPartAck).part_index == index


def test_a_part_is_landed_as_soon_as_its_bytes_are_in_and_keeps_no_slab(node: Make) -> None:
    def alter(part: int, data: bytearray) -> None:
        if part == 1:
            data[100] ^= 1

    written: dict[int, torch.Tensor] = {}

    def prepare_write(part: KVPart, wire: torch.Tensor) -> WriteReceived:
        def write() -> bool:
            written[part.part_index] = wire.clone()
            return part.part_index != 2

        return write

    sender, receiver = node("prefill-0", HostDevice(alter=alter)), node("decode-0", prepare_write=prepare_write)
    connect(sender, receiver)
    for index, outcome in enumerate((WriteOutcome.RIGHT, WriteOutcome.WRONG, None, WriteOutcome.RIGHT)):
        assert sender.try_send("decode-0", index, 4096) or sender.next(KVPartAck)
        part, arrived = receiver.next(KVPart)
        assert (part.part_index, arrived.written) == (index, outcome)
        assert receiver.is_clean == (outcome is not None), "nobody has released anything yet"
        assert torch.equal(written[index], content(index, 4096)) == (outcome is not WriteOutcome.WRONG)
        assert (arrived.wire is None) == (outcome is not None)
        arrived.release()
        assert sender.next(KVPartAck).part_index == index


def test_the_owner_hears_of_every_part_that_landed_also_of_those_lost_with_the_link(node: Make) -> None:
    def write(part: KVPart) -> bool:
        if part.part_index == 1:
            receiver.links.forget("prefill-0")
        return True

    sender, receiver = node("prefill-0"), node("decode-0", prepare_write=lambda part, wire: partial(write, part))
    connect(sender, receiver)
    for index, outcome in enumerate((WriteOutcome.RIGHT, WriteOutcome.LOST)):
        assert sender.try_send("decode-0", index, 4096)
        part, arrived = receiver.next(KVPart)
        assert (part.part_index, arrived.written) == (index, outcome)
    assert receiver.next(LinkLost).transfer_ids == {"t"}


def test_a_part_lands_before_it_is_checked(node: Make) -> None:
    """Whoever has the answer knows that its KV is there."""
    seen: list[str] = []

    def check(wire: torch.Tensor, answer: torch.Tensor) -> None:
        seen.append("check")
        is_intact(wire, answer)

    def write() -> bool:
        seen.append("write")
        return True

    sender, receiver = node("prefill-0"), node("decode-0", prepare_write=lambda part, wire: write, check=check)
    connect(sender, receiver)
    seen.clear()
    assert sender.try_send("decode-0", 0, 4096)
    receiver.next(KVPart)
    assert seen == ["write", "check"]


def test_what_lands_while_its_wire_is_aborted_is_over_when_the_owner_hears_of_it(
    node: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An abort does not wait for ever for a thread that is enqueueing: it is done again behind that."""
    aborts: list[str] = []
    abort = HostWire.abort

    def write() -> bool:
        receiver.links.forget("prefill-0")
        until(lambda: bool(aborts), 5.0)
        aborts.append("written")
        return True

    def watched(wire: HostWire) -> None:
        if wire.device is receiver.device:
            aborts.append("abort")
        abort(wire)

    sender, receiver = node("prefill-0"), node("decode-0", prepare_write=lambda part, wire: write)
    connect(sender, receiver)
    monkeypatch.setattr(HostWire, "abort", watched)
    assert sender.try_send("decode-0", 0, 4096)
    assert receiver.next(KVPart)[1].written is WriteOutcome.LOST
    assert "abort" in aborts[aborts.index("written") :]


def test_lost_is_said_when_the_wire_is_quiet_and_not_before(node: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    said = threading.Event()
    abort, post = HostWire.abort, LinkNode.post
    was_said_before: list[bool] = []

    def write() -> bool:
        receiver.links.forget("prefill-0")
        return True

    def slow(wire: HostWire) -> None:
        abort(wire)
        if wire.device is receiver.device and not was_said_before:
            was_said_before.append(said.wait(0.3))

    def watched(here: LinkNode, message: Any, arrived: Any) -> None:
        if arrived is not None:
            said.set()
        post(here, message, arrived)

    monkeypatch.setattr(LinkNode, "post", watched)
    sender, receiver = node("prefill-0"), node("decode-0", prepare_write=lambda part, wire: write)
    connect(sender, receiver)
    monkeypatch.setattr(HostWire, "abort", slow)
    assert sender.try_send("decode-0", 0, 4096)
    assert receiver.next(KVPart)[1].written is WriteOutcome.LOST
    assert was_said_before[0] is False


def test_a_sender_hears_that_a_part_has_left_when_its_receiver_has_it(
    node: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = node("prefill-0"), node("decode-0")
    connect(sender, receiver)
    write, had_it = Channel.write, []

    def watched(channel: Channel, message: Any) -> None:
        if isinstance(message, Left):
            had_it.append(not receiver.mailbox.empty())
        write(channel, message)

    monkeypatch.setattr(Channel, "write", watched)
    assert sender.try_send("decode-0", 0, 4096)
    sender.next(KVPartAck)
    receiver.take(0, 4096)
    assert had_it == [True]


def test_a_write_is_made_ready_before_the_bytes_are_on_their_way(node: Make) -> None:
    ready: list[tuple[int, int]] = []
    device = HostDevice()

    def prepare_write(part: KVPart, wire: torch.Tensor) -> WriteReceived:
        ready.append((part.part_index, wire.data_ptr()))
        return lambda: wire.data_ptr() == ready[part.part_index][1]

    sender, receiver = node("prefill-0", device), node("decode-0", prepare_write=prepare_write)
    connect(sender, receiver)
    device.packed = threading.Event()
    for index in range(2):
        assert sender.try_send("decode-0", index, SLAB_BYTES)
    until(lambda: len(ready) == 2, 5.0)
    assert receiver.mailbox.empty()
    device.packed.set()
    for _ in range(2):
        assert receiver.next(KVPart)[1].written is WriteOutcome.RIGHT
    assert [index for index, _ in ready] == [0, 1], "once for each"


def test_a_write_that_fails_breaks_the_link(node: Make) -> None:
    def write() -> bool:
        raise RuntimeError("no memory")

    sender, receiver = node("prefill-0"), node("decode-0", prepare_write=lambda part, wire: write)
    connect(sender, receiver)
    assert sender.try_send("decode-0", 0, 4096)
    assert receiver.next(LinkLost).transfer_ids == {"t"}
    assert sender.next(LinkLost).transfer_ids == {"t"}


# ---- what is refused before anything moves


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"fingerprint": "3 layers"}, "KV layout '2 layers' there, '3 layers' here"),
        ({"device": HostDevice(kind="nccl 2.28")}, "wire 'tcp' there, 'nccl 2.28' here"),
        ({"secret": "of another cluster"}, "is not of this cluster"),
        ({"worker_id": "decode-1"}, "receiver 'decode-0' there, 'decode-1' here"),
    ],
)
def test_ends_that_do_not_fit_refuse_each_other(node: Make, settings: dict[str, Any], reason: str) -> None:
    sender = node("prefill-0")
    receiver = node(settings.pop("worker_id", "decode-0"), **settings)
    with pytest.raises(TransferFailed, match=reason):
        connect(sender, receiver)
    assert not sender.links.is_up("decode-0")
    assert sender.mailbox.empty() and receiver.mailbox.empty()


def test_another_version_is_refused(node: Make) -> None:
    sender, receiver = node("prefill-0"), node("decode-0")
    sender.links.identity.version, receiver.links.identity.version = 7, 1
    with pytest.raises(TransferFailed, match="wire version 7 there, 1 here"):
        connect(sender, receiver)


def test_nobody_there_and_nobody_who_answers(node: Make) -> None:
    sender = node("prefill-0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(TransferFailed, match="not up in time"):
            sender.links.open("decode-0", f"127.0.0.1:{port}", 0.3)
    with pytest.raises(TransferFailed, match="cannot connect"):
        sender.links.open("decode-0", f"127.0.0.1:{port}", 0.3)


def test_a_receiver_that_dies_while_the_wire_connects_is_noticed_at_once(node: Make) -> None:
    sender, failures = node("prefill-0"), []

    def open_link() -> None:
        with pytest.raises(TransferFailed, match="closed the connection") as failure:
            sender.links.open("decode-0", f"127.0.0.1:{listener.getsockname()[1]}", 30.0)
        failures.append(failure)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        opener = threading.Thread(target=open_link)
        opener.start()
        receiver = Channel(listener.accept()[0])
        hello = receiver.read()
        receiver.write(hello)
        assert isinstance(receiver.read(), Token)
        receiver.close()
        opener.join(CLEAN_WITHIN_S)
        assert failures


def test_a_link_that_breaks_while_its_wire_is_made_leaves_nothing(node: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = node("prefill-0"), node("decode-0")
    token = sender.device.token

    def token_and_break() -> bytes:
        for end in sender.links.ends:
            end.epoch.break_("a test broke it")
        return token()

    monkeypatch.setattr(sender.device, "token", token_and_break)
    with pytest.raises(TransferFailed, match="a test broke it"):
        connect(sender, receiver)


def test_noise_on_the_port_harms_nobody(node: Make) -> None:
    sender, receiver = node("prefill-0"), node("decode-0")
    port = int(receiver.links.address.rpartition(":")[2])
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\2[]", b'\0\0\0\x0e["Grant",[{}]]', b"\0\0\0"):
        with socket.create_connection(("127.0.0.1", port)) as other:
            other.sendall(noise)
            other.shutdown(socket.SHUT_WR)
            assert other.recv(100) == b""
    connect(sender, receiver)


def test_an_epoch_that_is_over_is_refused(node: Make) -> None:
    sender, receiver = node("prefill-0"), node("decode-0")
    connect(sender, receiver)
    sender.links.forget("decode-0")
    sender.next(LinkLost), receiver.next(LinkLost)
    with pytest.raises(TransferFailed, match="epoch 1 is over, 1 has begun"):
        connect(sender, receiver)


# ---- when something breaks


def test_a_broken_link_is_opened_again_and_used(node: Make) -> None:
    sender, receiver = node("prefill-0"), node("decode-0")
    connect(sender, receiver)
    for epoch in range(3):
        assert sender.try_send("decode-0", epoch, 4096)
        receiver.take(epoch, 4096)
        sender.next(KVPartAck)
        (sender if epoch % 2 else receiver).links.ends.pop().epoch.break_("of a test")
        assert not sender.next(LinkLost, CLEAN_WITHIN_S).transfer_ids
        assert not receiver.next(LinkLost, CLEAN_WITHIN_S).transfer_ids
        assert sender.is_clean and receiver.is_clean
        until(lambda: sender.links.is_up("decode-0"), 5.0)


def test_what_is_sent_while_the_link_is_down_is_told_lost(node: Make) -> None:
    sender, receiver = node("prefill-0"), node("decode-0")
    connect(sender, receiver)
    receiver.close()
    sender.next(LinkLost)
    assert sender.try_send("decode-0", 0, 4096)
    lost = sender.next(LinkLost)
    assert "not up" in lost.reason and lost.transfer_ids == {"t"}
    assert sender.is_clean


def test_an_error_of_the_wire_ends_both_ends(node: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = node("prefill-0", stall_s=0.4), node("decode-0")
    connect(sender, receiver)
    (end,) = sender.links.ends
    monkeypatch.setattr(end.epoch.wire, "error", lambda: "unhandled system error")
    assert sender.next(LinkLost).reason == "unhandled system error"
    receiver.next(LinkLost)


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_an_error_of_the_device_ends_both_ends(node: Make, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes to the thread that waits for the device, which nobody waits for."""

    def fail(self: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    sender, receiver = node("prefill-0"), node("decode-0")
    connect(sender, receiver)
    wire = host_wire.HostWire.receive
    if side == "sender":
        monkeypatch.setattr(sender.device, "mark", lambda: type("Mark", (), {"wait": fail})())
    else:
        broken = type("Receipt", (), {"wait": fail})()
        monkeypatch.setattr(host_wire.HostWire, "receive", lambda *given: wire(*given) and broken)
    assert sender.try_send("decode-0", 0, 4096)
    reasons = {end.next(LinkLost, CLEAN_WITHIN_S).reason for end in (sender, receiver)}
    monkeypatch.undo()
    assert "an illegal memory access was encountered" in reasons
    assert sender.is_clean and receiver.is_clean


@pytest.mark.parametrize("stage", ["sending", "received"])
def test_a_part_that_stalls_ends_the_epoch(node: Make, stage: str) -> None:
    def hook(at: str, part: int, wire: HostWire) -> None:
        if at == stage and part == 1:
            wire.aborted.wait(30.0)

    device = HostDevice(hook=hook)
    sender, receiver = node("prefill-0", device, stall_s=0.5), node("decode-0", device, stall_s=0.5)
    connect(sender, receiver)
    for index in range(2):
        assert sender.try_send("decode-0", index, 4096)
    receiver.take(0, 4096)
    sender.next(KVPartAck)
    lost = [end.next(LinkLost, CLEAN_WITHIN_S) for end in (sender, receiver)]
    assert any("part 1" in end.reason for end in lost), lost
    assert all(end.transfer_ids == {"t"} for end in lost)
    assert sender.is_clean and receiver.is_clean
    assert receiver.mailbox.empty(), "what an abort has torn is never handed over"


def test_a_peer_may_be_forgotten_in_any_state(node: Make) -> None:
    device = HostDevice()
    sender, receiver = node("prefill-0", device), node("decode-0")
    connect(sender, receiver)
    assert sender.try_send("decode-0", 0, 4096)
    _, held = receiver.next(KVPart)
    sender.next(KVPartAck)
    device.packed = threading.Event()
    assert sender.try_send("decode-0", 1, 4096)
    receiver.links.forget("prefill-0")
    device.packed.set()
    sender.next(LinkLost, CLEAN_WITHIN_S), receiver.next(LinkLost, CLEAN_WITHIN_S)
    held.release()  # the part had arrived: it is the owner's
    assert receiver.is_clean


# ---- when a process is killed


STATES = ["before grant", "granted", "sending", "received"]


@pytest.mark.parametrize("state", STATES)
def test_receiver_killed(node: Make, process: Make, state: str) -> None:
    """At the sender: one LinkLost, all slabs free, and a link to the worker's next life."""
    reached = threading.Event()

    def hook(stage: str, part: int, wire: HostWire) -> None:
        if stage == state:
            reached.set()
            wire.aborted.wait(30.0)

    device = HostDevice(hook=hook)
    sender = node("prefill-0", device)
    receiver = process("decode-0", stop_at="received" if state == "received" else "")
    sender.links.open("decode-0", receiver.address, 20.0)
    if state == "granted":
        device.packed = threading.Event()
    num_before = 2 if state == "before grant" else 0  # fill its slabs, which nobody empties
    for index in range(num_before):
        assert sender.try_send("decode-0", index, SLAB_BYTES)
        sender.next(KVPartAck)
    assert sender.try_send("decode-0", 9, SLAB_BYTES)
    (end,) = sender.links.ends
    if state == "granted":
        until(lambda: end.num_ungranted_bytes == 0, 5.0)
    elif state == "sending":
        assert reached.wait(5.0)
    elif state == "received":
        assert receiver.hear() == "received"
    receiver.kill()
    if device.packed is not None:
        device.packed.set()
    assert sender.next(LinkLost, CLEAN_WITHIN_S).peer == "decode-0"
    assert sender.is_clean and not sender.links.is_up("decode-0")
    sender.links.forget("decode-0")
    device.hook, device.packed = HostDevice().hook, None
    receiver = process("decode-0")
    sender.links.open("decode-0", receiver.address, 20.0)
    assert sender.try_send("decode-0", 0, SLAB_BYTES)
    assert sender.next(KVPartAck) == KVPartAck("t", 0)
    receiver.do("take", 0, SLAB_BYTES)


@pytest.mark.parametrize("state", STATES)
def test_sender_killed(node: Make, process: Make, state: str) -> None:
    """At the receiver: one LinkLost, all slabs free, nothing torn handed over, and the worker's next life welcome."""
    reached = threading.Event()

    def hook(stage: str, part: int, wire: HostWire) -> None:
        if stage == "received" and state == "received" and not reached.is_set():
            reached.set()
            wire.aborted.wait(30.0)

    receiver = node("decode-0", HostDevice(hook=hook))
    sender = process("prefill-0", stop_at="sending" if state == "sending" else "")
    sender.do("open", "decode-0", receiver.links.address, 20.0)
    if state == "granted":
        sender.do("hold")
    held = []
    if state == "before grant":
        for index in range(2):
            assert sender.do("try_send", "decode-0", index, SLAB_BYTES)
            held.append(receiver.next(KVPart)[1])
    assert sender.do("try_send", "decode-0", 9, SLAB_BYTES)
    if state == "before grant":
        until(lambda: receiver.links.incoming.pool.num_waiting == 1, 5.0)
    elif state == "granted":
        until(lambda: receiver.num_free[1] == 1, 5.0)
    elif state == "sending":
        assert sender.hear() == "sending"
    else:
        assert reached.wait(5.0)
    sender.kill()
    assert receiver.next(LinkLost, CLEAN_WITHIN_S).peer == "prefill-0"
    assert receiver.mailbox.empty()
    for arrived in held:
        arrived.release()
    assert receiver.is_clean
    sender = process("prefill-0")
    sender.do("open", "decode-0", receiver.links.address, 20.0)
    assert sender.do("try_send", "decode-0", 0, SLAB_BYTES)
    receiver.take(0, SLAB_BYTES)


@pytest.mark.parametrize("is_sender", [True, False])
def test_a_peer_that_is_stopped_is_lost_after_the_stall(node: Make, process: Make, is_sender: bool) -> None:
    here, there = node("here", stall_s=0.8), process("there")
    if is_sender:
        there.do("open", "here", here.links.address, 20.0)
    else:
        here.links.open("there", there.address, 20.0)
        assert here.try_send("there", 0, 4096)
        here.next(KVPartAck)
    there.signal(signal.SIGSTOP)
    until(lambda: there.is_stopped, 5.0)
    if not is_sender:
        assert here.try_send("there", 1, 4096)
    assert here.next(LinkLost, 0.8 + CLEAN_WITHIN_S).peer == "there"
    assert here.is_clean
    there.signal(signal.SIGCONT)  # it may go on writing; nobody listens
    if is_sender:
        there.do("next", LinkLost)
        until(lambda: there.do("is_up", "here"), 10.0)  # and opens its next epoch
        assert there.do("try_send", "here", 5, 4096)
        here.take(5, 4096)
