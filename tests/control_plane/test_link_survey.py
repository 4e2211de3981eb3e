"""Which pairs are looked at and how they are probed, over workers that answer as a test says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from control_plane.gateway.link_report import link_report
from control_plane.link_survey import LinkSurvey, check_probes, look, measure
from phasewise.core.clock import ManualClock
from phasewise.core.config import TransferConfig
from phasewise.core.errors import InvalidRequest, Unavailable
from phasewise.core.kv_spec import KVCacheSpec
from phasewise.core.links import LinkFacts, LinkProbe, WorkerLinks
from phasewise.core.messages import WorkerInfo, WorkerLoad
from phasewise.core.placement import WorkerRole, WorkerState
from phasewise.core.profile import DeviceProfile

SPEC = KVCacheSpec(4, 2, 16, 16, "float32", "model")
ROLES = {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode", "decode-1": "decode", "mixed-0": "mixed"}


class Workers:
    """A LinkAsker. `seconds` are a probe's, taken in turn; None is a failure, an exception is raised."""

    def __init__(self, lost: Sequence[str] = (), seconds: Sequence[Any] = (0.5,), max_part_bytes: int = 100) -> None:
        self.clock = ManualClock(10.0)
        self.lost = lost
        self.seconds = list(seconds)
        self.max_part_bytes = max_part_bytes
        self.probed: list[tuple[str, str, int]] = []

    def members(self) -> list[tuple[WorkerInfo, WorkerLoad]]:
        profile = DeviceProfile.linear(0.0, 0.001, 0.0, 0.001)
        return [
            (
                WorkerInfo(name, WorkerRole(role), 1, "h", "cpu", "float32", 1, SPEC, 8, 128, profile),
                WorkerLoad(name, WorkerRole(role), WorkerState.LOST if name in self.lost else WorkerState.READY),
            )
            for name, role in ROLES.items()
        ]

    async def links(self, worker_id: str, peers: Sequence[WorkerInfo]) -> WorkerLinks:
        assert worker_id not in self.lost
        facts = tuple(
            LinkFacts(p.worker_id, "loopback", 0.0, 0.0, self.max_part_bytes, "float32", "none", 1024.0, True, "")
            for p in peers
        )
        return WorkerLinks(worker_id, 2, 4, 128, facts)

    async def probe(self, worker_id: str, peer: str, num_bytes: int, timeout_s: float) -> LinkProbe:
        self.probed.append((worker_id, peer, num_bytes))
        seconds = self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        if isinstance(seconds, Exception):
            raise seconds
        self.clock.advance(seconds or 0.0)
        return LinkProbe(num_bytes, seconds, "" if seconds is not None else "it did not arrive")

    async def survey(self) -> LinkSurvey:
        return await look(TransferConfig(), self.members(), self)

    async def measured(self, sizes: Sequence[int], timeout_s: float = 1e6) -> LinkSurvey:
        survey = await self.survey()
        return survey.with_probes(await measure(survey.pairs, self, sizes, timeout_s, self.clock))


async def test_pairs_are_those_of_ready_prefill_and_decode_workers() -> None:
    survey = await Workers().survey()
    assert [(p.prefill, p.decode) for p in survey.pairs] == [
        ("prefill-0", "decode-0"), ("prefill-0", "decode-1"), ("prefill-1", "decode-0"), ("prefill-1", "decode-1"),
    ]  # fmt: skip
    assert set(survey.sides) == set(ROLES)
    survey = await Workers(lost=("prefill-0", "decode-1")).survey()
    assert [(p.prefill, p.decode) for p in survey.pairs] == [("prefill-1", "decode-0")]
    assert len(survey.workers) == 5, "lost ones are told, too"


async def test_every_size_is_probed_three_times_and_the_fastest_counts() -> None:
    workers = Workers(lost=("prefill-1", "decode-1"), seconds=[0.5, 0.2, 0.3, 3.0, 2.0, 4.0])
    (pair,) = (await workers.measured([1 << 20, 32])).pairs
    assert pair.probes == (LinkProbe(32, 0.2), LinkProbe(96, 2.0)), "what the link does not take becomes its largest"
    assert workers.probed == [("prefill-0", "decode-0", size) for size in (32, 32, 32, 96, 96, 96)]


async def test_a_failure_ends_the_probes_of_its_pair_alone() -> None:
    workers = Workers(lost=("prefill-1",), seconds=[0.5, None, 0.25])
    first, second = (await workers.measured([32, 64])).pairs
    assert first.probes == (LinkProbe(32, None, "it did not arrive"),)
    assert [p.seconds for p in second.probes] == [0.25, 0.25]


async def test_a_worker_that_is_gone_is_a_failure_of_its_pair() -> None:
    workers = Workers(lost=("prefill-1",), seconds=[Unavailable("worker prefill-0 does not answer"), 0.25])
    first, second = (await workers.measured([32])).pairs
    assert first.probes == (LinkProbe(32, None, "worker prefill-0 does not answer"),)
    assert second.probes == (LinkProbe(32, 0.25),)


async def test_the_time_holds_for_all_and_is_shared_out() -> None:
    workers = Workers(lost=("prefill-1",), seconds=[1.0])
    first, second = (await workers.measured([32, 64], timeout_s=7.0)).pairs
    assert [p.seconds for p in first.probes] == [1.0, 1.0], "one repeat of the second had to do"
    assert [p.seconds for p in second.probes] == [1.0, None]
    assert second.probes[1].failure == "no time was left for it; raise timeout_s"
    assert len(workers.probed) == 4 + 3


@pytest.mark.parametrize(("timeout_s", "seconds"), [(5.0, 2.0), (50.0, None)], ids=["by-time", "by-the-link"])
async def test_a_repeat_that_fails_counts_unless_the_time_cut_it_short(timeout_s: float, seconds: float | None) -> None:
    """The third repeat has 1 of the 5 s left, and would have needed 2 like the others; or the link broke."""

    class Slow(Workers):
        async def probe(self, worker_id: str, peer: str, num_bytes: int, timeout_s: float) -> LinkProbe:
            if len(self.probed) < 2:
                return await super().probe(worker_id, peer, num_bytes, timeout_s)
            self.clock.advance(min(timeout_s, 1.0))
            return LinkProbe(num_bytes, None, "it did not arrive")

    workers = Slow(lost=("prefill-1", "decode-1"), seconds=[2.0])
    (pair,) = (await workers.measured([32], timeout_s)).pairs
    assert [probe.seconds for probe in pair.probes] == [seconds]


@pytest.mark.parametrize(
    ("sizes", "timeout_s", "field", "words"),
    [
        ([], 1.0, "sizes", "1 to 8 entries, not 0"),
        ([32] * 9, 1.0, "sizes", "not 9"),
        ([32, 33], 1.0, "sizes[1]", "multiple of 16"),
        ([16], 1.0, "sizes[0]", "from 32"),
        ([2**31], 1.0, "sizes[0]", "to 1073741824"),
        ([32], 0.0, "timeout_s", "above 0"),
        ([32], 601.0, "timeout_s", "at most 600"),
        ([32], float("nan"), "timeout_s", "not nan"),
    ],
)
def test_what_is_out_of_range_is_named(sizes: list[int], timeout_s: float, field: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words.replace("[", r"\[")) as caught:
        check_probes(sizes, timeout_s)
    assert caught.value.field == field


async def test_the_report_is_json_that_a_profile_can_be_read_from() -> None:
    report = link_report(await Workers(lost=("decode-1",)).measured([32]), 4096)
    report = json.loads(json.dumps(report))
    assert report["context_length"] == 4096
    workers = {w["id"]: w for w in report["workers"]}
    assert workers["decode-1"]["state"] == "lost"
    assert workers["decode-1"]["wire_version"] is None
    assert workers["prefill-0"]["chunk_tokens"] == 128
    profile = DeviceProfile.from_json(json.dumps(workers["prefill-0"]["profile"]), source="test")
    assert profile.prefill_s(10) == pytest.approx(0.01)
    assert report["pairs"][0]["probes"] == [{"num_bytes": 32, "seconds": 0.5, "failure": ""}]
