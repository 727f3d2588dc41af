"""
A link as devices have it: a proxy that bounds bandwidth, delays, jitters and stalls what goes through it.

The proxy is a process of its own on loopback; what it costs is not taken from the interpreters that are measured. Each
direction has its own bandwidth, which all connections of a link share. The delay is given as a round trip, half of it each
way. Within the proxy are at most the bytes of a round trip and a queue of 64 kB; then the sender waits, as behind a modem.

TCP hides loss: what a proxy can show of it is what it does to a stream. A lost segment of 1,460 bytes arrives a round trip
later, when it has been sent again, and all that is behind it waits. That TCP would also send more slowly for a while is not
modelled, nor is the round trip that opening a connection takes.
"""

import asyncio
import multiprocessing
import random
import selectors
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from disturbance import END_ON_CLOSE, RESET_ON_CLOSE, stop

__all__ = ["LINKS", "PROCESSES", "LinkProfile", "ShapedLink"]

PROCESSES = multiprocessing.get_context("forkserver")

SEGMENT = 1460  # bytes of a TCP segment on Ethernet
QUEUE = 64_000  # bytes that wait at the entrance of a link
SMALLEST_PIECE, LARGEST_PIECE, SECONDS_OF_A_PIECE = SEGMENT, 2**16, 0.0005
SMALLEST_SOCKET_BUFFER, PIECES_IN_A_SOCKET_BUFFER = 2**16, 4
SECONDS_OF_A_BUCKET = 0.001
BYTES_UP, BYTES_DOWN, STALLS = range(3)  # of the figures that a link's process shares


@dataclass(frozen=True, kw_only=True)
class LinkProfile:
    """
    Raises:
        ValueError: no link has such figures.
    """

    up: float
    """Bits a second from client to server."""
    down: float
    """Bits a second from server to client."""
    round_trip: float
    """Seconds that a byte and the answer to it are on the way."""
    jitter: float = 0.0
    """Seconds that a segment may come later, each way, drawn evenly from 0 on; none overtakes another."""
    loss: float = 0.0
    """Probability that a segment is lost once."""

    def __post_init__(self) -> None:
        if not (self.up > 0 and self.down > 0):
            raise ValueError(f"a link carries more than 0 bits a second, got up {self.up} and down {self.down}")
        if not (self.round_trip >= 0 and self.jitter >= 0):
            raise ValueError(f"delays are 0 seconds or more, got round_trip {self.round_trip} and jitter {self.jitter}")
        if not 0 <= self.loss < 1:
            raise ValueError(f"loss is a probability below 1, got {self.loss}")


LINKS = {
    # Of all of them both directions are alike. 3G is often faster downwards: a split run, which sends as much down as up, gains
    # less than half of its time from that.
    "3g": LinkProfile(up=1.5e6, down=1.5e6, round_trip=0.150),
    "4g": LinkProfile(up=12e6, down=12e6, round_trip=0.050),
    "wifi": LinkProfile(up=100e6, down=100e6, round_trip=0.005),
    "lan": LinkProfile(up=1e9, down=1e9, round_trip=0.0005),
}


class Bucket:
    """The bandwidth of one direction: a token bucket that is as large as what is sent in a millisecond."""

    def __init__(self, bits_a_second: float) -> None:
        self.bytes_a_second = bits_a_second / 8
        self.piece = min(LARGEST_PIECE, max(SMALLEST_PIECE, int(self.bytes_a_second * SECONDS_OF_A_PIECE)))
        self._free_at = 0.0

    def sent_at(self, num_bytes: int, now: float) -> float:
        """When so many bytes, that come to the link now, are on their way."""
        # The millisecond makes up for what this process oversleeps; a link that carries nothing saves no more than that.
        self._free_at = max(self._free_at, now - SECONDS_OF_A_BUCKET) + num_bytes / self.bytes_a_second
        return max(self._free_at, now)


class Weather:
    """
    What happens to the segments of a stream besides their journey: a function of the seed and of a byte's place in the
    stream, in however many pieces it comes.
    """

    def __init__(self, profile: LinkProfile, seed: str) -> None:
        self._profile, self._random = profile, random.Random(seed)
        self._position = 0
        self._drawn = 0
        self._last = 0.0
        self.stalls = 0
        """How many segments have been lost so far."""

    def seconds_later(self, num_bytes: int) -> float:
        """How much later than without weather the next so many bytes arrive."""
        if not (self._profile.jitter or self._profile.loss):
            return 0.0
        latest = self._last if self._position < self._drawn * SEGMENT else 0.0  # a segment that began with the piece before
        self._position += num_bytes
        while self._drawn * SEGMENT < self._position:
            self._drawn += 1
            self._last = self._random.uniform(0.0, self._profile.jitter)
            if self._random.random() < self._profile.loss:
                self._last += self._profile.round_trip
                self.stalls += 1
            latest = max(latest, self._last)
        return latest


class Lane:
    """One direction of one connection."""

    def __init__(self, profile: LinkProfile, bucket: Bucket, seed: str, count: Callable[[int, int], None]) -> None:
        self._bucket, self._weather, self._count = bucket, Weather(profile, seed), count
        self._one_way = profile.round_trip / 2
        self._room = int(bucket.bytes_a_second * profile.round_trip) + QUEUE
        self._on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._has_room = asyncio.Event()
        self._has_room.set()

    async def carry(self, source: socket.socket, sink: socket.socket) -> None:
        """Until the source ends; the sink hears of the end when it would have arrived."""
        await together(self._take(source), self._deliver(sink))

    async def _take(self, source: socket.socket) -> None:
        loop, arrival = asyncio.get_running_loop(), 0.0
        while True:
            await self._has_room.wait()
            piece = await loop.sock_recv(source, self._bucket.piece)
            before = self._weather.stalls
            sent = self._bucket.sent_at(len(piece), loop.time())
            arrival = max(arrival, sent + self._one_way + self._weather.seconds_later(len(piece)))
            self._count(len(piece), self._weather.stalls - before)
            self._use_room(len(piece))
            self._on_the_way.put_nowait((arrival, piece))
            if not piece:
                return

    async def _deliver(self, sink: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            arrival, piece = await self._on_the_way.get()
            if (left := arrival - loop.time()) > 0:
                await asyncio.sleep(left)
            if not piece:
                sink.shutdown(socket.SHUT_WR)
                return
            await loop.sock_sendall(sink, piece)
            self._use_room(-len(piece))

    def _use_room(self, num_bytes: int) -> None:
        self._room -= num_bytes
        if self._room > 0:
            self._has_room.set()
        else:
            self._has_room.clear()


class ShapedLink:
    """
    A link to 127.0.0.1:target_port in a process of its own, from entering to leaving.

    It looks for the target anew for each connection. While there is none, connections are reset.

    Args:
        seed: of jitter and loss; the n-th connection has the same for the same seed.

    Attributes:
        port: where clients connect.
        url: the same as a WebSocket address.
    """

    def __init__(self, target_port: int, profile: LinkProfile, seed: int = 0) -> None:
        self._target, self._profile, self._seed = target_port, profile, seed

    def __enter__(self) -> "ShapedLink":
        self._figures = PROCESSES.RawArray("q", 3)
        self._pipe, there = PROCESSES.Pipe()
        arguments = (self._target, self._profile, self._seed, self._figures, there)
        self._process = PROCESSES.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        there.close()
        self.port = int(self._pipe.recv())
        self.url = f"ws://127.0.0.1:{self.port}"
        return self

    @property
    def bytes_up(self) -> int:
        """That have entered the link at the client's end."""
        return int(self._figures[BYTES_UP])

    @property
    def bytes_down(self) -> int:
        """That have entered it at the server's end."""
        return int(self._figures[BYTES_DOWN])

    @property
    def stalls(self) -> int:
        """How many segments were lost."""
        return int(self._figures[STALLS])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Reset what is connected, and wait for the end of the process."""
        self._pipe.close()
        self._process.join()


def serve(target_port: int, profile: LinkProfile, seed: int, figures: Any, pipe: Any) -> None:
    """A link's process; it ends when the other end of the pipe is closed, be it that its holder has died."""
    # epoll waits whole milliseconds, four times the delay of a LAN; select waits microseconds.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    try:
        loop.run_until_complete(Proxy(target_port, profile, seed, figures).serve(pipe))
    finally:
        loop.close()


class Proxy:
    """The listener of a link, and its connections."""

    def __init__(self, target_port: int, profile: LinkProfile, seed: int, figures: Any) -> None:
        self._target, self._profile, self._seed, self._figures = target_port, profile, seed, figures
        self._up, self._down = Bucket(profile.up), Bucket(profile.down)
        self._connections: list[asyncio.Task[None]] = []

    async def serve(self, pipe: Any) -> None:
        """Until ``pipe``, which is told the port, has an end."""
        loop, closing = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(pipe.fileno(), closing.set)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            prepare(listener, self._up.piece)
            accepting = loop.create_task(self._accept(listener))
            pipe.send(listener.getsockname()[1])
            await closing.wait()
            for outcome in await stop(accepting, *self._connections):
                # A connection that ends in an error shows a defect of ours.
                if isinstance(outcome, Exception):
                    raise outcome

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            near, _ = await loop.sock_accept(listener)
            self._connections.append(loop.create_task(self._connect(near, len(self._connections))))

    async def _connect(self, near: socket.socket, number: int) -> None:
        """One connection, from its beginning to its end."""
        with near, socket.socket() as far:
            prepare(near, self._up.piece)
            prepare(far, self._down.piece)
            up = self._lane(self._up, f"{self._seed} up {number}", BYTES_UP)
            down = self._lane(self._down, f"{self._seed} down {number}", BYTES_DOWN)
            try:
                await asyncio.get_running_loop().sock_connect(far, ("127.0.0.1", self._target))
                await together(up.carry(near, far), down.carry(far, near))
            except OSError:
                return  # where one side is gone, the other goes too
            for end in (near, far):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, END_ON_CLOSE)

    def _lane(self, bucket: Bucket, seed: str, figure: int) -> Lane:
        def count(num_bytes: int, stalls: int) -> None:
            self._figures[figure] += num_bytes
            self._figures[STALLS] += stalls

        return Lane(self._profile, bucket, seed, count)


def prepare(end: socket.socket, piece: int) -> None:
    """However its connection ends, but for a quiet end, it is reset; what the system takes in for it is bounded."""
    end.setblocking(False)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Left alone, the system takes in megabytes, and a sender is ahead by them.
    for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        end.setsockopt(socket.SOL_SOCKET, buffer, max(SMALLEST_SOCKET_BUFFER, PIECES_IN_A_SOCKET_BUFFER * piece))


async def together(*coroutines: Coroutine[Any, Any, None]) -> None:
    """All of them to their end; an error of one stops the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        await stop(*tasks)
