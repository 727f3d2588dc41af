"""The shaped link has the bandwidth and the delay that it is given: otherwise what is measured over it says nothing."""

import random
import select
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from conftest import run_in_thread
from shaped_link import LINKS, QUEUE, SEGMENT, LinkProfile, ShapedLink, Weather

TRIES = 4  # a transfer is slower where others have the processor meanwhile; it is never faster
FAST = LinkProfile(up=1e10, down=1e10, round_trip=0.0)


@contextmanager
def connected(profile: LinkProfile, seed: int = 0) -> Iterator[tuple[ShapedLink, socket.socket, socket.socket]]:
    """A link, and the client's and the server's socket of one connection through it."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        ShapedLink(listener.getsockname()[1], profile, seed) as link,
        socket.create_connection(("127.0.0.1", link.port), timeout=10) as client,
        listener.accept()[0] as server,
    ):
        server.settimeout(10)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield link, client, server


def receive(end: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        piece = end.recv(2**20)
        assert piece, f"the connection ended after {len(received)} bytes"
        received += piece
    return bytes(received)


def transfer(sender: socket.socket, receiver: socket.socket, data: bytes) -> tuple[bytes, float]:
    """What arrives, and seconds from the first byte's leaving to the last one's arrival."""
    began = time.perf_counter()
    sending = run_in_thread(lambda: sender.sendall(data))
    received = receive(receiver, len(data))
    seconds = time.perf_counter() - began
    sending.result(timeout=10)
    return received, seconds


@pytest.mark.parametrize("name", ["3g", "4g", "wifi"])
def test_bandwidth_is_the_profiles(name: str) -> None:
    # Not the same in both directions, so that one cannot be taken for the other.
    profile = replace(LINKS[name], down=LINKS[name].down / 2)
    with connected(profile) as (_, client, server):
        for sender, receiver, bits_a_second in ((client, server, profile.up), (server, client, profile.down)):
            for _ in range(TRIES):
                data = bytes(int(bits_a_second / 8 * 0.6))
                _, seconds = transfer(sender, receiver, data)
                ratio = len(data) * 8 / (seconds - profile.round_trip / 2) / bits_a_second
                assert ratio < 1.1
                if ratio > 0.9:
                    break
            assert ratio > 0.9


@pytest.mark.parametrize("name", LINKS)
def test_small_message_and_its_answer_take_a_round_trip(name: str) -> None:
    seconds = []
    with connected(LINKS[name]) as (_, client, server):
        for _ in range(5):
            began = time.perf_counter()
            client.sendall(b"question")
            receive(server, 8)
            server.sendall(b"answer")
            receive(client, 6)
            seconds.append(time.perf_counter() - began)
    assert min(seconds) >= LINKS[name].round_trip
    # What is more is this machine's: four processes take turns.
    assert statistics.median(seconds) < LINKS[name].round_trip * 1.1 + 0.015


def test_bytes_arrive_unchanged_in_both_directions_at_once() -> None:
    profile = LinkProfile(up=400e6, down=200e6, round_trip=0.002, jitter=0.001, loss=0.01)
    draw = random.Random(0)
    up, down = draw.randbytes(3_000_000), draw.randbytes(2_000_000)
    with connected(profile) as (link, client, server):
        upwards = run_in_thread(lambda: transfer(client, server, up)[0])
        assert transfer(server, client, down)[0] == down
        assert upwards.result(timeout=10) == up
        assert (link.bytes_up, link.bytes_down) == (len(up), len(down))


def test_end_of_one_direction_leaves_the_other_open() -> None:
    with connected(LINKS["wifi"]) as (_, client, server):
        client.sendall(b"last words")
        client.shutdown(socket.SHUT_WR)
        assert receive(server, 10) == b"last words"
        assert server.recv(1) == b""
        server.sendall(b"heard")
        assert receive(client, 5) == b"heard"


def test_receiver_that_does_not_read_holds_up_its_sender() -> None:
    with connected(LINKS["4g"]) as (link, client, _):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        client.setblocking(False)
        sent = 0
        while select.select([], [client], [], 0.5)[1]:
            sent += client.send(bytes(2**14))
        # What is on the way, the queue, and the buffers of five sockets, of which the receiver's own is the largest.
        assert QUEUE < link.bytes_up <= sent < 8_000_000


def test_lost_segment_comes_a_round_trip_later_and_holds_up_what_is_behind_it() -> None:
    lossy = replace(FAST, round_trip=0.1, loss=0.999)
    with connected(lossy) as (link, client, server):
        _, seconds = transfer(client, server, bytes(10 * SEGMENT))
        assert link.stalls >= 9
        # All are lost at once and sent again at once.
        assert seconds == pytest.approx(0.15, abs=0.04)


def seconds_later(profile: LinkProfile, seed: str, sizes: list[int]) -> list[float]:
    """Seconds by piece."""
    weather = Weather(profile, seed)
    return [weather.seconds_later(size) for size in sizes]


def test_stalls_are_a_function_of_the_seed_however_the_bytes_are_cut_into_pieces() -> None:
    profile = replace(FAST, round_trip=1.0, jitter=0.1, loss=0.05)
    whole = seconds_later(profile, "1", [SEGMENT] * 600)
    halved = seconds_later(profile, "1", [SEGMENT // 2] * 1200)
    assert whole == [max(pair) for pair in zip(halved[::2], halved[1::2], strict=True)]
    assert 15 <= sum(later >= 1.0 for later in whole) <= 50
    assert all(later % 1.0 <= 0.1 for later in whole)
    assert whole != seconds_later(profile, "2", [SEGMENT] * 600)


def test_same_seed_gives_the_same_stalls() -> None:
    stalls = []
    for seed in (1, 1, 2, 3):
        with connected(replace(FAST, loss=0.1), seed) as (link, client, server):
            transfer(client, server, bytes(500 * SEGMENT))
            stalls.append(link.stalls)
    assert stalls[0] == stalls[1]
    assert len(set(stalls)) > 1


def test_connection_is_reset_where_there_is_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with (
        ShapedLink(port, FAST) as link,
        pytest.raises(ConnectionResetError),  # it may come before the connection is reported
        socket.create_connection(("127.0.0.1", link.port), timeout=10) as client,
    ):
        client.recv(1)


def test_closing_resets_what_is_connected() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with ShapedLink(listener.getsockname()[1], FAST) as link:
            client = socket.create_connection(("127.0.0.1", link.port), timeout=10)
            server, _ = listener.accept()
        for end in (client, server):
            with end, pytest.raises(ConnectionResetError):
                end.recv(1)


@pytest.mark.parametrize(
    "wrong", [{"up": 0.0}, {"down": -1.0}, {"round_trip": -0.1}, {"jitter": -1.0}, {"loss": 1.0}, {"loss": float("nan")}]
)
def test_impossible_profile_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        replace(FAST, **wrong)
