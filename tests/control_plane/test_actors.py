"""What the actors' shells do beside delegating."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from control_plane.actors import ControlPlaneActor, RemotePlacer
from control_plane.link_survey import LinkSurvey
from phasewise.core.config import ServingConfig
from phasewise.core.errors import Overloaded, Unavailable
from tests.control_plane.test_link_survey import Workers


class RecordingHandle:
    """An actor's handle: `handle.method.remote(…)` keeps the call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        calls = self.calls

        class Method:
            def remote(self, *arguments: Any) -> None:
                calls.append((name, arguments))

        return Method()


async def test_what_happens_in_one_turn_of_the_loop_is_told_in_one_call_and_in_order() -> None:
    handle = RecordingHandle()
    placer = RemotePlacer(handle)
    placer.first_token("a")
    placer.first_token("b")
    placer.finished("a", 7)
    assert handle.calls == []
    await asyncio.sleep(0)
    assert handle.calls == [("progress", ([("a", None), ("b", None), ("a", 7)],))]
    placer.finished("b", 0)
    await asyncio.sleep(0)
    assert handle.calls[1:] == [("progress", ([("b", 0)],))]


async def test_the_links_are_probed_by_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.actors.setup_logging", lambda *_, **__: None)
    actor = ControlPlaneActor(ServingConfig(), None)
    has_begun, may_go_on = asyncio.Event(), asyncio.Event()
    for info, _ in Workers().members():
        actor._scheduler.worker_joined(info)

    class Slow(Workers):
        async def probe(self, *arguments: Any) -> Any:
            has_begun.set()
            await may_go_on.wait()
            return await super().probe(*arguments)

    monkeypatch.setattr(actor, "_link_asker", Slow())
    first = asyncio.create_task(actor.probe_links([32], 10.0))
    await asyncio.wait_for(has_begun.wait(), 10)
    second = await actor.probe_links([32], 10.0)
    assert isinstance(second, Overloaded)
    assert isinstance(await actor.links(), LinkSurvey), "looking is always allowed"
    may_go_on.set()
    survey = await asyncio.wait_for(first, 10)
    assert isinstance(survey, LinkSurvey)
    assert [pair.probes[0].seconds for pair in survey.pairs] == [0.5] * 4
    assert not isinstance(await actor.probe_links([32], 10.0), Overloaded)


async def test_a_worker_that_does_not_answer_is_an_error_of_the_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.actors.setup_logging", lambda *_, **__: None)
    actor = ControlPlaneActor(ServingConfig(), None)
    info, _ = Workers().members()[0]
    actor._scheduler.worker_joined(info)  # and it has no handle: as if it was lost this moment
    answers = await actor.links(), await actor.probe_links([32], 1.0)
    assert [type(answer) for answer in answers] == [Unavailable, Unavailable]
    assert not actor._is_probing
