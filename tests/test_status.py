"""How a run stands, asked in a terminal: of one that is served, of one that is not, and of a folder that holds none."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_server.cli import main
from gpu_server.federation import StepRecord
from gpu_server.history import EvaluationRecord, Overview, RunEvent, RunFiles, row_of
from gpu_server.run_lock import lock_of
from gpu_server.status import as_table
from protocol import Seconds
from storage import RunDescription

NAMES = ("attic", "cellar", "kitchen")


def step(number: int, time: float, *, without: str = "") -> StepRecord:
    """Two seconds, in which cellar computes four times as long as the others."""
    names = [name for name in NAMES if name != without]
    return StepRecord(
        number=number,
        loss=2.5,
        labelled_tokens=30,
        tokens=60,
        seconds={name: Seconds(edge_compute=1.6 if name == "cellar" else 0.4, queue=0.1) for name in names},
        deadline=60.0,
        codec="int8",
        server_compute=0.1,
        bytes_up=dict.fromkeys(names, 2_000_000),
        bytes_down=dict.fromkeys(names, 1_000_000),
        time=time,
        step_seconds=2.0,
        losses=dict.fromkeys(names, 2.5),
        labelled=dict.fromkeys(names, 10),
        samples=dict.fromkeys(names, 4),
        tokens_of=dict.fromkeys(names, 20),
    )


def event(time: float, kind: str, client: str | None = None, **details: Any) -> RunEvent:
    return RunEvent(time=time, kind=kind, text="it happened", client=client, details=details)


def write(run_dir: Path, *lines: RunEvent | StepRecord | EvaluationRecord) -> None:
    for line in lines:
        name = {RunEvent: "events", StepRecord: "metrics", EvaluationRecord: "evaluations"}[type(line)]
        with (run_dir / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(row_of(line) if isinstance(line, StepRecord) else line.as_json()) + "\n")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of three devices and 900 steps, two of which are done, ten seconds ago."""
    RunDescription(run="r", fingerprint="f", config={"clients": 3}, dtype="float32", versions={"splitlora": "9.9"}).write(
        tmp_path
    )
    now = time.time()
    write(
        tmp_path,
        event(now - 30, "server_started", restarts=0),
        *(event(now - 25, "joined", name, samples=40, batch_size=4, steps=900) for name in NAMES),
        event(now - 20, "training_started", total_steps=900),
        RunEvent(time=now - 20, kind="checkpoint", text="", step=0),  # told of at most once a minute
        step(1, now - 12),
        step(2, now - 10),
        EvaluationRecord(step=2, time=now - 10, client="attic", loss=2.0, labelled_tokens=7),
    )
    (tmp_path / "checkpoints").mkdir()
    for number in (1, 2):
        file = tmp_path / f"checkpoints/{number:09}.safetensors"
        file.touch()
        os.utime(file, (now - 10, now - 10))
    return tmp_path


@pytest.fixture
def served(run_dir: Path) -> Iterator[Path]:
    with lock_of(run_dir):  # as a server that serves it
        yield run_dir


def status(run_dir: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["status", "--run-dir", str(run_dir), *flags]) == 0
    return capsys.readouterr().out


def refusal(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["status", "--run-dir", str(run_dir)]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    return shown.err


def test_it_says_where_a_served_run_is_and_who_is_slow(served: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = status(served, capsys)
    assert said.splitlines()[0] == "run r: step 2 of 900, 3 of 3 devices, 30 min left"
    assert "loss 2.500, held-out perplexity 7.4 (step 2), 30 tokens/s, 4.5 MB/s, int8 activations" in " ".join(said.split())
    assert "checkpoint of step 2, 10 s ago" in said
    assert "cellar is 4.0 times as slow as the others, who wait for it" in said
    heads, *rows = (line.split() for line in said.partition("\n\n")[2].splitlines())
    assert heads[:2] == ["device", "state"]
    assert [row[:2] for row in rows] == [[name, "connected"] for name in NAMES]
    assert rows[1] == ["cellar", "connected", "10", "s", "ago", "0", "4.0", "x", "10", "4", "MB", "2", "MB"]


def test_run_that_is_not_running_has_its_steps_its_time_left_and_since_when_devices_are_gone(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = status(run_dir, capsys)
    assert said.splitlines()[0] == "run r: no server runs; step 2 of 900, 30 min left at its last speed"
    rows = [line.split() for line in said.partition("\n\n")[2].splitlines()]
    assert [row[:5] for row in rows[1:]] == [[name, "away", "10", "s", "ago"] for name in NAMES]


def test_device_that_the_run_waits_for_is_late_until_its_step_is_finished(
    served: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time()
    write(served, event(now - 1, "late", "attic", clients=["attic"], seconds=119.0))
    said = status(served, capsys)
    assert "step 2 of 900 waits for attic, for 2 min" in " ".join(said.split())
    assert "attic    2 min late" in said
    write(served, step(3, now, without="attic"))
    said = status(served, capsys)
    row = next(line.split() for line in said.splitlines() if line.startswith("attic"))
    assert (row[1], row[5]) == ("connected", "1")  # steps missed


def test_json_has_the_figures_of_the_overview(served: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(status(served, capsys, "--json"))
    expected = Overview.of_files(RunFiles(served)).as_json(told["now"])
    assert told == json.loads(json.dumps(expected))
    assert (told["step"], told["total_steps"], told["seconds_left"]) == (2, 900, 898 * 2.0)


def test_line_that_is_being_written_is_no_step_yet(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert json.loads(status(run_dir, capsys, "--json"))["step"] == 2


def test_run_without_a_step_waits_for_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunDescription(run="r", fingerprint="f", config={"clients": 2}, dtype="float32", versions={}).write(tmp_path)
    assert status(tmp_path, capsys) == "run r: no server runs; before the first step\n"
    with lock_of(tmp_path):
        write(tmp_path, event(time.time(), "server_started"), event(time.time(), "joined", "attic"))
        assert status(tmp_path, capsys).splitlines()[0] == "run r: waiting for devices: 1 of 2 devices joined"


def test_run_of_before_there_were_events_has_its_end_from_its_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = RunDescription(run="r", fingerprint="f", config={"clients": 3}, dtype="float32", versions={})
    described.with_adapter(step=2, of=2).write(tmp_path)
    write(tmp_path, step(1, 0.0), step(2, 0.0))
    assert status(tmp_path, capsys).startswith("run r: the run is complete: 2 steps\n")
    described.with_adapter(step=2, of=5).write(tmp_path)
    assert json.loads(status(tmp_path, capsys, "--json"))["sentence"].startswith("stopped after step 2 of 5")


def test_folder_without_a_run_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert f"{folder} holds no run" in refusal(folder, capsys)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("metrics.jsonl", '{"step": 3, "loss_of_later_versions": 2.5}'),
        ("events.jsonl", '{"time": 1e10, "what": "happened"}'),
        ("events.jsonl", '{"time": 1e10, "kind": "training_started", "text": "", "details": {"total_steps": "many"}}'),
        ("events.jsonl", '{"time": 1e10, "kind": "late", "text": "", "details": {"clients": 3}}'),
        ("evaluations.jsonl", "[]"),
    ],
)
def test_line_of_a_later_version_is_refused_in_one_sentence(
    run_dir: Path, capsys: pytest.CaptureFixture[str], file: str, line: str
) -> None:
    with (run_dir / file).open("a") as lines:
        lines.write(f"{line}\n")
    said = refusal(run_dir, capsys)
    assert str(run_dir) in said
    assert "nothing that this version reads" in said
    assert "later one" in said


def test_text_of_a_stranger_moves_no_cursor(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(run_dir, event(time.time(), "joined", "a\x1b[2Jb"))
    assert "a\\x1b[2Jb" in status(run_dir, capsys)


@given(
    columns=st.integers(40, 200),
    names=st.lists(st.text("abcdefgh-0123456789", min_size=1, max_size=64), min_size=1, max_size=4, unique=True),
    missed=st.integers(0, 10**7),
    num_bytes=st.integers(0, 10**14),
    late=st.none() | st.floats(0, 1e7),
)
def test_table_fits_the_terminal(columns: int, names: list[str], missed: int, num_bytes: int, late: float | None) -> None:
    run = Overview("6f1c02aa41d3", len(names))
    run.add_event(event(0.0, "server_started"))
    for name in names:
        run.add_event(event(0.0, "joined", name, samples=10**6, batch_size=4, steps=10**6))
    run.add_step(step(1, 1.0))
    told = run.as_json(100.0)
    for device in told["devices"]:
        device |= {"missed_steps": missed, "bytes_up": num_bytes, "slowness": missed / 7, "late_seconds": late}
        device["state"] = "connected" if late is None else "late"
    lines = as_table(told, columns).splitlines()
    assert max(map(len, lines)) <= columns
    assert all(any(line.startswith(name[:7]) for line in lines) for name in names)


def test_narrow_terminal_has_less_of_each_device_and_its_whole_name(
    served: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = {}
    for columns in (80, 60):
        monkeypatch.setenv("COLUMNS", str(columns))
        heads[columns] = status(served, capsys).partition("\n\n")[2].splitlines()[0].split("  ")
    assert "received" in heads[80][-1]
    assert "tokens/s" in heads[60][-1]


@pytest.mark.parametrize("columns", [60, 80])
def test_devices_of_one_machine_are_told_apart(columns: int) -> None:
    run = Overview("r", 2)
    for name in ("workstation-client-0", "workstation-client-1"):
        run.add(RunEvent(time=1.0, kind="joined", text="", client=name, details={"samples": 4, "batch_size": 2}))
    lines = as_table(run.as_json(2.0), columns).splitlines()
    names = [line.split()[0] for line in lines[-2:]]
    assert [(name[:5], name[-3:]) for name in names] == [("works", "t-0"), ("works", "t-1")]


def test_devices_of_a_complete_run_are_done() -> None:
    run = Overview("r", 1)
    run.add(RunEvent(time=1.0, kind="joined", text="", client="kitchen"))
    run.add(RunEvent(time=2.0, kind="complete", text=""))
    run.server_is_gone()
    assert "kitchen  done" in as_table(run.as_json(3.0), 80)


def test_run_that_is_not_split_is_not_advised_to_be_split_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"mode": "federated", "clients": 3}
    RunDescription(run="r", fingerprint="f", config=config, dtype="float32", versions={}).write(tmp_path)
    write(tmp_path, *(step(number, 10.0 * number) for number in (1, 2)))
    said = " ".join(status(tmp_path, capsys).split())
    assert "cellar is 4.0 times as slow as the others, who wait for it; 94 % of its time goes to edge compute device" in said


def test_table_of_many_devices_is_bounded_and_says_how_all_of_them_are(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time()
    write(run_dir, *(event(now - 5, "joined", f"d{number:04}") for number in range(200)), event(now - 4, "lost", "d0150"))
    said = status(run_dir, capsys)
    assert len(said.splitlines()) < 120
    assert "of 203 devices (0 connected, 0 late, 203 away, 0 left) those that" in said
    assert len(json.loads(status(run_dir, capsys, "--json"))["devices"]) == 203
