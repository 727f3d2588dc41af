"""How many may knock, and how fast somebody may speak."""

import selectors
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from gpu_server.config import ConfigError
from gpu_server.listener import Limits, Listener, Pace

Dial = Callable[[], socket.socket]


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def listening(sockets: ExitStack, *, connections: int = 10, strangers: int = 10) -> tuple[Listener, Dial]:
    limits = Limits(connections=connections, strangers=strangers, handshake_seconds=1, messages_per_second=1, queue=1)
    listener = sockets.enter_context(Listener.open("127.0.0.1", 0, limits))

    def dial() -> socket.socket:
        return sockets.enter_context(socket.create_connection(listener.getsockname(), 10))

    return listener, dial


def accept(sockets: ExitStack, listener: Listener) -> socket.socket | None:
    """As asyncio does: when a connection waits, until there is one or none may be. None where it was turned away."""
    with selectors.DefaultSelector() as waiting:
        waiting.register(listener, selectors.EVENT_READ)
        while waiting.select(timeout=0):
            try:
                return sockets.enter_context(listener.accept()[0])
            except BlockingIOError:
                continue
    return None


def is_ended(client: socket.socket) -> bool:
    """Whether the server has closed or shut down this connection."""
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False


def test_connection_too_many_is_closed_at_once_and_the_others_stay(sockets: ExitStack) -> None:
    listener, dial = listening(sockets, connections=2)
    ends = []
    for _ in range(3):
        client = dial()
        ends.append((client, accept(sockets, listener)))
    assert [is_ended(client) for client, _ in ends] == [False, False, True]
    assert ends[2][1] is None


def test_place_of_a_closed_connection_is_free_again(sockets: ExitStack) -> None:
    listener, dial = listening(sockets, connections=1)
    first, server_end = dial(), None
    server_end = accept(sockets, listener)
    assert server_end is not None
    server_end.close()
    second = dial()
    assert accept(sockets, listener) is not None
    assert (is_ended(first), is_ended(second)) == (True, False)


def test_oldest_stranger_has_to_go_when_there_are_too_many(sockets: ExitStack) -> None:
    listener, dial = listening(sockets, strangers=2)
    clients, ends = [], []
    for _ in range(4):
        clients.append(dial())
        ends.append(accept(sockets, listener))
    assert all(end is not None for end in ends)
    assert [is_ended(client) for client in clients] == [True, True, False, False]


def test_whoever_has_said_who_it_is_stays(sockets: ExitStack) -> None:
    listener, dial = listening(sockets, strangers=1)
    clients, ends = [], []
    for _ in range(3):
        clients.append(dial())
        end = accept(sockets, listener)
        assert end is not None
        listener.admit(end.fileno())
        ends.append(end)
    assert not any(is_ended(client) for client in clients)


def test_address_that_cannot_be_listened_on_is_named(sockets: ExitStack) -> None:
    listener, _ = listening(sockets)
    port = listener.getsockname()[1]
    limits = Limits(connections=1, strangers=1, handshake_seconds=1, messages_per_second=1, queue=1)
    with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*; choose another --port or --host"):
        Listener.open("127.0.0.1", port, limits)
    with pytest.raises(ConfigError, match="cannot listen on no such host"):
        Listener.open("no such host", 0, limits)


def said_within(pace: Pace, messages: int) -> float:
    """Seconds that so many messages take of somebody who sends as fast as it may."""
    now = 0.0
    for _ in range(messages):
        now += pace.delay(now)
    return now


def test_messages_beyond_the_pace_have_to_wait() -> None:
    assert said_within(Pace(10.0), 110) == pytest.approx(10.0)


def test_a_seconds_worth_of_messages_may_come_at_once() -> None:
    pace = Pace(10.0)
    assert said_within(pace, 10) == pytest.approx(0.0)
    assert pace.delay(0.0) == pytest.approx(0.1)
    assert Pace(1000.0).delay(0.0) == 0.0


def test_whoever_keeps_the_pace_never_waits() -> None:
    pace = Pace(10.0)
    assert [pace.delay(number * 0.1) for number in range(100)] == pytest.approx([0.0] * 100, abs=1e-9)
