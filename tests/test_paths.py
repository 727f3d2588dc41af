"""A path means the same wherever a user writes it: in a flag, in TOML, in Python."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edge_client.cli
import export.cli
import gpu_server.cli
from edge_client import EdgeClient, EnrolmentError, Generator
from edge_client.enrolment import state_folder
from edge_client.generation import ExportedModelError
from gpu_server import GpuServer
from gpu_server.door import enrolments_of
from storage import ModelError


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return home


@pytest.fixture(autouse=True)
def _no_folder_of_that_name(home: Path, tmp_path: Path) -> Any:
    yield
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("~")]


def test_servers_paths_are_expanded_from_flags_toml_and_python(tiny_model: Path, home: Path, tmp_path: Path) -> None:
    (home / "model").symlink_to(tiny_model)
    options = {"model": "~/model", "run_dir": "~/run", "steps": 1, "cut_layer": 1, "port": 0, "clients_file": "~/clients.json"}
    with GpuServer(**options) as server:
        assert server.config.run_dir == str(home / "run")
        assert server.config.clients_file == str(home / "clients.json")
    assert (home / "run/run.json").exists()
    (tmp_path / "run.toml").write_text('model = "~/absent"\nrun-dir = "~/run-2"\nsteps = 1\n')
    assert gpu_server.cli.main(["serve", "--config=run.toml"]) == 1
    assert (home / "run-2").exists()
    assert gpu_server.cli.main(["serve", "--model=~/absent", "--run-dir=~/run-3", "--steps=1"]) == 1
    assert (home / "run-3").exists()
    assert enrolments_of("~/run-4", None).path == home / "run-4/clients.json"


def test_devices_paths_are_expanded(tiny_model: Path, home: Path, pairs_file: Callable[..., Path]) -> None:
    (home / "model").symlink_to(tiny_model)
    (home / "data.jsonl").write_bytes(pairs_file("a", 3).read_bytes())
    client = EdgeClient("ws://127.0.0.1:1", model="~/model", data="~/data.jsonl", eval_data="~/data.jsonl", state_dir="~/state")
    assert len(client.data.samples) == 3
    assert client._state._folder.is_relative_to(home / "state")
    with pytest.raises(ExportedModelError, match=str(home)):
        Generator("~/absent")
    assert edge_client.cli.main(["prepare", "~/absent"]) == 1


def test_exports_paths_are_expanded(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["onnx", "--model=~/absent", "--output=out"],
        ["merge", "--run-dir=~/absent", "--output=out"],
        ["verify", "~/absent"],
    ):
        assert export.cli.main(words) == 1
        assert str(home / "absent") in capsys.readouterr().err


def test_user_without_a_home_is_asked_for_the_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where there is none
    with pytest.raises(EnrolmentError, match="no home folder: give --state-dir DIR"):
        state_folder(None)
    assert state_folder(tmp_path) == tmp_path


def test_name_on_the_hub_is_no_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="nobody/nothing"):
        EdgeClient("ws://127.0.0.1:1", model="nobody/nothing", data="d.jsonl", state_dir=tmp_path)
