"""What the counting scripts find in this tree."""

from __future__ import annotations

from pathlib import Path

from tools.guides import passed_guides
from tools.private_reaches import reaches

ROOT = Path(__file__).resolve().parents[2]


def test_where_a_guide_of_size_is_passed_the_file_says_why() -> None:
    assert [str(passed) for passed in passed_guides(ROOT) if not passed.has_reason] == []


def test_tests_reach_into_what_is_private_in_fewer_than_fifty_places() -> None:
    places = [f"{reach.path}:{reach.line}" for reach in reaches(ROOT)]
    assert len(places) < 50, places
