"""The wire over TCP alone: content, who is let in, and aborts in every state."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from kv_transfer.tcp_wire import TcpDevice, TcpWire
from kv_transfer.wire import WireError

HOST = "127.0.0.3"
SOON_S = 2.0
LARGE = 64 << 20  # more than the kernel takes


@pytest.fixture
def ends() -> Iterator[Callable[..., tuple[TcpWire, TcpWire]]]:
    """Makes both ends of a wire, by default connected; afterwards they are aborted, and no thread is left."""
    wires: list[TcpWire] = []

    def make(is_connected: bool = True) -> tuple[TcpWire, TcpWire]:
        device = TcpDevice(HOST)
        token = device.token()
        wires[:] = device.make(token, 0), device.make(token, 1)
        if is_connected:
            both(wires[0].connect, wires[1].connect)
        return wires[0], wires[1]

    yield make
    for wire in wires:
        wire.abort()
    assert not [thread for thread in threading.enumerate() if thread.name == "kv-link-wire"]


def both(one: Callable[[], object], other: Callable[[], object]) -> None:
    thread = threading.Thread(target=one)
    thread.start()
    other()
    thread.join(SOON_S)
    assert not thread.is_alive()


def is_one(data: torch.Tensor, answer: torch.Tensor) -> None:
    answer.copy_((data == 1).all())


@pytest.mark.parametrize("size", [16, 1 << 20, LARGE])
def test_messages_arrive_bit_for_bit_in_order(ends: Callable[..., tuple[TcpWire, TcpWire]], size: int) -> None:
    sender, receiver = ends()
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    came = torch.zeros(2, size, dtype=torch.uint8)
    receipts = [receiver.receive(came[i], None, lambda t, answer: answer.fill_(True)) for i in range(2)]
    marks = [sender.send(data), sender.send(data.flip(0))]
    assert all(receipt.wait() for receipt in receipts)
    for mark in marks:
        mark.wait()
    assert torch.equal(came[0], data) and torch.equal(came[1], data.flip(0))
    assert sender.error() == receiver.error() == ""


def test_what_a_check_says_comes_with_the_receipt(ends: Callable[..., tuple[TcpWire, TcpWire]]) -> None:
    sender, receiver = ends()
    for value in (1, 2):
        sender.send(torch.full((64,), value, dtype=torch.uint8))
        assert receiver.receive(torch.empty(64, dtype=torch.uint8), None, is_one).wait() is (value == 1)


def test_it_listens_on_its_own_address_until_the_other_end_has_come(
    ends: Callable[..., tuple[TcpWire, TcpWire]],
) -> None:
    sender, receiver = ends(is_connected=False)
    address = sender.address
    assert address[0] == HOST
    both(sender.connect, receiver.connect)
    with socket.socket() as late:
        assert late.connect_ex(address) != 0


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.1\r\n\r\n", b"x" * 32])
def test_who_does_not_know_the_secret_is_turned_away(
    ends: Callable[..., tuple[TcpWire, TcpWire]], noise: bytes
) -> None:
    sender, receiver = ends(is_connected=False)
    with socket.create_connection(sender.address) as other:
        other.sendall(noise)
        other.shutdown(socket.SHUT_WR)
        both(sender.connect, receiver.connect)
        assert other.recv(100) == b""
    sender.send(torch.ones(16, dtype=torch.uint8))
    assert receiver.receive(torch.empty(16, dtype=torch.uint8), None, is_one).wait()


def test_somebody_who_connects_and_says_nothing_holds_nobody_up_for_long(
    ends: Callable[..., tuple[TcpWire, TcpWire]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kv_transfer.tcp_wire._SECRET_S", 0.2)
    sender, receiver = ends(is_connected=False)
    with socket.create_connection(sender.address):
        both(sender.connect, receiver.connect)


def in_time(wire: TcpWire) -> None:
    started_s = time.monotonic()
    wire.abort()
    assert time.monotonic() - started_s < SOON_S


def test_an_abort_ends_the_wait_for_the_other_end(ends: Callable[..., tuple[TcpWire, TcpWire]]) -> None:
    for has_other in (False, True):
        sender, _ = ends(is_connected=False)
        address = sender.address
        failures: list[WireError] = []

        def connect(sender: TcpWire = sender, failures: list[WireError] = failures) -> None:
            with pytest.raises(WireError) as failure:
                sender.connect()
            failures.append(failure.value)

        with socket.socket() as other:
            if has_other:
                other.connect(address)
            thread = threading.Thread(target=connect)
            thread.start()
            in_time(sender)
            thread.join(SOON_S)
            assert failures
            with socket.socket() as late:
                assert late.connect_ex(address) != 0


def test_an_abort_ends_a_connection_that_nobody_answers(ends: Callable[..., tuple[TcpWire, TcpWire]]) -> None:
    sender, receiver = ends(is_connected=False)
    assert sender._listener is not None
    sender._listener.listen(0)
    with socket.create_connection(sender.address):  # fills the queue: further ones are not answered
        failures: list[WireError] = []

        def connect() -> None:
            with pytest.raises(WireError) as failure:
                receiver.connect()
            failures.append(failure.value)

        thread = threading.Thread(target=connect)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        in_time(receiver)
        thread.join(SOON_S)
        assert failures


@pytest.mark.parametrize("is_sender", [True, False])
def test_an_abort_ends_a_message_under_way_and_those_behind_it(
    ends: Callable[..., tuple[TcpWire, TcpWire]], is_sender: bool
) -> None:
    sender, receiver = ends()
    data = torch.ones(LARGE, dtype=torch.uint8)
    operations: list[object] = []
    if is_sender:
        operations += [sender.send(data), sender.send(data)]
        in_time(sender)
    else:
        sender.send(data[:1000])
        operations += [receiver.receive(data, None, is_one), receiver.receive(data, None, is_one)]
        in_time(receiver)
    for operation in operations:
        with pytest.raises(WireError):
            operation.wait()  # type: ignore[attr-defined]
    with pytest.raises(WireError, match="aborted"):
        (sender if is_sender else receiver).send(data)


def test_an_end_that_is_gone_breaks_the_other(ends: Callable[..., tuple[TcpWire, TcpWire]]) -> None:
    sender, receiver = ends()
    receipt = receiver.receive(torch.empty(LARGE, dtype=torch.uint8), None, is_one)
    sender.send(torch.ones(1000, dtype=torch.uint8)).wait()
    sender.abort()
    with pytest.raises(WireError, match="the other end is gone"):
        receipt.wait()
    assert receiver.error()


def test_nothing_connects_after_an_abort(ends: Callable[..., tuple[TcpWire, TcpWire]]) -> None:
    for wire in ends(is_connected=False):
        wire.abort()
        with pytest.raises(WireError, match="aborted"):
            wire.connect()
