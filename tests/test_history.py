"""What happened in a run, told once: to the log, to the files, to whoever follows it; and read again from the files."""

import json
import logging
import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import permissions
from steps import a_step as step

from gpu_server import ServerError
from gpu_server.federation import StepRecord
from gpu_server.history import (
    MOST_CLIENTS,
    TOGETHER,
    EvaluationRecord,
    HistoryError,
    RunEvent,
    RunFiles,
    record_of,
    row_of,
    tell,
    telling_to,
)
from gpu_server.run_directory import RunDirectory
from protocol import InvalidName, Seconds, check_name
from storage import RunDescription
from terminal import show_log

DESCRIPTION = RunDescription(run="r", fingerprint="f", config={}, dtype="float32", versions={"splitlora": "9.9"})


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.describe(DESCRIPTION)
    return directory


# Telling


def test_what_is_told_is_in_the_log_and_with_who_follows(caplog: pytest.LogCaptureFixture) -> None:
    told: list[RunEvent] = []
    with telling_to(told.append), caplog.at_level(logging.INFO, "gpu_server"):
        tell("back", "kitchen is back", client="kitchen", step=3, seconds=4.5)
    (event,) = told
    assert (event.kind, event.text, event.client, event.step, event.details) == (
        "back", "kitchen is back", "kitchen", 3, {"seconds": 4.5}
    )  # fmt: skip
    assert caplog.messages == ["kitchen is back"]
    assert RunEvent.from_json(json.loads(json.dumps(event.as_json()))) == event


def test_nobody_hears_what_is_told_of_another_run() -> None:
    first: list[RunEvent] = []
    second: list[RunEvent] = []

    def serve(sink: Callable[[RunEvent], None], text: str) -> None:
        with telling_to(sink):
            both.wait()
            tell("note", text)

    both = threading.Barrier(2)
    threads = [threading.Thread(target=serve, args=(sink.append, text)) for sink, text in ((first, "a"), (second, "b"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.text for event in first] == ["a"]
    assert [event.text for event in second] == ["b"]


def test_a_strangers_words_are_made_plain_and_lose_their_secret() -> None:
    told: list[RunEvent] = []
    with telling_to(told.append):
        tell("refused", "it sent \x1b[2J and splitlora://h:1#a/SECRET?pin=x", level="warning")
    assert "\x1b" not in told[0].text
    assert "SECRET" not in told[0].text


def test_log_in_json_has_a_line_an_event_with_what_is_quiet_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    with show_log("gpu_server", "json"):
        tell("checkpoint", "a checkpoint of step 4 is written", step=4, quiet=True)
        logging.getLogger("gpu_server").info("%s", "told\nby nobody")
        logging.getLogger("gpu_server").debug("only for who debugs")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["kind"], line["level"], line["text"]) for line in lines] == [
        ("checkpoint", "info", "a checkpoint of step 4 is written"),
        ("note", "info", "told\\nby nobody"),
    ]
    assert lines[0]["step"] == 4
    assert all(line["time"] > 1.7e9 for line in lines)


# Files


def test_a_runs_files_say_what_was_written(directory: RunDirectory) -> None:
    steps, events = [step(1), step(2)], [RunEvent(time=1.5, kind="note", text="é\u2028")]
    held_out = EvaluationRecord(step=2, time=3.0, client="a", loss=math.log(8), labelled_tokens=40)
    for each in steps:
        directory.append_metrics(each)
    directory.append_event(events[0])
    directory.append_evaluation(held_out)
    files = RunFiles(directory.path)
    assert list(files.steps()) == steps
    assert list(files.events()) == events
    assert list(files.evaluations()) == [held_out]
    assert held_out.perplexity == pytest.approx(8)
    assert files.description == DESCRIPTION
    assert not files.is_served
    assert {permissions(directory.path / name) for name in ("metrics.jsonl", "events.jsonl", "evaluations.jsonl")} == {0o600}


def test_a_run_that_has_done_nothing_yet_has_no_lines(directory: RunDirectory) -> None:
    files = RunFiles(directory.path)
    assert [*files.steps(), *files.events(), *files.evaluations()] == []


def test_what_comes_later_is_left_out_whatever_the_clock_said(directory: RunDirectory) -> None:
    for number, time in ((1, 50.0), (2, 60.0), (3, 10.0)):  # it was put back
        directory.append_metrics(step(number, time=time))
        directory.append_evaluation(EvaluationRecord(step=number, time=time, client="a", loss=1.0, labelled_tokens=1))
        directory.append_event(RunEvent(time=time, kind="note", text=str(number)))
    files = RunFiles(directory.path)
    assert files.num_events() == 3
    before = list(files.everything(last_step=2, num_events=2))
    assert len(before) == 6
    assert {happened.time for happened in before} == {50.0, 60.0}


def test_line_that_is_being_written_is_left_out(directory: RunDirectory) -> None:
    directory.append_metrics(step(1))
    with (directory.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row_of(step(2)))[:40])
    assert [record.number for record in RunFiles(directory.path).steps()] == [1]


@pytest.mark.parametrize("name", ["events.jsonl", "evaluations.jsonl"])
def test_line_that_a_crash_has_torn_does_not_spoil_the_next(directory: RunDirectory, name: str) -> None:
    (directory.path / name).write_text('{"torn": ')
    directory.hold()
    directory.append_event(RunEvent(time=1.0, kind="note", text="after"))
    directory.append_evaluation(EvaluationRecord(step=1, time=1.0, client="a", loss=1.0, labelled_tokens=1))
    directory.release()
    files = RunFiles(directory.path)
    assert [event.text for event in files.events()] == ["after"]
    assert len(list(files.evaluations())) == 1


STEP = '{"step": 1, "loss": 1.0, "labelled_tokens": 1, "tokens": 1, "clients": {}}'


@pytest.mark.parametrize(
    "line",
    [
        *("{}", "[]", "nothing", '{"step": 1, "loss": {}, "clients": []}', "[" * 100_000),
        STEP.replace('"step": 1', '"step": Infinity'),
        *(STEP.replace("{", f'{{"time": {time}, ', 1) for time in ("1e300", "Infinity", "NaN", "-1")),
    ],
    ids=lambda line: line[:40],
)
def test_line_of_a_later_version_is_refused_in_a_sentence(directory: RunDirectory, line: str) -> None:
    directory.append_metrics(step(1))
    with (directory.path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(HistoryError, match=r"metrics\.jsonl, line 2 is nothing that this version reads; .* version 9\.9"):
        list(RunFiles(directory.path).steps())


@pytest.mark.parametrize(
    "line", ['{"time": 1e300, "kind": "lost", "text": "x"}', '{"time": 1, "kind": "lost", "text": "x", "step": 1e999}']
)
def test_event_of_no_time_or_step_is_refused_in_a_sentence(directory: RunDirectory, line: str) -> None:
    (directory.path / "events.jsonl").write_text(line + "\n")
    with pytest.raises(HistoryError, match=r"events\.jsonl, line 1 is nothing that this version reads"):
        list(RunFiles(directory.path).events())


def test_members_of_a_later_version_are_left_out() -> None:
    row = row_of(step(1))
    row["weather"], row["clients"]["a"]["mood"] = "fine", 1
    assert record_of(row) == step(1)


def of_many(number: int, clients: int) -> StepRecord:
    names = [f"d{place:04}" for place in range(clients)]
    return step(
        number,
        labelled_tokens=2 * clients,
        tokens=3 * clients,
        seconds=dict.fromkeys(names, Seconds(edge_compute=0.5, queue=0.25)),
        bytes_up=dict.fromkeys(names, 100),
        bytes_down=dict.fromkeys(names, 200),
        losses=dict.fromkeys(names, 2.5),
        labelled=dict.fromkeys(names, 2),
        samples=dict.fromkeys(names, 1),
        tokens_of=dict.fromkeys(names, 3),
    )


def test_line_of_very_many_clients_is_short_and_has_the_sums_of_all() -> None:
    each, all_together = of_many(1, MOST_CLIENTS), of_many(1, MOST_CLIENTS + 1)
    assert record_of(row_of(each)) == each
    line = json.dumps(row_of(all_together))
    assert len(line) < 1000
    read = record_of(json.loads(line))
    assert row_of(read) == row_of(all_together)
    assert (read.num_taking_part, all_together.num_taking_part) == (MOST_CLIENTS + 1, MOST_CLIENTS + 1)
    for name in ("number", "time", "loss", "labelled_tokens", "tokens", "num_bytes"):
        assert getattr(read, name) == getattr(all_together, name)
    for name in ("bytes_up", "bytes_down", "labelled", "samples", "tokens_of"):
        assert sum(getattr(read, name).values()) == sum(getattr(all_together, name).values())
    assert sum(read.seconds.values(), Seconds()) == sum(all_together.seconds.values(), Seconds())
    with pytest.raises(InvalidName):
        check_name(TOGETHER)


def test_line_of_an_earlier_version_has_the_rest_by_default() -> None:
    row = {"step": 1, "loss": 2.0, "labelled_tokens": 3, "tokens": 4, "clients": {"a": {"bytes_up": 1, "bytes_down": 2}}}
    record = record_of(row)
    assert (record.number, record.loss, record.bytes_up) == (1, 2.0, {"a": 1})
    assert record.seconds == {"a": Seconds()}


@pytest.mark.parametrize("where", ["nowhere", "empty"])
def test_folder_without_a_run_is_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(HistoryError, match=f"{where} holds no run"):
        RunFiles(tmp_path / where)


def test_lines_of_a_run_that_goes_on_are_compressed_where_they_are_many(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_server.run_directory.SEGMENT_BYTES", 1000)
    for server in range(3):
        directory.hold()
        directory.forget_after(4 * server)
        directory.rotate()
        for number in range(4 * server + 1, 4 * server + 6):  # the last will be done again
            directory.append_metrics(step(number))
            directory.append_event(RunEvent(time=float(number), kind="note", text=f"step {number}"))
            directory.append_evaluation(EvaluationRecord(step=number, time=1.0, client="a", loss=1.0, labelled_tokens=1))
        directory.release()
    files = RunFiles(directory.path)
    assert [record.number for record in files.steps()] == list(range(1, 14))
    assert [record.step for record in files.evaluations()] == list(range(1, 14))
    assert [event.time for event in files.events()] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 9, 10, 11, 12, 13]
    assert (directory.path / "metrics.0002.jsonl.gz").exists()
    directory.hold()
    directory.forget_after(3)  # where it goes on if both checkpoints after that are damaged
    assert [record.number for record in files.steps()] == [1, 2, 3]
    directory.release()


def test_segment_that_is_damaged_is_named(directory: RunDirectory) -> None:
    (directory.path / "metrics.0001.jsonl.gz").write_bytes(b"nothing")
    with pytest.raises(HistoryError, match=r"metrics\.jsonl cannot be read: metrics\.0001\.jsonl\.gz is damaged"):
        list(RunFiles(directory.path).steps())
    with pytest.raises(ServerError, match=r"metrics\.0001\.jsonl\.gz is damaged"):
        directory.forget_after(1)
