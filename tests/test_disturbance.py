"""The disturbed link does what its plan says and nothing else: otherwise the tests that use it prove nothing."""

import gc
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest
from disturbance import DIRECTIONS, KINDS, Direction, Fault, Kind, Link, Plan
from hypothesis import example, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.http11 import Request, Response
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import ServerConnection, serve

REQUEST = b"GET / HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"
REFUSAL = "by no means\n" * 100  # begins as a data frame does
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
CUTS: tuple[Kind, ...] = ("cut", "cut after", "half cut")

both_directions = pytest.mark.parametrize("direction", DIRECTIONS)


def make_frame(payload: bytes, *, opcode: int = BINARY, mask: bytes = b"") -> bytes:
    """As RFC 6455 writes it; the payload stays as it is, since the link does not look."""
    size = len(payload)
    marks = 0x80 if mask else 0
    if size < 126:
        length = bytes([marks | size])
    elif size < 2**16:
        length = bytes([marks | 126]) + size.to_bytes(2, "big")
    else:
        length = bytes([marks | 127]) + size.to_bytes(8, "big")
    return bytes([0x80 | opcode]) + length + mask + payload


A, B, C = (make_frame(letter * 40, mask=b"mask") for letter in (b"a", b"b", b"c"))


def receive(end: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer before the end."""
    data = b""
    while len(data) < size and (more := end.recv(size - len(data))):
        data += more
    return data


def receive_until_reset(end: socket.socket) -> bytes:
    """Everything there is; the test fails where it ends otherwise than in a reset."""
    data = b""
    try:
        while more := end.recv(2**16):
            data += more
    except ConnectionResetError:
        return data
    pytest.fail(f"ended in order after {len(data)} bytes")


@dataclass
class Ends:
    """Both ends of one connection through a link, upgraded, without a library that would do something of its own."""

    link: Link
    client: socket.socket
    server: socket.socket

    def sender(self, direction: Direction) -> socket.socket:
        return self.client if direction == "up" else self.server

    def receiver(self, direction: Direction) -> socket.socket:
        return self.server if direction == "up" else self.client


@contextmanager
def connected(*faults: Fault) -> Iterator[Ends]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        with (
            Link(listener.getsockname()[1], Plan(*faults)) as link,
            socket.create_connection(("127.0.0.1", link.port), timeout=10) as client,
            listener.accept()[0] as server,
        ):
            server.settimeout(10)
            client.sendall(REQUEST)
            assert receive(server, len(REQUEST)) == REQUEST
            server.sendall(SWITCH)
            assert receive(client, len(SWITCH)) == SWITCH
            yield Ends(link, client, server)


@contextmanager
def echo_server(port: int = 0) -> Iterator[int]:
    """Sends every message back, and refuses the path /no."""

    def refuse(connection: ServerConnection, request: Request) -> Response | None:
        return connection.respond(403, REFUSAL) if request.path == "/no" else None

    def echo(connection: ServerConnection) -> None:
        try:
            for message in connection:
                connection.send(message)
        except ConnectionClosedError:
            pass  # as these tests intend

    with serve(echo, "127.0.0.1", port, process_request=refuse, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.socket.getsockname()[1]
    thread.join()


def connect_to(link: Link) -> ClientConnection:
    return connect(link.url, max_size=None, open_timeout=10)


def open_files() -> set[str]:
    """What each descriptor stands for; every socket has a name of its own."""
    gc.collect()
    found = set()
    for number in os.listdir("/dev/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found.add(os.readlink(f"/dev/fd/{number}"))
    return found


def test_messages_of_every_length_of_header_pass_unchanged() -> None:
    with echo_server() as port, Link(port, Plan()) as link:
        with connect_to(link) as client:
            for size in (0, 1, 125, 126, 65535, 65536, 2**20):
                message = os.urandom(size)
                client.send(message)
                assert client.recv(timeout=10) == message
            client.send("text")
            assert client.recv(timeout=10) == "text"
        assert link.frames == {"up": 8, "down": 8}
        assert not link.faults


some_frames = st.lists(
    st.builds(
        lambda size, opcode, mask: make_frame(bytes(range(256)) * (size // 256) + bytes(size % 256), opcode=opcode, mask=mask),
        st.sampled_from([0, 1, 125, 126, 127, 4000, 65535, 65536, 70000]),
        st.sampled_from([CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG]),
        st.sampled_from([b"", b"mask"]),
    ),
    max_size=6,
)


@settings(max_examples=40)
@given(
    frames=some_frames,
    direction=st.sampled_from(DIRECTIONS),
    piece=st.sampled_from([50, 1000, 10**6]),
    lost=st.integers(0, 10),
)
@example(frames=[A, B, make_frame(bytes(300)), make_frame(bytes(70000))[:20]], direction="down", piece=1, lost=0)
def test_bytes_pass_unchanged_however_they_are_cut_into_packets_and_wherever_they_end(
    frames: list[bytes], direction: Direction, piece: int, lost: int
) -> None:
    data = b"".join(frames)
    data = data[: max(0, len(data) - lost)]
    with connected() as ends:
        sender = ends.sender(direction)

        def send() -> None:
            for start in range(0, len(data), piece):
                sender.sendall(data[start : start + piece])
            sender.shutdown(socket.SHUT_WR)

        writer = threading.Thread(target=send)
        writer.start()
        assert receive(ends.receiver(direction), len(data) + 1) == data
        writer.join()
        ends.receiver(direction).sendall(A)  # one direction has ended, the other goes on
        assert receive(sender, len(A)) == A


def test_refusal_of_the_upgrade_arrives_whole_and_counts_as_no_frame() -> None:
    with echo_server() as port, Link(port, Plan(Fault("down", 1, "cut"))) as link:
        with pytest.raises(InvalidStatus) as refused, connect(link.url + "/no"):
            pass
        assert refused.value.response.body == REFUSAL.encode()
        assert not link.frames


@both_directions
@pytest.mark.parametrize(("kind", "arrived"), [("cut", A), ("cut after", A + B), ("half cut", A + B[: len(B) // 2])])
def test_cut_resets_both_sides_and_takes_back_nothing_that_was_forwarded(
    direction: Direction, kind: Kind, arrived: bytes
) -> None:
    with connected(Fault(direction, 2, kind)) as ends:
        ends.sender(direction).sendall(A + B + C)
        assert receive_until_reset(ends.receiver(direction)) == arrived
        assert receive_until_reset(ends.sender(direction)) == b""
        assert ends.link.faults == {kind: 1}
        assert ends.link.frames == {direction: 2}


@pytest.mark.parametrize("kind", CUTS)
def test_cut_waits_until_a_slow_reader_has_the_frames_before_it(kind: Kind) -> None:
    # More than fits into the buffers of both systems: some of it is still with the link when the fault comes.
    large = make_frame(bytes(12 * 2**20))
    with connected(Fault("up", 2, kind)) as ends:
        writer = threading.Thread(target=ends.client.sendall, args=(large + A,))
        writer.start()
        forwarded = {"cut": 0, "half cut": len(A) // 2, "cut after": len(A)}[kind]
        assert receive_until_reset(ends.server) == large + A[:forwarded]
        writer.join()


@both_directions
def test_no_answer_to_the_frame_before_a_cut_comes_back(direction: Direction) -> None:
    with connected(Fault(direction, 1, "cut after")) as ends:
        ends.sender(direction).sendall(A)
        assert receive(ends.receiver(direction), len(A)) == A
        try:
            ends.receiver(direction).sendall(B)
        except OSError:
            pass  # the reset was faster
        assert receive_until_reset(ends.sender(direction)) == b""


@both_directions
def test_duplicate_is_the_same_frame_twice_and_no_other(direction: Direction) -> None:
    with connected(Fault(direction, 2, "duplicate")) as ends:
        ends.sender(direction).sendall(A + B + C)
        assert receive(ends.receiver(direction), 4 * len(A)) == A + B + B + C
        assert ends.link.faults == {"duplicate": 1}
        assert ends.link.frames == {direction: 3}


@both_directions
def test_delay_holds_the_frame_and_what_is_behind_it(direction: Direction) -> None:
    with connected(Fault(direction, 2, "delay", seconds=0.1)) as ends:
        start = time.monotonic()
        ends.sender(direction).sendall(A + B + C)
        assert receive(ends.receiver(direction), len(A + B + C)) == A + B + C
        assert time.monotonic() - start >= 0.1
        assert ends.link.faults == {"delay": 1}


@both_directions
def test_delay_holds_its_direction_only(direction: Direction) -> None:
    with connected(Fault(direction, 2, "delay", seconds=600)) as ends:
        ends.sender(direction).sendall(A + B)
        assert receive(ends.receiver(direction), len(A)) == A
        ends.receiver(direction).sendall(C)
        assert receive(ends.sender(direction), len(C)) == C


@both_directions
def test_slow_frame_comes_in_pieces_and_holds_what_is_behind_it(direction: Direction) -> None:
    with connected(Fault(direction, 1, "slow", seconds=0.1)) as ends:
        start = time.monotonic()
        ends.sender(direction).sendall(A + B)
        first = ends.receiver(direction).recv(2**16)
        assert 0 < len(first) < len(A)
        assert first + receive(ends.receiver(direction), len(A + B) - len(first)) == A + B
        assert time.monotonic() - start >= 0.1
        assert ends.link.faults == {"slow": 1}


def test_shortest_frame_can_be_slow_and_cut_in_half() -> None:
    empty = make_frame(b"")
    with connected(Fault("down", 1, "slow"), Fault("down", 2, "half cut")) as ends:
        ends.server.sendall(empty + empty)
        assert receive_until_reset(ends.client) == empty + empty[:1]
        assert ends.link.faults == {"slow": 1, "half cut": 1}


@both_directions
def test_half_open_link_swallows_both_directions_until_its_time_is_over(direction: Direction) -> None:
    with connected(Fault(direction, 2, "half open", seconds=0.1)) as ends:
        start = time.monotonic()
        ends.sender(direction).sendall(A + B + C)
        assert receive(ends.receiver(direction), len(A)) == A
        ends.server.shutdown(socket.SHUT_WR)  # the client does not hear of it
        assert receive_until_reset(ends.receiver(direction)) == b""
        assert receive_until_reset(ends.sender(direction)) == b""
        assert time.monotonic() - start >= 0.1
        assert ends.link.faults == {"half open": 1}
        assert ends.link.frames == {direction: 2}


def test_half_open_link_ends_when_the_client_closes() -> None:
    with connected(Fault("down", 1, "half open", seconds=600)) as ends:
        ends.server.sendall(A)
        # More than any buffer takes: it is being swallowed, not held.
        ends.client.sendall(make_frame(bytes(30 * 2**20)))
        ends.client.close()
        assert receive_until_reset(ends.server) == b""


@both_directions
def test_connection_that_ends_in_order_delivers_everything(direction: Direction) -> None:
    large = make_frame(bytes(2**20))
    with connected() as ends:
        ends.receiver(direction).shutdown(socket.SHUT_WR)
        assert ends.sender(direction).recv(1) == b""
        ends.sender(direction).sendall(large)
        ends.sender(direction).close()
        assert receive(ends.receiver(direction), len(large) + 1) == large


@both_directions
def test_reset_passes_through(direction: Direction) -> None:
    with connected() as ends:
        ends.sender(direction).sendall(A)
        assert receive(ends.receiver(direction), len(A)) == A
        ends.sender(direction).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        ends.sender(direction).close()
        assert receive_until_reset(ends.receiver(direction)) == b""


def test_frames_are_numbered_across_connections_by_direction_without_pings() -> None:
    with echo_server() as port, Link(port, Plan(Fault("up", 3, "cut"), Fault("down", 3, "cut after"))) as link:
        with connect_to(link) as client:
            for message in ("one", "two"):
                assert client.ping().wait(10)
                client.send(message)
                assert client.recv(timeout=10) == message
        with connect_to(link) as client:
            client.send("three")  # the third upwards; downwards there is none
            with pytest.raises(ConnectionClosedError):
                client.recv(timeout=10)
        assert link.faults == {"cut": 1}
        with connect_to(link) as client:
            client.send("four")
            assert client.recv(timeout=10) == "four"
            with pytest.raises(ConnectionClosedError):
                client.recv(timeout=10)
        assert link.faults == {"cut": 1, "cut after": 1}
        assert link.frames == {"up": 4, "down": 3}


def test_server_takes_a_duplicate_for_two_messages() -> None:
    with echo_server() as port, Link(port, Plan(Fault("up", 1, "duplicate"))) as link, connect_to(link) as client:
        client.send("again")
        assert [client.recv(timeout=10), client.recv(timeout=10)] == ["again", "again"]


def test_connections_are_disturbed_one_by_one() -> None:
    with echo_server() as port, Link(port, Plan(Fault("up", 2, "cut"))) as link, connect_to(link) as lucky:
        with connect_to(link) as unlucky:
            lucky.send("first")
            assert lucky.recv(timeout=10) == "first"
            unlucky.send("second")
            with pytest.raises(ConnectionClosedError):
                unlucky.recv(timeout=10)
        lucky.send("third")
        assert lucky.recv(timeout=10) == "third"


def assert_target_absent(link: Link) -> None:
    # Whoever connects hears of it while it connects or soon after.
    with pytest.raises(ConnectionResetError), socket.create_connection(("127.0.0.1", link.port), timeout=10) as client:
        client.recv(1)


def test_link_outlives_its_target() -> None:
    with echo_server() as port, Link(port, Plan()) as link, connect_to(link) as client:
        client.send("before")
        assert client.recv(timeout=10) == "before"
    with Link(port, Plan()) as link:
        for _ in range(3):
            assert_target_absent(link)
        with echo_server(port), connect_to(link) as client:
            client.send("after")
            assert client.recv(timeout=10) == "after"
        assert_target_absent(link)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_closed_link_leaves_no_thread_and_no_socket(kind: Kind | None) -> None:
    threads, files = set(threading.enumerate()), open_files()  # what an earlier test has left may end meanwhile
    with connected(*([Fault("up", 1, kind, seconds=600)] if kind else [])) as ends:
        ends.client.sendall(A + B[:5])
        if kind in CUTS:
            receive_until_reset(ends.client)
        elif kind in ("duplicate", None):
            assert receive(ends.server, len(A)) == A
        with socket.create_connection(("127.0.0.1", ends.link.port), timeout=10) as another:
            ends.link.close()
            ends.link.close()
            receive_until_reset(another)
        if kind not in CUTS:
            receive_until_reset(ends.client)
    assert not set(threading.enumerate()) - threads
    assert not open_files() - files


def test_random_plan_is_a_function_of_its_seed() -> None:
    plans = [Plan.random(seed, faults=10, frames=100) for seed in (1, 1, 2)]
    assert plans[0].faults == plans[1].faults != plans[2].faults
    # Also on another day: a failure that names its seed can be repeated.
    assert (
        repr(Plan.random(7, faults=1, frames=9, seconds=2.0))
        == "Plan(Fault(direction='down', frame=2, kind='cut after', seconds=2.0))"
    )


def test_random_plan_spreads_over_frames_directions_and_kinds() -> None:
    faults = list(itertools.chain.from_iterable(Plan.random(seed, faults=5, frames=20).faults for seed in range(200)))
    assert len(faults) == 1000
    for values in ({fault.frame for fault in faults}, {fault.kind for fault in faults}):
        assert values in (set(range(1, 21)), set(KINDS))
    assert 400 < sum(fault.direction == "up" for fault in faults) < 600
    chosen = Plan.random(3, faults=40, frames=20, kinds=("cut", "slow"), seconds=1.5).faults
    assert {(fault.kind, fault.seconds) for fault in chosen} == {("cut", 1.5), ("slow", 1.5)}
    assert {(fault.direction, fault.frame) for fault in chosen} == set(itertools.product(DIRECTIONS, range(1, 21)))


def test_impossible_faults_are_refused() -> None:
    with pytest.raises(ValueError, match="can never happen"):
        Fault("up", 0, "cut")
    with pytest.raises(ValueError, match="can never happen"):
        Fault("up", 1, "snip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two faults at one frame"):
        Plan(Fault("up", 1, "cut"), Fault("up", 1, "delay"))
