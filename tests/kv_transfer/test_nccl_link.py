"""Direct links over NCCL between two GPUs: every size bit for bit in both roles, and aborts of real kernels."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from phasewise.core.messages import KVPartAck, LinkLost
from tests.support.link_node import LinkNode, NodeProcess
from tests.support.served import until

pytest.importorskip("cupy")

from tests.support.deaf_wire import gpu_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
    pytest.mark.filterwarnings("ignore"),  # of other versions of torch and CuPy than the pinned ones
]

SETTINGS: dict[str, Any] = {"slab_bytes": 104 << 20, "trial_bytes": 16 << 20, "stall_s": 1.5}
OPEN_S = 60.0
CLEAN_WITHIN_S = 2.0


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    NodeProcess.prepare()


@pytest.fixture
def here() -> Iterator[LinkNode]:
    node = LinkNode("here", gpu_device(0), **SETTINGS)
    yield node
    node.close()
    assert node.is_clean


def there(stop_at: str = "") -> NodeProcess:
    return NodeProcess("there", stop_at, gpu=1, **SETTINGS)


def test_parts_of_every_size_arrive_bit_for_bit_in_both_roles(here: LinkNode) -> None:
    rng = random.Random(0)
    sizes = [1024, 100 << 20] + [16 * int(64 * (100 * 1024) ** rng.random()) for _ in range(14)]
    process = there()
    try:
        here.links.open("there", process.address, OPEN_S)
        process.do("open", "here", here.links.address, OPEN_S)
        rates = [here.links.bytes_per_s("there"), process.do("bytes_per_s", "here")]
        print(f"rates of 16 MiB messages: {[f'{rate / 1e9:.0f} GB/s' for rate in rates]}")
        for index, size in enumerate(sizes):
            assert here.try_send("there", index, size)
            assert process.do("try_send", "here", index, size)
            here.take_both(index, size)
            process.do("take_both", index, size)
        assert here.is_clean and process.do("is_clean")
    finally:
        process.close()


def test_many_parts_at_once_keep_their_order(here: LinkNode) -> None:
    process = there()
    try:
        here.links.open("there", process.address, OPEN_S)
        num_acks = 0
        for index in range(200):
            while not here.try_send("there", index, 16 * (index + 1) * 97):
                assert here.next(KVPartAck) == KVPartAck("t", num_acks)
                num_acks += 1
            process.do("take", index, 16 * (index + 1) * 97)
        assert [here.next(KVPartAck).part_index for _ in range(num_acks, 200)] == list(range(num_acks, 200))
    finally:
        process.close()


@pytest.mark.parametrize("state", ["idle", "sending", "kernel waits"])
def test_receiver_killed(here: LinkNode, state: str) -> None:
    """One LinkLost within 2 s, all slabs free, no kernel left on the GPU, and a link to the worker's next life."""
    process = there("go" if state == "kernel waits" else "")
    here.links.open("there", process.address, OPEN_S)
    if state != "idle":
        for index in range(2):
            assert here.try_send("there", index, 100 << 20)
    if state == "kernel waits":
        (end,) = here.links.ends
        until(lambda: end.epoch.is_on_wire(0), 5.0)
    killed_s = time.monotonic()
    process.kill()
    while isinstance(message := here.mailbox.get(timeout=CLEAN_WITHIN_S)[0], KVPartAck):
        pass
    assert message.peer == "there"
    print(f"{state}: lost after {time.monotonic() - killed_s:.2f} s")
    assert here.is_clean
    torch.cuda.synchronize(0)
    process.close()
    here.links.forget("there")
    process = there()
    try:
        here.links.open("there", process.address, OPEN_S)
        assert here.try_send("there", 5, 1 << 20)
        process.do("take", 5, 1 << 20)
        here.next(KVPartAck)
    finally:
        process.close()


def test_sender_killed(here: LinkNode) -> None:
    process = there()
    process.do("open", "here", here.links.address, OPEN_S)
    assert process.do("try_send", "here", 0, 100 << 20)
    here.take(0, 100 << 20)
    killed_s = time.monotonic()
    process.kill()
    assert here.next(LinkLost, CLEAN_WITHIN_S).peer == "there"
    print(f"lost after {time.monotonic() - killed_s:.2f} s")
    assert here.is_clean
    process.close()


def test_a_kernel_that_waits_too_long_is_aborted_and_the_link_opened_again(here: LinkNode) -> None:
    process = there("go")
    try:
        here.links.open("there", process.address, OPEN_S)
        assert here.try_send("there", 0, 1 << 20)
        reason = here.next(LinkLost, SETTINGS["stall_s"] + CLEAN_WITHIN_S).reason
        assert "stalled" in reason or "closed" in reason, reason  # whoever noticed first
        assert here.is_clean
        torch.cuda.synchronize(0)
        until(lambda: here.links.is_up("there"), 20.0)
    finally:
        process.close()
    here.next(LinkLost)
