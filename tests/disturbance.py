"""A link that fails as links do, at the frames a plan names: a proxy between WebSocket clients and a server."""

import asyncio
import fcntl
import itertools
import random
import socket
import struct
import termios
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Direction = Literal["up", "down"]
Kind = Literal["cut", "cut after", "half cut", "duplicate", "delay", "half open", "slow"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
KINDS: tuple[Kind, ...] = get_args(Kind)

PIECES = 8  # of a slow frame
LARGEST_HEAD = 2**20
SWITCHING = b"HTTP/1.1 101 "
RESET_ON_CLOSE, END_ON_CLOSE = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)  # SO_LINGER: on for no seconds; off


@dataclass(frozen=True)
class Fault:
    """What happens to one data frame, or at it.

    Args:
        direction: "up" is from client to server, "down" from server to client.
        frame: its number from 1 among the data frames (opcodes 0, 1 and 2) of this direction over all connections of the
            link. websockets sends every message as one frame, so this is also the message's number. Frames that a fault
            before them on their connection keeps from their turn have none.
        kind: "cut" resets both sides instead of forwarding the frame; "cut after" when the receiver's system has it; "half
            cut" when it has the first half. "duplicate" forwards the frame twice, byte for byte. "delay" holds it and all
            behind it on its connection. "slow" forwards it in pieces. "half open" swallows it and everything after it, both
            ways, until the client closes or the time is over; then it resets both sides.
        seconds: how long a delay lasts, a slow frame takes, or a connection is half open.
    """

    direction: Direction
    frame: int
    kind: Kind
    seconds: float = 0.05

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS or self.kind not in KINDS or self.frame < 1:
            raise ValueError(f"{self} can never happen")


class Plan:
    """The faults of a link, at most one a frame."""

    def __init__(self, *faults: Fault) -> None:
        self.faults = faults
        self._by_frame = {(fault.direction, fault.frame): fault for fault in faults}
        if len(self._by_frame) < len(faults):
            raise ValueError(f"two faults at one frame in {self}")

    @classmethod
    def random(
        cls, seed: int, faults: int, frames: int, kinds: Sequence[Kind] = KINDS, seconds: float = Fault.seconds
    ) -> "Plan":
        """So many faults at different ones of the first ``frames`` frames of both directions; the same for the same seed."""
        draw = random.Random(seed)
        places = draw.sample(list(itertools.product(DIRECTIONS, range(1, frames + 1))), faults)
        return cls(*(Fault(*place, draw.choice(kinds), seconds) for place in places))

    def at(self, direction: Direction, frame: int) -> Fault | None:
        return self._by_frame.get((direction, frame))

    def __repr__(self) -> str:
        return f"Plan({', '.join(map(repr, self.faults))})"


class Broken(Exception):
    """From this frame on its connection does not go on."""

    def __init__(self, fault: Fault, frame: bytes, receiver: "Stream") -> None:
        super().__init__(fault)
        self.fault = fault
        self.frame = frame
        self.receiver = receiver


class Stream:
    """The socket to one side. However it is closed, this resets the connection, except by ``close``."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        # What was sent is then in the system's hands, which deliver it whatever happens here, a reset excepted.
        writer.transport.set_write_buffer_limits(0)
        self._on_close(RESET_ON_CLOSE)

    @classmethod
    async def open(cls, **where: Any) -> "Stream":
        return cls(*await asyncio.open_connection(limit=LARGEST_HEAD, **where))

    async def head(self) -> bytes:
        """The HTTP request or response."""
        return await self._reader.readuntil(b"\r\n\r\n")

    async def frame(self) -> bytes:
        """One frame of RFC 6455 with its header, payload as it is."""
        frame = b""
        try:
            frame = await self._reader.readexactly(2)
            length = frame[1] & 0x7F
            if length > 125:
                extended = await self._reader.readexactly(2 if length == 126 else 8)
                frame += extended
                length = int.from_bytes(extended, "big")
            mask = 4 if frame[1] & 0x80 else 0
            return frame + await self._reader.readexactly(mask + length)
        except asyncio.IncompleteReadError as end:
            raise asyncio.IncompleteReadError(frame + end.partial, None) from None

    async def some(self) -> bytes:
        """Whatever comes next; nothing at the end."""
        return await self._reader.read(2**16)

    async def discard(self) -> None:
        """Read to the end."""
        while await self.some():
            pass

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def send_end(self, rest: bytes) -> None:
        await self.send(rest)
        self._writer.write_eof()

    async def arrival(self) -> None:
        """Until the receiver's system has all that was sent, which a reset would take back."""
        # No event tells of acknowledgements. A receiver that is gone, or has stopped reading, never sends them: wait a second.
        for _ in range(1000):
            if self._writer.is_closing() or not self._unacknowledged():
                return
            await asyncio.sleep(0.001)

    def _unacknowledged(self) -> int:
        number = fcntl.ioctl(self._writer.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(number, "little")

    def _on_close(self, linger: bytes) -> None:
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def close(self) -> None:
        if not self._writer.is_closing():
            self._on_close(END_ON_CLOSE)
            self._writer.close()

    def reset(self) -> None:
        """At once; nothing happens to a stream that is closed."""
        self._writer.transport.abort()

    async def closed(self) -> None:
        try:
            await self._writer.wait_closed()
        except OSError:
            pass  # also a reset stream is closed


class Link:
    """A proxy before 127.0.0.1:target_port that carries out a plan; ws only, for TLS hides the frames.

    It looks for the target anew for each connection. While there is none, connections are reset.

    Attributes:
        port: where clients connect, as long as the link lives.
        url: the same as a WebSocket address.
        faults: how often each kind of fault has happened; counted just before it shows.
        frames: how many data frames have had their turn, by direction.
    """

    def __init__(self, target_port: int, plan: Plan) -> None:
        self.faults: Counter[str] = Counter()
        self.frames: Counter[str] = Counter()
        self._target = target_port
        self._plan = plan
        self._tasks: list[asyncio.Task[None]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self.url = f"ws://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=f"link to {target_port}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Reset what is connected, and wait until every socket is closed."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()

    def __enter__(self) -> "Link":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            with self._listener:
                self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._loop.add_reader(self._listener, self._accept)
        await self._closing.wait()
        self._loop.remove_reader(self._listener)
        for outcome in await stop(*self._tasks):
            # A connection that ends in an error shows a defect of ours; pytest reports errors of threads.
            if isinstance(outcome, Exception):
                raise outcome

    def _accept(self) -> None:
        try:
            near, _ = self._listener.accept()
        except OSError:
            return  # the client has thought better of it
        # Streams do both themselves, but the link may close before there is one.
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        task = self._loop.create_task(self._connect(near))
        task.add_done_callback(lambda _: near.close())
        self._tasks.append(task)

    async def _connect(self, near_socket: socket.socket) -> None:
        """One connection, from its beginning to its end."""
        near = await Stream.open(sock=near_socket)
        streams = [near]
        try:
            far = await Stream.open(host="127.0.0.1", port=self._target)
            streams.append(far)
            await self._carry(near, far)
            for stream in streams:
                stream.close()
        except OSError:
            pass  # where one side is gone, the other goes too
        finally:
            for stream in streams:
                stream.reset()
            for stream in streams:
                await stream.closed()

    async def _carry(self, near: Stream, far: Stream) -> None:
        """Forward in both directions until both have ended or a fault ends them."""
        pumps = [asyncio.ensure_future(self._forward("up", near, far)), asyncio.ensure_future(self._forward("down", far, near))]
        try:
            await asyncio.gather(*pumps)
        except Broken as broken:
            # Before the last frame goes out: nobody hears an answer to it.
            await stop(*pumps)
            await self._break(broken, near, far)
        finally:
            await stop(*pumps)

    async def _forward(self, direction: Direction, source: Stream, sink: Stream) -> None:
        """Until the source ends, be it within a frame; the sink hears of the end."""
        rest = b""
        try:
            head = await source.head()
            await sink.send(head)
            if direction == "up" or head.startswith(SWITCHING):
                while True:
                    await self._pass_on(direction, await source.frame(), sink)
            while text_of_refusal := await source.some():
                await sink.send(text_of_refusal)
        except asyncio.IncompleteReadError as end:
            rest = end.partial
        await sink.send_end(rest)

    async def _pass_on(self, direction: Direction, frame: bytes, sink: Stream) -> None:
        fault = None
        if frame[0] & 0x0F <= 2:
            self.frames[direction] += 1
            fault = self._plan.at(direction, self.frames[direction])
        if fault is None:
            await sink.send(frame)
        else:
            self.faults[fault.kind] += 1
            await self._disturb(fault, frame, sink)

    async def _disturb(self, fault: Fault, frame: bytes, sink: Stream) -> None:
        if fault.kind == "duplicate":
            await sink.send(frame + frame)
        elif fault.kind == "delay":
            await asyncio.sleep(fault.seconds)
            await sink.send(frame)
        elif fault.kind == "slow":
            size = -(-len(frame) // PIECES)
            pieces = [frame[start : start + size] for start in range(0, len(frame), size)]
            for piece in pieces:
                await asyncio.sleep(fault.seconds / len(pieces))
                await sink.send(piece)
        else:
            raise Broken(fault, frame, sink)

    async def _break(self, broken: Broken, near: Stream, far: Stream) -> None:
        """What still happens before both sides are reset, and the reset."""
        if broken.fault.kind == "half open":
            swallowing = [asyncio.ensure_future(near.discard()), asyncio.ensure_future(far.discard())]
            try:
                await asyncio.wait(swallowing[:1], timeout=broken.fault.seconds)
            finally:
                await stop(*swallowing)
        else:
            forwarded = {"cut": 0, "half cut": len(broken.frame) // 2, "cut after": len(broken.frame)}[broken.fault.kind]
            await broken.receiver.send(broken.frame[:forwarded])
            await broken.receiver.arrival()
        near.reset()
        far.reset()


async def stop(*tasks: "asyncio.Future[None]") -> list[BaseException | None]:
    """Cancel what is not done; how each ended."""
    for task in tasks:
        task.cancel()
    return await asyncio.gather(*tasks, return_exceptions=True)
