"""
What a server of many devices pays beside its arithmetic: for one that comes back, a ping, a finished step, a scrape, a page.

    python benchmarks/serving_cost.py --devices 100 1000 10000

Everything is in this process and real but for what is at its ends: connections are queues, nothing is computed, and of the
files only the line of a step is made. Given is processor time of all threads for one of each; and for what may hold up the
others, the longest that the thread of the event loop computed in one go.
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import harness
from usual_settings import settings
from websockets.exceptions import ConnectionClosedError

from gpu_server.door import Door
from gpu_server.federation import Federation, FinishStep, ModelLimits, StepRecord
from gpu_server.history import Overview, row_of, telling_to
from gpu_server.listener import Limits
from gpu_server.page.live import PageObserver
from gpu_server.page.snapshot import Snapshot
from gpu_server.prometheus import PrometheusObserver
from gpu_server.serving import EventRelay
from gpu_server.serving.conversation import Conversations
from gpu_server.serving.lifetime import Lifetime
from gpu_server.serving.peer import Peer
from gpu_server.serving.performer import Performer
from protocol import Hello, Join, Message, Ping, Seconds, encode

LIMITS = ModelLimits(fingerprint="f", width=4, vocabulary_size=9, num_positions=64, max_batch_tokens=999, edge_shapes={})
PARTS = tuple(vars(Seconds()))
STEPS_BEFORE = 20
"""As many as speeds are measured over."""
SECONDS_BETWEEN_TICKS = 0.001
LOST = object()


class Connection:
    """What a peer needs of one, without a socket."""

    enrolment = None
    username = None
    address = "192.0.2.1:40000"
    descriptor = -1
    bytes_up = bytes_down = 0

    def __init__(self) -> None:
        self._coming: asyncio.Queue[Any] = asyncio.Queue()
        self.answered = asyncio.Event()
        self.protocol = SimpleNamespace(max_message_size=0)
        nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
        self.transport = SimpleNamespace(set_write_buffer_limits=nothing, abort=nothing)

    async def ask(self, message: Message) -> None:
        self.answered.clear()
        self._coming.put_nowait(encode(message))
        await self.answered.wait()

    def lose(self) -> None:
        self._coming.put_nowait(LOST)

    async def recv(self) -> bytes:
        data = await self._coming.get()
        if data is LOST:
            raise ConnectionClosedError(None, None)
        self.bytes_up += len(data)
        return bytes(data)

    async def send(self, data: bytes) -> None:
        self.bytes_down += len(data)
        self.answered.set()

    async def close(self, *_: object) -> None:
        pass

    async def wait_closed(self) -> None:
        pass


class Page(Connection):
    """One that takes at once what it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self.transport = SimpleNamespace(get_write_buffer_size=lambda: 0, abort=lambda: None)


class Journal:
    """Makes what would be written, and writes nothing."""

    def __init__(self) -> None:
        self.line_bytes = 0

    def write_step(self, record: StepRecord) -> "Future[None]":
        self.line_bytes = len(json.dumps(row_of(record))) + 1
        return done()

    def write_event(self, *_: object) -> "Future[None]":
        return done()


def done() -> "Future[None]":
    future: Future[None] = Future()
    future.set_result(None)
    return future


class Server:
    """A run under way with so many devices, all connected."""

    def __init__(self, devices: int) -> None:
        self.names = [f"device-{number:05}" for number in range(devices)]
        self.federation = Federation("run", settings(clients=devices, epochs=None, steps=10**6), LIMITS, {})
        overview = Overview("run", devices)
        self.page = PageObserver(Snapshot(overview), lambda: self.federation.waits_for(time.monotonic()))
        self.prometheus = PrometheusObserver(self.page.overview, {"run": "run"}, devices)
        self.journal: Any = Journal()
        self.peers: dict[str, Peer] = {}
        self.relay = EventRelay(self.journal, [self.page, self.prometheus])
        loop = asyncio.get_running_loop()
        self.lifetime = Lifetime(loop, self.federation, self.peers, 0.0)
        nothing: Any = SimpleNamespace(round_end={})
        self.performer = Performer(
            self.federation,
            nothing,
            journal=self.journal,
            observers=[self.page, self.prometheus],
            peers=self.peers,
            lifetime=self.lifetime,
        )
        self.performer._checkpoint = lambda *_: None  # type: ignore[method-assign]
        self.performer._methods.update(
            {kind: lambda *_: None for kind in self.performer._methods if kind.__name__ == "Checkpoint"}
        )
        limits = Limits(connections=devices, strangers=9, handshake_seconds=9.0, messages_per_second=1e6, queue=9)
        admitting: Any = SimpleNamespace(admit=lambda _: None, freeze=lambda: None)
        self.conversations = Conversations(
            self.federation,
            self.performer,
            self.lifetime,
            peers=self.peers,
            door=Door(host="127.0.0.1", port=0, limits=limits),
            listener=admitting,
            model_name="",
            caches=None,
            edge_part=None,
        )
        self.numbers = itertools.count(1)

    async def come(self, name: str) -> tuple[Connection, "asyncio.Task[None]"]:
        connection: Any = Connection()
        talk = asyncio.create_task(self.conversations.converse(Peer(connection, max_messages_per_second=1e6)))
        await connection.ask(Hello(name=name, fingerprint="f"))
        return connection, asyncio.create_task(self._join(connection, talk))

    async def _join(self, connection: Connection, talk: "asyncio.Task[None]") -> None:
        await connection.ask(Join(num_samples=9, batch_size=4, longest=30))
        await talk

    def fill(self) -> None:
        """All devices at once, without their conversations."""
        join = Join(num_samples=9, batch_size=4, longest=30)
        roster = self.federation._roster
        for name in self.names[:-1]:
            roster.add(name, roster.newcomer(join))
            connection: Any = Connection()
            peer = self.peers[name] = Peer(connection, max_messages_per_second=1e6)
            peer.name, peer.has_joined = name, True
        self.federation._enter(self.federation.phase, 0.0)
        self.federation.welcome(Hello(name=self.names[-1], fingerprint="f"))
        self.federation.join(self.names[-1], join, time.monotonic())
        for name in self.names:
            self.page.event_happened(event("joined", name))
            self.prometheus.event_happened(event("joined", name))

    def record(self) -> StepRecord:
        number, names = next(self.numbers), self.names
        draw = random.Random(number)
        return StepRecord(
            number=number,
            loss=2.5,
            labelled_tokens=12 * len(names),
            tokens=30 * len(names),
            seconds={name: Seconds(**{part: draw.random() for part in PARTS}) for name in names},
            deadline=60.0,
            codec="int8",
            server_compute=0.1,
            time=time.time(),
            step_seconds=5.0,
            learning_rate=1e-3,
            gradient_norm=1.0,
            losses={name: draw.random() for name in names},
            labelled=dict.fromkeys(names, 12),
            samples=dict.fromkeys(names, 4),
            tokens_of=dict.fromkeys(names, 30),
        )


def event(kind: str, client: str) -> Any:
    from gpu_server.history import RunEvent

    return RunEvent(time=time.time(), kind=kind, text=f"{client} {kind}", client=client)


async def cost(work: Callable[[], Awaitable[object]], times: int) -> tuple[float, float]:
    """Milliseconds of processor for one, the median; and the longest that the event loop computed in one go."""
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            began = time.thread_time()
            await asyncio.sleep(SECONDS_BETWEEN_TICKS)
            longest = max(longest, time.thread_time() - began)

    ticking, taken = asyncio.create_task(tick()), []
    await asyncio.sleep(0.01)
    longest = 0.0
    for _ in range(times):
        began = time.process_time()
        await work()
        taken.append(time.process_time() - began)
    await asyncio.sleep(0.01)
    ticking.cancel()
    return 1000 * statistics.median(taken), 1000 * longest


async def measure(devices: int, times: int) -> list[object]:
    server = Server(devices)
    with telling_to(server.relay):
        server.relay.connect(server.lifetime)
        server.fill()
        for _ in range(STEPS_BEFORE):
            server.page.step_finished(replace(server.record(), bytes_up=dict.fromkeys(server.names, 1)))
        server.page._tell()
        one: Any = Connection()

        async def come_back() -> None:
            name = server.names[devices // 2]
            server.federation.disconnected(name, time.monotonic())
            server.peers.pop(name, None)
            connection: Any = Connection()
            talk = asyncio.create_task(server.conversations.converse(Peer(connection, max_messages_per_second=1e6)))
            await connection.ask(Hello(name=name, fingerprint="f"))
            await connection.ask(Join(num_samples=9, batch_size=4, longest=30))
            connection.lose()
            await talk

        async def ping() -> None:
            await one.ask(Ping(index=next(server.numbers)))

        async def step() -> None:
            server.performer._finish_step(FinishStep(record=server.record_made), {})  # type: ignore[attr-defined]
            assert server.performer._steps.last is not None
            await server.performer._steps.last
            server.page._news.clear()

        async def tell_page() -> None:
            server.page.step_finished(server.record_made)  # type: ignore[attr-defined]
            server.page._tell()

        async def scrape() -> None:
            text, _ = await asyncio.to_thread(server.prometheus.exposition())
            server.scraped = len(text)  # type: ignore[attr-defined]

        asking = asyncio.create_task(server.conversations.converse(Peer(one, max_messages_per_second=1e6)))
        rows = [await cost(come_back, 4 * times), await cost(ping, 4 * times)]
        one.lose()
        await asking
        server.record_made = server.record()  # type: ignore[attr-defined]
        rows.append(await cost(step, times))
        rows.append(await cost(tell_page, times))
        page: Any = Page()
        server.page.viewers._all[page] = SimpleNamespace(  # type: ignore[assignment]
            since=time.monotonic(), opened=time.monotonic(), taken=0, has_missed_something=False
        )
        sent = []
        tell = server.page.viewers.tell
        server.page.viewers.tell = lambda news: sent.append(len(news))  # type: ignore[method-assign, assignment]
        rows.append(await cost(tell_page, times))
        server.page.viewers.tell = tell  # type: ignore[method-assign]
        server.page.viewers._all.clear()
        rows.append(await cost(scrape, times))
        server.performer.close()
        if server.page._timer is not None:
            server.page._timer.cancel()
    figures = [f"{taken:.2f} ({kept:.0f})" for taken, kept in rows]
    sizes = [server.journal.line_bytes, sent[-1], server.scraped]  # type: ignore[attr-defined]
    return [devices, *figures, *(f"{size / 1e3:,.0f}" for size in sizes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    header = [
        "devices",
        "lost and back, ms",
        "ping",
        "finished step",
        "page told, nobody looks",
        "page told, one looks",
        "scrape",
    ]
    header += ["line of a step, kB", "page's news", "scrape's text"]
    rows = [asyncio.run(measure(devices, options.times)) for devices in options.devices]
    print(harness.markdown(header, rows))
    print("\nin brackets: the longest that the event loop computed in one go, ms")


if __name__ == "__main__":
    main()
