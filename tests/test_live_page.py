"""What a page is told: the same as the files say, once, little at a time, and where it is slow no more than it takes."""

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Clock, metrics, run_in_thread
from ports import free_port
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from edge_client import EdgeClient
from gpu_server import GpuServer, RunEndedEarly, StepRecord
from gpu_server.history import EvaluationRecord, HistoryError, RunEvent
from gpu_server.history.overview import Overview
from gpu_server.page.live import SECONDS_BETWEEN_UPDATES, SECONDS_WITHOUT_NEWS, PageObserver
from gpu_server.page.snapshot import EVENTS_SHOWN, MOST_EVALUATIONS, MOST_MARKS, Snapshot
from gpu_server.serving.viewers import BYTES_OF_PONGS, MOST_UNSENT, SECONDS_TO_TAKE_ANYTHING, Viewers
from protocol import Seconds

SECONDS = 60.0
STEPS = 12


class Page:
    """Does with what it is told what a page does, and comes back to a server that was away."""

    def __init__(self, port: int) -> None:
        self.opened = 0
        self.losses: dict[int, float] = {}
        self.twice: list[int] = []
        """Steps that it was told again, though it knew them."""
        self.events: list[str] = []
        self.overview: dict[str, Any] = {}
        self._news, self._over = threading.Condition(), False
        self._url = f"ws://127.0.0.1:{port}/live"
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        while not self._over:
            with suppress(OSError, WebSocketException, EOFError), connect(self._url, proxy=None, max_size=2**24) as connection:
                while not self._over:
                    self._take(json.loads(connection.recv()))

    def _take(self, message: dict[str, Any]) -> None:
        with self._news:
            if message["kind"] == "snapshot":
                self.opened += 1
                self.losses, self.events = {}, []
            curve = message["curve"]
            self.twice += [step for step in curve["step"] if step in self.losses]
            self.losses.update(zip(curve["step"], curve["loss"], strict=True))
            self.events += [event["text"] for event in message["events"]]
            self.overview = message["overview"]
            self._news.notify_all()

    def wait_until(self, holds: Callable[["Page"], bool]) -> None:
        with self._news:
            assert self._news.wait_for(lambda: holds(self), SECONDS), (self.opened, self.losses, self.events)

    def close(self) -> None:
        self._over = True
        self._thread.join(SECONDS)


@contextmanager
def page_of(port: int) -> Iterator[Page]:
    page = Page(port)
    try:
        yield page
    finally:
        page.close()


def losses_in(run_dir: Path) -> dict[int, float]:
    """By step, with the six digits that a curve has."""
    return {row["step"]: float(f"{row['loss']:.6g}") for row in metrics(run_dir)}


def test_page_knows_what_the_files_say_over_a_restart_of_the_server(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    run_dir, port, ended = tmp_path / "run", free_port(), threading.Event()
    where = {"run_dir": str(run_dir), "port": port, "model": str(tiny_model), "linger": 60}
    settings = {"cut_layer": 1, "dtype": "float32", "steps": STEPS, "checkpoint_every": 4}

    def take_part() -> list[int]:
        with EdgeClient(
            f"ws://127.0.0.1:{port}", engine="torch", model=str(tiny_model), name="a", data=pairs_file("a", 9), dtype="float32"
        ) as device:
            numbers = []
            for step in device.train():
                numbers.append(step.number)
                if step.number == 6 and numbers.count(6) == 1:
                    first.suspend()
                    assert ended.wait(SECONDS)
            return numbers

    with page_of(port) as page:
        with GpuServer(**where, **settings) as first:  # type: ignore[arg-type]
            page.wait_until(lambda page: page.opened == 1)
            device = run_in_thread(take_part)
            with pytest.raises(RunEndedEarly):
                list(first.train())
        ended.set()
        page.wait_until(lambda page: page.losses == losses_in(run_dir))
        with GpuServer(**where, resume=True) as second:  # type: ignore[arg-type]
            page.wait_until(lambda page: page.opened == 2)
            list(second.train())
            page.wait_until(lambda page: len(page.losses) == STEPS)
        assert device.result(SECONDS) == list(range(1, STEPS + 1))
        assert page.losses == losses_in(run_dir)
        assert page.twice == []
        assert any("joined" in text for text in page.events)  # of before the restart, too
        assert page.overview["step"] == STEPS


def test_run_goes_on_whose_history_the_page_cannot_read(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    where = {"run_dir": str(tmp_path / "run"), "port": free_port(), "model": str(tiny_model)}
    with GpuServer(**where, cut_layer=1, dtype="float32", steps=STEPS):  # type: ignore[arg-type]
        pass
    with (tmp_path / "run/events.jsonl").open("a") as file:
        file.write('{"of": "a newer version"}\n')
    with page_of(where["port"]) as page, GpuServer(**where, resume=True):  # type: ignore[arg-type]
        page.wait_until(lambda page: page.opened == 1)
    assert "the page does not show all that was before: " in caplog.text
    assert issubclass(HistoryError, ValueError)


# What is told


def a_step(number: int, *clients: str, loss: float = 1.5) -> StepRecord:
    return StepRecord(
        number=number,
        loss=loss,
        labelled_tokens=50,
        tokens=100,
        seconds={name: Seconds(edge_compute=0.1, uplink=0.2) for name in clients},
        deadline=1.0,
        codec="float32",
        server_compute=0.1,
        bytes_up=dict.fromkeys(clients, 1000),
        bytes_down=dict.fromkeys(clients, 900),
        time=1e9 + number,
        step_seconds=0.123456,
    )


def an_event(kind: str, number: int = 0, **more: Any) -> RunEvent:
    return RunEvent(time=1e9 + number, kind=kind, text=f"{kind} {number}", **more)


def an_evaluation(number: int, client: str = "a", loss: float = 2.0) -> EvaluationRecord:
    return EvaluationRecord(step=number, time=1e9 + number, client=client, loss=loss, labelled_tokens=10)


def told(message: str) -> dict[str, Any]:
    return json.loads(message, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_page_of_a_long_run_with_many_devices_opens_with_little() -> None:
    snapshot, clients = Snapshot(Overview("run", 1)), [f"device-{number}" for number in range(30)]
    for number in range(1, 10_001):
        snapshot.add(a_step(number, *clients, loss=math.exp(-number / 5000) + 1 / 3))
        if number % 10 == 0:
            snapshot.add(an_evaluation(number, clients[number // 10 % 30], loss=2 + 1 / number))
            snapshot.add(an_event("checkpoint", number, step=number))
    message = snapshot.everything(1e9)
    assert len(message) < 200_000
    first = told(message)
    assert first["curve"]["step"][-1] == 10_000
    assert first["evaluations"]["step"][-1] == 10_000
    assert len(first["evaluations"]["step"]) <= MOST_EVALUATIONS
    assert set(first["evaluations"]["client"]) == set(clients)
    assert len(first["marks"]) <= MOST_MARKS
    assert first["marks"][-1]["step"] == 10_000


def test_restarts_and_codecs_stay_marked_among_many_checkpoints() -> None:
    snapshot = Snapshot(Overview("run", 1))
    rare = [an_event("server_started", 3, step=3, details={"restarts": 1}), an_event("codec", 5, step=5)]
    many = [an_event("checkpoint", number, step=number) for number in range(10, 1000)]
    for event in (an_event("server_started", 0, step=0, details={"restarts": 0}), *rare, *many):
        snapshot.add(event)
    marks = told(snapshot.everything(1e9))["marks"]
    assert [(mark["step"], mark["kind"]) for mark in marks[:2]] == [(3, "restart"), (5, "codec")]
    assert {mark["kind"] for mark in marks[2:]} == {"checkpoint"}


def test_last_fifty_events_are_shown_and_those_for_whoever_debugs_are_not() -> None:
    snapshot = Snapshot(Overview("run", 1))
    for number in range(100):
        snapshot.add(an_event("note", number))
        snapshot.add(an_event("note", -number, level="debug"))
    texts = [event["text"] for event in told(snapshot.everything(1e9))["events"]]
    assert texts == [f"note {number}" for number in range(100 - EVENTS_SHOWN, 100)]


def test_numbers_that_json_has_not_are_null_and_end_no_run() -> None:
    snapshot = Snapshot(Overview("run", 1))
    details = {"share": math.inf, "of": [math.nan]}
    news = [a_step(1, "a", loss=math.nan), an_evaluation(1, loss=1e9), an_event("note", details=details)]
    for happened in news:
        snapshot.add(happened)
    for message in (told(snapshot.everything(1e9)), told(snapshot.update(news, 1e9))):
        assert message["curve"]["loss"] == [None]
        assert message["evaluations"]["perplexity"] == [None]
        assert message["events"][0]["details"] == {"share": None, "of": [None]}


def test_page_that_comes_while_the_history_is_read_waits_for_it_and_the_run_does_not(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    may_go_on = threading.Event()

    def history() -> Iterator[StepRecord]:
        yield a_step(1, "a")
        assert may_go_on.wait(SECONDS)
        yield a_step(2, "a")

    async def act(observer: PageObserver, pass_time: Callable[[float], Any]) -> None:
        observer.recall(history(), None)
        observer.step_finished(a_step(3, "a"))
        assert observer._everything_told() is None
        await pass_time(1.0)
        assert observer.viewers.messages == []  # type: ignore[attr-defined]
        may_go_on.set()
        (thread,) = (each for each in threading.enumerate() if each.name == "recall")
        thread.join(SECONDS)
        await pass_time(SECONDS_BETWEEN_UPDATES)
        assert told(observer._everything_told() or "")["curve"]["step"] == [1, 2, 3]

    assert [message["curve"]["step"] for message in observing(monkeypatch, clock, 1, act).messages] == [[3]]


class Told(Viewers):
    """Open pages that only count."""

    def __init__(self, everything: Callable[[], str | None], pages: int) -> None:
        super().__init__(everything)
        self.pages, self.messages = pages, list[dict[str, Any]]()

    def __len__(self) -> int:
        return self.pages

    def tell(self, news: str) -> None:
        self.messages.append(told(news))


def observing(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, pages: int, act: Callable[[PageObserver, Callable[[float], Any]], Any]
) -> Told:
    """What pages are told while ``act(observer, pass_time)`` acts."""
    observer = PageObserver(Snapshot(Overview("run", 1)), lambda: ([], 0.0))
    viewers = observer.viewers = Told(observer._everything_told, pages)

    async def main() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "time", clock)

        async def pass_time(seconds: float) -> None:
            clock.now += seconds
            for _ in range(3):
                await asyncio.sleep(0)

        await act(observer, pass_time)

    asyncio.run(main())
    return viewers


def test_pages_are_told_twice_a_second_at_most_and_miss_nothing(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    async def act(observer: PageObserver, pass_time: Callable[[float], Any]) -> None:
        for number in range(1, 101):  # ten seconds
            observer.step_finished(a_step(number, "a"))
            await pass_time(0.1)
        await pass_time(SECONDS_BETWEEN_UPDATES)

    messages = observing(monkeypatch, clock, 1, act).messages
    assert 15 <= len(messages) <= 22
    assert [step for message in messages for step in message["curve"]["step"]] == list(range(1, 101))


def test_pages_are_told_how_things_are_when_nothing_happens(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    async def act(observer: PageObserver, pass_time: Callable[[float], Any]) -> None:
        observer.step_finished(a_step(1, "a"))
        for _ in range(30):
            await pass_time(1.0)

    messages = observing(monkeypatch, clock, 1, act).messages
    assert len(messages) == 1 + 29 // SECONDS_WITHOUT_NEWS
    assert [len(message["curve"]["step"]) for message in messages] == [1] + [0] * (len(messages) - 1)


def test_nothing_is_told_where_no_page_is_open_and_the_next_page_knows_it_all(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    async def act(observer: PageObserver, pass_time: Callable[[float], Any]) -> None:
        for number in (1, 2):
            observer.step_finished(a_step(number, "a"))
            await pass_time(1.0)
        observer.step_finished(a_step(3, "a"))
        known = told(observer._everything_told() or "")["curve"]["step"]
        assert observer._everything_told() is observer._everything_told()  # made once
        observer.viewers.pages = 1  # type: ignore[attr-defined]
        await pass_time(1.0)
        (news,) = observer.viewers.messages  # type: ignore[attr-defined]
        assert known + news["curve"]["step"] == [1, 2, 3]  # no step twice, and none missing
        assert told(observer._everything_told() or "")["curve"]["step"] == [1, 2, 3]

    observing(monkeypatch, clock, 0, act)


@pytest.mark.parametrize("kind", ["complete", "stopped", "failed"])
def test_last_words_are_told_at_once(monkeypatch: pytest.MonkeyPatch, clock: Clock, kind: str) -> None:
    async def act(observer: PageObserver, _: object) -> None:
        observer.step_finished(a_step(1, "a"))
        observer.event_happened(an_event(kind))
        assert len(observer.viewers.messages) == 1  # type: ignore[attr-defined]
        observer.evaluated(an_evaluation(1))  # devices measure the end of a run when it is complete

    first, second = observing(monkeypatch, clock, 1, act).messages
    assert first["events"][-1]["kind"] == kind
    assert second["evaluations"]["step"] == [1]


# Pages that do not read


class Connection:
    """A page's end on the server, and what of it is on its way."""

    def __init__(self) -> None:
        self.unsent = self.bytes_down = self.bytes_up = 0
        self.is_aborted = False
        self.got: list[str] = []
        self.transport = self
        self._closed = asyncio.get_running_loop().create_future()

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.is_aborted = True

    def sent(self, message: str, *, takes: bool) -> None:
        self.got.append(message)
        self.bytes_down += len(message)
        self.unsent = 0 if takes else self.unsent + len(message)

    async def recv(self) -> None:
        await self._closed


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Callable[[Callable[..., None]], None]:
    """``shown(act)`` calls ``act(viewers, reader, deaf)`` of two pages that are open."""

    def shown(act: Callable[..., None]) -> None:
        async def main() -> None:
            reader, deaf = Connection(), Connection()

            def broadcast(connections: Any, message: str) -> None:
                for each in connections:
                    each.sent(message, takes=each is reader)

            monkeypatch.setattr("gpu_server.serving.viewers.broadcast", broadcast)
            monkeypatch.setattr("gpu_server.serving.viewers.time", SimpleNamespace(monotonic=clock))
            viewers = Viewers(lambda: "all")
            tasks = [asyncio.ensure_future(viewers.show(each)) for each in (reader, deaf)]  # type: ignore[arg-type]
            await asyncio.sleep(0)
            assert len(viewers) == 2
            act(viewers, reader, deaf)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            assert len(viewers) == 0

        asyncio.run(main())

    return shown


def test_page_that_does_not_read_has_little_kept_for_it_and_is_closed_in_the_end(
    shown: Callable[..., None], clock: Clock
) -> None:
    news = "n" * 10_000

    def act(viewers: Viewers, reader: Connection, deaf: Connection) -> None:
        for number in range(1, 100):
            viewers.tell(news)
            assert deaf.unsent <= MOST_UNSENT + len(news)
            assert reader.got == ["all", *[news] * number]
            clock.now += SECONDS_TO_TAKE_ANYTHING / 100
            assert not deaf.is_aborted
        clock.now += 1.0
        viewers.tell(news)
        assert (deaf.is_aborted, reader.is_aborted) == (True, False)

    shown(act)


def test_page_that_has_missed_something_is_sent_everything_once_it_has_taken_the_rest(shown: Callable[..., None]) -> None:
    def act(viewers: Viewers, reader: Connection, deaf: Connection) -> None:
        deaf.unsent = MOST_UNSENT + 1
        viewers.tell("missed")
        deaf.unsent = 5
        viewers.tell("missed, too")
        deaf.unsent = 0
        viewers.tell("part of everything")
        deaf.unsent = 0
        viewers.tell("new")
        assert deaf.got == ["all", "all", "new"]
        assert reader.got == ["all", "missed", "missed, too", "part of everything", "new"]

    shown(act)


def test_page_on_a_slow_link_that_takes_a_little_stays(shown: Callable[..., None], clock: Clock) -> None:
    def act(viewers: Viewers, _: Connection, slow: Connection) -> None:
        slow.unsent = slow.bytes_down = MOST_UNSENT
        for _each in range(20):
            clock.now += SECONDS_TO_TAKE_ANYTHING - 1
            slow.unsent -= 10
            viewers.tell("")
            assert not slow.is_aborted

    shown(act)


def test_page_that_says_more_than_pongs_is_closed(shown: Callable[..., None], clock: Clock) -> None:
    def act(viewers: Viewers, reader: Connection, chatty: Connection) -> None:
        reader.bytes_up, chatty.bytes_up = 500, 11 * BYTES_OF_PONGS
        viewers.tell("")
        assert (reader.is_aborted, chatty.is_aborted) == (False, True)
        clock.now += 3600.0
        chatty.unsent, reader.bytes_up = 0, 120 * 131
        viewers.tell("")
        assert not reader.is_aborted

    shown(act)


def test_end_waits_for_no_page_that_has_not_taken_what_it_was_sent(shown: Callable[..., None]) -> None:
    def act(viewers: Viewers, reader: Connection, deaf: Connection) -> None:
        viewers.end()
        assert (reader.is_aborted, deaf.is_aborted) == (False, True)

    shown(act)
