"""A real cluster of processes, shared by the tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.served import Served, held, served, until
from tests.support.tiny_model import save_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(directory, the transformers model in it)."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, save_tiny_model(folder)


@pytest.fixture(scope="session")
def shared_cluster(tiny_model: tuple[Path, Any]) -> Iterator[Served]:
    with served(str(tiny_model[0]), "--prefill", "1", "--decode", "2") as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Served) -> Iterator[Served]:
    """The shared cluster; afterwards no block and no request may be left in it."""
    yield shared_cluster
    until(lambda: not held(shared_cluster.status()), 10.0)
