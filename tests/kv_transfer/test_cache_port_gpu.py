"""In which order KV goes out of a cache and comes into it, beside steps that a GPU is busy with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from engine.kv_cache import PagedKVCache
from kv_transfer.cache_port import CachePort
from kv_transfer.cache_protocol import KVPlace
from kv_transfer.codec import Codec, part_layout
from kv_transfer.plan import PartSpan
from phasewise.core.kv_spec import KVCacheSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore"),  # of other versions of torch and Triton than the pinned ones
]

SPEC = KVCacheSpec(4, 2, 64, 16, "bfloat16", "test")
SPAN = PartSpan(0, 4, 0, 32)
BLOCKS = [5, 2]
LONG = 400_000_000  # clocks of a GPU: some 0.2 s


def step_of(storage: torch.Tensor, value: float) -> None:
    """A step that takes long and then writes to the blocks."""
    torch.cuda._sleep(LONG)
    for block in BLOCKS:
        storage[:, :, block * 16 : block * 16 + 16] = value


@pytest.fixture
def port() -> Iterator[CachePort]:
    cache = PagedKVCache(SPEC, 8, torch.device("cuda", 0))
    found = CachePort(cache, SPEC)
    found.warm_up(["bfloat16"], Codec.NONE)
    torch.cuda.synchronize()
    yield found
    torch.cuda.synchronize()


def part_of_ones(port: CachePort) -> torch.Tensor:
    cache = PagedKVCache(SPEC, 8, torch.device("cuda", 0))
    cache.storage.fill_(1.0)
    layout = part_layout(port.spec, SPAN, "bfloat16", Codec.NONE)
    wire = torch.empty(layout.num_bytes, dtype=torch.uint8, device="cuda")
    CachePort(cache, SPEC).pack(KVPlace(BLOCKS), SPAN, layout, wire)
    torch.cuda.synchronize()
    return wire


def write_beside(
    port: CachePort, place: KVPlace, wire: torch.Tensor, wires_stream: torch.cuda.Stream
) -> torch.cuda.Event:
    with torch.cuda.stream(wires_stream):
        port.unpack(place, SPAN, part_layout(port.spec, SPAN, "bfloat16", Codec.NONE), wire)
        done = torch.cuda.Event()
        done.record()
    return done


def test_what_comes_in_waits_for_the_step_that_had_its_blocks(port: CachePort) -> None:
    storage, wire, place = port.cache.storage, part_of_ones(port), KVPlace(BLOCKS)
    zeros = torch.zeros_like(wire)
    step_of(storage, 7.0)
    port.prepare(place)
    assert not port.can_write_beside(place), "a link's stream must not wait for a step"
    write_beside(port, place, zeros, torch.cuda.Stream())
    write_beside(port, place, wire, other := torch.cuda.Stream()).synchronize()  # not only the first one waits
    other.synchronize()
    assert port.can_write_beside(place)
    found = storage[:, :, [b * 16 + i for b in BLOCKS for i in range(16)]].clone()
    assert torch.isin(found, torch.tensor([0.0, 1.0], device="cuda")).all()


def test_what_comes_in_does_not_wait_for_later_steps(port: CachePort) -> None:
    storage, wire, place = port.cache.storage, part_of_ones(port), KVPlace(BLOCKS)
    torch.cuda._sleep(LONG)
    slots_of_port = port._slots

    def late(place: KVPlace) -> torch.Tensor:  # the slots are there when the place says that it is free
        torch.cuda._sleep(LONG // 4)
        return slots_of_port(place)

    port._slots = late  # type: ignore[method-assign]
    port.prepare(place)
    port._slots = slots_of_port  # type: ignore[method-assign]
    torch.cuda._sleep(LONG)
    step = torch.cuda.Event()
    step.record()
    write_beside(port, place, wire, torch.cuda.Stream()).synchronize()
    assert not step.query(), "the step computes still"
    read = storage[:, :, BLOCKS[0] * 16].clone()
    assert torch.equal(read, torch.ones_like(read))


def test_what_goes_out_is_what_was_there_at_its_mark(port: CachePort) -> None:
    storage = port.cache.storage
    storage.fill_(1.0)
    layout = part_layout(port.spec, SPAN, "bfloat16", Codec.NONE)
    wire = torch.empty(layout.num_bytes, dtype=torch.uint8, device="cuda")
    torch.cuda._sleep(LONG)
    storage.fill_(2.0)
    mark = port.mark()
    torch.cuda._sleep(LONG)
    step = torch.cuda.Event()
    step.record()
    with port.beside(mark):
        port.pack(KVPlace(BLOCKS), SPAN, layout, wire)
        packed = torch.cuda.Event()
        packed.record()
    packed.synchronize()
    assert not step.query(), "the step behind the mark computes still"
    port.rejoin()
    values = wire[: layout.content_bytes].view(torch.bfloat16)
    assert torch.equal(values, torch.full_like(values, 2.0))
