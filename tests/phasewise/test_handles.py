"""Handles of members: found when they are needed, in order, and forgotten."""

from __future__ import annotations

import threading
from typing import Any

from phasewise.core.handles import Directory

WAIT_S = 10.0


class Finder:
    """Finds what `there` has; a test waits for `has_asked`."""

    def __init__(self, **there: Any) -> None:
        self.there = there
        self.has_asked = threading.Event()

    def __call__(self, member_id: str) -> Any:
        self.has_asked.set()
        return self.there.get(member_id)


def wait_for(directory: Directory, member_id: str) -> None:
    """Returns when what was said to a member has reached it, and all before it."""
    done = threading.Event()
    directory.call(member_id, lambda handle: done.set())
    assert done.wait(WAIT_S)


def test_what_is_said_to_a_member_that_is_not_found_yet_reaches_it_in_order() -> None:
    finder = Finder()
    directory = Directory(finder)
    said: list[tuple[str, int]] = []
    for number in range(5):
        directory.call("decode-0", lambda handle, number=number: said.append((handle, number)))  # type: ignore[misc]
    assert finder.has_asked.wait(WAIT_S)
    assert said == []
    finder.there["decode-0"] = "a handle"
    wait_for(directory, "decode-0")
    directory.call("decode-0", lambda handle: said.append((handle, 5)))
    assert said == [("a handle", number) for number in range(6)]
    assert directory.get("decode-0") == "a handle"


def test_a_member_that_is_expected_is_found_before_it_is_needed() -> None:
    finder = Finder(gateway="a handle")
    directory = Directory(finder)
    directory.expect("gateway")
    wait_for(directory, "gateway")
    assert directory.known() == ["a handle"]


def test_nothing_is_said_to_a_member_that_was_forgotten() -> None:
    finder = Finder()
    directory = Directory(finder)
    said: list[str] = []
    directory.call("decode-0", said.append)
    assert finder.has_asked.wait(WAIT_S)
    directory.forget("decode-0")
    finder.there["decode-0"] = finder.there["decode-1"] = "a handle"
    directory.call("decode-0", said.append)
    directory.connect({"decode-0": "a handle"})
    wait_for(directory, "decode-1")
    assert said == [] and directory.get("decode-0") is None


def test_the_successor_of_a_member_that_was_forgotten_is_somebody_else() -> None:
    directory = Directory()
    directory.connect({"decode-0#1": "old"})
    directory.forget("decode-0#1")
    directory.connect({"decode-0#2": "new"})
    said: list[str] = []
    for member_id in ("decode-0#1", "decode-0#2"):
        directory.call(member_id, said.append)
    assert said == ["new"]
