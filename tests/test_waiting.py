"""A device that waits says for whom, and how long, and no more often than somebody wants to read it."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Clock, run_in_thread

from edge_client import ConnectionFailed, EdgeClient
from edge_client.device_log import DeviceLog
from edge_client.waiting import WaitReports, reason_to_wait
from gpu_server import GpuServer
from gpu_server.federation import Federation
from protocol import Pong


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, "edge_client")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "edge_client"]


def test_wait_is_told_of_at_growing_distances(clock: Clock, told: Callable[[], list[str]]) -> None:
    reports = WaitReports(lambda: "the run waits for b", DeviceLog("a", None), clock)
    with reports:
        for _ in range(3 * 3600):
            clock.now += 1
            reports.look()
    assert [line.removesuffix(": the run waits for b") for line in told()] == [
        f"this device has waited {when}"
        for when in ("10 s", "30 s", "90 s", "4 min", "14 min", "40 min", "1 h 40 min", "2 h 40 min")
    ]


def test_answer_ends_it_and_the_next_wait_begins_anew(clock: Clock, told: Callable[[], list[str]]) -> None:
    reports = WaitReports(lambda: "", DeviceLog("a", None), clock)
    for _ in range(4):
        with reports:
            clock.now += 9
            reports.look()
        clock.now += 100
        reports.look()
    assert told() == []
    with reports:
        clock.now += 10
        reports.look()
    assert len(told()) == 1


def test_answer_that_comes_meanwhile_leaves_nothing_to_tell(clock: Clock, told: Callable[[], list[str]]) -> None:
    def reason() -> str:
        reports.__exit__(None, None, None)
        return "too late"

    reports = WaitReports(reason, DeviceLog("a", None), clock)
    with reports:
        clock.now += 60
        reports.look()
    assert told() == []


def test_device_whose_data_has_ended_is_told_how_far_the_others_are() -> None:
    class Server:
        def exchange(self, *arguments: object, **options: object) -> Pong:
            return Pong(software="1", run="r", clients=2, joined=2, step=49)

    @contextmanager
    def dial() -> Iterator[Server]:
        yield Server()

    assert reason_to_wait(dial, "a") == "the server is at work, 49 steps finished"  # type: ignore[arg-type]


def test_reasons_come_from_the_server(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], returned: Callable[[type, str], threading.Event]
) -> None:
    joined, received = returned(Federation, "join"), returned(Federation, "receive")
    options = {"model": str(tiny_model), "run_dir": str(tmp_path / "run"), "cut_layer": 1, "steps": 2, "dtype": "float32"}
    device = {
        "engine": "torch",
        "model": options["model"],
        "data": pairs_file("a", 4),
        "dtype": "float32",
        "state_dir": tmp_path / "state",
    }
    with GpuServer(**options, port=0, clients=2) as server:
        ended = run_in_thread(lambda: list(server.train()))
        with EdgeClient(server.url, name="a", **device) as one, EdgeClient(server.url, name="b", **device) as two:
            first = run_in_thread(one.start)
            assert joined.wait(timeout=60)
            assert reason_to_wait(one._access.connect, "a") == "1 of 2 devices are connected"
            two.start()
            first.result(timeout=60)
            steps = run_in_thread(lambda: list(one.train()))
            assert received.wait(timeout=60)
            assert reason_to_wait(two._access.connect, "c").startswith("the run waits for b (silent for ")
            assert reason_to_wait(two._access.connect, "b") == "its own message is still on the way to the server"
            assert len(list(two.train())) == len(steps.result(timeout=60)) == 2
        ended.result(timeout=60)

    def gone() -> None:
        raise ConnectionFailed("no server at ws://here")

    assert (
        reason_to_wait(gone, "a") == "the server cannot be asked why, a second connection to it fails: no server at ws://here"
    )  # type: ignore[arg-type]
