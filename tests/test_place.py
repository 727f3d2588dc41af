"""What a device keeps of a run, and what it does not trust."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_in_thread
from protocol_samples import SETTINGS

from edge_client import ConnectionFailed, EdgeClient
from edge_client.place import Place, SavedStep, StateError
from gpu_server import GpuServer
from protocol import Welcome


def welcome(run: str, **fields: Any) -> Welcome:
    return Welcome(**{"run": run, "settings": SETTINGS, "fingerprint": "f", **fields})


def saved(step: int, round: int = 0) -> SavedStep:
    return SavedStep(step=step, round=round, restarts=0, state={"adapter/m": np.full((2, 2), step, np.float32)})


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path, "ws://here", "a")
    place.keep(welcome("run"), "float32")
    return place


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def keep(place: Place, *steps: int, keep_from: int = 0, ends: tuple[int, ...] = ()) -> None:
    for step in steps:
        place.save(saved(step), keep_from=keep_from, is_round_end=step in ends)


def test_device_that_joins_again_while_its_server_is_down_takes_the_model_of_its_place(
    tmp_path: Path, tiny_model: Path, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_client.client.find_model", lambda name: tiny_model if name == "gpt2" else Path(name))
    invitation = f"splitlora://127.0.0.1:1/#a/{'A' * 43}"  # nobody listens there
    options = {"data": pairs_file("a", 4), "state_dir": tmp_path / "state"}
    with pytest.raises(ConnectionFailed, match="no server at"):
        EdgeClient.join(invitation, **options)
    place = Place(tmp_path / "state", EdgeClient.join(invitation, model="gpt2", **options).server, "a")
    place.keep(welcome("run"), "float32", model="gpt2")
    assert EdgeClient.join(invitation, **options).name == "a"


def test_device_notes_the_name_of_its_model_and_no_folder(
    tmp_path: Path, tiny_model: Path, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_client.client.find_model", lambda name: tiny_model)
    state = tmp_path / "state"
    options = {"data": pairs_file("a", 4), "state_dir": state, "dtype": "float32"}
    with GpuServer(model=str(tiny_model), run_dir=tmp_path / "run", cut_layer=1, steps=1, clients=2, port=0) as server:
        ended = run_in_thread(lambda: list(server.train()))
        with (
            EdgeClient(server.url, model="gpt2", name="a", **options) as one,
            EdgeClient(server.url, model=str(tiny_model), name="b", **options) as two,
        ):
            assert [Place(state, server.url, name).model() for name in "ab"] == ["gpt2", None]
            other = run_in_thread(lambda: list(two.train()))
            assert len(list(one.train())) == len(other.result(timeout=60)) == 1
        ended.result(timeout=60)


def test_model_that_is_no_name_on_the_hub_is_not_taken_from_a_place(place: Place) -> None:
    assert place.model() is None
    place.keep(welcome("run"), "float32", model="../models/gpt2")
    assert place.model() is None


def test_place_is_kept_until_it_is_given_up(tmp_path: Path) -> None:
    place = Place(tmp_path, "ws://here", "a")
    assert not place.is_kept
    place.keep(welcome("run"), "float32")
    assert Place(tmp_path, "ws://here", "a").is_kept
    place.give_up()
    assert not Place(tmp_path, "ws://here", "a").is_kept
    assert files(tmp_path) == []


def test_settings_of_the_run_are_noted(tmp_path: Path) -> None:
    place = Place(tmp_path, "ws://here", "a")
    assert place.welcome() is None
    for restarts in (0, 1):
        place.keep(welcome("run", restarts=restarts), "float32")
        noted = Place(tmp_path, "ws://here", "a").welcome()
        assert noted is not None
        assert (noted.run, noted.settings, noted.restarts) == ("run", SETTINGS, restarts)


@pytest.mark.parametrize(("server", "name"), [("ws://there", "a"), ("ws://here", "b")])
def test_places_of_other_servers_and_names_are_others(place: Place, tmp_path: Path, server: str, name: str) -> None:
    other = Place(tmp_path, server, name)
    assert not other.is_kept
    other.keep(welcome("run"), "float32")
    other.give_up()
    assert place.is_kept


def test_another_run_of_the_same_server_begins_anew(place: Place) -> None:
    keep(place, 1, 2)
    place.keep(welcome("run"), "float32")
    assert place.last_step() == 2
    place.keep(welcome("next"), "float32")
    assert (place.is_kept, place.last_step()) == (True, 0)


def test_the_last_step_and_the_rounds_that_may_come_back_are_kept(place: Place) -> None:
    keep(place, 1, 2, 3, 4, 5, ends=(2, 4))
    assert [place.load(step).step for step in (2, 3, 4, 5, 9)] == [2, 2, 4, 5, 5]  # type: ignore[union-attr]
    assert place.load(1) is None
    keep(place, 6, keep_from=4, ends=(6,))
    assert [step for step in range(7) if (found := place.load(step)) is not None and found.step == step] == [4, 6]


def test_steps_that_a_server_took_back_are_forgotten(place: Place) -> None:
    keep(place, 1, 2, 3, 4, 5, ends=(2, 4))
    place.forget_after(2)
    assert place.last_step() == 2
    assert place.load(9).step == 2  # type: ignore[union-attr]


def test_what_is_loaded_is_what_was_saved(place: Place) -> None:
    place.save(saved(3, round=2), keep_from=0, is_round_end=False)
    found = place.load(3)
    assert found is not None
    assert (found.step, found.round, found.restarts) == (3, 2, 0)
    np.testing.assert_array_equal(found.state["adapter/m"], np.full((2, 2), 3, np.float32))


def test_step_is_on_the_disk_before_it_has_its_name_and_the_name_after(
    place: Place, tmp_path: Path, disk_calls: list[str]
) -> None:
    keep(place, 1)
    folder = files(tmp_path)[0].parent
    assert disk_calls == [f"fsync {folder}/0000000001.safetensors.part", "replace", f"fsync {folder}"]


def test_torn_file_is_passed_over(place: Place, tmp_path: Path) -> None:
    keep(place, 1, 2, 3, ends=(2,))
    newest = files(tmp_path)[1]
    assert newest.name == "0000000003.safetensors"
    os.truncate(newest, 20)
    found = place.load(3)
    assert found is not None
    assert found.step == 2
    assert place.last_step() == 2  # nobody claims to remember what is torn
    keep(place, 4, ends=(4,))
    assert [path.name for path in files(tmp_path)[:-1]] == ["0000000002.safetensors", "0000000004.safetensors"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"run": 7}', b"\xff"])
def test_note_that_is_no_note_is_no_place(place: Place, tmp_path: Path, content: bytes) -> None:
    note = next(path for path in files(tmp_path) if path.name == "place.json")
    note.write_bytes(content)
    assert not place.is_kept
    assert place.welcome() is None


def test_folder_is_the_users_alone_and_no_name_reaches_its_path(tmp_path: Path) -> None:
    place = Place(tmp_path, "ws://../../etc", "a")
    place.keep(welcome("run"), "float32")
    (note,) = files(tmp_path)
    assert note.parent.parent == tmp_path / "places"
    assert note.parent.name.isalnum()
    assert note.parent.stat().st_mode & 0o777 == 0o700
    assert json.loads(note.read_text())["server"] == "ws://../../etc"


@pytest.mark.parametrize("what", ["keep", "save"])
def test_disk_that_is_full_is_said(place: Place, monkeypatch: Any, what: str) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match="No space left on device; free some space there"):
        place.keep(welcome("other"), "float32") if what == "keep" else keep(place, 1)


def test_server_that_never_moves_its_checkpoint_does_not_fill_the_disk(
    place: Place, tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    place.save(saved(1), keep_from=0, is_round_end=True)
    size = max(path.stat().st_size for path in files(tmp_path) if path.suffix == ".safetensors")
    monkeypatch.setattr("edge_client.place.MOST_BYTES", 3 * size)
    keep(place, *range(2, 10), ends=tuple(range(10)))
    assert [path.name for path in files(tmp_path)[:-1]] == [f"{step:010}.safetensors" for step in (6, 7, 8, 9)]
    (warning,) = caplog.records  # once
    assert "the server has not moved its checkpoint for" in warning.getMessage()


def test_rounds_ends_are_known_again_after_a_restart(place: Place, tmp_path: Path) -> None:
    keep(place, 1, 2, 3, ends=(2,))
    again = Place(tmp_path, "ws://here", "a")
    keep(again, 4)
    assert [path.name for path in files(tmp_path)[:-1]] == ["0000000002.safetensors", "0000000004.safetensors"]
