"""What run.json says of a run, and how to find out whether a server has it."""

import json
from pathlib import Path

import pytest

from gpu_server import ServerError
from gpu_server.run_description import RunDescription, is_served, lock_of

pytest.importorskip("torch")

from gpu_server.run_directory import RunDirectory

DESCRIPTION = RunDescription(
    run="f00", restarts=2, fingerprint="ab", config={"model": "gpt2"}, device="cpu", dtype="float32", versions={"torch": "2"}
)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    assert RunDescription.read(tmp_path) is None
    for description in (DESCRIPTION, DESCRIPTION.served_at("ws://a:1"), DESCRIPTION.with_adapter(step=3, of=5)):
        description.write(tmp_path)
        assert RunDescription.read(tmp_path) == description


def test_a_run_of_an_earlier_version_is_read_and_what_a_later_one_adds_is_left_alone(tmp_path: Path) -> None:
    content = {"run": "f00", "fingerprint": "ab", "config": {"model": "gpt2"}, "dtype": "float32", "weather": "fine"}
    (tmp_path / "run.json").write_text(json.dumps(content))
    description = RunDescription.read(tmp_path)
    assert description is not None
    assert (description.run, description.restarts, description.url) == ("f00", 0, "")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": 5}', '{"config": {}}', "[" * 200_000, "9" * 5000, "\xff"])
def test_what_describes_no_run_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content, encoding="latin-1")
    with pytest.raises(ServerError, match=r"run.json does not describe a run; restore it, or choose another --run-dir$"):
        RunDescription.read(tmp_path)


def test_a_folder_is_served_as_long_as_a_server_holds_it(tmp_path: Path) -> None:
    assert not is_served(tmp_path)
    directory = RunDirectory(tmp_path)
    directory.hold()
    assert is_served(tmp_path)
    directory.release()
    assert not is_served(tmp_path)


def test_who_asks_whether_a_server_runs_does_not_keep_one_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, waits = lock_of(tmp_path), []

    def answered(seconds: float) -> None:
        waits.append(seconds)
        asked.release()

    monkeypatch.setattr("time.sleep", answered)
    asked.acquire()
    RunDirectory(tmp_path).hold()
    assert len(waits) == 1
