"""A server in a process of its own, an honest client that trains all the while, and those who mean harm."""

import base64
import os
import random
import selectors
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from conftest import make_model
from mutation import Mutator
from ports import free_port

from edge_client import EdgeClient
from edge_client.enrolment import store
from edge_client.generation import process_memory
from gpu_server.door import enrolments_of, invite
from protocol import (
    PIECE_BYTES,
    ActivationGradient,
    Activations,
    AdapterGradient,
    AskPart,
    AskPiece,
    EdgeAdapter,
    Failure,
    Goodbye,
    Hello,
    HiddenGradient,
    HiddenStates,
    Join,
    Message,
    Part,
    Ping,
    Seconds,
    Start,
    decode,
    encode,
    zstd,
)
from protocol.invitation import Invitation
from protocol.settings import ABILITIES
from split_model import PretrainedModel

SECONDS = 60.0  # after which whoever waits is wrong
HANDSHAKE_SECONDS = 2.0
STEP_DEADLINE = 3.0
MAX_PAGES = 16
MOST_TIMES = 6
MOST_GROWTH = 10_000_000  # bytes, by an attack that is repeated
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
WIDTH = 32
PATCH = "base_model.model.transformer.h.0.attn.c_attn.lora_"
ENDED = (ConnectionError, EOFError, ssl.SSLError)

Attack = Callable[["Siege", int], "Counter[str]"]


class RawClient:
    """
    A WebSocket connection that keeps to no rules but those it is told to, and reads only when asked.

    Args:
        invitation: whose secret is used; None has none. Without a pin the server speaks plain ws.
        asks: what it says in HTTP, if that is not a device's request.
    """

    def __init__(
        self,
        port: int,
        invitation: Invitation | None,
        *,
        encrypted: bool = True,
        read_buffer: int | None = None,
        asks: bytes | None = None,
    ) -> None:
        self._plain = socket.socket()
        if read_buffer is not None:
            self._plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read_buffer)
        self._plain.settimeout(SECONDS)
        self.socket = self._plain
        try:
            self._plain.connect(("127.0.0.1", port))
            if encrypted:
                self.socket = trusting().wrap_socket(self._plain)
            self.status = self._upgrade(request(invitation) if asks is None else asks)
            """Of HTTP; 101 opens the WebSocket."""
        except BaseException:
            self.close()
            raise

    def _upgrade(self, asks: bytes) -> int:
        self.socket.sendall(asks)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self._read(1)
        return int(head.split()[1])

    def say(self, message: Message | bytes) -> None:
        self.send(frame_header(BINARY, message if isinstance(message, bytes) else encode(message)))

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def hear(self) -> Message:
        """
        The next message.

        Raises:
            ConnectionError, EOFError: the server has closed the connection.
        """
        while True:
            first, length = self._read(2)
            if length > 125:
                length = int.from_bytes(self._read(2 if length == 126 else 8), "big")
            payload = self._read(length)
            if first & 15 == BINARY:
                return decode(payload, 2**26)
            if first & 15 == CLOSE:
                raise EOFError("closed")

    def end(self, *data: bytes) -> str:
        """What becomes of a connection that the server has to end after this: "refused" with a reason, or "cut off"."""
        try:
            for part in data:
                self.send(part)
            while not isinstance(self.hear(), Failure):
                pass
        except ENDED:
            return "cut off"
        return "refused"

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise EOFError("closed")
            data += part
        return data

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up, without a goodbye."""
        self.socket.close()
        self._plain.close()


def trusting() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def request(invitation: Invitation | None) -> bytes:
    lines = [] if invitation is None else [f"Authorization: Basic {in_base64(':'.join(invitation.credentials).encode())}"]
    return opening("/", *lines)


def opening(target: str, *lines: str, host: str = "x") -> bytes:
    """A request for a WebSocket."""
    first = [f"GET {target} HTTP/1.1", f"Host: {host}", "Upgrade: websocket", "Connection: Upgrade"]
    key = ["Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {in_base64(bytes(16))}"]
    return "\r\n".join([*first, *key, *lines, "", ""]).encode()


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def frame_header(opcode: int, payload: bytes, *, claims: int | None = None, last: bool = True) -> bytes:
    """A frame, masked with zeros, whose header may claim another length than it has."""
    length = len(payload) if claims is None else claims
    first = opcode | (0x80 if last else 0)
    if length < 126:
        head = struct.pack("!BB", first, 0x80 | length)
    elif length < 2**16:
        head = struct.pack("!BBH", first, 0x80 | 126, length)
    else:
        head = struct.pack("!BBQ", first, 0x80 | 127, length)
    return head + bytes(4) + payload


class HonestClient:
    """Trains in a thread, and counts."""

    def __init__(self, client: EdgeClient) -> None:
        self.steps = 0
        self._moved = threading.Condition()
        self._client = client
        self._thread = threading.Thread(target=self._train, name="honest", daemon=True)
        self._thread.start()

    def _train(self) -> None:
        try:
            with self._client as client:
                for _ in client.train():
                    with self._moved:
                        self.steps += 1
                        self._moved.notify_all()
        except ConnectionError:
            pass  # the siege is over

    def goes_on(self, steps: int = 3) -> None:
        """So many steps more."""
        with self._moved:
            wanted = self.steps + steps
            assert self._moved.wait_for(lambda: self.steps >= wanted, SECONDS), "the honest client's steps do not go on"

    def join(self) -> None:
        self._thread.join(SECONDS)


class ServerProcess:
    """``splitlora-server serve`` with these flags; everything it says is kept."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "gpu_server", "serve", *flags]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                with self._news:
                    self.said.append(line)
                    self._news.notify_all()

    def wait_for(self, words: str) -> None:
        """Until it has said them."""
        with self._news:
            if not self._news.wait_for(lambda: any(words in line for line in self.said), SECONDS):
                raise AssertionError(f"the server has not said {words!r}: {''.join(self.said)}")

    def resident(self) -> int:
        """Bytes."""
        found = process_memory("VmRSS", self._process.pid)
        assert found is not None
        return found

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))

    def stop(self) -> int:
        """By SIGTERM; its exit status."""
        self._process.terminate()
        try:
            return self._process.wait(SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()


@dataclass(frozen=True)
class Suffered:
    """What came of an attack."""

    counts: "Counter[str]"
    honest_steps: int
    """That the honest client has taken meanwhile."""
    grown: list[int]
    """Bytes that the server took more, by the first time and by the second."""


@dataclass
class Siege:
    """What is attacked, and by whom."""

    server: ServerProcess
    honest: HonestClient
    port: int
    mallory: Invitation
    """Of an enrolled client that means harm."""
    fingerprint: str
    page_token: str
    draw: random.Random
    labels: str
    """Who has them, "server" or "device"."""
    resident: int = 0
    """Bytes that the server used before anything happened."""
    open_files: int = 0

    def suffer(self, attack: Attack, amount: int) -> Suffered:
        """
        The attack at least twice, each time so much of it: what it makes a server allocate once, and its allocator and kernels
        keep, is there after the first times, and a leak grows at the last as at the first. The honest client goes on.

        Raises:
            AssertionError: the server has grown at every time.
        """
        steps, counts, grown = self.honest.steps, Counter[str](), list[int]()
        while len(grown) < 2 or (grown[-1] >= MOST_GROWTH and len(grown) < MOST_TIMES):
            before = self.server.resident()
            counts += attack(self, amount)
            self.honest.goes_on()
            grown.append(self.server.resident() - before)
        assert grown[-1] < MOST_GROWTH, grown
        return Suffered(counts, self.honest.steps - steps, grown)

    def stranger(self) -> RawClient:
        """Enrolled, and connected; it has said nothing."""
        return RawClient(self.port, self.mallory)

    @contextmanager
    def welcomed(self) -> Iterator[RawClient]:
        """Mallory without a model, who may ask for her part of it."""
        while True:
            with self.stranger() as client:
                if not self._let_in(client, ""):
                    continue
                yield client
                return

    def _let_in(self, client: RawClient, fingerprint: str) -> bool:
        """Whether Mallory is welcome: she is not while her last connection is not forgotten yet."""
        abilities = ABILITIES if self.labels == "device" else ()
        client.say(Hello(name=self.mallory.name, fingerprint=fingerprint, abilities=abilities))
        answer = client.hear()
        assert not isinstance(answer, Failure) or answer.retry_after, answer.reason
        return not isinstance(answer, Failure)

    def part(self) -> Part:
        """What the server hands over."""
        with self.welcomed() as client:
            client.say(AskPart(index=1))
            part = client.hear()
            assert isinstance(part, Part)
            return part

    @contextmanager
    def member(self, **options: Any) -> Iterator[tuple[RawClient, int]]:
        """Mallory in the run, with batches of 2 x 4 rows; and the step after which she goes on."""
        while True:
            with RawClient(self.port, self.mallory, **options) as client:
                if not self._let_in(client, self.fingerprint):
                    continue
                client.say(Join(num_samples=4, batch_size=2, longest=4))
                start = client.hear()
                assert isinstance(start, Start)
                yield client, start.step
                return


@contextmanager
def besieged(folder: Path, seed: int, labels: str = "server") -> Iterator[Siege]:
    """A guarded server, encrypted, of a run for two clients that goes on with one."""
    model = make_model(folder)
    run_dir, port = folder / "run", free_port()
    enrolments = enrolments_of(str(run_dir), None)
    honest, mallory = (invite(enrolments, name, address=f"127.0.0.1:{port}") for name in ("honest", "mallory"))
    store(folder / "state", honest)
    data = folder / "honest.txt"
    data.write_text("".join(f"n{number}||{'abc ' * (number % 5 + 1)}\n" for number in range(20)))
    flags = [
        f"--model={model}",
        f"--run-dir={run_dir}",
        f"--port={port}",
        f"--step-deadline={STEP_DEADLINE}",
        f"--handshake-seconds={HANDSHAKE_SECONDS}",
        *["--host=0.0.0.0", "--clients=2", "--quorum=1", "--steps=1000000", "--checkpoint-every=100", "--micro-batches=1"],
        *["--cut-layer=1", "--lora-rank=2", "--device=cpu", "--dtype=float32", f"--labels={labels}"],
        *["--page-token", f"--max-pages={MAX_PAGES}"],
    ]
    with ExitStack() as stack:
        server = ServerProcess(*flags)
        stack.callback(server.stop)
        server.wait_for("listening on wss://")
        client = EdgeClient(
            honest.url, engine="torch", model=str(model), data=data, batch_size=2, state_dir=folder / "state", give_up_after=1.0
        )
        draw, fingerprint = random.Random(seed), PretrainedModel(model).fingerprint()
        token = (run_dir / "page-token").read_text().strip()
        siege = Siege(server, HonestClient(client), port, mallory, fingerprint, token, draw, labels)
        with siege.member() as (first, _):
            first.say(Goodbye())
        siege.part()  # it is made
        siege.honest.goes_on(20)
        siege.resident, siege.open_files = server.resident(), server.open_files()
        yield siege
    siege.honest.join()


# What frames can do

THE_END = frame_header(BINARY, encode(Start(step=0, total_steps=0, adapter={})))  # is never a client's to say


def frames_of_a_stranger(siege: Siege, amount: int) -> "Counter[str]":
    """Mutated and random frames, each the first of its connection."""
    counts: Counter[str] = Counter()
    mutator = Mutator(siege.draw.getrandbits(32))
    for _ in range(amount):
        _, frame = mutator.frame()
        with siege.stranger() as client:
            counts[client.end(frame_header(BINARY, frame), THE_END)] += 1
    return counts


def frames_of_a_member(siege: Siege, amount: int) -> "Counter[str]":
    """The same, in the middle of a run."""
    counts: Counter[str] = Counter()
    mutator = Mutator(siege.draw.getrandbits(32))
    for _ in range(amount):
        _, frame = mutator.frame()
        with siege.member() as (client, _):
            counts[client.end(frame_header(BINARY, frame), THE_END)] += 1
    return counts


def bombs(siege: Siege, amount: int) -> "Counter[str]":
    """Small frames that would be large, from a stranger and from a member."""
    counts: Counter[str] = Counter()
    for _ in range(amount):
        for frame in BOMBS:
            for open_client in (siege.stranger, None):
                with ExitStack() as stack:
                    client = stack.enter_context(open_client() if open_client else siege.member())  # type: ignore[arg-type]
                    client = client if isinstance(client, RawClient) else client[0]
                    counts[client.end(frame_header(BINARY, frame))] += 1
    return counts


def announcing(frame: bytes, size: int) -> bytes:
    """A zstd frame with another size in its header, of eight bytes."""
    # RFC 8878, 3.1.1: a descriptor, whose first two bits say how many bytes the size takes; a window where it is not one
    # segment; the size; blocks.
    descriptor, single = frame[4], frame[4] >> 5 & 1
    blocks = 6 - single + (single, 2, 4, 8)[descriptor >> 6]
    return frame[:4] + bytes([descriptor | 0b11000000]) + frame[5 : 6 - single] + struct.pack("<Q", size) + frame[blocks:]


_MILLIONS = zstd.compress(bytes(2**26))
BOMBS = [
    _MILLIONS,
    announcing(_MILLIONS, 100),
    announcing(_MILLIONS, 2**16),
    *(announcing(zstd.compress(b"x"), size) for size in (2**63, 2**63 - 1, 2**64 - 1, 2**32)),
    *(zstd.compress(opening * 60_000) for opening in (b"\x91", b"\x81", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff")),
    *(zstd.compress(header + b"\xff" * 4) for header in (b"\xdd", b"\xdf", b"\xc6", b"\xc9", b"\xdb")),
    zstd.compress(msgpack.packb([2, "Activations", {"values": msgpack.ExtType(1, b"\x93\xa7float32\xdd\xff\xff\xff\xff")}])),
    zstd.compress(
        msgpack.packb([2, "Start", {"adapter": {"x": msgpack.ExtType(1, msgpack.packb(["float32", [2**63, 2**63], b""]))}}])
    ),
    zstd.compress(msgpack.packb([[]] * 60_000)),
]


def wrong_frames(siege: Siege, amount: int) -> "Counter[str]":
    """Against the WebSocket protocol itself."""
    wrong = [
        frame_header(BINARY, b"", claims=2**63 - 1),
        frame_header(BINARY, b"", claims=2**63),
        frame_header(BINARY, b"", claims=2**40),
        frame_header(TEXT, b"\xff\xfe"),
        frame_header(PING, b"", claims=2**20),
        frame_header(PING, b"", last=False),
        frame_header(0, b"goes on"),
        frame_header(3, b"reserved"),
        frame_header(BINARY | 0x40, b"reserved"),
        frame_header(CLOSE, b"\x00\x01"),
        struct.pack("!BB", 0x82, 1) + b"x",  # not masked
        frame_header(BINARY, b"x", last=False) + frame_header(0, b"x", last=False) * 5_000,
        frame_header(BINARY, b"", last=False) + frame_header(0, b"", last=False) * 5_000,  # no byte of a message, ever
        frame_header(BINARY, b"x" * 60_000, last=False) * 3,
    ]
    counts: Counter[str] = Counter()
    for _ in range(amount):
        for frame in wrong:
            with siege.stranger() as client:
                counts[client.end(frame)] += 1
    return counts


# What the order of messages can do


def replays(siege: Siege, amount: int) -> "Counter[str]":
    """A member that repeats what it has said, at once and later, and says things before their time."""
    counts: Counter[str] = Counter()
    for _ in range(amount):
        with siege.member() as (client, step):
            batch, gradient = encode(a_batch(step + 1)), encode(a_gradient(step + 1))
            client.say(batch)
            client.say(batch)
            counts["asked twice, answered once"] += isinstance(client.hear(), ActivationGradient)
            client.say(gradient)
            client.say(gradient)
            counts["asked twice, answered once"] += isinstance(client.hear(), EdgeAdapter)
            client.say(batch)
            counts["told where the run is"] += isinstance(client.hear(), Start)
            client.say(gradient)
            counts["given the kept answer"] += isinstance(client.hear(), EdgeAdapter)
            client.say(a_gradient(step + 2))
            counts[client.end()] += 1
    return counts


def a_batch(step: int) -> Activations:
    lengths, label_counts, labels = (np.array(values, np.int32) for values in ([4, 3], [2, 1], [1, 2, 3]))
    values = np.random.default_rng(step).standard_normal((7, WIDTH)).astype(np.float32)
    return Activations(step=step, seconds=Seconds(), lengths=lengths, label_counts=label_counts, labels=labels, values=values)


def replies(siege: Siege, amount: int) -> "Counter[str]":
    """A member that keeps its labels: what it replies when it is asked back, unasked, twice, and wrong in every way."""
    counts: Counter[str] = Counter()
    for _ in range(amount):
        with siege.member() as (client, step):
            states = asked_back(client, step + 1)
        with siege.member() as (client, step):
            again = asked_back(client, step + 1)
            counts["asked back again"] += states.step != again.step or states.values.tobytes() == again.values.tobytes()
            reply = encode(a_reply(again))
            client.say(reply)
            client.say(reply)
            counts["replied twice, answered once"] += isinstance(client.hear(), ActivationGradient)
            counts[client.end(frame_header(BINARY, encode(a_reply(again, micro_batch=1))))] += 1
        for change in WRONG_REPLIES:
            with siege.member() as (client, step):
                states = asked_back(client, step + 1)
                counts[client.end(frame_header(BINARY, change(states)))] += 1
        for batch in (a_batch, lambda step: a_reply(HiddenStates(step=step, values=np.zeros((3, WIDTH), np.float32)))):
            with siege.member() as (client, step):  # labels that nobody wants to know; a reply to nothing
                counts[client.end(frame_header(BINARY, encode(batch(step + 1))))] += 1
    return counts


def asked_back(client: RawClient, step: int) -> HiddenStates:
    client.say(replace(a_batch(step), labels=np.empty(0, np.int32)))
    states = client.hear()
    assert isinstance(states, HiddenStates)
    assert states.values.shape == (3, WIDTH)
    return states


def a_reply(states: HiddenStates, **fields: Any) -> HiddenGradient:
    loss = {"summed_loss": 9.0, "labelled_tokens": len(states.values), "values": states.values * np.float32(0.01)}
    return HiddenGradient(**{"step": states.step, "micro_batch": 0, "seconds": Seconds(), **loss, **fields})


WRONG_REPLIES: list[Callable[[HiddenStates], bytes]] = [
    lambda states: encode(a_reply(states, labelled_tokens=2)),
    lambda states: encode(a_reply(states, values=states.values[:2], labelled_tokens=2)),
    lambda states: encode(a_reply(states, values=states.values[:, :-1])),
    lambda states: encode(a_reply(states, values=states.values.astype(np.float64))),
    lambda states: encode(a_reply(states, values=states.values + np.float32(1e30))),
    lambda states: encode(a_reply(states, values=states.values * np.float32("nan"))),
    lambda states: encode(a_reply(states, summed_loss=1e300)),
    lambda states: encode(a_reply(states, summed_loss=float("nan"))),
    lambda states: encode(a_reply(states, step=states.step + 1)),
    lambda states: encode(a_reply(states), "coarse"),
    lambda states: encode(a_gradient(states.step)),
]


def a_gradient(step: int) -> AdapterGradient:
    tensors = {f"{PATCH}A.weight": np.zeros((2, WIDTH), np.float32), f"{PATCH}B.weight": np.zeros((3 * WIDTH, 2), np.float32)}
    return AdapterGradient(step=step, seconds=Seconds(), tensors=tensors)


def greedy_for_the_part(siege: Siege, amount: int) -> "Counter[str]":
    """Who asks without end, for what there is not, at the wrong time, or for everything without reading any of it."""
    counts: Counter[str] = Counter()
    files = siege.part().files
    largest = max(files, key=lambda file: file.size)
    most = 2 * sum(-(-file.size // PIECE_BYTES) for file in files) + 100
    part, piece = AskPart(index=1), AskPiece(index=1, sha256=largest.sha256, offset=0)
    wrong = [
        AskPiece(index=1, sha256="0" * 64, offset=0),
        *(AskPiece(index=1, sha256=largest.sha256, offset=offset) for offset in (largest.size, 2**62, 2**63 - 1)),
    ]
    for _ in range(amount):
        for questions in ([part], [piece], [part, piece]):
            with siege.welcomed() as client:
                answers = 0
                while True:
                    client.say(replace(questions[answers % len(questions)], index=answers + 1))
                    if isinstance(client.hear(), Failure):
                        break
                    answers += 1
                    assert answers < most
                counts["refused when it was enough"] += 1
        for question in wrong:
            with siege.welcomed() as client:
                counts[client.end(frame_header(BINARY, encode(question)))] += 1
        with siege.stranger() as client:
            counts[client.end(frame_header(BINARY, encode(part)))] += 1
        with siege.member() as (client, _):
            counts[client.end(frame_header(BINARY, encode(piece)))] += 1
        with siege.welcomed() as client:
            flood = b"".join(frame_header(BINARY, encode(replace(piece, index=number + 1))) for number in range(2_000))
            pump(client, flood)
            counts["stopped"] += 1
    return counts


# What connections can do


def silence(siege: Siege, amount: int) -> "Counter[str]":
    """Connections that say nothing, all at once, until the server has ended every one."""
    counts: Counter[str] = Counter()
    with ExitStack() as stack, selectors.DefaultSelector() as waiting:
        for _ in range(amount):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", siege.port), SECONDS))
            client.setblocking(False)
            waiting.register(client, selectors.EVENT_READ)
        siege.honest.goes_on()
        counts["ended"] = drop_ended(waiting, lambda: None)
    return counts


def slow_handshakes(siege: Siege, amount: int) -> "Counter[str]":
    """A byte at a time: of the TLS handshake, and of the HTTP request behind it. The server ends them when it is time."""
    hello = ssl.MemoryBIO()
    handshake = trusting().wrap_bio(ssl.MemoryBIO(), hello)
    try:
        handshake.do_handshake()
    except ssl.SSLWantReadError:
        pass
    greeting, asking = hello.read(), request(siege.mallory)[:-2]
    counts: Counter[str] = Counter()
    with ExitStack() as stack, selectors.DefaultSelector() as waiting:
        for number in range(amount):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", siege.port), SECONDS))
            if number % 2:
                client = stack.enter_context(trusting().wrap_socket(client))
                client.setblocking(False)
            waiting.register(client, selectors.EVENT_READ, iter(asking if number % 2 else greeting))

        def drip() -> None:
            for key in list(waiting.get_map().values()):
                byte = next(key.data, None)
                if byte is not None:
                    try:
                        key.fileobj.send(bytes([byte]))  # type: ignore[union-attr]
                    except (OSError, ValueError):
                        pass  # it is ended, as the selector will say

        counts["ended"] = drop_ended(waiting, drip)
    return counts


def drop_ended(waiting: selectors.BaseSelector, do: Callable[[], None]) -> int:
    """Wait until all of these connections are ended, doing something from time to time. How many were."""
    ended, until = 0, time.monotonic() + SECONDS
    while waiting.get_map():
        assert time.monotonic() < until, f"{len(waiting.get_map())} connections are still open"
        do()
        for key, _ in waiting.select(timeout=0.02):
            try:
                if key.fileobj.recv(2**16):  # type: ignore[union-attr]
                    continue  # tickets of TLS
            except (BlockingIOError, ssl.SSLWantReadError):
                continue
            except OSError:
                pass
            waiting.unregister(key.fileobj)
            ended += 1
    return ended


def secrets_of_others(siege: Siege, amount: int) -> "Counter[str]":
    """Names without their secrets."""
    counts: Counter[str] = Counter()
    for number in range(amount):
        secret = base64.urlsafe_b64encode(siege.draw.randbytes(32)).decode().rstrip("=")
        name = ("honest", "mallory", "nobody")[number % 3]
        invitation = Invitation(host="127.0.0.1", port=siege.port, name=name, secret=secret, pin=siege.mallory.pin)
        with RawClient(siege.port, invitation if number % 4 else None) as client:
            counts[f"HTTP {client.status}"] += 1
    return counts


def pumps(siege: Siege, amount: int) -> "Counter[str]":
    """Everything that is answered, as fast as can be and never reading: the server must stop reading, and buffer nothing."""
    counts: Counter[str] = Counter()
    pings, questions = frame_header(PING, b"x" * 125) * 500, b""
    for number in range(500):
        questions += frame_header(BINARY, encode(Ping(index=number + 1)))
    for number in range(amount):
        with ExitStack() as stack:
            if number % 2:
                client, data = stack.enter_context(siege.stranger()), questions
            else:
                (client, _), data = stack.enter_context(siege.member(read_buffer=2**14)), pings
            counts["MB taken"] += pump(client, data) // 10**6
            counts["stopped"] += 1
            siege.honest.goes_on()
    return counts


def pump(client: RawClient, data: bytes, most: int = 2**26) -> int:
    """Send until nothing has been taken for a second, or too much was. Bytes taken."""
    client.socket.setblocking(False)
    taken = 0
    with selectors.DefaultSelector() as waiting:
        waiting.register(client.socket, selectors.EVENT_WRITE)
        while taken < most:
            try:
                taken += client.socket.send(data)
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                if not waiting.select(timeout=1.0):
                    return taken
            except OSError:
                return taken  # it was cut off
    raise AssertionError(f"the server takes {most} bytes from somebody who never reads")


# What the page lets in


def odd_requests(siege: Siege, amount: int) -> "Counter[str]":
    """Of HTTP, from who has no token: no answer says anything of the run, and the server keeps nothing of them."""
    counts: Counter[str] = Counter()
    draw = siege.draw
    for _ in range(amount):
        method = draw.choice(["GET"] * 6 + ["HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "x" * 100])
        target = draw.choice(
            ["/", "/live", "/metrics", "/page-token", "/run.json", "/events.jsonl", "//", "/..", "/%2e%2e/", "*"]
        )
        target = draw.choice([target, target, f"http://x{target}", f"{target}/" + "y" * 7_000, f"{target}/../page-token", ""])
        wrong = [siege.page_token[:-1], siege.page_token.swapcase(), siege.mallory.secret, "", "%00", "x" * 4_000]
        given = draw.choice(wrong)
        target += draw.choice(["", f"?token={given}", f"?token={given}&token={given}", f"#{given}", f"?{given}"])
        lines = [f"{method} {target} HTTP/1.1", *draw.choice([["Host: x"], ["Host: 127.0.0.1"], ["Host: x", "Host: y"], []])]
        lines += draw.choice(
            [[], [f"Authorization: Bearer {given}"], [f"Authorization: Basic {given}"], ["Authorization: x"] * 2]
        )
        lines += draw.choice([[], ["Origin: https://x"], ["Origin: null"], ["Origin: https://evil.example"]])
        lines += draw.choice(
            [[], ["Upgrade: websocket", "Connection: Upgrade"], ["Upgrade: h2c"], ["Content-Length: 9", "", "z"]]
        )
        lines += draw.choice([[]] * 4 + [["X: " + "x" * 8_000] * 120, ["X: y"] * 1_000, ["X: " + "x" * 100_000], ["\0"]])
        try:
            with RawClient(siege.port, None, asks="\r\n".join([*lines, "", ""]).encode()) as client:
                counts[f"HTTP {client.status}"] += 1
        except ENDED:
            counts["cut off"] += 1
    return counts


def open_page(siege: Siege, **options: Any) -> RawClient:
    return RawClient(siege.port, None, asks=opening(f"/live?token={siege.page_token}"), **options)


def pages_that_speak(siege: Siege, amount: int) -> "Counter[str]":
    """Whoever may see the page says something: it is closed, whatever it was."""
    counts: Counter[str] = Counter()
    mutator = Mutator(siege.draw.getrandbits(32))
    hello = encode(Hello(name=siege.mallory.name, fingerprint=siege.fingerprint))
    for number in range(amount):
        said = (hello, b"", b"x" * 100_000, mutator.frame()[1])[number % 4]
        with open_page(siege) as page:
            if page.status != 101:  # the last pages are still being closed
                counts[f"HTTP {page.status}"] += 1
                continue
            try:
                page.send(frame_header((BINARY, TEXT)[number % 2], said))
                while True:
                    page.hear()
            except ENDED:
                counts["cut off"] += 1
    return counts


def pages_that_never_read(siege: Siege, amount: int) -> "Counter[str]":
    """As many as may be, and more; some say pings all the while. The steps of which all are told go on."""
    counts: Counter[str] = Counter()
    pings = frame_header(PING, b"x" * 125) * 500
    with ExitStack() as stack:
        for number in range(amount):
            page = stack.enter_context(open_page(siege, read_buffer=2**12))
            counts[f"HTTP {page.status}"] += 1
            if page.status == 101 and number % 10 == 0:
                pump(page, pings)
        siege.honest.goes_on(20)
        with siege.member():  # and devices find their places
            counts["a device is let in"] += 1
    return counts


@dataclass(frozen=True)
class Trial:
    """An attack, how much of it at a time in the tests and in the benchmark, and how it may end."""

    attack: Attack
    short: int
    long: int
    ends: set[str]


REFUSALS = (400, 401, 403, 404, 405, 414, 426, 431, 501, 505)
TRIALS = {
    "frames of a stranger": Trial(frames_of_a_stranger, 100, 2_500, {"refused", "cut off"}),
    "frames of a member": Trial(frames_of_a_member, 30, 1_000, {"refused", "cut off"}),
    "bombs": Trial(bombs, 1, 25, {"refused"}),
    "wrong frames": Trial(wrong_frames, 1, 50, {"cut off"}),
    "replays and reordering": Trial(
        replays, 3, 50, {"asked twice, answered once", "told where the run is", "given the kept answer", "refused"}
    ),
    "greedy for the part": Trial(greedy_for_the_part, 1, 25, {"refused", "refused when it was enough", "stopped"}),
    "silence": Trial(silence, 100, 1_000, {"ended"}),
    "slow handshakes": Trial(slow_handshakes, 30, 60, {"ended"}),
    "secrets of others": Trial(secrets_of_others, 50, 1_500, {"HTTP 401"}),
    "pumps that never read": Trial(pumps, 2, 10, {"stopped", "MB taken"}),
    "odd requests of HTTP": Trial(odd_requests, 80, 3_000, {*(f"HTTP {status}" for status in REFUSALS), "cut off"}),
    "pages that speak": Trial(pages_that_speak, 12, 400, {"cut off", "HTTP 503"}),
    "pages that never read": Trial(pages_that_never_read, 20, 60, {"HTTP 101", "HTTP 503", "a device is let in"}),
}
TRIALS_OF_LABELS_ON_DEVICE = {
    "replies": Trial(replies, 1, 25, {"asked back again", "replied twice, answered once", "refused"}),
    "frames of a member": Trial(frames_of_a_member, 15, 500, {"refused", "cut off"}),
}
"""Of a server whose clients keep their labels."""
