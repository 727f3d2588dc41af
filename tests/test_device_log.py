"""What a device writes of what it sees: a line an event, bounded, for its owner alone, and the same for log collectors."""

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import permissions

import edge_client.cli
from edge_client.client_state import ClientState
from edge_client.connection import Refused
from edge_client.device_log import LARGEST_FILE, OLDER_FILES, DeviceLog
from gpu_server import GpuServer
from gpu_server.history import RunEvent
from protocol import RemoteProtocolError
from terminal import show_log

STEPS = 3


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# One device, as people start it


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]) -> Callable[..., Path]:
    """A whole run with one device, by the command; the device's log."""

    def run(*words: str) -> Path:
        settings = {"model": str(tiny_model), "cut_layer": 2, "lora_rank": 4, "steps": STEPS, "dtype": "float32"}
        state = tmp_path / "state"
        with GpuServer(**settings, port=0, clients=1, run_dir=str(tmp_path / "run")) as server:
            command = ["train", "--server", server.url, "--name", "kitchen", "--data", str(pairs_file("mine", 9))]
            command += ["--eval-data", str(pairs_file("held-out", 3)), "--state-dir", str(state), "--batch-size", "3"]
            command += ["--engine", "torch", "--model", str(tiny_model)]
            assert edge_client.cli.main([*command, *words]) == 0
            list(server.train())
            return ClientState(state, server.url, "kitchen").log_file

    return run


def test_log_says_what_the_device_saw_and_has_none_of_its_texts(run: Callable[..., Path], pairs_file: Any, capsys: Any) -> None:
    path = run("--eval-every", "2")
    events = lines(path)
    assert [event["kind"] for event in events] == [
        *("started", "evaluated", "step", "step", "evaluated", "step", "evaluated", "done")
    ]
    assert {event["client"] for event in events} == {"kitchen"}
    assert [event["step"] for event in events] == [0, 0, 1, 2, 2, 3, 3, 3]
    step = events[2]["details"]
    assert step["loss"] > 0 < step["bytes"]
    assert step["seconds"]["edge_compute"] > 0
    evaluated = events[1]["details"]
    assert evaluated.keys() == {"loss", "labelled_tokens", "seconds"}
    times = [event["time"] for event in events]
    assert times == sorted(times)
    assert all(RunEvent.from_json(event).text for event in events)  # in the form of the server's own
    said = capsys.readouterr().err
    assert "of the held-out texts before the first step" in said
    assert "of the held-out texts after step 2" in said
    assert "perplexity after: " in said
    assert "perplexity before: " not in said  # it was said already
    assert '"step"' not in said  # people see a bar
    assert permissions(path) == 0o600
    assert permissions(path.parent) == 0o700
    for line in pairs_file("mine", 9).read_text().splitlines():
        assert json.loads(line)["completion"] not in path.read_text()


def test_standard_error_is_json_for_log_collectors_the_same_events_and_no_bar(run: Callable[..., Path], capsys: Any) -> None:
    path = run("--log-format", "json")
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    kinds = [event["kind"] for event in said]
    assert kinds.count("step") == STEPS
    notes = [event["text"] for event in said if event["kind"] == "note"]
    assert any(note.startswith("perplexity before: ") for note in notes)
    assert notes[-1].startswith("done: ")
    in_file = lines(path)
    assert [event for event in said if "client" in event] == in_file


def test_log_outlives_its_runs(run: Callable[..., Path], tmp_path: Path) -> None:
    state = ClientState(tmp_path, "ws://here", "a")
    DeviceLog("a", state.log_file).tell("note", "one")
    state.delete()
    DeviceLog("a", state.log_file).tell("note", "two")
    assert [event["text"] for event in lines(state.log_file)] == ["one", "two"]
    assert ClientState(tmp_path, "ws://there", "a").log_file != state.log_file


# The file


def test_log_is_bounded_however_long_the_device_runs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("edge_client.device_log.LARGEST_FILE", 2000)
    log = DeviceLog("a", tmp_path / "logs" / "a.jsonl")
    for number in range(100):
        log.tell("note", "x" * 100, step=number)
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == ["a.jsonl", *(f"a.jsonl.{number}" for number in range(1, OLDER_FILES + 1))]
    assert all(permissions(file) == 0o600 and file.stat().st_size <= 2000 for file in files)
    steps = [event["step"] for file in [*reversed(files[1:]), files[0]] for event in lines(file)]
    assert steps == list(range(steps[0], 100))  # the newest are there, and none is torn
    assert (OLDER_FILES + 1) * LARGEST_FILE == 2**24


def test_line_that_a_kill_has_torn_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"kind": "note"}\n{"ki')
    DeviceLog("a", path).tell("note", "after it")
    first, torn, last = path.read_text().splitlines()
    assert (json.loads(first)["kind"], torn, json.loads(last)["text"]) == ("note", '{"ki', "after it")


@pytest.mark.parametrize("where", ["a file for a folder", "a full disk"])
def test_device_whose_log_cannot_be_written_says_so_once_and_goes_on(
    tmp_path: Path, caplog: Any, capsys: Any, where: str
) -> None:
    (tmp_path / "logs").write_text("no folder")
    path = Path("/dev/full") if where == "a full disk" else tmp_path / "logs" / "a.jsonl"
    log = DeviceLog("a", path)
    with caplog.at_level(logging.INFO, "edge_client"):
        log.tell("note", "one")
        log.tell("note", "two")
    first, warning, second = caplog.messages
    assert (first, second) == ("one", "two")
    assert warning.startswith(f"what this device sees cannot be written to {path}: ")
    assert warning.endswith("; it goes on without")
    assert capsys.readouterr().err == ""


def test_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "elsewhere")
    DeviceLog("a", tmp_path / "a.jsonl").tell("note", "one")
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_several_threads_write_whole_lines(tmp_path: Path) -> None:
    log = DeviceLog("a", tmp_path / "a.jsonl")
    threads = [threading.Thread(target=lambda: [log.tell("note", "x" * 50) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(tmp_path / "a.jsonl")) == 200


def test_a_strangers_words_are_made_plain_and_lose_their_secret(tmp_path: Path, capsys: Any) -> None:
    log = DeviceLog("a", tmp_path / "a.jsonl")
    with show_log("edge_client", "json"):
        log.tell("lost", f"the server says \x1b[2J splitlora://h:1/#a/{'s' * 43}")
    for text in ((tmp_path / "a.jsonl").read_text(), capsys.readouterr().err):
        assert "s" * 43 not in text
        assert "\\x1b" in json.loads(text)["text"]


# How it ended


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (Refused("the server refuses: no"), "refused", "Refused: the server refuses: no"),
        (RemoteProtocolError("it is none"), "stopped", "RemoteProtocolError: it is none"),
        (ValueError("line 3 is 'my secret text'"), "stopped", "ValueError"),  # it may have the owner's text in it
        (KeyboardInterrupt(), "left", "the user has ended it"),
    ],
)
def test_log_says_how_the_device_ended_and_not_what_may_be_in_its_data(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], error: BaseException, kind: str, text: str
) -> None:
    settings = {"model": str(tiny_model), "cut_layer": 2, "lora_rank": 4, "steps": STEPS, "dtype": "float32", "linger": 0}
    with GpuServer(**settings, port=0, clients=1, run_dir=str(tmp_path / "run")) as server:
        client = edge_client.EdgeClient(
            server.url, model=str(tiny_model), engine="torch", name="a", data=pairs_file("a", 3), state_dir=tmp_path / "state"
        )
        with pytest.raises(type(error)), client:
            raise error
        server.stop()
    found = [(event["kind"], event["text"]) for event in lines(client.log_file)]
    assert found[0] == (kind, text)
