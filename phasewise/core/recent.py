"""A bounded memory of names: what was cancelled or is over, for messages that are delayed or overtake each other."""

from __future__ import annotations

from collections import OrderedDict


class RecentNames:
    """Remembers the last `capacity` names that were added."""

    def __init__(self, capacity: int = 8192) -> None:
        self._capacity = capacity
        self._names: OrderedDict[str, None] = OrderedDict()

    def add(self, name: str) -> None:
        self._names[name] = None
        self._names.move_to_end(name)
        if len(self._names) > self._capacity:
            self._names.popitem(last=False)

    def __contains__(self, name: str) -> bool:
        return name in self._names
