"""A device of which something fails: it is as if it had been killed, and the run ends with the same adapter."""

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import adapter_bytes, run_in_thread, run_split

import edge_client.client_state
import edge_client.saved_steps
import storage.activation_cache
from edge_client import EdgeClient, StateError
from gpu_server import GpuServer, RunEndedEarly
from storage import replace_file

STEPS = 6


class Killed(BaseException):
    """Nothing that is done about exceptions happens to it."""


@pytest.fixture(params=["rounds of several steps", "delta", "delta in rounds of several steps"])
def settings(request: pytest.FixtureRequest, tiny_model: Path) -> dict[str, Any]:
    rounds = {"aggregate_every": 3} if "rounds" in request.param else {}
    delta = {"codec": "delta", "check_codec_every": 0} if "delta" in request.param else {}
    shape = {"cut_layer": 2, "lora_rank": 4, "micro_batches": 2}
    return {"model": str(tiny_model), "steps": STEPS, "dtype": "float32", **shape, **rounds, **delta}


@pytest.fixture
def device(tmp_path: Path, pairs_file: Callable[..., Path]) -> dict[str, Any]:
    return {"data": pairs_file("a", 4), "batch_size": 2, "engine": "torch", "dtype": "float32", "name": "a"}


def refuse_write(monkeypatch: pytest.MonkeyPatch, state_dir: Path, number: int, error: BaseException) -> list[Path]:
    """Of what the device writes, one file cannot be. Gives all it has written since."""
    written: list[Path] = []

    def write(path: Path, data: bytes, **options: Any) -> None:
        if path.is_relative_to(state_dir):
            written.append(path)
            if len(written) == number:
                raise error
        replace_file(path, data, **options)

    for module in (edge_client.client_state, edge_client.saved_steps, storage.activation_cache):
        monkeypatch.setattr(module, "replace_file", write)
    return written


def test_device_whose_disk_is_full_comes_back_as_one_that_was_killed(
    settings: dict[str, Any],
    device: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "edge_client")
    others = {name: value for name, value in device.items() if name != "name"}
    all_writes = refuse_write(monkeypatch, tmp_path / "undisturbed-state", 0, Killed())
    run_split(
        {**settings, "run_dir": str(tmp_path / "undisturbed")}, {"a": {**others, "state_dir": tmp_path / "undisturbed-state"}}
    )
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for number in (2, len(all_writes) // 2, len(all_writes)):
        for what, error in (("full", full), ("killed", Killed())):
            name = f"{what}-{number}"
            state, run_dir = tmp_path / f"state-{name}", tmp_path / name
            with GpuServer(**settings, port=0, run_dir=str(run_dir)) as server:
                ended = run_in_thread(lambda server=server: list(server.train()))
                refuse_write(monkeypatch, state, number, error)
                client = EdgeClient(server.url, model=settings["model"], state_dir=state, **device)
                client.__enter__()
                with pytest.raises((StateError, Killed)) as caught:
                    list(client.train())
                if what == "full":
                    assert "No space left on device; free some space there" in str(caught.value)
                    client.__exit__(StateError, None, None)
                    assert "this device stays in run" in caplog.text
                else:
                    client._membership.hang_up()
                with EdgeClient(server.url, model=settings["model"], state_dir=state, **device) as again:
                    list(again.train())
                ended.result(timeout=60)
            assert adapter_bytes(run_dir) == adapter_bytes(tmp_path / "undisturbed"), name


def first_step_and(error: type[BaseException], client: EdgeClient) -> None:
    with client:
        next(client.train())
        raise error


@pytest.mark.parametrize("error", [ZeroDivisionError, MemoryError, SystemExit])
def test_device_leaves_for_nothing_but_its_user(
    error: type[BaseException], tiny_model: Path, device: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"model": str(tiny_model), "cut_layer": 2, "steps": STEPS, "dtype": "float32"}
    client = {"model": options["model"], "state_dir": tmp_path / "state", **device}
    with GpuServer(**options, port=0, run_dir=str(tmp_path / "run")) as server, caplog.at_level(logging.INFO):
        ended = run_in_thread(lambda: list(server.train()))
        with pytest.raises(error):
            first_step_and(error, EdgeClient(server.url, **client))
        assert "has left" not in caplog.text
        with EdgeClient(server.url, **client) as again:
            assert [step.number for step in again.train()][-1] == STEPS
        assert len(ended.result(timeout=60)) == STEPS


def test_user_who_interrupts_makes_the_device_leave(
    tiny_model: Path, device: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"model": str(tiny_model), "cut_layer": 2, "steps": STEPS, "dtype": "float32"}
    with GpuServer(**options, port=0, run_dir=str(tmp_path / "run")) as server, caplog.at_level(logging.INFO):
        ended = run_in_thread(lambda: list(server.train()))
        client = EdgeClient(server.url, model=options["model"], state_dir=tmp_path / "state", **device)
        with pytest.raises(KeyboardInterrupt):
            first_step_and(KeyboardInterrupt, client)
        assert isinstance(ended.exception(timeout=60), RunEndedEarly)
    assert "has left the run after step 1: it said goodbye" in caplog.text
    assert not list((tmp_path / "state/places").iterdir())
