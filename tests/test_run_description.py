"""What run.json says of a run, and how to find out whether a server has it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpu_server import ServerError
from gpu_server.run_lock import is_served, lock_of
from storage import RunDescription

DESCRIPTION = RunDescription(
    run="f00", restarts=2, fingerprint="ab", config={"model": "gpt2"}, device="cpu", dtype="float32", versions={"torch": "2"}
)


SERVED = RunDescription(
    **{**vars(DESCRIPTION), "of_the_run": ["lr"], "history": [{"versions": {"torch": "2"}, "host": "a", "restarts": 0}]}
)
WITH_NOISE = DESCRIPTION.with_noise({"kitchen": {"delta": 1e-6}})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    assert RunDescription.read(tmp_path, ServerError) is None
    for description in (
        DESCRIPTION,
        DESCRIPTION.served_at("ws://a:1"),
        DESCRIPTION.with_adapter(step=3, of=5),
        DESCRIPTION.with_adapter(step=5, of=5, best_step=2),
        WITH_NOISE,
        SERVED,
    ):
        description.write(tmp_path)
        assert RunDescription.read(tmp_path, ServerError) == description


def test_a_run_of_an_earlier_version_is_read_and_what_a_later_one_adds_is_left_alone(tmp_path: Path) -> None:
    content = {"run": "f00", "fingerprint": "ab", "config": {"model": "gpt2"}, "dtype": "float32", "weather": "fine"}
    (tmp_path / "run.json").write_text(json.dumps(content))
    description = RunDescription.read(tmp_path, ServerError)
    assert description is not None
    assert (description.run, description.restarts, description.url) == ("f00", 0, "")


def test_history_has_an_entry_for_every_change_of_versions_or_host() -> None:
    first = {"versions": {"splitlora": "1"}, "host": "a", "time": "t0", "restarts": 0}
    description = replace(DESCRIPTION, versions={"splitlora": "1"}, history=[first])
    assert description.served_with({"splitlora": "1"}, "a", "t1") == [first]
    newer = description.served_with({"splitlora": "2"}, "a", "t1")
    assert newer == [first, {"versions": {"splitlora": "2"}, "host": "a", "time": "t1", "restarts": 3}]
    moved = replace(description, history=newer, restarts=7).served_with({"splitlora": "2"}, "b", "t2")
    assert moved == [*newer, {"versions": {"splitlora": "2"}, "host": "b", "time": "t2", "restarts": 8}]
    # Of an earlier version, which wrote no history.
    assert DESCRIPTION.served_with({"torch": "3"}, "a", "t")[0] == {"versions": {"torch": "2"}}


@pytest.mark.parametrize("content", ["", "[]", "[" * 200_000, "9" * 5000, "\xff"])
def test_what_is_no_object_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content, encoding="latin-1")
    with pytest.raises(ServerError, match=r"run.json (cannot be read|is not)[^\n]*$"):
        RunDescription.read(tmp_path, ServerError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: None}, f"{name} is null; a text is expected") for name in ("run", "fingerprint", "dtype", "device", "url")),
        *(({name: [1]}, rf"{name} is \[1\]; an object is expected") for name in ("config", "versions", "noise", "adapter")),
        *(({name: 5}, rf"{name} is 5; a list is expected") for name in ("of_the_run", "history")),
        ({"restarts": 1.5}, r"restarts is 1\.5; a whole number is expected"),
        ({"adapter": {"step": 3}}, '"of" is missing'),
        ({"adapter": {"step": 3, "of": True}}, "of is true; a whole number is expected"),
        ({"adapter": {"step": 3, "of": 2}}, "the adapter cannot be that of step 3 of 2"),
        ({"adapter": {"step": -1, "of": 2}}, "the adapter cannot be that of step -1 of 2"),
        ({"adapter": {"step": 1, "of": 2, "best_step": 2}}, "the adapter cannot be that of step 2 where the run has reached 1"),
        (
            {"adapter": {"step": 1, "of": 2, "best_step": -1}},
            "the adapter cannot be that of step -1 where the run has reached 1",
        ),
    ],
)
def test_member_that_cannot_be_right_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    DESCRIPTION.write(tmp_path)
    content = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(content | changes))
    with pytest.raises(ServerError, match=f"run.json: {message}; restore the file, or choose another run directory$"):
        RunDescription.read(tmp_path, ServerError)


@pytest.mark.parametrize("name", ["run", "fingerprint", "dtype", "config"])
def test_member_that_every_version_has_written_is_required(tmp_path: Path, name: str) -> None:
    DESCRIPTION.write(tmp_path)
    content = json.loads((tmp_path / "run.json").read_text())
    del content[name]
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(ServerError, match=f'run.json: "{name}" is missing; restore the file'):
        RunDescription.read(tmp_path, ServerError)


def test_a_folder_is_served_as_long_as_a_server_holds_it(tmp_path: Path) -> None:
    from gpu_server.run_directory import RunDirectory

    assert not is_served(tmp_path)
    assert not list(tmp_path.iterdir())  # who only asks leaves nothing behind
    directory = RunDirectory(tmp_path)
    directory.hold()
    assert is_served(tmp_path)
    directory.release()
    assert not is_served(tmp_path)


def test_who_asks_whether_a_server_runs_does_not_keep_one_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_server.run_directory import RunDirectory

    asked, waits = lock_of(tmp_path), []

    def answered(seconds: float) -> None:
        waits.append(seconds)
        asked.release()

    monkeypatch.setattr("time.sleep", answered)
    asked.acquire()
    RunDirectory(tmp_path).hold()
    assert len(waits) == 1
