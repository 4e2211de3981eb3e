"""What a handoff is predicted to take, against arithmetic by hand and a plain simulation of its parts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from phasewise.core.handoff_cost import (
    MESSAGE_S,
    UNMEASURED_THRESHOLD_TOKENS,
    HandoffPath,
    decode_delay_s,
    pays,
    pays_from_tokens,
)
from phasewise.core.profile import DeviceProfile, Point, StepTimes

PATH = HandoffPath(
    bytes_per_token=1000.0, bytes_per_s=1e6, part_s=0.01, max_part_bytes=2**30, num_groups=4, chunk_tokens=100
)
"""A token's bytes take 1 ms, a part 10 ms besides."""


def arrival_of_last_part_s(num_parts: int, part_s: float, prefill_s: float) -> float:
    """Part i can leave when its share of the prompt is computed; the link sends one after the other."""
    free_s = 0.0
    for i in range(1, num_parts + 1):
        free_s = max(free_s, prefill_s * i / num_parts) + part_s
    return free_s


@pytest.mark.parametrize("prefill_s", [0.0, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("num_tokens", [41, 99, 100])
def test_the_visible_share_is_what_a_simulation_of_the_parts_gives(num_tokens: int, prefill_s: float) -> None:
    assert PATH.is_layerwise(num_tokens)
    last_s = arrival_of_last_part_s(4, 0.01 + num_tokens * 0.001 / 4, prefill_s)
    assert PATH.visible_s(num_tokens, prefill_s) == pytest.approx(last_s - prefill_s)
    assert PATH.total_s(num_tokens) == pytest.approx(4 * 0.01 + num_tokens * 0.001)
    far = replace(PATH, latency_s=0.5)
    assert far.visible_s(num_tokens, prefill_s) == pytest.approx(last_s - prefill_s + 0.5), "once, not for every part"


def test_short_prompts_go_at_once_and_all_of_that_is_seen() -> None:
    assert not PATH.is_layerwise(40)  # four parts of 10 tokens: 10 ms of bytes each, as long as a part
    assert PATH.total_s(40) == PATH.visible_s(40, 1.0) == pytest.approx(0.05)
    small = replace(PATH, max_part_bytes=10_000)
    assert small.total_s(40) == pytest.approx(0.04 + 0.04), "four parts, because the link takes no larger ones"


def test_what_the_link_takes_in_several_parts_anyway_goes_layer_by_layer() -> None:
    """At once three parts of 10 ms and all bytes are seen, layer by layer one and a quarter of the bytes."""
    path = replace(PATH, bytes_per_s=1e7)
    assert not path.is_layerwise(90)
    assert replace(path, max_part_bytes=30_000).is_layerwise(90)
    at_once = replace(path, max_part_bytes=30_000, threshold_tokens=1000)
    assert at_once.visible_s(90, 1.0) == pytest.approx(3 * 0.01 + 0.009)
    assert replace(at_once, threshold_tokens=1).visible_s(90, 1.0) == pytest.approx(0.01 + 0.009 / 4)


def test_one_group_of_layers_is_nothing_to_hide_behind() -> None:
    assert not replace(PATH, num_groups=1, max_part_bytes=10_000).is_layerwise(100)
    assert not PATH.is_layerwise(0)


def test_chunks_make_more_parts() -> None:
    path = replace(PATH, part_s=0.02)
    assert path.is_layerwise(100)  # 4 parts of 25 ms
    assert not path.is_layerwise(160)  # 8 of 20 ms
    assert path.is_layerwise(161)
    assert path.total_s(200) == pytest.approx(8 * 0.02 + 0.2)


def test_no_message_is_faster_than_the_commit() -> None:
    fast = replace(PATH, bytes_per_s=1e12, part_s=0.0)
    assert fast.visible_s(100, 1.0) == MESSAGE_S


def test_the_threshold_can_be_given_and_stands_in_where_no_rate_is_known() -> None:
    given = replace(PATH, threshold_tokens=7)
    assert [given.is_layerwise(n) for n in (6, 7)] == [False, True]
    unknown = replace(PATH, bytes_per_s=0.0)
    n = UNMEASURED_THRESHOLD_TOKENS
    assert [unknown.is_layerwise(n - 1), unknown.is_layerwise(n)] == [False, True]
    with pytest.raises(ValueError, match="measure it first"):
        unknown.total_s(5)


def test_a_dearer_part_or_a_faster_link_moves_the_threshold_up() -> None:
    def first(path: HandoffPath) -> int:
        return next(n for n in range(1, 10_000) if path.is_layerwise(n))

    one_chunk = replace(PATH, chunk_tokens=10_000)
    assert first(one_chunk) == 41
    assert first(replace(one_chunk, part_s=0.02)) == 81
    assert first(replace(one_chunk, bytes_per_s=4e6)) == 161
    assert first(replace(one_chunk, num_groups=8)) == 81


def test_a_prompt_delays_decodes_by_its_chunks_less_one_reading_of_the_weights_each() -> None:
    profile = DeviceProfile(
        StepTimes((Point(1, 0, 0.006), Point(1000, 0, 0.030))),
        StepTimes((Point(1, 0, 0.005), Point(100, 0, 0.010))),
    )
    assert decode_delay_s(profile, 1000) == pytest.approx(0.030 - 0.005)
    assert decode_delay_s(profile, 2000) == pytest.approx(2 * (0.030 - 0.005))
    assert decode_delay_s(replace(profile, prefill=profile.decode), 1) == 0.0, "never below nothing"


def test_the_formula_of_the_delay_holds_for_the_published_measurement() -> None:
    """benchmarks/results/engine-h100.json: 64 decodes + 2048 prompt tokens took 66.67 ms in two steps of 2048."""
    profile = DeviceProfile.read("benchmarks/results/profile-llama-8b-h100.json")
    base_s = profile.decode_step_s(1)
    two_chunks_s = profile.prefill_s(1984) - base_s + profile.prefill_s(64, 1984) - base_s
    together_s = two_chunks_s + 2 * profile.decode_step_s(64, 64 * 1088)
    assert together_s == pytest.approx(0.06667, rel=0.1)


def test_a_handoff_pays_from_where_it_costs_less_than_the_delay() -> None:
    # Prefill 5 ms + 2 ms per token, decode 5 ms: a prompt of n tokens delays by 2n ms.
    profile = DeviceProfile.linear(0.005, 0.002, 0.005, 0.0)
    path = replace(PATH, chunk_tokens=10_000, threshold_tokens=10_000)  # at once: 10 + n ms
    assert pays_from_tokens(path, profile, profile, 1000) == 11
    assert not pays(path, profile, profile, 10)
    assert pays(path, profile, profile, 10, num_decodes=2.0)
    assert pays_from_tokens(path, profile, profile, 1000, num_decodes=2.0) == 4
    assert pays_from_tokens(path, profile, profile, 10) is None
    slow = replace(path, bytes_per_s=1e5)
    assert pays_from_tokens(slow, profile, profile, 1 << 20) is None
