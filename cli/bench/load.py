"""Runs one point of a load test on one event loop: a closed loop, or an open one on its schedule."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from cli.bench.points import Point
from cli.bench.summary import RequestRow
from cli.bench.target import Target
from cli.bench.workload import PromptBuilder, RequestSpec

OnDone = Callable[[RequestRow], None]


class RunClock:
    """Seconds since the run began, of the clock with the finest steps."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self._start_s


class LoadRun:
    """One point against one target. `rows` grows in the order of sending."""

    def __init__(self, target: Target, prompts: PromptBuilder, on_done: OnDone) -> None:
        self._target = target
        self._prompts = prompts
        self._on_done = on_done
        self._clock = RunClock()
        self.rows: list[RequestRow] = []

    async def warm_up(self, requests: list[RequestSpec]) -> None:
        """Sends requests one after another, outside of the measurement."""
        for request in requests:
            row = self._row(request, scheduled_s=0.0)
            await self._target.send(row, self._body(request), self._clock.now_s)
            self._on_done(row)

    async def run(self, point: Point) -> list[RequestRow]:
        """Sends the point's requests and waits for all answers."""
        self._clock = RunClock()
        self.rows = []
        if point.concurrency is None:
            await self._open_loop(point)
        else:
            await self._closed_loop(point, point.concurrency)
        return self.rows

    async def _open_loop(self, point: Point) -> None:
        async with asyncio.TaskGroup() as tasks:
            for request in point.requests:
                arrival_s = request.arrival_s or 0.0
                body = self._body(request)  # before its time has come: building a long prompt takes milliseconds
                delay_s = arrival_s - self._clock.now_s()
                await asyncio.sleep(max(delay_s, 0.0))
                tasks.create_task(self._send(self._row(request, scheduled_s=arrival_s), body))

    async def _closed_loop(self, point: Point, concurrency: int) -> None:
        waiting = iter(point.requests)
        end_s = point.duration_s

        async def client() -> None:
            for request in waiting:
                body = self._body(request)
                now_s = self._clock.now_s()
                if end_s is not None and now_s >= end_s:
                    return
                row = self._row(request, scheduled_s=now_s)
                await self._send(row, body)
                if row.error == "cannot connect":  # nobody listens any more: going on would only count to infinity
                    return

        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency):
                tasks.create_task(client())

    async def _send(self, row: RequestRow, body: bytes) -> None:
        self.rows.append(row)
        await self._target.send(row, body, self._clock.now_s)
        self._on_done(row)

    def _body(self, request: RequestSpec) -> bytes:
        return self._target.body(self._prompts.build(request), request.num_output_tokens)

    def _row(self, request: RequestSpec, *, scheduled_s: float) -> RequestRow:
        return RequestRow(
            index=request.index,
            num_prompt_tokens=request.num_prompt_tokens,
            num_wanted_tokens=request.num_output_tokens,
            scheduled_s=scheduled_s,
            sent_s=scheduled_s,
        )


def warm_up_requests(point: Point, count: int) -> list[RequestSpec]:
    """The first requests' lengths with prompts of their own, so that no prefix cache is warmed for the measurement."""
    found: list[RequestSpec] = []
    for request in point.requests:
        if len(found) == count:
            break
        found.append(replace(request, index=-1 - request.index, arrival_s=0.0, hash_ids=(), token_ids=()))
    return found
