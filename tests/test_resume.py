"""Runs that stop and go on, through the programs a person starts, and the run directories that cannot go on."""

import errno
import importlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import adapter_bytes, make_model, metrics, run_in_thread, run_split
from ports import free_port
from programs import arguments, program, read_until

from edge_client import ConnectionFailed, EdgeClient, Refused, Step
from gpu_server import ConfigError, GpuServer, RunEndedEarly, ServerError
from gpu_server.checkpoints import Checkpoints, SavedRound
from gpu_server.federation import Phase
from gpu_server.run_directory import RunDirectory
from gpu_server.sdk import _StepQueue
from gpu_server.serving.lifetime import Lifetime
from gpu_server.torch_engine import TorchEngine

STEPS = 12


@pytest.fixture
def settings(tiny_model: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_model),
        "cut_layer": 2,
        "lora_rank": 4,
        "steps": STEPS,
        "dtype": "float32",
        "micro_batches": 2,
        "checkpoint_every": 4,
    }


def losses(run_dir: Path) -> list[float]:
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def serving(*words: str, **more: Any) -> AbstractContextManager["subprocess.Popen[str]"]:
    # The runs they are compared with have one thread, too: sums of another order differ in their last bits.
    return program("gpu_server", "serve", *words, env={**os.environ, "OMP_NUM_THREADS": "1"}, **more)


def train(steps: Iterator[Step], after: int, do: Callable[[], None]) -> None:
    """All of ``steps``, and something else after one of them."""
    for step in steps:
        if step.number == after:
            do()


def test_terminated_server_keeps_its_last_round_and_goes_on_when_resumed(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    client = {"data": pairs_file("a", 9), "batch_size": 2, "state_dir": tmp_path / "state"}
    run_split({**settings, "run_dir": str(tmp_path / "undisturbed")}, {"a": client})
    port, run_dir = free_port(), tmp_path / "run"
    # No checkpoint but the one that the signal asks for.
    first = {**settings, "checkpoint_every": 1000, "port": port, "run_dir": run_dir, "linger": 1}

    def take_part() -> list[int]:
        numbers = []
        with EdgeClient(
            f"ws://127.0.0.1:{port}", engine="torch", model=settings["model"], name="a", dtype="float32", **client
        ) as device:
            for step in device.train():
                numbers.append(step.number)
                if step.number == 5 and numbers.count(5) == 1:
                    os.kill(server.pid, signal.SIGTERM)
        return numbers

    with serving(*arguments(first)) as server:
        read_until(server, "listening on")
        numbers = run_in_thread(take_part)
        _, said = server.communicate(timeout=60)
        assert server.returncode == 128 + signal.SIGTERM
        assert "--resume goes on from there" in said
        assert "connection lost" not in said  # one event, one line
        assert "Traceback" not in said
    with serving("--resume", "--port", str(port), *arguments({"run_dir": run_dir, "model": settings["model"]})) as again:
        _, said = again.communicate(timeout=60)
        assert (again.returncode, "going on after step" in said) == (0, True)
    assert numbers.result(timeout=60) == list(range(1, STEPS + 1))  # no step was lost, and none was done twice
    assert adapter_bytes(run_dir) == adapter_bytes(tmp_path / "undisturbed")
    assert losses(run_dir) == losses(tmp_path / "undisturbed")


def test_server_that_is_resumed_and_stopped_before_a_round_ends_leaves_its_checkpoints_as_they_are(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path], monkeypatch: Any
) -> None:
    options = {**settings, "run_dir": str(tmp_path / "run"), "linger": 1}
    device = {
        "engine": "torch",
        "model": options["model"],
        "data": pairs_file("a", 9),
        "state_dir": tmp_path / "state",
        "dtype": "float32",
    }
    with GpuServer(**options, port=0) as server:

        def take_part() -> None:
            with EdgeClient(server.url, name="a", give_up_after=0.0, **device) as client:
                for step in client.train():
                    if step.number == 8:
                        server.suspend()

        with pytest.raises(ConnectionFailed):
            take_part()
    last = Checkpoints(tmp_path / "run/checkpoints").steps()[-1]
    run = json.loads((tmp_path / "run/run.json").read_text())["run"]
    kept = Checkpoints(tmp_path / "run/checkpoints").latest(run)
    written, write = [], Checkpoints.write

    def watched_write(self: Checkpoints, saved: SavedRound) -> None:
        written.append(saved.step)
        write(self, saved)

    monkeypatch.setattr(Checkpoints, "write", watched_write)
    with GpuServer(run_dir=options["run_dir"], model=options["model"], resume=True, port=0) as again:
        again.suspend()
        with pytest.raises(RunEndedEarly, match=f"the server was stopped after step {last}"):
            list(again.train())
    assert written == [last]
    again_kept = Checkpoints(tmp_path / "run/checkpoints").latest(run)
    assert kept is not None
    assert again_kept is not None
    assert (again_kept.step, again_kept.membership) == (kept.step, kept.membership)
    assert {name: tensor.tolist() for name, tensor in again_kept.state.items()} == {
        name: tensor.tolist() for name, tensor in kept.state.items()
    }


@pytest.mark.parametrize("then", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_does_not_disturb_what_the_first_one_began(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path], then: signal.Signals
) -> None:
    options = {**settings, "steps": 10**6, "checkpoint_every": 1000, "port": 0, "run_dir": tmp_path / "run"}
    with serving(*arguments(options)) as server:
        url = read_until(server, "listening on").split()[2]
        device = {
            "engine": "torch",
            "model": settings["model"],
            "data": pairs_file("a", 9),
            "state_dir": tmp_path / "state",
            "give_up_after": 0.0,
        }
        client = EdgeClient(url, name="a", dtype="float32", **device)
        with pytest.raises(ConnectionFailed), client:
            train(client.train(), after=3, do=lambda: [server.send_signal(each) for each in (signal.SIGTERM, then)].clear())
        _, said = server.communicate(timeout=60)
    assert "Traceback" not in said
    assert "; --resume goes on from there" in said
    assert server.returncode in {128 + signal.SIGTERM, 130}  # two that come at once have no order
    assert Checkpoints(tmp_path / "run/checkpoints").steps()[-1] >= 3


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs a signal of the user's own")
def test_whoever_follows_a_run_hears_a_signal_that_woke_nobody() -> None:
    """It comes while another thread runs, as one does that comes just before this one begins to wait."""

    class Heard(Exception):
        pass

    def hear(number: int, frame: object) -> None:
        raise Heard

    steps = _StepQueue()
    before = signal.signal(signal.SIGUSR1, hear)
    late = threading.Timer(30.0, steps.end)  # who hears nothing would follow for ever
    late.start()
    threading.Timer(0.1, lambda: signal.raise_signal(signal.SIGUSR1)).start()
    try:
        with pytest.raises(Heard):
            list(steps.follow())
        assert late.is_alive()  # it did not have to be woken
    finally:
        late.cancel()
        signal.signal(signal.SIGUSR1, before)


def test_server_that_is_terminated_before_its_run_starts_says_so_and_waits_again_when_resumed(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    with serving(*arguments({**settings, "port": 0, "run_dir": tmp_path / "run"})) as server:
        read_until(server, "listening on")
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=60)
        assert server.returncode == 128 + signal.SIGTERM
    assert said.splitlines()[-1].endswith("stopped before the run started; --resume waits for its devices again")
    with GpuServer(run_dir=str(tmp_path / "run"), resume=True) as again:
        assert again.total_steps == 0


def test_interruption_while_the_server_begins_to_listen_leaves_no_thread_behind(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    interrupted = threading.Event()

    def interrupt(*_: Any) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    def describe(self: RunDirectory, description: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.wait(timeout=60)

    monkeypatch.setattr(RunDirectory, "describe", describe)
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), GpuServer(**settings, port=0, run_dir=str(tmp_path / "run")):
            pytest.fail("it went on")
    finally:
        signal.signal(signal.SIGINT, before)
    assert "server" not in [thread.name for thread in threading.enumerate()]


def test_server_that_is_stopped_while_a_round_ends_writes_its_checkpoint_once_at_a_time(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path], monkeypatch: Any
) -> None:
    options = {**settings, "checkpoint_every": 3, "run_dir": str(tmp_path / "run")}
    device = {
        "engine": "torch",
        "model": options["model"],
        "data": pairs_file("a", 9),
        "state_dir": tmp_path / "state",
        "dtype": "float32",
    }
    aggregate, write, finish_tasks = TorchEngine.aggregate, Checkpoints.write, Lifetime.finish_tasks
    first_is_written, is_ending, nobody_writes = threading.Event(), threading.Event(), threading.Lock()

    def aggregate_and_stop(self: TorchEngine, step: int, *rest: Any) -> Any:
        if step == 3:
            assert first_is_written.wait(timeout=60)
            server.suspend()
        return aggregate(self, step, *rest)

    def watched_write(self: Checkpoints, saved: SavedRound) -> None:
        assert nobody_writes.acquire(blocking=False)
        if saved.step == 3:
            assert is_ending.wait(timeout=60)
        write(self, saved)
        nobody_writes.release()
        first_is_written.set()

    async def watched_finish(self: Lifetime, seconds: float) -> None:
        is_ending.set()
        await finish_tasks(self, seconds)

    monkeypatch.setattr(TorchEngine, "aggregate", aggregate_and_stop)
    monkeypatch.setattr(Checkpoints, "write", watched_write)
    monkeypatch.setattr(Lifetime, "finish_tasks", watched_finish)
    with GpuServer(**options, port=0) as server:
        with EdgeClient(server.url, name="a", give_up_after=0.0, **device) as client, pytest.raises(ConnectionFailed):
            list(client.train())
        with pytest.raises(RunEndedEarly, match="the server was stopped"):
            list(server.train())
    assert Checkpoints(tmp_path / "run/checkpoints").steps() == [0, 3]
    assert len(losses(tmp_path / "run")) >= 3


def test_device_that_is_refused_for_other_data_is_started_again_as_before_and_loses_nothing(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    options = {**settings, "aggregate_every": STEPS}
    device = {"data": pairs_file("a", 9), "batch_size": 2}
    run_split({**options, "run_dir": str(tmp_path / "undisturbed")}, {"a": {**device, "state_dir": tmp_path / "other"}})
    as_before = {
        "engine": "torch",
        "model": settings["model"],
        "name": "a",
        "dtype": "float32",
        "state_dir": tmp_path / "state",
        **device,
    }
    with GpuServer(**options, port=0, run_dir=str(tmp_path / "run")) as server:
        killed = EdgeClient(server.url, **as_before)
        killed.__enter__()
        steps = killed.train()
        for _ in range(5):
            next(steps)
        killed._membership.hang_up()
        other_data = {**as_before, "batch_size": 3}
        with pytest.raises(Refused, match="start it as before"), EdgeClient(server.url, **other_data) as other:
            other.start()
        with EdgeClient(server.url, **as_before) as client:
            assert [step.number for step in client.train()] == list(range(6, STEPS + 1))
        assert len(list(server.train())) == STEPS
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "undisturbed")


def test_start_that_is_refused_leaves_the_note_of_how_this_device_computes_as_it_was(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    device = {"data": pairs_file("a", 9), "batch_size": 2, "engine": "auto", "device": "cpu", "dtype": "auto"}
    run_split({**settings, "run_dir": str(tmp_path / "undisturbed")}, {"a": {**device, "state_dir": tmp_path / "other"}})
    as_before = {**device, "model": settings["model"], "name": "a", "state_dir": tmp_path / "state"}
    with GpuServer(**settings, port=0, run_dir=str(tmp_path / "run")) as server:
        killed = EdgeClient(server.url, **as_before)
        killed.__enter__()
        next(killed.train())
        killed._membership.hang_up()
        (place,) = (tmp_path / "state/places").rglob("place.json")
        noted = place.read_bytes()
        otherwise = {**as_before, "engine": "torch", "dtype": "bfloat16", "batch_size": 3}
        with pytest.raises(Refused, match="start it as before"), EdgeClient(server.url, **otherwise) as other:
            other.start()
        assert (other.engine, other.dtype) == ("torch", "bfloat16")
        assert place.read_bytes() == noted
        with EdgeClient(server.url, **as_before) as client:
            assert (client.engine, client.dtype) == ("onnxruntime", "float32")
            list(client.train())
        list(server.train())
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "undisturbed")


def test_device_that_was_refused_from_the_first_may_come_with_what_the_server_asks_for(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    device = {"name": "a", "data": pairs_file("a", 9), "batch_size": 2, "state_dir": tmp_path / "state"}
    with GpuServer(**settings, max_batch_tokens=20, port=0, run_dir=str(tmp_path / "run")) as server:
        with pytest.raises(Refused, match="smaller --batch-size or --max-length"), EdgeClient(server.url, **device) as client:
            client.start()
        assert not list((tmp_path / "state/places").rglob("place.json"))
        with EdgeClient(server.url, **device, max_length=10) as client:
            assert len(list(client.train())) == STEPS


class Clock:
    """A loop's timers, without the loop."""

    def __init__(self) -> None:
        self.now = 0.0
        self._numbers = itertools.count()
        self._due: dict[int, tuple[float, Callable[[], None]]] = {}

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Any:
        number = next(self._numbers)
        self._due[number] = (self.now + seconds, callback)
        return SimpleNamespace(cancel=lambda: self._due.pop(number, None))

    def create_future(self) -> None:
        """It has none: nobody awaits anything."""

    def pass_to(self, then: float) -> None:
        for timer, (due, callback) in sorted(self._due.items(), key=lambda item: item[1][0]):
            if due <= then:
                self.now = due
                del self._due[timer]
                callback()
        self.now = then


@pytest.fixture
def stopped(settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]) -> dict[str, Any]:
    """The options of a run that was suspended after step 5."""
    options = {**settings, "port": 0, "run_dir": str(tmp_path / "run")}
    device = {
        "engine": "torch",
        "model": options["model"],
        "data": pairs_file("a", 9),
        "state_dir": tmp_path / "state",
        "dtype": "float32",
    }
    with GpuServer(**options) as server, EdgeClient(server.url, name="a", **device) as client:
        steps = client.train()
        for _ in range(5):
            next(steps)
        server.suspend()
    return {**options, "resume": True}


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("cut_layer", 1, "cut-layer 2; it cannot go on with cut-layer 1"),
        ("lora_rank", 8, "lora-rank 4"),
        ("lr", 0.5, "lr"),
        ("lora_targets", "c_proj,c_fc", "lora-targets c_attn; it cannot go on with lora-targets c_fc,c_proj"),
        ("init_adapter", "nowhere", "no init-adapter; it cannot go on with init-adapter nowhere. Leave --init-adapter out"),
    ],
)
def test_run_of_another_configuration_is_not_gone_on_with(stopped: dict[str, Any], name: str, value: Any, shown: str) -> None:
    before = contents(Path(stopped["run_dir"]))
    with pytest.raises(ConfigError, match=shown), GpuServer(**{**stopped, name: value}):
        pass
    assert contents(Path(stopped["run_dir"])) == before


def test_run_of_another_model_is_not_gone_on_with(stopped: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make_model(tmp_path / "other", seed=1)
    before = contents(Path(stopped["run_dir"]))
    with (
        pytest.raises(ConfigError, match="holds a run of another model: its fingerprint is"),
        GpuServer(**{**stopped, "model": str(other)}),
    ):
        pass
    assert contents(Path(stopped["run_dir"])) == before


def test_folder_without_a_run_is_not_resumed(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run to resume; correct --run-dir, or start a run: "):
        GpuServer(**settings, resume=True, run_dir=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_run_of_another_version_goes_on_unless_that_had_settings_which_this_one_would_leave_out(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with GpuServer(**settings, run_dir=str(run_dir), port=0):
        pass
    described = json.loads((run_dir / "run.json").read_text())
    (began,) = described["history"]
    assert began.keys() == {"versions", "host", "time", "restarts"}
    assert began["versions"] == described["versions"]
    assert "lr" in described["of_the_run"]
    assert "port" not in described["of_the_run"]

    described["versions"] = {"splitlora": "99.0", "torch": "1.0"}
    described["config"] |= {"colour": "blue", "page_size": 5}  # which a later version may have
    described["of_the_run"].append("colour")
    (run_dir / "run.json").write_text(json.dumps(described))
    before = contents(run_dir)
    with pytest.raises(
        ConfigError, match=r"was served by splitlora 99\.0, and has settings that .* does not know: colour; go on"
    ):
        GpuServer(**settings, run_dir=str(run_dir), resume=True)
    assert contents(run_dir) == before

    described["of_the_run"].remove("colour")
    (run_dir / "run.json").write_text(json.dumps(described))
    with GpuServer(resume=True, run_dir=str(run_dir), port=0) as server:
        assert any(re.fullmatch(r"torch \S+, before 1\.0", choice) for choice in server.choices)
    now = json.loads((run_dir / "run.json").read_text())
    assert now["history"] == [began]  # what it says is what it was served with, and that is the same again
    assert now["config"].keys() == described["config"].keys() - {"colour", "page_size"}


def test_one_command_starts_a_run_and_goes_on_with_it(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    device = {"a": {"data": pairs_file("a", 9), "batch_size": 2, "state_dir": tmp_path / "state"}}
    command = {**settings, "run_dir": str(tmp_path / "run"), "resume_or_start": True, "linger": 0.0}
    with GpuServer(**command, port=0):
        pass  # nobody has come yet
    run_split(command, device)
    run_split({**settings, "run_dir": str(tmp_path / "undisturbed")}, device)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "undisturbed")
    assert json.loads((tmp_path / "run/run.json").read_text())["restarts"] == 1


def test_going_on_without_a_run_directory_says_what_is_missing(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^run-dir is missing: the folder of the run to go on with$"):
        GpuServer(resume=True)


def test_finished_run_says_so_and_what_can_be_done(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path], caplog: Any
) -> None:
    run_split({**settings, "run_dir": str(tmp_path / "run")}, {"a": {"data": pairs_file("a", 9), "batch_size": 2}})
    caplog.set_level("INFO", "gpu_server")
    with GpuServer(resume=True, run_dir=str(tmp_path / "run"), port=0, linger=0.1) as server:
        assert list(server.train()) == []
    folder = tmp_path / "run/adapter"
    assert [record.message for record in caplog.records if record.name == "gpu_server"] == [
        f"all 12 steps of this run are done, and its adapter is in {folder}; to train further: a larger --steps, or another "
        f"run with --init-adapter {folder}",
        "the run is complete; waiting up to 0.1 s for a to fetch the adapter",
    ]


def test_finished_run_that_is_made_longer_is_the_run_that_was_begun_so(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    devices = {
        name: {"data": pairs_file(name, 9, 100 * offset), "batch_size": 2, "state_dir": tmp_path / name}
        for offset, name in enumerate("ab")
    }
    run_split({**settings, "run_dir": str(tmp_path / "longer"), "steps": 5}, devices)
    run_split({"model": settings["model"], "run_dir": str(tmp_path / "longer"), "resume": True, "steps": STEPS}, devices)
    run_split({**settings, "run_dir": str(tmp_path / "undisturbed")}, devices)
    assert adapter_bytes(tmp_path / "longer") == adapter_bytes(tmp_path / "undisturbed")
    assert losses(tmp_path / "longer") == losses(tmp_path / "undisturbed")
    assert json.loads((tmp_path / "longer/run.json").read_text())["adapter"] == {"step": STEPS, "of": STEPS}


@pytest.mark.parametrize("aggregate_every", [1, 2])
def test_run_is_made_longer_while_its_device_waits_for_the_server(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path], aggregate_every: int
) -> None:
    settings |= {"aggregate_every": aggregate_every, "checkpoint_every": 1}
    data = {"data": pairs_file("a", 9), "batch_size": 2}
    port, run_dir, numbers = free_port(), str(tmp_path / "run"), []
    with GpuServer(**{**settings, "port": port, "run_dir": run_dir, "steps": 6}) as server:
        device = {
            "engine": "torch",
            "model": settings["model"],
            "name": "a",
            "dtype": "float32",
            "state_dir": tmp_path / "state",
            **data,
        }
        client = EdgeClient(server.url, **device).__enter__()
        steps = client.train()
        numbers += [next(steps).number for _ in range(5)]
        server.suspend()
    with GpuServer(run_dir=run_dir, resume=True, steps=STEPS) as again:
        numbers += [step.number for step in steps]
        client.__exit__(None, None, None)
        list(again.train())
    assert numbers[-1] == STEPS
    run_split({**settings, "run_dir": str(tmp_path / "undisturbed")}, {"a": {**data, "state_dir": tmp_path / "other"}})
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "undisturbed")
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")


def test_finished_run_whose_devices_have_forgotten_their_moments_is_not_made_longer(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    run = {**settings, "run_dir": str(tmp_path / "run"), "aggregate_every": 2}
    run_split(run, {"a": {"data": pairs_file("a", 9), "batch_size": 2, "state_dir": tmp_path / "state"}})
    before = contents(tmp_path / "run")
    longer = GpuServer(run_dir=run["run_dir"], port=0, resume=True, steps=STEPS + 2)
    with pytest.raises(ConfigError, match=r"is complete, and its devices no longer have .* --init-adapter "), longer:
        pass
    assert contents(tmp_path / "run") == before


def test_run_goes_on_where_the_adapter_it_began_with_is_not(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    device = {"a": {"data": pairs_file("a", 9), "batch_size": 2, "state_dir": tmp_path / "state"}}
    run_split({**settings, "run_dir": str(tmp_path / "first")}, device)
    start = {**settings, "init_adapter": str(tmp_path / "first/adapter")}
    run_split({**start, "run_dir": str(tmp_path / "second"), "steps": 5}, device)
    run_split({**start, "run_dir": str(tmp_path / "undisturbed")}, device)
    shutil.rmtree(tmp_path / "first")
    run_split({"model": settings["model"], "run_dir": str(tmp_path / "second"), "resume": True, "steps": STEPS}, device)
    assert adapter_bytes(tmp_path / "second") == adapter_bytes(tmp_path / "undisturbed")


def test_run_directory_belongs_to_one_server(stopped: dict[str, Any]) -> None:
    with GpuServer(**stopped), pytest.raises(ServerError, match="is in use by another server"), GpuServer(**stopped):
        pass


def test_torn_checkpoint_and_torn_metrics_send_the_run_back_to_the_one_before(
    stopped: dict[str, Any], settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    run_dir = Path(stopped["run_dir"])
    newest = sorted((run_dir / "checkpoints").glob("*.safetensors"))[-1]
    os.truncate(newest, newest.stat().st_size // 2)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    client = {"data": pairs_file("a", 9), "state_dir": tmp_path / "state"}
    run_split({**stopped}, {"a": client})
    run_split({**settings, "run_dir": str(tmp_path / "undisturbed")}, {"a": client})
    assert adapter_bytes(run_dir) == adapter_bytes(tmp_path / "undisturbed")
    assert losses(run_dir) == losses(tmp_path / "undisturbed")


@pytest.mark.parametrize("aggregate_every", [1, 2])
def test_device_that_evaluates_between_steps_while_its_server_goes_back_goes_back_too(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path], aggregate_every: int
) -> None:
    options = {**settings, "aggregate_every": aggregate_every, "checkpoint_every": 1}
    device = {"data": pairs_file("a", 9), "eval_data": pairs_file("held-out", 3), "batch_size": 2}
    run_split({**options, "run_dir": str(tmp_path / "undisturbed")}, {"a": {**device, "state_dir": tmp_path / "other"}})
    run_dir, port = tmp_path / "run", free_port()
    options = {**options, "port": port, "run_dir": str(run_dir)}
    url, state = f"ws://127.0.0.1:{port}", tmp_path / "state"
    with GpuServer(**options) as server:
        client = EdgeClient(
            url, engine="torch", model=settings["model"], name="a", dtype="float32", state_dir=state, **device
        ).__enter__()
        steps = client.train()
        for _ in range(7):
            next(steps)
        server.suspend()
    newest = sorted((run_dir / "checkpoints").glob("*.safetensors"))[-1]
    os.truncate(newest, newest.stat().st_size // 2)
    with GpuServer(**options, resume=True) as again:
        estimates: list[float] = []
        assert client.perplexity(estimates.append) == estimates[-1]
        assert len(estimates) == 2
        assert [step.number for step in steps][-1] == STEPS
        client.__exit__(None, None, None)
        assert list(again.train())[-1].number == STEPS
    assert adapter_bytes(run_dir) == adapter_bytes(tmp_path / "undisturbed")
    assert losses(run_dir) == losses(tmp_path / "undisturbed")


def test_run_whose_checkpoints_are_all_torn_refuses_to_start(stopped: dict[str, Any]) -> None:
    for path in Path(stopped["run_dir"], "checkpoints").glob("*.safetensors"):
        os.truncate(path, 5)
    with pytest.raises(ServerError, match=r"no checkpoint in .* is intact; the run cannot go on"), GpuServer(**stopped):
        pass


def test_complete_run_can_be_resumed_and_gives_late_devices_its_adapter(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    client = {"data": pairs_file("a", 9), "state_dir": tmp_path / "state"}
    options = {**settings, "run_dir": str(tmp_path / "run")}
    run_split(options, {"a": client})
    before = (adapter_bytes(tmp_path / "run"), losses(tmp_path / "run"))
    with GpuServer(**options, port=0, resume=True, linger=0.0) as server:
        assert list(server.train()) == []
    assert (adapter_bytes(tmp_path / "run"), losses(tmp_path / "run")) == before


def test_full_disk_ends_the_server_with_one_sentence_and_the_run_goes_on_later(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    client = {"data": pairs_file("a", 9), "batch_size": 2, "state_dir": tmp_path / "state"}
    run_split({**settings, "run_dir": str(tmp_path / "undisturbed")}, {"a": client})
    port, run_dir = free_port(), tmp_path / "run"
    options = {**settings, "port": port, "run_dir": run_dir, "linger": 1}

    def little_room() -> None:
        # The kernel takes no file beyond this size, as a full disk takes none: metrics fit, checkpoints of later steps do not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    def take_part() -> None:
        with EdgeClient(
            f"ws://127.0.0.1:{port}", engine="torch", model=settings["model"], name="a", dtype="float32", **client
        ) as device:
            for _ in device.train():
                pass

    # The first checkpoint has no moments of AdamW yet, those after it have.
    room = 4096 + sum(path.stat().st_size for path in (tmp_path / "undisturbed/adapter").glob("*.safetensors"))
    with serving(*arguments(options), preexec_fn=little_room) as server:
        read_until(server, "listening on")
        device = run_in_thread(take_part)
        _, said = server.communicate(timeout=60)
        assert server.returncode == 1
        assert "File too large; the ones before are kept, and --resume goes on from there" in said.splitlines()[-1]
        assert "Traceback" not in said
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["000000000.safetensors"]
    with serving("--resume", *arguments({"port": port, "run_dir": run_dir, "model": settings["model"]})) as again:
        again.communicate(timeout=60)
        assert again.returncode == 0
    device.result(timeout=60)
    assert adapter_bytes(run_dir) == adapter_bytes(tmp_path / "undisturbed")
    assert losses(run_dir) == losses(tmp_path / "undisturbed")


def no_room(monkeypatch: Any, function: str, name: str, allowed: int) -> None:
    """From the call after so many ``allowed`` ones on, a function that writes finds the disk full, for files of this name."""
    module, _, attribute = function.rpartition(".")
    original, calls = getattr(importlib.import_module(module), attribute), itertools.count()

    def full(path: Any, *rest: Any, **more: Any) -> Any:
        if Path(path).match(name) and next(calls) >= allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, *rest, **more)

    monkeypatch.setattr(function, full)


@pytest.mark.parametrize(
    ("function", "name", "allowed"),
    [
        ("gpu_server.history.line_file._private", "metrics.jsonl", 5),
        ("gpu_server.run_directory.replace_file", "codecs.json", 2),
        ("storage.run_description.replace_file", "run.json", 1),
        ("gpu_server.run_directory.save_adapter", "adapter", 0),
        ("gpu_server.checkpoints.replace_file", "*.safetensors", 0),
        ("gpu_server.checkpoints.replace_file", "*.safetensors", 2),
    ],
)
def test_wherever_the_disk_is_full_the_server_ends_with_one_sentence_and_goes_on_later(
    settings: dict[str, Any],
    tmp_path: Path,
    pairs_file: Callable[..., Path],
    monkeypatch: Any,
    function: str,
    name: str,
    allowed: int,
) -> None:
    settings |= {"codec": "int8", "check_codec_every": 3}
    data, port, run_dir = {"data": pairs_file("a", 9), "batch_size": 2}, free_port(), tmp_path / "run"

    def take_part() -> None:
        device = {
            "engine": "torch",
            "model": settings["model"],
            "name": "a",
            "dtype": "float32",
            "state_dir": tmp_path / "state",
            **data,
        }
        with EdgeClient(f"ws://127.0.0.1:{port}", **device) as client:
            train(client.train(), after=STEPS + 1, do=lambda: None)

    with monkeypatch.context() as patch:
        no_room(patch, function, name, allowed)
        with GpuServer(**settings, port=port, run_dir=str(run_dir)) as server:
            device = run_in_thread(take_part)
            with pytest.raises(ServerError, match=r"cannot be written.*: No space left on device; .*--resume goes on"):
                list(server.train())
    with GpuServer(run_dir=str(run_dir), resume=True, linger=1.0) as again:
        list(again.train())
    device.result(timeout=60)
    run_split({**settings, "run_dir": str(tmp_path / "undisturbed")}, {"a": {**data, "state_dir": tmp_path / "other"}})
    assert adapter_bytes(run_dir) == adapter_bytes(tmp_path / "undisturbed")
    assert losses(run_dir) == losses(tmp_path / "undisturbed")


def test_what_a_run_leaves_is_for_its_owner_alone(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    before = os.umask(0o022)
    try:
        run = {**settings, "run_dir": str(tmp_path / "run"), "codec": "int8", "check_codec_every": 3}
        run_split(run, {"a": {"data": pairs_file("a", 9), "batch_size": 2}})
    finally:
        os.umask(before)
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*")}
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    for name in ("metrics.jsonl", "codecs.json", "run.json", "checkpoints/000000012.safetensors"):
        assert modes[f"run/{name}"] == 0o600
    assert modes["run/checkpoints"] == 0o700


def test_finished_run_waits_as_long_as_it_says_after_every_device_that_is_lost(monkeypatch: Any) -> None:
    unfetched: Any = SimpleNamespace(phase=Phase.FINISHED, unfinished=lambda: ["a"])
    clock: Any = Clock()
    lifetime = Lifetime(clock, unfetched, {}, grace_period=60.0)
    ended = []
    monkeypatch.setattr(lifetime, "end", lambda: ended.append(clock.now))
    lifetime.end_if_all_have_left()
    clock.pass_to(50.0)
    lifetime.end_if_all_have_left()  # a device had come, and its connection was lost
    clock.pass_to(200.0)
    assert ended == [110.0]


def test_moved_run_directory_goes_on(
    stopped: dict[str, Any], settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    moved = tmp_path / "moved"
    shutil.move(stopped["run_dir"], moved)
    client = {"data": pairs_file("a", 9), "state_dir": tmp_path / "state"}
    run_split({"model": settings["model"], "run_dir": str(moved), "resume": True}, {"a": client})
    assert len(losses(moved)) == STEPS


def test_run_ends_with_what_is_left_when_a_device_leaves_for_good_and_says_so(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path], caplog: Any
) -> None:
    caplog.set_level("INFO", "gpu_server")
    files = {name: pairs_file(name, 9, 100 * offset) for offset, name in enumerate("ab")}

    def take_part(url: str, name: str, steps: int) -> int:
        done = 0
        with EdgeClient(
            url, engine="torch", model=settings["model"], data=files[name], name=name, state_dir=tmp_path / name
        ) as client:
            for done, _ in enumerate(client.train(), 1):
                if done == steps:
                    break
        return done

    with GpuServer(**settings, clients=2, port=0, run_dir=str(tmp_path / "run")) as server:
        leaver, stayer = (run_in_thread(lambda n=n, s=s: take_part(server.url, n, s)) for n, s in (("a", 3), ("b", STEPS)))
        assert len(list(server.train())) == STEPS
        assert (leaver.result(timeout=60), stayer.result(timeout=60)) == (3, STEPS)
    assert re.search(r"a \(127\.0\.0\.1:\d+\) has left the run after step 3: it said goodbye", caplog.text)
    rows = metrics(tmp_path / "run")
    assert rows[2]["clients"].keys() == {"a", "b"}
    assert rows[-1]["clients"].keys() == {"b"}


@pytest.mark.parametrize("name", ["resume", "resume_or_start"])
def test_text_is_not_taken_for_true(settings: dict[str, Any], tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name.replace('_', '-')} must be true or false, got 'no'$"):
        GpuServer(**{**settings, "run_dir": str(tmp_path / "run"), name: "no"})  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
