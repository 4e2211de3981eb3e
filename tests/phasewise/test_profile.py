"""The measured table: exact at its points, linear and monotone elsewhere; its file, and who may use it."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from dataclasses import replace

import pytest

from phasewise.core.errors import ConfigError
from phasewise.core.profile import DeviceProfile, Point, ProfileFacts, StepTimes

FACTS = ProfileFacts("H100", "8B", "bfloat16", 1, 1000, 16, 131_072, 3e12, 5e10, {"torch": "2.11"}, "phasewise", "d")
PROFILE = DeviceProfile(
    StepTimes((Point(256, 0, 0.010), Point(256, 4096, 0.014), Point(2048, 0, 0.050), Point(2048, 4096, 0.070))),
    StepTimes((Point(1, 128, 0.005), Point(1, 2048, 0.006), Point(64, 8192, 0.008), Point(64, 65_536, 0.012))),
    FACTS,
)


def test_points_are_met_and_the_rest_is_linear() -> None:
    assert PROFILE.prefill_s(256) == 0.010
    assert PROFILE.prefill_s(2048, 4096) == pytest.approx(0.070)
    assert PROFILE.prefill_s(1152) == pytest.approx(0.030), "half-way in tokens"
    assert PROFILE.prefill_s(256, 2048) == pytest.approx(0.012), "half-way in context"
    assert PROFILE.prefill_s(256, 8192) == pytest.approx(0.018), "beyond in context"
    assert PROFILE.decode_step_s(64, 65_536) == pytest.approx(0.012)
    assert PROFILE.decode_step_s(64, 122_880) == pytest.approx(0.016)


def test_a_long_prompt_runs_in_chunks_that_see_what_came_before() -> None:
    chunks = 0.050 + 0.060 + PROFILE.prefill_s(100, 4096)
    assert PROFILE.prefill_s(2048 + 2048 + 100) == pytest.approx(chunks)


@pytest.mark.parametrize("seed", range(5))
def test_predictions_never_fall_whatever_the_noise(seed: int) -> None:
    rng = random.Random(seed)
    points = tuple(
        Point(size, context * rng.randrange(1, 3), rng.random())
        for size in rng.sample(range(1, 500), 6)
        for context in rng.sample(range(5000), rng.randrange(1, 5))
    )
    profile = DeviceProfile(StepTimes(points), StepTimes(points))
    sizes = [*range(0, 700, 7), 2000]
    contexts = [0, 1, 10, *range(100, 12_000, 571), 100_000]
    for predict in (profile.prefill_s, profile.decode_step_s):
        table = [[predict(size, context) for context in contexts] for size in sizes]
        for row in table:
            assert row == sorted(row) and row[0] >= 0.0
        for before, after in itertools.pairwise(table):
            assert all(a <= b + 1e-12 for a, b in zip(before, after, strict=True))


def test_one_point_is_a_profile() -> None:
    profile = DeviceProfile(StepTimes((Point(8, 0, 0.5),)), StepTimes((Point(1, 7, 0.25),)))
    assert (profile.prefill_s(3), profile.prefill_s(8, 99)) == (0.5, 0.5)
    assert profile.decode_step_s(9, 1000) == 0.25


def test_linear() -> None:
    profile = DeviceProfile.linear(0.5, 0.001, 0.25, 0.01)
    assert profile.prefill_s(100) == pytest.approx(0.6)
    assert profile.prefill_s(100_000, 5) == pytest.approx(100.5)
    assert profile.decode_step_s(10) == profile.decode_step_s(10, 1e6) == pytest.approx(0.35)


def test_it_travels_and_is_written_and_read() -> None:
    assert pickle.loads(pickle.dumps(PROFILE)) == PROFILE
    text = PROFILE.to_json()
    assert json.loads(text)["version"] == 1
    again = DeviceProfile.from_json(text, source="f")
    assert again == PROFILE and again.decode_step_s(17, 999) == PROFILE.decode_step_s(17, 999)
    assert again.to_json() == text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": 2}, "version"),
        ({"prefill": []}, "prefill"),
        ({"decode": [{"sequences": 1, "context_tokens": 0, "seconds": -1}]}, "decode.0.seconds"),
        ({"decode": [{"tokens": 1, "context_tokens": 0, "seconds": 1}]}, "decode.0."),
        ({"surprise": 1}, "surprise"),
        ({"device": None}, "device"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_by_name(change: dict[str, object], expected: str) -> None:
    text = json.dumps({**json.loads(PROFILE.to_json()), **change})
    with pytest.raises(ConfigError) as caught:
        DeviceProfile.from_json(text, source="p.json")
    assert caught.value.message.startswith("p.json is no device profile of version 1 (")
    assert expected in caught.value.message and "phasewise profile" in caught.value.message
    with pytest.raises(ConfigError, match="JSON"):
        DeviceProfile.from_json(text[:-2], source="p.json")


@pytest.mark.parametrize("name", ["device", "model", "dtype", "tensor_parallel"])
def test_a_profile_of_something_else_is_refused(name: str) -> None:
    PROFILE.check_is_of(replace(FACTS, kv_blocks=7, versions={}, date="later"), source="p.json")
    other = replace(FACTS, **{name: 2 if name == "tensor_parallel" else "other"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"p\.json was measured with {name} .* and this worker has"):
        PROFILE.check_is_of(other, source="p.json")
