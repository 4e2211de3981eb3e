"""Which links a worker makes, where they listen, and what is said when it cannot have them."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kv_transfer.link import PrepareWrite, WriteOutcome, WriteReceived, write_nothing
from kv_transfer.routed_link import RoutedLink
from phasewise.core.config import build_config
from phasewise.core.errors import ConfigError
from phasewise.core.handles import WorkerHandles
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import KVPart, KVPartAck
from phasewise.core.own_address import own_address
from phasewise.core.placement import WorkerRole
from tests.support.link_node import content, header
from tests.support.served import until
from workers.links import Links
from workers.settings import WorkerSettings

SPEC = KVCacheSpec(2, 2, 8, 16, "float32", "tiny")
Make = Callable[..., Links]


@pytest.fixture
def links() -> Iterator[Make]:
    made: list[Links] = []

    def make(
        role: WorkerRole,
        link: str = "tcp",
        device: str = "cpu",
        head: str = "",
        post: Any = None,
        prepare_write: PrepareWrite = lambda part, wire: write_nothing,
    ) -> Links:
        config = build_config({"transfer": {"link": link, "slab_mib": 1}}, source="test")
        settings = WorkerSettings(f"{role.value}-0", role, device, 1, config, secret="s", head=head)
        made.append(Links(settings, WorkerHandles(), post or (lambda message, arrived=None: None), prepare_write))
        made[-1].agree_on(SPEC)
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_pair_hands_over_across_tcp(links: Make) -> None:
    acks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    parts: queue.SimpleQueue[Any] = queue.SimpleQueue()
    sender = links(WorkerRole.PREFILL, post=lambda message, arrived=None: acks.put(message))
    written: list[Any] = []

    def prepare_write(part: KVPart, wire: torch.Tensor) -> WriteReceived:
        def write() -> bool:
            written.append(part)
            return True

        return write

    receiver = links(
        WorkerRole.DECODE, post=lambda message, arrived=None: parts.put((message, arrived)), prepare_write=prepare_write
    )
    sender.want("decode-0", receiver.address)
    until(lambda: sender.link.name("decode-0") == "tcp", 10.0)
    buffer = sender.link.buffer("decode-0", 4096)
    assert buffer is not None and not sender.link.uses_store
    buffer.copy_(content(3, 4096))
    sender.link.send_part("decode-0", header(3, 4096), buffer)
    message, arrived = parts.get(timeout=10.0)
    assert message == header(3, 4096)
    assert arrived.written is WriteOutcome.WRONG, "the checksum of this content is not that of a part"
    assert written == [message]
    assert acks.get(timeout=10.0) == KVPartAck("t", 3)
    assert sender.link.bytes_per_s("decode-0") > 0


def test_without_direct_links_there_is_no_address(links: Make) -> None:
    made = links(WorkerRole.PREFILL, "object_store")
    assert made.address == "" and not isinstance(made.link, RoutedLink)


@pytest.mark.parametrize("role", [WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.MIXED])
def test_a_worker_of_any_role_can_be_reached_for_its_role_may_change(links: Make, role: WorkerRole) -> None:
    assert links(role).address.startswith("127.0.0.1:")


def test_a_worker_listens_where_its_road_to_the_cluster_begins(links: Make) -> None:
    assert links(WorkerRole.DECODE).address.startswith("127.0.0.1:")
    assert links(WorkerRole.DECODE, head="127.0.0.9").address.startswith("127.0.0.1:")
    assert own_address("127.0.0.9") == "127.0.0.1"


@pytest.mark.parametrize(
    ("link", "device", "message"),
    [
        ("nccl", "cpu", "transfer.link nccl needs GPUs; use tcp or object_store"),
        ("tcp", "cuda", "transfer.link tcp is for KV in host memory; use nccl or object_store"),
    ],
)
def test_a_link_that_the_device_cannot_have_is_refused(links: Make, link: str, device: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as failure:
        links(WorkerRole.PREFILL, link, device)
    assert failure.value.field == "transfer.link"


def test_where_a_link_does_not_open_the_object_store_carries_and_the_log_says_why(
    links: Make, caplog: pytest.LogCaptureFixture
) -> None:
    sender, receiver = links(WorkerRole.PREFILL), links(WorkerRole.DECODE)
    receiver.agree_on(KVCacheSpec(3, 2, 8, 16, "float32", "tiny"))
    sender.want("decode-0", receiver.address)
    until(lambda: "no link from prefill-0 to decode-0" in caplog.text, 10.0)
    assert "KV layout '2 layers" in caplog.text and "the object store carries meanwhile" in caplog.text
    assert sender.link.name("decode-0") != "tcp"


def test_a_link_that_did_not_open_is_tried_again_until_it_does(links: Make, caplog: pytest.LogCaptureFixture) -> None:
    sender, receiver = links(WorkerRole.PREFILL), links(WorkerRole.DECODE)
    receiver.agree_on(KVCacheSpec(3, 2, 8, 16, "float32", "tiny"))
    sender.want("decode-0", receiver.address)
    until(lambda: "no link from prefill-0 to decode-0" in caplog.text, 10.0)
    receiver.agree_on(SPEC)
    until(lambda: sender.link.name("decode-0") == "tcp", 10.0)
