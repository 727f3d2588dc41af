"""A link that is dead is given up, and none that lives. No socket, no clock but the test's, but for the last ones."""

import socket
import ssl
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from disturbance import Fault, Plan
from disturbance import Link as DisturbedLink

from edge_client import EdgeClient
from edge_client.connection import retransmissions, shut, unacknowledged_bytes
from edge_client.link_watch import LinkWatch, Patience
from gpu_server import GpuServer

LOOK = 0.25


class FakeLink:
    def __init__(self) -> None:
        self.now = 0.0
        self.num_received = 0
        self.delivered, self.lost_in_a_row = True, 0
        self.answers_after: float | None = 0.05
        """Seconds until a pong; None: never."""
        self.pings: list[float] = []
        self.given_up_at: float | None = None
        self._pong_at: float | None = None

    def is_delivered(self) -> bool:
        return self.delivered

    def retransmissions(self) -> int:
        return self.lost_in_a_row

    def ping(self) -> None:
        self.pings.append(self.now)
        if self.answers_after is not None:
            self._pong_at = self.now + self.answers_after

    def give_up(self) -> None:
        self.given_up_at = self.now

    def pass_time(self, watch: LinkWatch, seconds: float, meanwhile: Callable[[], object] = lambda: None) -> None:
        until = self.now + seconds
        while self.now < until and self.given_up_at is None:
            self.now += LOOK
            meanwhile()
            if self._pong_at is not None and self._pong_at <= self.now:
                self.num_received, self._pong_at = self.num_received + 6, None
            watch.look()


@pytest.fixture
def link() -> FakeLink:
    return FakeLink()


def watch_of(link: FakeLink, patience: Patience | None = None, *, num_devices: int = 3) -> LinkWatch:
    return LinkWatch(link, patience or Patience(), num_devices=num_devices, clock=lambda: link.now)


def test_link_that_becomes_silent_is_given_up_within_five_seconds(link: FakeLink) -> None:
    watch = watch_of(link)
    link.answers_after = None
    link.pass_time(watch, 60)
    assert link.pings == [1.0]
    assert watch.has_given_up
    assert link.given_up_at is not None
    assert 4 <= link.given_up_at <= 5


def test_server_that_answers_is_waited_for_without_end_and_asked_ever_more_seldom(link: FakeLink) -> None:
    watch = watch_of(link)
    link.pass_time(watch, 3600)
    assert not watch.has_given_up
    gaps = [later - earlier for earlier, later in pairwise(link.pings)]
    assert gaps[:4] == pytest.approx([2, 4, 8, 16], abs=1)
    assert max(gaps) == pytest.approx(30, abs=1)
    link.answers_after = None
    link.pass_time(watch, 60)
    assert watch.has_given_up


def test_after_an_answer_a_short_silence_tells_something_again(link: FakeLink) -> None:
    watch = watch_of(link)
    link.pass_time(watch, 600)

    def answer() -> None:
        link.num_received += 1000

    link.pass_time(watch, LOOK, answer)  # the sign of life that may be awaited just now
    link.pass_time(watch, LOOK, answer)
    since, link.answers_after = link.now, None
    link.pass_time(watch, 60)
    assert link.given_up_at is not None
    assert link.given_up_at - since <= 5


def test_message_that_takes_long_either_way_is_no_silence(link: FakeLink) -> None:
    watch = watch_of(link)
    link.answers_after = None

    def arrive() -> None:
        link.num_received += 100

    link.pass_time(watch, 300, arrive)
    assert not link.pings
    link.delivered = False  # the question for a sign of life stands behind a long message that is under way
    link.pass_time(watch, 300)
    assert link.given_up_at is None
    link.delivered = True
    link.pass_time(watch, 300)
    assert watch.has_given_up


def test_link_whose_other_end_acknowledges_nothing_is_given_up_though_nothing_is_delivered(link: FakeLink) -> None:
    watch = watch_of(link)
    link.delivered, link.lost_in_a_row = False, 3
    link.pass_time(watch, 60)
    assert not watch.has_given_up
    link.lost_in_a_row = 4
    link.pass_time(watch, LOOK)
    assert watch.has_given_up


def test_each_link_in_a_row_that_was_given_up_makes_the_next_more_patient(link: FakeLink) -> None:
    watch = watch_of(link, patience := Patience(given_up=3))
    link.answers_after, link.lost_in_a_row = None, 6
    link.pass_time(watch, 24)
    assert not watch.has_given_up
    link.pass_time(watch, 2)
    assert watch.has_given_up
    assert patience.given_up == 4


def test_message_that_a_slow_relay_has_acknowledged_costs_links_once_and_not_at_every_step(link: FakeLink) -> None:
    """It passes on what it has within 50 seconds; until then it looks as if the server were silent."""
    patience = Patience()
    for step in range(5):
        connections = 0
        while True:
            connections += 1
            watch, link.given_up_at = watch_of(link, patience), None
            link.answers_after = None
            link.pass_time(watch, 50)
            if not watch.has_given_up:
                break
        link.num_received += 10**6  # the answer
        watch.look()
        patience.given_up = 0
        assert connections <= (1 if step else 6)
    since = link.now
    link.pass_time(watch, 600)
    assert watch.has_given_up
    assert link.now - since < 120


def test_device_that_has_slept_hears_the_answer_that_has_come_meanwhile(link: FakeLink) -> None:
    watch = watch_of(link)
    link.answers_after = None
    link.pass_time(watch, 2)
    assert link.pings
    link.now += 3600
    watch.look()  # before whoever reads the socket has been awake
    assert not watch.has_given_up
    link.num_received += 6
    link.answers_after = 0.05
    link.pass_time(watch, 600)
    assert not watch.has_given_up


def test_ten_thousand_devices_that_wait_ask_for_five_hundred_signs_of_life_a_second(link: FakeLink) -> None:
    link.pass_time(watch_of(link, num_devices=10_000), 3600)
    assert len(link.pings) * 10_000 / 3600 <= 500


def test_link_that_is_given_up_stays_encrypted() -> None:
    near, far = socket.socketpair()
    with far, ssl.create_default_context().wrap_socket(near, server_hostname="a", do_handshake_on_connect=False) as encrypted:
        shut(encrypted)
        assert far.recv(1) == b""
        with pytest.raises(ssl.SSLError):  # what is sent without encryption fails otherwise
            encrypted.send(b"activations")
        shut(far)
    shut(encrypted)  # it is closed


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say it")
def test_system_says_what_has_reached_the_other_side() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()
        with far:
            assert (unacknowledged_bytes(near), retransmissions(near)) == (0, 0)
            near.setblocking(False)
            with suppress(BlockingIOError):  # it does not read: what its system cannot take stays here
                while True:
                    near.send(bytes(2**16))
            assert (unacknowledged_bytes(near) or 0) > 0
            far.setblocking(True)
            emptied = threading.Thread(target=lambda: [None for _ in iter(lambda: far.recv(2**20), b"")])
            emptied.start()
            near.setblocking(True)
            near.shutdown(socket.SHUT_WR)
            emptied.join()
            far.shutdown(socket.SHUT_WR)
            assert near.recv(1) == b""  # the other side's end comes with its acknowledgement of everything
            assert unacknowledged_bytes(near) in (0, 1)  # some systems count the end itself
    assert (unacknowledged_bytes(near), retransmissions(near)) == (None, 0)  # it is closed


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say what has been delivered")
def test_run_goes_on_over_a_link_that_has_become_silent(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither side is told, and for ten minutes the server's side of it stays open."""
    for name, seconds in {"SECONDS_BETWEEN_LOOKS": 0.05, "SHORTEST_QUIET": 0.1, "PATIENCE": 0.5}.items():
        monkeypatch.setattr(f"edge_client.link_watch.{name}", seconds)
    run = {"model": str(tiny_model), "cut_layer": 1, "dtype": "float32", "steps": 3, "run_dir": str(tmp_path / "run")}
    silence = Plan(Fault("up", 5, "half open", seconds=600.0))
    with GpuServer(**run, clients=1, port=0) as server, DisturbedLink(int(server.url.rpartition(":")[2]), silence) as link:
        device = {"model": str(tiny_model), "engine": "torch", "dtype": "float32", "data": pairs_file("a", 9)}
        with EdgeClient(link.url, name="a", state_dir=tmp_path / "state", **device) as client:
            assert [step.number for step in client.train()] == [1, 2, 3]
        assert link.faults == {"half open": 1}
