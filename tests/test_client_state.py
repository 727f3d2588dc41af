"""What a device keeps of a run, and what it does not trust."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import permissions, run_in_thread
from protocol_samples import SETTINGS
from safetensors.numpy import save_file

from edge_client import ConnectionFailed, EdgeClient
from edge_client.client_state import ClientState, WayToCompute
from edge_client.saved_steps import SavedStep, StateError
from gpu_server import GpuServer
from protocol import Welcome
from storage import CacheFolder

WAY = WayToCompute(engine="torch", dtype="float32", part="")


def welcome(run: str, **fields: Any) -> Welcome:
    return Welcome(**{"run": run, "settings": SETTINGS, "fingerprint": "f", **fields})


def saved(step: int, round: int = 0) -> SavedStep:
    return SavedStep(step=step, round=round, restarts=0, state={"adapter/m": np.full((2, 2), step, np.float32)})


@pytest.fixture
def state(tmp_path: Path) -> ClientState:
    state = ClientState(tmp_path, "ws://here", "a")
    state.enter(welcome("run"), WAY)
    return state


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def keep(state: ClientState, *steps: int, keep_from: int = 0, ends: tuple[int, ...] = ()) -> None:
    for step in steps:
        state.saved_steps.save(saved(step), keep_from=keep_from, is_round_end=step in ends)


def test_device_that_joins_again_while_its_server_is_down_takes_the_model_it_had(
    tmp_path: Path, tiny_model: Path, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_client.client.find_model", lambda name: tiny_model if name == "gpt2" else Path(name))
    invitation = f"splitlora://127.0.0.1:1/#a/{'A' * 43}"  # nobody listens there
    options = {"data": pairs_file("a", 4), "state_dir": tmp_path / "state", "engine": "torch"}
    with pytest.raises(ConnectionFailed, match="no server at"):
        EdgeClient.join(invitation, **options)
    state = ClientState(tmp_path / "state", EdgeClient.join(invitation, model="gpt2", **options).server, "a")
    state.enter(welcome("run"), WAY, model="gpt2")
    assert EdgeClient.join(invitation, **options).name == "a"


def test_device_notes_the_name_of_its_model_and_no_folder(
    tmp_path: Path, tiny_model: Path, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_client.client.find_model", lambda name: tiny_model)
    state = tmp_path / "state"
    options = {"data": pairs_file("a", 4), "state_dir": state, "engine": "torch", "dtype": "float32"}
    with GpuServer(model=str(tiny_model), run_dir=tmp_path / "run", cut_layer=1, steps=1, clients=2, port=0) as server:
        ended = run_in_thread(lambda: list(server.train()))
        with (
            EdgeClient(server.url, model="gpt2", name="a", **options) as one,
            EdgeClient(server.url, model=str(tiny_model), name="b", **options) as two,
        ):
            assert [ClientState(state, server.url, name).model() for name in "ab"] == ["gpt2", None]
            other = run_in_thread(lambda: list(two.train()))
            assert len(list(one.train())) == len(other.result(timeout=60)) == 1
        ended.result(timeout=60)


def test_model_that_is_no_name_on_the_hub_is_not_taken_from_a_note(state: ClientState) -> None:
    assert state.model() is None
    state.enter(welcome("run"), WAY, model="../models/gpt2")
    assert state.model() is None


def test_state_is_there_until_it_is_deleted(tmp_path: Path) -> None:
    state = ClientState(tmp_path, "ws://here", "a")
    assert not state.is_in_a_run
    state.enter(welcome("run"), WAY)
    assert ClientState(tmp_path, "ws://here", "a").is_in_a_run
    state.delete()
    assert not ClientState(tmp_path, "ws://here", "a").is_in_a_run
    assert files(tmp_path) == []


def test_settings_of_the_run_are_noted(tmp_path: Path) -> None:
    state = ClientState(tmp_path, "ws://here", "a")
    assert state.welcome() is None
    for restarts in (0, 1):
        state.enter(welcome("run", restarts=restarts), WAY)
        noted = ClientState(tmp_path, "ws://here", "a").welcome()
        assert noted is not None
        assert (noted.run, noted.settings, noted.restarts) == ("run", SETTINGS, restarts)


@pytest.mark.parametrize(("server", "name"), [("ws://there", "a"), ("ws://here", "b")])
def test_states_of_other_servers_and_names_are_others(state: ClientState, tmp_path: Path, server: str, name: str) -> None:
    other = ClientState(tmp_path, server, name)
    assert not other.is_in_a_run
    other.enter(welcome("run"), WAY)
    other.delete()
    assert state.is_in_a_run


def test_another_run_of_the_same_server_begins_anew(state: ClientState) -> None:
    keep(state, 1, 2)
    state.enter(welcome("run"), WAY)
    assert state.saved_steps.last_step() == 2
    state.enter(welcome("next"), WAY)
    assert (state.is_in_a_run, state.saved_steps.last_step()) == (True, 0)


def test_the_last_step_and_the_rounds_that_may_come_back_are_kept(state: ClientState) -> None:
    keep(state, 1, 2, 3, 4, 5, ends=(2, 4))
    assert [state.saved_steps.load(step).step for step in (2, 3, 4, 5, 9)] == [2, 2, 4, 5, 5]  # type: ignore[union-attr]
    assert state.saved_steps.load(1) is None
    keep(state, 6, keep_from=4, ends=(6,))
    assert [step for step in range(7) if (found := state.saved_steps.load(step)) is not None and found.step == step] == [4, 6]


def test_steps_that_a_server_took_back_are_forgotten(state: ClientState) -> None:
    keep(state, 1, 2, 3, 4, 5, ends=(2, 4))
    state.saved_steps.forget_after(2)
    assert state.saved_steps.last_step() == 2
    assert state.saved_steps.load(9).step == 2  # type: ignore[union-attr]


def test_what_is_loaded_is_what_was_saved(state: ClientState) -> None:
    state.saved_steps.save(saved(3, round=2), keep_from=0, is_round_end=False)
    found = state.saved_steps.load(3)
    assert found is not None
    assert (found.step, found.round, found.restarts) == (3, 2, 0)
    np.testing.assert_array_equal(found.state["adapter/m"], np.full((2, 2), 3, np.float32))


def test_step_is_on_the_disk_before_it_has_its_name_and_the_name_after(
    state: ClientState, tmp_path: Path, disk_calls: list[str]
) -> None:
    keep(state, 1)
    folder = files(tmp_path)[0].parent
    assert disk_calls == [f"fsync {folder}/0000000001.npz.part", "replace", f"fsync {folder}"]


def test_torn_file_is_passed_over(state: ClientState, tmp_path: Path) -> None:
    keep(state, 1, 2, 3, ends=(2,))
    newest = files(tmp_path)[1]
    assert newest.name == "0000000003.npz"
    os.truncate(newest, 20)
    found = state.saved_steps.load(3)
    assert found is not None
    assert found.step == 2
    assert state.saved_steps.last_step() == 2  # nobody claims to remember what is torn
    keep(state, 4, ends=(4,))
    assert [path.name for path in files(tmp_path)[:-1]] == ["0000000002.npz", "0000000004.npz"]


def test_no_damaged_byte_changes_what_is_remembered(state: ClientState, tmp_path: Path) -> None:
    keep(state, 3)
    (_, path) = sorted(files(tmp_path), reverse=True)
    whole = path.read_bytes()
    num_lost = 0
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        found = state.saved_steps.load(3)
        num_lost += found is None
        assert found is None or (found.step, found.state["adapter/m"].tolist()) == (3, [[3, 3], [3, 3]])
    assert num_lost > len(whole) // 2  # the rest are dates and the like


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"run": 7}', b"\xff"])
def test_note_that_cannot_be_read_is_none(state: ClientState, tmp_path: Path, content: bytes) -> None:
    note = next(path for path in files(tmp_path) if path.name == "place.json")
    note.write_bytes(content)
    assert not state.is_in_a_run
    assert state.welcome() is None


def test_folder_is_the_users_alone_and_no_name_reaches_its_path(tmp_path: Path) -> None:
    state = ClientState(tmp_path, "ws://../../etc", "a")
    state.enter(welcome("run"), WAY)
    (note,) = files(tmp_path)
    assert note.parent.parent == tmp_path / "places"
    assert note.parent.name.isalnum()
    assert note.parent.stat().st_mode & 0o777 == 0o700
    assert json.loads(note.read_text())["server"] == "ws://../../etc"


def test_state_that_an_earlier_version_has_left_is_found(tmp_path: Path) -> None:
    """A device may be killed, updated, and started again."""
    folder = tmp_path / "places" / hashlib.sha256(b"ws://here a").hexdigest()[:32]
    folder.mkdir(parents=True)
    note = {"run": "r", "settings": asdict(SETTINGS), "fingerprint": "f", "restarts": 2, "dtype": "bfloat16", "model": "gpt2"}
    (folder / "place.json").write_text(json.dumps({**note, "server": "ws://here", "name": "a"}))
    metadata = {"step": "4", "round": "2", "restarts": "2", "is_round_end": "1"}
    save_file({"adapter/m": np.ones((2, 2), np.float32)}, folder / "0000000004.safetensors", metadata)
    earlier = CacheFolder(folder / "samples", 10**6)
    earlier.store(3, 0, {0: (0, np.ones((2, 3), np.uint16))})
    earlier.confirm(3, 0)

    state = ClientState(tmp_path, "ws://here", "a")
    noted = state.welcome()
    assert noted is not None
    assert vars(noted) == vars(welcome("r", restarts=2))
    assert (state.way_to_compute("r"), state.model()) == (WayToCompute("torch", "bfloat16", ""), "gpt2")
    assert state.activation_cache(10**6).newest == 3
    # Steps were kept in another format. It is as if the device had not kept any, and the files go.
    assert state.saved_steps.last_step() == 0
    keep(state, 1)
    assert not list(folder.glob("*.safetensors"))


@pytest.mark.parametrize("what", ["enter", "save"])
def test_disk_that_is_full_is_said(state: ClientState, monkeypatch: Any, what: str) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match="No space left on device; free some space there"):
        state.enter(welcome("other"), WAY) if what == "enter" else keep(state, 1)


def test_server_that_never_moves_its_checkpoint_does_not_fill_the_disk(
    state: ClientState, tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    state.saved_steps.save(saved(1), keep_from=0, is_round_end=True)
    size = max(path.stat().st_size for path in files(tmp_path) if path.suffix == ".npz")
    monkeypatch.setattr("edge_client.saved_steps.MOST_BYTES", 3 * size)
    keep(state, *range(2, 10), ends=tuple(range(10)))
    assert [path.name for path in files(tmp_path)[:-1]] == [f"{step:010}.npz" for step in (6, 7, 8, 9)]
    (warning,) = caplog.records  # once
    assert "the server has not moved its checkpoint for" in warning.getMessage()


def test_rounds_ends_are_known_again_after_a_restart(state: ClientState, tmp_path: Path) -> None:
    keep(state, 1, 2, 3, ends=(2,))
    again = ClientState(tmp_path, "ws://here", "a")
    keep(again, 4)
    assert [path.name for path in files(tmp_path)[:-1]] == ["0000000002.npz", "0000000004.npz"]


# The secret of the noise


def test_noise_has_a_secret_that_outlives_a_kill_and_not_the_run(state: ClientState, tmp_path: Path) -> None:
    secret = state.noise_secret()
    assert len(secret) == 32
    assert ClientState(tmp_path, "ws://here", "a").noise_secret() == secret
    state.enter(welcome("run", restarts=1), WAY)
    assert state.noise_secret() == secret
    (path,) = (path for path in files(tmp_path) if path.name == "noise")
    assert permissions(path) == 0o600
    state.enter(welcome("next"), WAY)
    assert state.noise_secret() != secret
    state.delete()
    assert files(tmp_path) == []


def test_every_device_has_a_secret_of_its_own(state: ClientState, tmp_path: Path) -> None:
    other = ClientState(tmp_path, "ws://here", "b")
    other.enter(welcome("run"), WAY)
    assert other.noise_secret() != state.noise_secret()


@pytest.mark.parametrize("what", ["empty", "short", "long", "open to others", "link", "folder", "pipe"])
def test_secret_that_this_device_has_not_made_is_not_used(state: ClientState, tmp_path: Path, what: str) -> None:
    secret = state.noise_secret()
    (path,) = (path for path in files(tmp_path) if path.name == "noise")
    path.unlink()
    if what == "link":
        (tmp_path / "theirs").write_bytes(secret)
        (tmp_path / "theirs").chmod(0o600)
        path.symlink_to(tmp_path / "theirs")
    elif what == "folder":
        path.mkdir(mode=0o700)
    elif what == "pipe":
        os.mkfifo(path, 0o600)  # opening it must not wait for a writer
    else:
        path.write_bytes({"empty": b"", "short": secret[:31], "long": secret + b"x"}.get(what, secret))
        path.chmod(0o644 if what == "open to others" else 0o600)
    with pytest.raises(StateError, match=r"noise is not the secret that this device has made .* delete it") as caught:
        state.noise_secret()
    assert secret.hex() not in str(caught.value)


def test_disk_that_is_full_has_room_for_no_secret(state: ClientState, monkeypatch: Any, tmp_path: Path) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StateError, match="free some space there"):
            state.noise_secret()
    assert [path.name for path in files(tmp_path)] == ["place.json"]
    assert len(state.noise_secret()) == 32
