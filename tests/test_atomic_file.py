"""A file is whole, private unless it is meant for others, and written where it was meant to be."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import permissions

from storage import remove_unfinished, replace_file


@pytest.fixture(autouse=True)
def _wide_open_umask() -> Any:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_file_is_its_owners_alone_unless_another_mode_is_asked_for(tmp_path: Path) -> None:
    replace_file(tmp_path / "private", b"1")
    replace_file(tmp_path / "public", b"1", mode=0o666)
    assert (permissions(tmp_path / "private"), permissions(tmp_path / "public")) == (0o600, 0o644)
    (tmp_path / "was public").write_bytes(b"0")
    replace_file(tmp_path / "was public", b"1")
    assert permissions(tmp_path / "was public") == 0o600


def test_no_link_is_written_through(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("storage.atomic_file.secrets.token_hex", lambda _: "guessed")  # by whoever has left the link
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for name in ("file.part", "file.guessed.part"):
        (tmp_path / name).symlink_to(victim)
        (tmp_path / f"dangling-{name}").symlink_to(tmp_path / "made")
    for path in (tmp_path / "file", tmp_path / "dangling-file"):
        with pytest.raises(FileExistsError):
            replace_file(path, b"content")
    monkeypatch.undo()
    replace_file(tmp_path / "file", b"content")
    assert (victim.read_bytes(), (tmp_path / "file").read_bytes()) == (b"precious", b"content")
    assert not (tmp_path / "made").exists()


def test_a_link_at_the_name_itself_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "file").symlink_to(victim)
    replace_file(tmp_path / "file", b"content")
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_the_file_before_and_nothing_beside_it(tmp_path: Path, monkeypatch: Any, call: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    replace_file(tmp_path / "file", b"before")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "file", b"after")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"before")]


def test_interrupted_writer_leaves_nothing_beside_the_file(tmp_path: Path, monkeypatch: Any) -> None:
    """Ctrl-C, while a secret is half written."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "file", b"secret")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    replace_file(tmp_path / "file", b"content")
    (tmp_path / "file.0123.part").write_bytes(b"cont")
    (tmp_path / "folder.part").mkdir()
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.part"]
    remove_unfinished(tmp_path / "absent")


def test_what_a_killed_writer_of_one_file_left_is_removed_without_touching_those_of_others(tmp_path: Path) -> None:
    for name in ("[a].json.01.part", "b.json.02.part"):
        (tmp_path / name).write_bytes(b"cont")
    remove_unfinished(tmp_path, "[a].json")
    assert [path.name for path in tmp_path.iterdir()] == ["b.json.02.part"]
