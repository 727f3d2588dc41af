"""What serves a run, in its parts: who watches, what is written when, what is sent to whom."""

import asyncio
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from conftest import run_in_thread
from ports import free_port

from edge_client import ConnectionFailed, EdgeClient
from gpu_server import GpuServer, Observer, RunStatus, ServerError, StepRecord
from gpu_server.federation import Action, Federation, FinishStep, Phase, SaveCodecState, Train, Trained
from gpu_server.history import RunEvent
from gpu_server.run_directory import RunDirectory
from gpu_server.serving.journal import Journal
from gpu_server.serving.lifetime import Lifetime
from gpu_server.serving.peer import Peer
from gpu_server.serving.performer import Performer
from gpu_server.torch_engine import TorchEngine
from protocol import Failure, Goodbye, Hello, LocalProtocolError, Session, Side, TrainingDiverged, Welcome, encode

SECONDS = 60.0
STEPS = 3


class Watching(Observer):
    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.statuses: list[RunStatus] = []
        self.events: list[RunEvent] = []
        self.checkpoints: list[int] = []
        self.threads: set[int] = set()
        self.served: list[tuple[str, int]] = []
        """From which step on, and how many were told until then."""

    def serving_begins(self, step: int) -> None:
        assert not self.steps + self.statuses + self.events
        self.threads.add(threading.get_ident())
        self.served.append(("begins", step))

    def serving_ends(self) -> None:
        self.threads.add(threading.get_ident())
        self.served.append(("ends", len(self.steps)))

    def step_finished(self, record: StepRecord) -> None:
        self.threads.add(threading.get_ident())
        self.steps.append(record)

    def status_changed(self, status: RunStatus) -> None:
        self.statuses.append(status)

    def event_happened(self, event: RunEvent) -> None:
        self.events.append(event)

    def checkpoint_written(self, step: int) -> None:
        self.checkpoints.append(step)


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]) -> Callable[..., list[StepRecord]]:
    """A run of one device, to its end: what whoever follows it sees."""

    def run(*observers: Observer) -> list[StepRecord]:
        options: dict[str, Any] = {"model": str(tiny_model), "run_dir": str(tmp_path / "run"), "steps": STEPS}
        server = GpuServer(port=0, cut_layer=1, dtype="float32", **options)
        for observer in observers:
            server.observe(observer)

        def take_part() -> None:
            data = pairs_file("a", 9)
            device = {"name": "a", "engine": "torch", "model": str(tiny_model), "data": data, "dtype": "float32"}
            with EdgeClient(server.url, give_up_after=0.0, **device) as client:
                list(client.train())

        with server:
            device = run_in_thread(take_part)
            try:
                return list(server.train())
            finally:
                assert isinstance(device.exception(SECONDS), ConnectionFailed | None)

    return run


# Observers


def test_rounds_ends_for_which_there_is_no_time_are_not_written_and_the_last_one_always_is(
    run: Callable[..., list[StepRecord]], monkeypatch: Any
) -> None:
    monkeypatch.setattr("gpu_server.checkpoints.SHORTEST_PAUSE", 1e6)
    watching = Watching()
    run(watching)
    assert watching.checkpoints == [0, STEPS]


def test_everybody_who_watches_a_run_is_told_the_same(run: Callable[..., list[StepRecord]]) -> None:
    first, second = Watching(), Watching()
    followed = run(first, second)
    assert [step.number for step in followed] == list(range(1, STEPS + 1))
    assert first.steps == second.steps == followed
    assert first.statuses == second.statuses
    told = [(status.step, status.connected, status.is_saved) for status in first.statuses]
    assert told[0] == (0, 1, False)  # the device has joined
    assert told[-1] == (STEPS, 0, True)  # and left, with the adapter
    assert told == sorted(told, key=lambda status: (status[2], status[0]))
    assert first.statuses[-1].unfinished == ()
    assert len(told) == 1 + STEPS + 2  # it joined; every step; the run is complete; it left
    assert first.events == second.events
    assert first.checkpoints == second.checkpoints
    assert first.checkpoints[-1] == STEPS
    assert first.served == second.served == [("begins", 0), ("ends", STEPS)]
    assert len(first.threads | second.threads) == 1


def test_members_are_copied_only_for_an_observer_that_asks_for_it(
    run: Callable[..., list[StepRecord]], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_run, status = [0], Federation.status

    def counting(federation: Federation) -> RunStatus:
        in_the_run[0] += threading.current_thread().name == "server"
        return status(federation)

    monkeypatch.setattr(Federation, "status", counting)
    run(Observer())
    assert in_the_run == [0]


@pytest.mark.parametrize(
    "method",
    ["serving_begins", "serving_ends", "step_finished", "status_changed", "event_happened", "checkpoint_written"],
)
def test_what_an_observer_raises_ends_the_run_and_is_told(run: Callable[..., list[StepRecord]], method: str) -> None:
    class Failing(Watching):
        def fail(self, *_: object) -> None:
            raise ZeroDivisionError("of an observer")

    setattr(Failing, method, Failing.fail)
    with pytest.raises(ZeroDivisionError, match="of an observer"):
        run(Failing())


def test_whoever_comes_too_late_to_watch_is_told_so(tiny_model: Path, tmp_path: Path) -> None:
    with (
        GpuServer(model=str(tiny_model), run_dir=str(tmp_path / "run"), steps=1, port=0) as server,
        pytest.raises(RuntimeError, match="call observe before the with block"),
    ):
        server.observe(Watching())


# How it ends


def test_a_server_that_could_not_listen_serves_its_run_once_the_port_is_free(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        server = GpuServer(model=str(tiny_model), run_dir=str(tmp_path / "run"), steps=STEPS, port=port, dtype="float32")
        with pytest.raises(ServerError, match=f"cannot listen on 127.0.0.1:{port}: "), server:
            pass
    data = pairs_file("a", 9)

    def take_part() -> None:
        with EdgeClient(server.url, name="a", engine="torch", model=str(tiny_model), data=data, dtype="float32") as client:
            list(client.train())

    with server:
        device = run_in_thread(take_part)
        assert len(list(server.train())) == STEPS
        device.result(SECONDS)


def test_what_fails_ends_a_run_and_is_not_lost_if_it_fails_after_the_end() -> None:
    async def end() -> None:
        federation: Any = SimpleNamespace(phase=Phase.TRAINING)
        lifetime = Lifetime(asyncio.get_running_loop(), federation, {}, grace_period=0.0)
        go = asyncio.Event()

        async def fail() -> None:
            await go.wait()
            raise ZeroDivisionError

        lifetime.spawn(fail())
        lifetime.end(to_be_continued=True)
        assert await lifetime.until_end()
        go.set()
        await lifetime.finish_tasks(SECONDS)
        lifetime.raise_late()

    async def end_in_the_same_turn() -> None:
        federation: Any = SimpleNamespace(phase=Phase.TRAINING)
        lifetime = Lifetime(asyncio.get_running_loop(), federation, {}, grace_period=0.0)
        lifetime.end()
        lifetime.fail(ZeroDivisionError())
        lifetime.fail(KeyError())
        await lifetime.finish_tasks(SECONDS)
        lifetime.raise_late()

    async def fail() -> None:
        federation: Any = SimpleNamespace(phase=Phase.TRAINING)
        lifetime = Lifetime(asyncio.get_running_loop(), federation, {}, grace_period=0.0)

        async def divide() -> None:
            raise ZeroDivisionError

        lifetime.spawn(divide())
        await lifetime.until_end()

    async def iterate_no_more() -> None:
        federation: Any = SimpleNamespace(phase=Phase.TRAINING)
        lifetime = Lifetime(asyncio.get_running_loop(), federation, {}, grace_period=0.0)
        lifetime.fail(StopIteration())  # which no future takes
        await lifetime.until_end()

    for each in (end, end_in_the_same_turn, fail):
        with pytest.raises(ZeroDivisionError):
            asyncio.run(each())
    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(iterate_no_more())


@pytest.mark.parametrize("end", ["stop", "suspend"])
def test_what_was_learnt_before_the_step_that_fails_after_the_end_is_saved(
    end: str, tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is ended while step 3 is computed, and that step then diverges."""
    options: dict[str, Any] = {"model": str(tiny_model), "run_dir": str(tmp_path / "run"), "steps": 9}
    server = GpuServer(port=0, cut_layer=1, dtype="float32", **options)
    train = TorchEngine.train

    def diverge(engine: TorchEngine, step: int, *rest: Any) -> Trained:
        if step < 3:
            return train(engine, step, *rest)
        getattr(server, end)()
        raise TrainingDiverged("the loss of step 3 is nan")

    monkeypatch.setattr(TorchEngine, "train", diverge)

    def take_part() -> None:
        device = {"name": "a", "engine": "torch", "model": str(tiny_model), "data": pairs_file("a", 9), "dtype": "float32"}
        with EdgeClient(server.url, give_up_after=0.0, **device) as client:
            list(client.train())

    with server:
        device = run_in_thread(take_part)
        with pytest.raises(TrainingDiverged, match="step 3"):
            list(server.train())
        device.exception(SECONDS)
    assert (server.adapter_folder / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "checkpoints" / f"{2:09}.safetensors").is_file()


# What is written


class Written(RunDirectory):
    """Instead of a disk: what is written, and on which thread. A disk that is slow, until ``go`` is set."""

    def __init__(self, go: threading.Event) -> None:
        self.done: list[Any] = []
        self.threads: set[str] = set()
        self.checkpoints: Any = SimpleNamespace(write=self._write)
        self._go = go

    def _write(self, what: Any) -> None:
        assert self._go.wait(SECONDS)
        self.done.append(what)
        self.threads.add(threading.current_thread().name)

    def describe(self, description: Any) -> None:
        self.done.append(description.url)

    def sync_metrics(self) -> None:
        self._write("metrics on the disk")

    append_metrics = write_codec_state = _write


@pytest.fixture
def disk() -> Written:
    return Written(threading.Event())


@pytest.fixture
def journal(disk: Written) -> Any:
    description: Any = SimpleNamespace(served_at=lambda url: SimpleNamespace(url=url))
    model: Any = None
    journal = Journal(disk, description, model, model, base_model="")
    journal.begin("ws://here")
    yield journal
    disk._go.set()
    journal.close()


def test_steps_and_decisions_are_written_in_the_order_asked_by_a_thread_of_their_own(journal: Journal, disk: Written) -> None:
    asked: list[Future[None]] = [journal.write_step("row 1"), journal.write_step("row 2")]  # type: ignore[arg-type]
    asked += [journal.write_codec_state({"decided": 2}), journal.write_step("row 3")]  # type: ignore[arg-type]
    assert disk.done == ["ws://here"]
    assert not any(future.done() for future in asked)
    disk._go.set()
    for future in asked:
        future.result(SECONDS)
    assert disk.done == ["ws://here", "row 1", "row 2", {"decided": 2}, "row 3"]
    assert len(disk.threads) == 1
    assert threading.current_thread().name not in disk.threads


def test_neither_steps_nor_decisions_wait_for_a_checkpoint(journal: Journal, disk: Written) -> None:
    writing, written = threading.Event(), threading.Event()

    def write(_: object) -> None:
        writing.set()
        assert written.wait(SECONDS)

    disk.checkpoints = SimpleNamespace(write=write)
    disk._go.set()
    checkpoint = journal.write_checkpoint("checkpoint 1")  # type: ignore[arg-type]
    assert writing.wait(SECONDS)
    journal.write_step("row 2").result(SECONDS)  # type: ignore[arg-type]
    journal.write_codec_state({"decided": 2}).result(SECONDS)
    assert not checkpoint.done()
    written.set()
    checkpoint.result(SECONDS)


def test_bytes_are_counted_step_by_step_however_slow_the_disk_is(journal: Journal, disk: Written) -> None:
    """A step's line has the bytes until it was finished; of three steps on a disk that is stuck, none gets all."""
    num_bytes = iter([(10, 1), (20, 2), (30, 3)])
    peer: Any = SimpleNamespace(take_counts=lambda: next(num_bytes))
    federation: Any = SimpleNamespace(
        round=0, early_stopping=None, phase=Phase.TRAINING, status=lambda: None, expires=lambda: None
    )
    engine: Any = SimpleNamespace(round_end={})
    watching = Watching()

    async def finish_steps() -> None:
        lifetime = Lifetime(asyncio.get_running_loop(), federation, {}, grace_period=0.0)
        peers = {"a": peer}
        performer = Performer(federation, engine, journal=journal, observers=[watching], peers=peers, lifetime=lifetime)
        for number in (1, 2, 3):
            record = StepRecord(
                number=number,
                loss=0.0,
                labelled_tokens=1,
                tokens=1,
                seconds={},
                deadline=1.0,
                codec="float32",
                server_compute=0.0,
            )
            performer.perform([FinishStep(record=record)])
            for _ in range(5):
                await asyncio.sleep(0)  # every task does what it can without the disk
        assert next(num_bytes, None) is None
        assert watching.steps == []
        disk._go.set()
        await lifetime.finish_tasks(SECONDS)
        performer.close()

    asyncio.run(finish_steps())
    assert [(step.number, step.bytes_up, step.bytes_down) for step in watching.steps] == [
        (1, {"a": 10}, {"a": 1}),
        (2, {"a": 20}, {"a": 2}),
        (3, {"a": 30}, {"a": 3}),
    ]


def test_what_is_decided_about_a_codec_is_on_the_disk_before_the_step_is_computed(journal: Journal, disk: Written) -> None:
    class Engine:
        round_end: Any = None

        def check(self, *_: Any) -> dict[str, float]:
            return {"": 0.5}

        def train(self, *_: Any) -> Trained:
            return Trained(loss=float(len(disk.done)), labelled_tokens=1, gradients={})

    class Federation:
        phase, round, early_stopping = Phase.TRAINING, 0, None
        result: Trained

        def codec_of(self, step: int) -> str:
            return "int8"

        def expires(self) -> None:
            return None

        def checked(self, changes: dict[str, float]) -> list[Any]:
            assert changes == {"int8": 0.5}
            asyncio.get_running_loop().call_later(0, disk._go.set)
            return [SaveCodecState(state=changes)]

        def trained(self, trained: Trained, *_: float) -> list[Any]:
            self.result = trained
            return []

    federation: Any = Federation()

    async def perform() -> None:
        lifetime = Lifetime(asyncio.get_running_loop(), federation, {}, grace_period=0.0)
        engine: Any = Engine()
        performer = Performer(federation, engine, journal=journal, observers=[], peers={}, lifetime=lifetime)
        performer.perform([Train(step=1, total_steps=1, micro_batch=0, codecs_to_try=["coarse"], batches={})])
        await lifetime.finish_tasks(SECONDS)
        lifetime.raise_late()
        performer.close()

    asyncio.run(perform())
    assert disk.done == ["ws://here", {"int8": 0.5}]
    assert federation.result.loss == 2.0


def test_whatever_the_federation_wants_done_somebody_does(journal: Journal) -> None:
    federation: Any = SimpleNamespace(round=0, early_stopping=None)
    engine: Any = SimpleNamespace(round_end={})
    nobody: Any = None
    performer = Performer(federation, engine, journal=journal, observers=[], peers={}, lifetime=nobody)
    assert performer._methods.keys() == set(get_args(Action))


# What is sent


class Socket:
    """A connection, as far as a peer sends."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    async def send(self, data: bytes) -> None:
        self.sent.append(data)

    async def close(self, code: int) -> None:
        """Nobody is there."""


WELCOME = Welcome(run="r", settings=None, fingerprint="f", restarts=0)  # type: ignore[arg-type]


def greeted(socket: Socket) -> Peer:
    connection: Any = socket
    peer = Peer(connection, max_messages_per_second=1.0)
    peer.session.receive(Session(Side.CLIENT).send(Hello(name="a", fingerprint="f")))
    return peer


def test_an_answer_that_nobody_waits_for_is_not_sent_and_its_sender_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "send", lambda self, message: b"bytes")

    async def tell() -> None:
        socket = Socket()
        stranger: Any = socket
        assert not await Peer(stranger, max_messages_per_second=1.0).send(WELCOME)  # it has not asked
        assert socket.sent == []

    asyncio.run(tell())


def test_an_answer_is_sent_to_who_waits_and_not_to_who_was_refused_meanwhile() -> None:
    async def tell() -> None:
        socket = Socket()
        peer = greeted(socket)
        assert peer.session.awaits(WELCOME)
        await peer.refuse("it is over")
        assert len(socket.sent) == 1
        assert not await peer.send(WELCOME)
        await peer.refuse("twice")
        assert len(socket.sent) == 1

    asyncio.run(tell())


def test_an_answer_that_cannot_be_sent_though_it_is_awaited_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    async def tell() -> None:
        peer = greeted(Socket())

        def fail(_: object) -> bytes:
            raise LocalProtocolError("a defect")

        monkeypatch.setattr(peer.session, "send", fail)
        with pytest.raises(LocalProtocolError, match="a defect"):
            await peer.send(WELCOME)

    asyncio.run(tell())


def test_who_says_goodbye_just_when_it_is_refused_ends_nothing_but_its_own_conversation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def tell() -> None:
        socket = Socket()
        peer = greeted(socket)
        awaits = Session.awaits

        def say_goodbye_meanwhile(session: Session, message: Any) -> bool:
            is_awaited = awaits(session, message)
            session.receive(encode(Goodbye()))  # on the thread that takes its messages
            return is_awaited

        monkeypatch.setattr(Session, "awaits", say_goodbye_meanwhile)
        await peer.refuse("its enrolment was revoked")
        assert socket.sent == []

    asyncio.run(tell())


def test_disk_that_is_full_while_an_answer_is_sent_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> bytes:
        raise OSError(28, "No space left on device")

    async def tell() -> None:
        peer = greeted(Socket())
        monkeypatch.setattr(peer.session, "send", fail)
        with pytest.raises(ServerError, match="cache cannot be written: No space left on device; when that is mended"):
            await peer.send(WELCOME)

    asyncio.run(tell())


def test_who_is_refused_is_told_a_reason_that_fits_a_message() -> None:
    client = Session(Side.CLIENT)

    async def tell() -> Any:
        socket = Socket()
        connection: Any = socket
        peer = Peer(connection, max_messages_per_second=1.0)
        peer.session.receive(client.send(Hello(name="a", fingerprint="f")))
        await peer.refuse("x" * 5000, retry_after=3.0)
        return client.receive(socket.sent[0])

    assert vars(asyncio.run(tell())) == vars(Failure(reason="x" * 1000, retry_after=3.0))
