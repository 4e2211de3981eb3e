"""What benchmarks.handoff computes from what it measured; and two processes that really hand a prompt over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.handoff import duty_percent, lengths_of, more_percent, num_unequal, shape_8b, share_percent
from benchmarks.link_cluster import Seen, add_rows, stages_ms
from benchmarks.link_kernels import floor_gb_per_s
from benchmarks.link_nodes import CacheEnd, LinkSettings
from benchmarks.nodes import Node, open_links, pipes
from benchmarks.offline import Rows
from phasewise.core.kv_spec import FP8, KVCacheSpec
from phasewise.core.lifecycle import Stage


def test_shares_and_duty() -> None:
    assert share_percent(ours_s=2.0, raw_s=1.5) == 75
    assert duty_percent(30, elapsed_s=3.0, bytes_per_s=50.0) == pytest.approx(20)
    assert more_percent(1.05, 1.0) == pytest.approx(5)
    assert floor_gb_per_s(cache_bytes=100, moved_bytes=150, copy_bytes_per_s=3e9) == pytest.approx(2.0)
    assert shape_8b().bytes_per_token == 131_072


def test_lengths_are_the_same_in_every_run() -> None:
    lengths = lengths_of(1000, 4096, "a")
    assert lengths == lengths_of(1000, 4096, "a") != lengths_of(1000, 4096, "b")
    assert 1 <= min(lengths) < 100 and 4000 < max(lengths) <= 4096


def test_tokens_of_both_workers_are_joined() -> None:
    alone = {"a": [1, 2, 3], "b": [4, 5], "c": [6, 7]}
    assert num_unequal([{"a": [1], "b": [4], "c": [6]}, {"a": [2, 3], "b": [5], "c": [7]}], alone) == 0
    assert num_unequal([{"a": [1], "b": [4]}, {"a": [3, 2], "b": [5], "c": [6, 7]}], alone) == 1
    assert num_unequal([{}, {}], alone) == 3


def seen(ttft_s: float, second_s: float, step_s: float) -> Seen:
    times = [ttft_s, ttft_s + second_s, *(ttft_s + second_s + i * step_s for i in range(1, 5))]
    moments = {Stage.RECEIVED: 100.0, Stage.FIRST_TOKEN: 100.5, Stage.DECODE_START: 100.507, Stage.FINISHED: 101.0}
    return Seen(tuple(times), dict(moments))


def test_rows_of_the_clusters() -> None:
    rows = Rows(None, "", ())
    add_rows(rows, {"disaggregated": [seen(0.103, 0.006, 0.005)], "mixed": [seen(0.1, 0.005, 0.005)]}, 2048)
    found = {row["case"].partition(",")[0].partition(":")[0]: row for row in rows.rows}
    assert found["handover"]["ours"] == pytest.approx(7.0) and found["handover"]["must"] == pytest.approx(8.0)
    assert found["TTFT longer than a mixed worker's"]["ours"] == pytest.approx(3.0)
    assert found["second token over the mean gap"]["ours"] == pytest.approx(20.0)
    stages = stages_ms([seen(0.1, 0.005, 0.005)])
    assert list(stages) == ["received", "first_token", "decode_start", "finished"]
    assert stages["decode_start"] == pytest.approx(507.0)


@pytest.fixture
def pair() -> Iterator[dict[str, Node]]:
    controls, settings = pipes(("sender", "receiver")), LinkSettings(slab_bytes=1 << 16)
    nodes = {}
    for name, dtype in (("sender", "bfloat16"), ("receiver", FP8)):
        spec = KVCacheSpec(2, 2, 16, 16, dtype, "test")
        nodes[name] = Node(CacheEnd, [], name, controls[name], settings, spec, 64, 1 << 20)
    for node in nodes.values():
        node.end()
    yield nodes
    for node in nodes.values():
        node.leave()
    for node in nodes.values():
        node.close()


@pytest.mark.slow
def test_two_processes_hand_prompts_over(pair: dict[str, Node]) -> None:
    rates = open_links(pair, ("sender", "receiver"))
    assert rates["sender", "receiver"] > 0
    sender, receiver = pair["sender"], pair["receiver"]
    receiver.begin("take", 3)
    start_s = sender.call("give_all", "receiver", [1, 1000, 17])
    assert receiver.end() > start_s
    assert receiver.call("num_checksum_failures") == 0
    with pytest.raises(RuntimeError, match="does not fit 1024 slots"):
        sender.call("content", 5000)
