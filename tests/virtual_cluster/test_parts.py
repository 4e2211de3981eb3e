"""What a virtual cluster would notice: KV that is not where it is read, wrong tokens, a second end."""

from __future__ import annotations

import random
from functools import partial

import pytest

from kv_transfer.cache_protocol import KVPlace
from kv_transfer.codec import Codec, WireLayout
from kv_transfer.plan import PartSpan
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.messages import NewTokens, WorkerOutput
from phasewise.core.placement import Placement
from phasewise.core.request import FinishReason, SampledToken
from tests.virtual_cluster.cache import VirtualCache, VirtualWire
from tests.virtual_cluster.clock import VirtualTime
from tests.virtual_cluster.engine import token_of
from tests.virtual_cluster.gateway import PlaceAnswer, VirtualGateway
from tests.virtual_cluster.network import Latency, Network

SPEC = KVCacheSpec(4, 1, 2, block_size=16, dtype="float32")


def test_events_happen_in_the_order_of_their_times() -> None:
    time = VirtualTime()
    happened: list[tuple[str, float]] = []

    def note(name: str) -> None:
        happened.append((name, time.now_s()))

    for name, delay_s in (("third", 2.0), ("first", 1.0), ("second", 1.0)):
        time.after(delay_s, name, partial(note, name))
    time.run(lambda: len(happened) == 3)
    assert happened == [("first", 1.0), ("second", 1.0), ("third", 2.0)]
    with pytest.raises(RuntimeError, match="nothing happens any more"):
        time.run(lambda: False)


def test_messages_overtake_each_other_and_what_goes_to_a_lost_process_never_comes() -> None:
    time = VirtualTime()
    came: list[int | str] = []
    network = Network(time, random.Random(0), Latency())
    network.join("a", came.append)
    network.join("b", came.append)
    for number in range(50):
        network.send("a", number, "")
    network.send("b", "never", "")
    network.lose("b")
    time.run(lambda: len(came) == 50)
    assert set(came) == set(range(50)) and came != list(range(50))


def move(source: VirtualCache, target: VirtualCache, span: PartSpan, blocks: list[int], place: KVPlace) -> None:
    """One part of a handoff."""
    wire = VirtualWire(0)
    layout = WireLayout(span.num_layers, span.num_tokens, 1, 2, "float32", Codec.NONE)
    source.pack(KVPlace(blocks), span, layout, wire)
    target.unpacking(place, span, layout, wire)()


def test_a_handoff_is_whole_when_all_its_parts_are_in_whatever_their_order() -> None:
    source, target = VirtualCache(SPEC, 8, 0), VirtualCache(SPEC, 8, 0)
    source.write("r", [3, 1, 2], 0, 40)
    place = KVPlace([7, 6, 5])
    parts = [PartSpan(layer, 2, token, 20) for token in (20, 0) for layer in (2, 0)]
    for span in parts[:3]:
        move(source, target, span, [3, 1, 2], place)
    with pytest.raises(AssertionError, match="not all of them whole"):
        target.check("r", place.block_table, 40)
    move(source, target, parts[3], [3, 1, 2], place)
    target.check("r", place.block_table, 40)


def test_kv_that_is_not_where_it_is_read_is_noticed() -> None:
    cache = VirtualCache(SPEC, 8, 4)
    cache.write("r", [0, 1], 0, 20)
    cache.check("r", [0, 1], 20)
    for name, blocks, num_tokens in (("other", [0, 1], 20), ("r", [1, 0], 20), ("r", [0, 2], 20), ("r", [0, 1], 21)):
        with pytest.raises(AssertionError):
            cache.check(name, blocks, num_tokens)
    with pytest.raises(AssertionError):
        cache.write("r", [0, 1], 21, 1)  # a token was left out
    places = cache.copy_out([0, 1])
    cache.write("other", [0, 1], 0, 20)
    with pytest.raises(AssertionError):
        cache.check_last("r", [0, 1], 20)
    cache.copy_in(places, [4, 5])
    cache.check("r", [4, 5], 20)
    assert cache.swap.num_free == 4


def placed_gateway() -> tuple[VirtualTime, VirtualGateway, str]:
    """A gateway with one placed request for two tokens, and the id that workers know."""
    time = VirtualTime()
    gateway = VirtualGateway("gateway-0", 5, time, Network(time, random.Random(0), Latency()))
    gateway.submit("r", (1, 2, 3), 2, 60.0)
    (record,) = gateway.attempts.open_requests
    gateway.receive(PlaceAnswer(record.request_id, Placement(record.request_id, "prefill-0", "decode-0")))
    return time, gateway, record.request_id


def output(attempt_id: str, position: int, token_id: int, reason: FinishReason | None = None) -> WorkerOutput:
    return WorkerOutput("w", chunks=(NewTokens(attempt_id, 0, position, (SampledToken(token_id),), reason),))


def test_right_tokens_end_a_request_and_a_wrong_or_missing_one_is_noticed() -> None:
    first, second = token_of(5, "r", 0), token_of(5, "r", 1)
    _, gateway, attempt_id = placed_gateway()
    gateway.receive(output(attempt_id, 1, second, FinishReason.LENGTH))  # overtakes the one before it
    gateway.receive(output(attempt_id, 0, first))
    assert gateway.ends.statuses == {"finished": 1} and gateway.num_left == 0
    _, gateway, attempt_id = placed_gateway()
    with pytest.raises(AssertionError, match="token 0 is"):
        gateway.receive(output(attempt_id, 0, first + 1))
    _, gateway, attempt_id = placed_gateway()
    with pytest.raises(AssertionError, match="finished with 1 of 2"):
        gateway.receive(output(attempt_id, 0, first, FinishReason.LENGTH))


def test_a_request_that_no_worker_answers_ends_at_its_deadline() -> None:
    time, gateway, _ = placed_gateway()
    time.run(lambda: gateway.ends.num_ended == 1)
    assert time.now_s() == 60.0
    assert gateway.ends.statuses == {"failed": 1} and gateway.ends.errors == {"deadline_exceeded": 1}
