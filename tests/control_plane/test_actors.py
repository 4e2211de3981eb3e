"""What the actors' shells do beside delegating."""

from __future__ import annotations

import asyncio
from typing import Any

from control_plane.actors import RemotePlacer


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
