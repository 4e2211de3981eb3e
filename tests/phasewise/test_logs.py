"""Logging: one form for all processes, and a collector that cannot hang."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from phasewise.core.logs import LogCollector, setup_logging


@pytest.fixture(autouse=True)
def _own_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in list(root.handlers):
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_carry_the_request(tmp_path: Path) -> None:
    out = io.StringIO()
    with LogCollector(str(tmp_path / "log"), out) as collector:
        setup_logging("decode-0", log_format="json", level="info", collector=collector.path)
        logging.getLogger("x").info("naïve %s", "☕", extra={"request_id": "r", "worker_id": "w"})
        logging.getLogger("x").debug("not wanted")
    (entry,) = [json.loads(line) for line in out.getvalue().splitlines()]
    assert entry["message"] == "naïve ☕"
    assert (entry["process"], entry["request_id"], entry["worker_id"]) == ("decode-0", "r", "w")
    assert entry["level"] == "info"


def test_text_lines(tmp_path: Path) -> None:
    out = io.StringIO()
    setup_logging("serve", log_format="text", level="warning", stream=out)
    logging.getLogger("x").warning("look", extra={"request_id": "r"})
    assert out.getvalue().endswith("WARNING serve: look [request_id=r]\n")


def test_a_collector_whose_reader_is_gone_still_closes(tmp_path: Path) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    done = threading.Event()

    def run() -> None:
        with LogCollector(str(tmp_path / "log"), Gone()) as collector:
            setup_logging("w", log_format="text", level="info", collector=collector.path)
            for i in range(2000):
                logging.getLogger("x").info("line %d", i)
        done.set()

    threading.Thread(target=run, daemon=True).start()
    assert done.wait(20)
