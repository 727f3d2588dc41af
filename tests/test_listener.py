"""How many may knock, and how fast somebody may speak."""

import functools
import os
import resource
import selectors
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from programs import arguments, program, read_until

from edge_client import EdgeClient
from gpu_server import ServerError
from gpu_server.listener import (
    ADMITTED_BETWEEN_FREEZES,
    FILES_IN_RESERVE,
    STRANGERS_BETWEEN_COLLECTIONS,
    Limits,
    Listener,
    RateLimiter,
    _forget_closed,
)

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


def test_accepting_looks_at_strangers_alone_however_many_devices_are_connected(
    sockets: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = []

    def forget(connections: dict[int, socket.socket]) -> int:
        looked_at.append(len(connections))
        return _forget_closed(connections)

    monkeypatch.setattr("gpu_server.listener._forget_closed", forget)
    listener, dial = listening(sockets, connections=100, strangers=3)
    for _ in range(60):
        dial()
        end = accept(sockets, listener)
        assert end is not None
        listener.admit(end.fileno())
    assert max(looked_at) <= 3


def test_place_of_a_connection_is_another_s_once_its_descriptor_is(sockets: ExitStack) -> None:
    listener, dial = listening(sockets, connections=2, strangers=2)
    descriptors = []
    for _ in range(5):
        client = dial()
        end = accept(sockets, listener)
        assert end is not None
        listener.admit(end.fileno())
        descriptors.append(end.fileno())
        end.close()
        client.close()
    assert len(set(descriptors)) < 5


def collector_of(monkeypatch: pytest.MonkeyPatch, *, frozen: int) -> list[str]:
    """What the listener has Python's collector do; so many objects are frozen when it comes."""
    done: list[str] = []
    doings = {what: functools.partial(done.append, what) for what in ("collect", "freeze", "unfreeze")}
    monkeypatch.setattr("gpu_server.listener.gc", SimpleNamespace(**doings, get_freeze_count=lambda: frozen))
    return done


def test_rubbish_of_strangers_is_collected_and_devices_that_stay_are_frozen(
    sockets: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = collector_of(monkeypatch, frozen=0)
    listener, dial = listening(sockets, connections=10**4, strangers=3)

    def come(*, admitted: bool) -> None:
        dial()
        end = accept(sockets, listener)
        assert end is not None
        if admitted:
            listener.admit(end.fileno())
        else:
            end.close()

    for _ in range(ADMITTED_BETWEEN_FREEZES):
        come(admitted=True)
    assert done == []
    for _ in range(2 * STRANGERS_BETWEEN_COLLECTIONS + 1):
        come(admitted=False)
    assert done == ["unfreeze", "collect", "freeze", "collect", "collect"]
    for _ in range(ADMITTED_BETWEEN_FREEZES):
        listener.freeze_newcomers()
        come(admitted=True)
    assert len(done) == 5
    listener.freeze_newcomers()
    listener.unfreeze()
    assert done[5:] == ["unfreeze", "collect", "freeze", "unfreeze"]


def test_what_the_program_has_frozen_stays_frozen(sockets: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    done = collector_of(monkeypatch, frozen=1)
    listener, dial = listening(sockets, connections=10**4, strangers=3)
    listener.freeze()
    for come in range(ADMITTED_BETWEEN_FREEZES + STRANGERS_BETWEEN_COLLECTIONS + 1):
        dial()
        end = accept(sockets, listener)
        assert end is not None
        if come < ADMITTED_BETWEEN_FREEZES:
            listener.admit(end.fileno())
        else:
            end.close()
    listener.freeze_newcomers()
    listener.unfreeze()
    assert done == ["collect"]


def test_all_strangers_are_turned_away_at_the_end_and_no_device(sockets: ExitStack) -> None:
    listener, dial = listening(sockets)
    clients = [dial() for _ in range(3)]
    ends = [accept(sockets, listener) for _ in clients]
    assert ends[1] is not None
    listener.admit(ends[1].fileno())
    listener.turn_strangers_away()
    assert [is_ended(client) for client in clients] == [True, False, True]


@pytest.fixture
def no_file_is_left() -> Iterator[Callable[[], None]]:
    """Called, it leaves this process as many files as it has open now."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def forbid() -> None:
        number = os.dup(0)  # the lowest that is free
        os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, before[1]))

    yield forbid
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_connection_for_which_there_is_no_file_is_closed_and_so_is_the_oldest_strangers(
    sockets: ExitStack, no_file_is_left: Callable[[], None]
) -> None:
    listener, dial = listening(sockets)
    stranger = dial()
    assert accept(sockets, listener) is not None
    late = dial()
    no_file_is_left()
    for _ in range(2):  # one is the pause between two connections
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert is_ended(late)
    assert is_ended(stranger)


def test_file_is_kept_in_reserve_also_where_the_connection_has_gone_by_itself(
    sockets: ExitStack, no_file_is_left: Callable[[], None]
) -> None:
    listener, _ = listening(sockets)
    listener.setblocking(False)  # as asyncio has it
    late = sockets.enter_context(socket.socket())
    no_file_is_left()
    for number in range(4):  # of two tries one is the pause between two connections
        if number == 2:
            late.connect(listener.getsockname())
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert is_ended(late)


def limits_within(monkeypatch: pytest.MonkeyPatch, more_files: int, devices: int, connections: int = 256) -> Limits:
    """Where a process may open so many files beside its own and the reserve."""
    own = len(os.listdir("/dev/fd")) + FILES_IN_RESERVE
    monkeypatch.setattr("gpu_server.listener._allow_open_files", lambda wanted: min(wanted, own + more_files))
    limits = Limits(connections=connections, strangers=32, handshake_seconds=1, messages_per_second=1, queue=1)
    return limits.within_open_files(devices)


def test_connections_are_as_many_as_there_are_files_and_strangers_leave_room_for_the_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert limits_within(monkeypatch, 1000, 250).strangers == 32
    few = limits_within(monkeypatch, 12, 2)
    assert (few.connections, few.strangers) == (12, 5)
    with pytest.raises(ServerError, match=r"may open \d+ files, and a run of 10 devices takes \d+: raise the limit, "):
        limits_within(monkeypatch, 12, 10)


def test_limit_of_open_files_is_raised_where_it_may_be(no_file_is_left: Callable[[], None]) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    limits = Limits(connections=256, strangers=32, handshake_seconds=1, messages_per_second=1, queue=1)
    assert limits.within_open_files(2) == limits
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256


def test_strangers_do_not_disturb_a_run_where_few_files_may_be_open(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], sockets: ExitStack
) -> None:
    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))

    flags = {"model": tiny_model, "run_dir": tmp_path / "run", "cut_layer": 2, "steps": 8, "checkpoint_every": 2, "linger": 1}
    with program("gpu_server", "serve", *arguments({**flags, "port": 0}), preexec_fn=few_files) as server:
        url = read_until(server, "listening on").split()[2]
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        for _ in range(60):
            sockets.enter_context(socket.create_connection(address))
        with EdgeClient(
            url, engine="torch", model=str(tiny_model), data=pairs_file("a", 9), state_dir=tmp_path / "state"
        ) as client:
            for _ in client.train():
                for _ in range(10):
                    sockets.enter_context(socket.create_connection(address))
        _, said = server.communicate(timeout=60)
        assert server.returncode == 0
    assert "Traceback" not in said
    assert "joined with 9 samples" in said


def test_address_that_cannot_be_listened_on_is_named(sockets: ExitStack) -> None:
    listener, _ = listening(sockets)
    port = listener.getsockname()[1]
    limits = Limits(connections=1, strangers=1, handshake_seconds=1, messages_per_second=1, queue=1)
    with pytest.raises(ServerError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*; choose another --port or --host"):
        Listener.open("127.0.0.1", port, limits)
    with pytest.raises(ServerError, match="cannot listen on no such host"):
        Listener.open("no such host", 0, limits)


def said_within(pace: RateLimiter, messages: int) -> float:
    """Seconds that so many messages take of somebody who sends as fast as it may."""
    now = 0.0
    for _ in range(messages):
        now += pace.delay(now)
    return now


def test_messages_beyond_the_pace_have_to_wait() -> None:
    assert said_within(RateLimiter(10.0), 110) == pytest.approx(10.0)


def test_a_seconds_worth_of_messages_may_come_at_once() -> None:
    pace = RateLimiter(10.0)
    assert said_within(pace, 10) == pytest.approx(0.0)
    assert pace.delay(0.0) == pytest.approx(0.1)
    assert RateLimiter(1000.0).delay(0.0) == 0.0


def test_whoever_keeps_the_pace_never_waits() -> None:
    pace = RateLimiter(10.0)
    assert [pace.delay(number * 0.1) for number in range(100)] == pytest.approx([0.0] * 100, abs=1e-9)
