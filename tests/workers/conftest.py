"""Every life-cycle test runs twice: with an engine that computes at once, and with one that runs a step ahead."""

from __future__ import annotations

import pytest

from tests.support.worker_box import WorkerBox


@pytest.fixture(autouse=True, params=[0, 1], ids=["at-once", "a-step-ahead"])
def _engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerBox, "num_steps_ahead", request.param)
    monkeypatch.setattr(WorkerBox, "links_write", bool(request.param))
