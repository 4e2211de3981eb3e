"""What a worker keeps for a gateway, against connections that break anywhere and a gateway that takes nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from phasewise.delivery.frame_queue import FrameQueue


def drain(queue: FrameQueue, most_bytes: int = 1 << 30) -> bytes:
    """Sends up to `most_bytes`."""
    sent = b""
    while (data := queue.to_send()) is not None and len(sent) < most_bytes:
        piece = bytes(data[: most_bytes - len(sent)])
        queue.went(len(piece))
        sent += piece
    return sent


def test_frames_are_kept_until_they_are_acknowledged() -> None:
    queue = FrameQueue()
    assert queue.is_empty and queue.to_send() is None
    for frame in (b"one", b"two", b"three"):
        assert queue.push(frame)
    assert drain(queue) == b"onetwothree"
    assert (queue.is_all_sent, queue.is_empty, queue.first) == (True, False, 0)
    queue.acknowledged(2)
    assert (queue.is_empty, queue.first) == (False, 2)
    queue.acknowledged(3)
    assert (queue.is_empty, queue.first) == (True, 3)


def test_a_new_connection_goes_on_with_the_first_frame_that_the_gateway_lacks() -> None:
    queue = FrameQueue()
    for frame in (b"one", b"two", b"three"):
        queue.push(frame)
    assert drain(queue, 5) == b"onetw"
    queue.begin(1)
    assert drain(queue) == b"twothree"
    queue.begin(3)  # all of it arrived, and no acknowledgement came
    assert queue.is_empty and drain(queue) == b""


def test_a_gateway_that_takes_nothing_costs_a_bounded_amount_and_a_gap() -> None:
    queue = FrameQueue(max_bytes=10)
    assert queue.push(b"sixsix") and queue.push(b"sixsix")
    assert drain(queue, 8) == b"sixsixsi"
    assert not queue.push(b"three")
    assert (queue.first, queue.num_dropped) == (2, 2)
    assert drain(queue) == b"three"
    queue.acknowledged(3)
    assert queue.is_empty


def test_a_frame_larger_than_the_bound_goes_out() -> None:
    queue = FrameQueue(max_bytes=10)
    assert queue.push(b"x" * 100)
    assert drain(queue) == b"x" * 100


@given(st.lists(st.one_of(st.just("push"), st.just("break"), st.integers(1, 30)), max_size=60), st.integers(1, 100))
def test_whatever_breaks_the_gateway_has_each_frame_once_and_knows_of_each_gap(
    actions: list[str | int], max_bytes: int
) -> None:
    """`break`: the connection ends, with whatever had gone. A number: so many bytes go, and arrive."""
    queue, taken, wire, num_pushed, num_lost = FrameQueue(max_bytes), list[int](), b"", 0, 0
    expected = 0

    def connect() -> None:
        nonlocal expected, num_lost, wire
        num_lost += max(queue.first - expected, 0)
        expected, wire = max(expected, queue.first), b""
        queue.begin(expected)

    connect()
    for action in (*actions, "break", 10_000):
        if action == "push":
            frame = bytes([num_pushed]) * (num_pushed % 7 + 1)
            num_pushed += 1
            if not queue.push(frame):
                connect()
        elif action == "break":
            connect()
        else:
            assert isinstance(action, int)
            wire += drain(queue, action)
            while wire and len(wire) >= wire[0] % 7 + 1:
                taken.append(wire[0])
                wire = wire[wire[0] % 7 + 1 :]
                expected += 1
            if action % 2:
                queue.acknowledged(expected)
    assert taken == sorted(set(taken))
    assert len(taken) + num_lost == num_pushed == expected
    assert num_lost <= queue.num_dropped
