"""Parts through the object store, with actors that are lists: what is lost is told, and nothing ends its caller."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch

from kv_transfer.link import ArrivedPart, DeviceFull
from kv_transfer.object_store_link import ObjectStoreLink
from phasewise.core.handles import WorkerHandles
from phasewise.core.messages import KVCommit, KVPart, LinkLost

PART = KVPart("t", 0, 0, 1, 0, 1, 2**20, "float32", "none")


class Actor:
    """Its calls end as `outcome` says; one that is raised at once is an argument that the store does not take."""

    def __init__(self, outcome: Exception | None, *, at_once: bool) -> None:
        self._outcome = outcome
        self._at_once = at_once

    @property
    def post_part(self) -> Actor:
        return self

    def remote(self, *_: Any) -> Actor:
        if self._at_once and self._outcome is not None:
            raise self._outcome
        return self

    def future(self) -> Future[None]:
        future: Future[None] = Future()
        if self._outcome is None:
            future.set_result(None)
        else:
            future.set_exception(self._outcome)
        return future


class Box:
    def __init__(self, actor: Actor) -> None:
        self.posted: list[Any] = []
        mailboxes = WorkerHandles()
        mailboxes.connect({"decode-0": actor})
        self.link = ObjectStoreLink("prefill-0", mailboxes, torch.device("cpu"), self._post)

    def _post(self, message: Any, arrived: ArrivedPart | None = None) -> None:
        self.posted.append(message)

    def send(self) -> None:
        buffer = self.link.buffer("decode-0", PART.num_bytes)
        assert buffer is not None
        self.link.send_part("decode-0", PART, buffer.zero_())


@pytest.mark.parametrize("at_once", [True, False])
def test_a_part_that_the_store_or_the_peer_does_not_take_is_told(at_once: bool) -> None:
    box = Box(Actor(OSError("no space left on device"), at_once=at_once))
    box.send()
    assert box.posted == [LinkLost("decode-0", "OSError: no space left on device", frozenset({"t"}))]
    assert box.link.bytes_per_s("decode-0") == 0.0, "a call that failed has no rate"


def test_a_part_that_cannot_be_received_fails_its_own_handoff(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("full")

    box = Box(Actor(None, at_once=True))
    monkeypatch.setattr("kv_transfer.object_store_link.is_intact", fail)
    box.link.receive("prefill-1", PART, np.zeros(PART.num_bytes, np.uint8))
    assert box.posted == [LinkLost("prefill-1", "OutOfMemoryError: full", frozenset({"t"}))]


def test_a_full_device_is_said_with_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("full")

    box = Box(Actor(None, at_once=True))
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(DeviceFull, match="full"):
        box.link.buffer("decode-0", 4096)


def test_a_part_that_went_well_is_measured() -> None:
    box = Box(Actor(None, at_once=True))
    box.send()
    assert box.posted == [] and box.link.bytes_per_s("decode-0") > 0
    assert not box.link.send_commit("decode-0", KVCommit("t", 1, 30, (None,), 0.0)), "it goes by the workers' own way"


def test_what_fails_behind_the_end_is_not_told() -> None:
    box = Box(Actor(OSError("gone"), at_once=False))
    box.link.close()
    box.send()
    assert box.posted == []
