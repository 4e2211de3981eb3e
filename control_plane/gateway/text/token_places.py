"""Where the texts of tokens stand in a text, and where parts of them stand at its ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Place = tuple[int, int]
"""Begin and end of a piece of a text."""


class TokenPlaces:
    """Finds the texts of tokens in a text. `contents` are those texts."""

    def __init__(self, contents: Iterable[str]) -> None:
        self._contents = sorted(contents, key=len, reverse=True)
        self._longest = len(self._contents[0]) if self._contents else 0
        self._begins = {content[:n] for content in self._contents for n in range(1, len(content))}
        self._ends = {content[n:] for content in self._contents for n in range(1, len(content))}

    def within(self, text: str) -> list[Place]:
        """Where a token's whole text stands, overlaps included."""
        # One search for each: an expression of hundreds of alternatives holds the interpreter's lock for seconds.
        found = (content for content in self._contents if content in text)
        return [(start, start + len(content)) for content in found for start in positions(content, text)]

    def spans(self, text: str) -> list[Place]:
        """Where tokens are matched."""
        return matched(self.within(text))

    def at_ends(self, text: str) -> list[Place]:
        """Where `text` may become a part of a token when it stands, as it is or stripped, between other texts."""
        first = len(text) - len(text.lstrip())
        last = len(text.rstrip())
        if any(text and text in content for content in self._contents):
            return [(0, len(text))]
        if first < last and any(text[first:last] in content for content in self._contents):
            return [(first, last)]
        spans: list[Place] = []
        for end in {len(text), last}:
            sizes = (n for n in range(min(self._longest, end), 0, -1) if text[end - n : end] in self._begins)
            spans += [(end - n, end) for n in list(sizes)[:1]]
        for start in {0, first}:
            room = min(self._longest, len(text) - start)
            sizes = (n for n in range(room, 0, -1) if text[start : start + n] in self._ends)
            spans += [(start, start + n) for n in list(sizes)[:1]]
        return spans


def matched(places: Iterable[Place]) -> list[Place]:
    """The places that a search from left to right finds: of two that begin together the longer, and no overlaps."""
    found: list[Place] = []
    for start, end in sorted(places, key=lambda place: (place[0], -place[1])):
        if not found or start >= found[-1][1]:
            found.append((start, end))
    return found


def positions(content: str, text: str) -> Iterator[int]:
    """Where `content` begins in `text`, overlaps included."""
    start = text.find(content)
    while start >= 0:
        yield start
        start = text.find(content, start + 1)
