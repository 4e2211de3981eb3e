"""A worker's connections for tokens and a gateway's port for them: real sockets, whose connections break."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress

import pytest

from phasewise.core.messages import NewTokens, RequestFailed, WorkerOutput
from phasewise.core.request import SampledToken
from phasewise.delivery.frames import LENGTH
from phasewise.delivery.listener import TokenListener
from phasewise.delivery.sinks import TokenSinks

WAIT_S = 30.0
WORKER, GATEWAY, SECRET = "decode-0#1", "gateway-0#1", "known to the cluster"


class Taker:
    """Keeps what came, and whom tokens were lost of."""

    def __init__(self) -> None:
        self.outputs: list[WorkerOutput] = []
        self.lost: list[str] = []
        self.breaks_at: int | None = None
        self._news = asyncio.Event()

    def deliver(self, output: WorkerOutput) -> None:
        self.outputs.append(output)
        self._news.set()
        if self.breaks_at == output.chunks[0].position:
            raise RuntimeError("a fault of ours")

    def tokens_lost(self, worker_id: str) -> None:
        self.lost.append(worker_id)
        self._news.set()

    @property
    def positions(self) -> list[int]:
        return [output.chunks[0].position for output in self.outputs]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._news.clear()
                await self._news.wait()


def output(position: int, num_tokens: int = 1, num_more_bytes: int = 0) -> WorkerOutput:
    tokens = tuple(SampledToken(position + i) for i in range(num_tokens))
    failures = (RequestFailed("another", "internal", "x" * num_more_bytes),) if num_more_bytes else ()
    return WorkerOutput(WORKER, (NewTokens("r", 0, position, tokens),), failures=failures)


@asynccontextmanager
async def listening(taker: Taker, gateway_id: str = GATEWAY) -> AsyncIterator[tuple[TokenListener, str]]:
    listener = TokenListener(gateway_id, SECRET, taker)
    try:
        yield listener, await listener.open("127.0.0.1")
    finally:
        await listener.close()


@pytest.fixture
def sinks() -> Iterator[TokenSinks]:
    made = TokenSinks(WORKER, SECRET, max_queued_bytes=1 << 20)
    yield made
    made.close(0.0)


class Proxy:
    """Passes connections on to a gateway's port. Each of the first ends after so many bytes as `ends_after` says."""

    def __init__(self, address: str, ends_after: list[int]) -> None:
        self._address = address.split(":")
        self._ends_after = ends_after
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_connections = 0
        self.reads = asyncio.Event()  # cleared: nothing is read from the worker
        self.reads.set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            await self.cut()
            await server.wait_closed()

    async def cut(self) -> None:
        """Ends all connections."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._pass_both(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass_both(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = self._ends_after.pop(0) if self._ends_after else None
        self.num_connections += 1
        there, back = await asyncio.open_connection(*self._address)
        answers = asyncio.create_task(self._pass_on(there, writer, None))
        try:
            await self._pass_on(reader, back, left)
        except asyncio.CancelledError:
            pass  # `cut`
        finally:
            answers.cancel()
            for end in (writer, back):
                end.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: int | None) -> None:
        try:
            while left is None or left > 0:
                await self.reads.wait()
                data = await reader.read(1000 if left is None else min(left, 1000))
                if not data:
                    break
                writer.write(data)
                await writer.drain()
                left = None if left is None else left - len(data)
        except ConnectionError:
            pass


async def test_outputs_arrive_as_they_were_and_in_order(sinks: TokenSinks) -> None:
    taker = Taker()
    async with listening(taker) as (_, address):
        sinks.connect({GATEWAY: address})
        outputs = [output(i, i % 5 + 1) for i in range(1000)]
        for one in outputs:
            sinks.deliver(GATEWAY, one)
        await taker.until(lambda: len(taker.outputs) == 1000)
        assert taker.outputs == outputs
        assert not taker.lost


async def test_a_large_output_arrives(sinks: TokenSinks) -> None:
    taker = Taker()
    async with listening(taker) as (_, address):
        sinks.connect({GATEWAY: address})
        large = output(0, num_more_bytes=32 << 20)  # more than a connection's buffers take, and than may be queued
        sinks.deliver(GATEWAY, large)
        await taker.until(lambda: len(taker.outputs) == 1)
        sinks.deliver(GATEWAY, output(1))
        await taker.until(lambda: len(taker.outputs) == 2)
        assert taker.outputs == [large, output(1)]
        assert not taker.lost


@pytest.mark.parametrize("seed", range(5))
async def test_a_connection_that_breaks_loses_nothing_and_repeats_nothing(sinks: TokenSinks, seed: int) -> None:
    rng, taker = random.Random(seed), Taker()
    async with listening(taker) as (_, address):
        # In the Hello, in its answer's time, between frames and inside them.
        proxy = Proxy(address, [rng.choice([10, 160, rng.randrange(200, 20_000)]) for _ in range(8)])
        async with proxy.open() as proxied:
            sinks.connect({GATEWAY: proxied})
            for i in range(2000):
                sinks.deliver(GATEWAY, output(i))
                if i % 10 == 0:
                    await asyncio.sleep(0)
            await taker.until(lambda: len(taker.outputs) >= 2000 or bool(taker.lost))
            assert not taker.lost
            assert taker.positions == list(range(2000))
            assert proxy.num_connections > 5


async def test_the_last_output_arrives_though_its_connection_broke_after_it_had_gone(sinks: TokenSinks) -> None:
    taker = Taker()
    async with listening(taker) as (_, address):
        proxy = Proxy(address, [])
        async with proxy.open() as proxied:
            sinks.connect({GATEWAY: proxied})
            sinks.deliver(GATEWAY, output(0))
            await taker.until(lambda: len(taker.outputs) == 1)
            proxy.reads.clear()
            sinks.deliver(GATEWAY, output(1))  # the last word; nobody passes it on
            await proxy.cut()
            proxy.reads.set()
            await taker.until(lambda: len(taker.outputs) == 2)
            assert taker.positions == [0, 1]
            assert proxy.num_connections == 2


async def test_a_gateway_that_reads_nothing_holds_nobody_back_and_hears_of_what_it_missed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    taker, other = Taker(), Taker()
    sinks = TokenSinks(WORKER, SECRET, max_queued_bytes=32 << 20)  # more than the system keeps of a connection
    async with listening(taker) as (_, address), listening(other, "gateway-1#1") as (_, other_address):
        proxy = Proxy(address, [])
        async with proxy.open() as proxied:
            sinks.connect({GATEWAY: proxied, "gateway-1#1": other_address})
            sinks.deliver(GATEWAY, output(0))
            await taker.until(lambda: len(taker.outputs) == 1)
            proxy.reads.clear()
            num_sent = 0
            while "takes no tokens" not in caplog.text:
                num_sent += 1
                assert num_sent < 1000, "the queue is not bounded"
                sinks.deliver(GATEWAY, output(num_sent, num_more_bytes=500_000))
                sinks.deliver("gateway-1#1", output(num_sent))
            await other.until(lambda: len(other.outputs) == num_sent)
            assert not taker.lost
            proxy.reads.set()
            await taker.until(lambda: bool(taker.lost) and taker.positions[-1] == num_sent)
            sinks.deliver(GATEWAY, output(num_sent + 1))
            await taker.until(lambda: taker.positions[-1] == num_sent + 1)
            assert taker.lost == [WORKER]
            assert taker.positions == sorted(set(taker.positions))
            assert len(taker.positions) < num_sent
            assert other.positions == list(range(1, num_sent + 1))
        sinks.close(0.0)


async def test_a_gateway_that_is_not_there_yet_is_reached_when_it_is(
    sinks: TokenSinks, caplog: pytest.LogCaptureFixture
) -> None:
    taker = Taker()
    async with listening(taker) as (_, address):
        proxy = Proxy(address, [0, 0, 0])
        async with proxy.open() as proxied:
            sinks.connect({GATEWAY: proxied})
            sinks.deliver(GATEWAY, output(0))
            sinks.deliver(GATEWAY, output(1))
            await taker.until(lambda: len(taker.outputs) == 2)
            assert proxy.num_connections == 4
            assert caplog.text.count("the connection for tokens to gateway-0#1 is broken") == 1


async def test_whoever_is_not_of_the_cluster_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    taker = Taker()
    async with listening(taker) as (_, address):
        stranger = TokenSinks("decode-7#1", "guessed")
        stranger.connect({GATEWAY: address})
        stranger.deliver(GATEWAY, output(0))
        await asyncio.to_thread(stranger.close, 1.0)  # it tries all the time
        assert "the gateway refuses it: the worker is not of this cluster" in caplog.text
        assert not taker.outputs
        assert "guessed" not in caplog.text and SECRET not in caplog.text


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", LENGTH.pack(3) + b"[1]", LENGTH.pack(1 << 31)])
async def test_whoever_does_not_speak_the_protocol_is_disconnected_alone(sinks: TokenSinks, said: bytes) -> None:
    taker = Taker()
    async with listening(taker) as (_, address):
        sinks.connect({GATEWAY: address})
        sinks.deliver(GATEWAY, output(0))
        await taker.until(lambda: len(taker.outputs) == 1)
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(said)
        async with asyncio.timeout(WAIT_S):
            with suppress(ConnectionError):
                await reader.read()
        writer.transport.abort()
        sinks.deliver(GATEWAY, output(1))
        await taker.until(lambda: len(taker.outputs) == 2)


async def test_what_is_meant_for_a_gateway_that_is_gone_is_dropped(sinks: TokenSinks) -> None:
    taker = Taker()
    async with listening(taker) as (_, address):
        sinks.connect({GATEWAY: address})
        sinks.deliver(GATEWAY, output(0))
        await taker.until(lambda: len(taker.outputs) == 1)
        sinks.forget(GATEWAY)
        sinks.forget(GATEWAY)
        sinks.deliver(GATEWAY, output(1))
        sinks.deliver("gateway-9#1", output(2))
        again = TokenSinks("decode-1#1", SECRET)
        again.connect({GATEWAY: address})
        again.deliver(GATEWAY, output(3))
        await taker.until(lambda: len(taker.outputs) == 2)
        assert taker.positions == [0, 3]
        again.close(0.0)


async def test_a_worker_that_stops_says_its_last_words() -> None:
    taker = Taker()
    async with listening(taker) as (_, address):
        sinks = TokenSinks(WORKER, SECRET)
        sinks.connect({GATEWAY: address})
        for i in range(200):
            sinks.deliver(GATEWAY, output(i, 1000))
        await asyncio.to_thread(sinks.close, WAIT_S)
        await taker.until(lambda: len(taker.outputs) == 200)


async def test_a_worker_that_stops_does_not_wait_for_a_gateway_that_is_not_there() -> None:
    sinks = TokenSinks(WORKER, SECRET)
    sinks.connect({GATEWAY: "127.0.0.1:1"})
    sinks.deliver(GATEWAY, output(0))
    async with asyncio.timeout(WAIT_S):
        await asyncio.to_thread(sinks.close, 0.1)


async def test_a_message_that_breaks_the_gateway_is_said_and_taken_once(
    sinks: TokenSinks, caplog: pytest.LogCaptureFixture
) -> None:
    taker = Taker()
    taker.breaks_at = 1
    async with listening(taker) as (_, address):
        sinks.connect({GATEWAY: address})
        for i in range(3):
            sinks.deliver(GATEWAY, output(i))
        await taker.until(lambda: len(taker.outputs) == 3)
        assert taker.positions == [0, 1, 2]
        assert taker.lost == [WORKER]
        assert "a message of worker decode-0#1 could not be taken" in caplog.text


async def test_nothing_more_comes_of_a_worker_that_was_forgotten(sinks: TokenSinks) -> None:
    taker = Taker()
    async with listening(taker) as (listener, address):
        sinks.connect({GATEWAY: address})
        for i in range(100):
            sinks.deliver(GATEWAY, output(i))
        await taker.until(lambda: len(taker.outputs) == 100)
        listener.forget(WORKER)
        listener.forget(WORKER)
        sinks.deliver(GATEWAY, output(100))
        # It is no worker of this gateway's any more: it begins anew, and what it no longer has counts as lost.
        await taker.until(lambda: taker.positions[-1] == 100)
        assert taker.lost == [WORKER]
