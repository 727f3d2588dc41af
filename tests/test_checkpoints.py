"""A checkpoint is there whole or not at all, and what is wrong with one is said."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_server import ServerError
from gpu_server.checkpoints import Checkpoints, CheckpointSpacing, SavedRound
from gpu_server.run_setup import set_up
from storage import replace_file

MEMBERSHIP = {"a": {"num_samples": 5, "batch_size": 2, "longest": 9, "step": 0, "left": False}}


def saved(step: int, run: str = "run") -> SavedRound:
    state = {"adapter/matrix": torch.full((2, 3), float(step)), "edge_optimiser/0.step": torch.tensor(float(step))}
    return SavedRound(run=run, step=step, membership=MEMBERSHIP, state=state)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def newest(checkpoints: Checkpoints) -> Path:
    return sorted(checkpoints.folder.glob("*.safetensors"))[-1]


def assert_is(found: SavedRound | None, expected: SavedRound) -> None:
    assert found is not None
    assert (found.run, found.step, found.membership) == (expected.run, expected.step, expected.membership)
    assert found.state.keys() == expected.state.keys()
    assert all(torch.equal(found.state[name], tensor) for name, tensor in expected.state.items())


def test_latest_gives_what_was_written(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest("run") is None
    for step in (0, 9, 10):
        checkpoints.write(saved(step))
        assert_is(checkpoints.latest("run"), saved(step))


def test_the_last_two_are_kept(checkpoints: Checkpoints) -> None:
    for step in (0, 5, 10, 15):
        checkpoints.write(saved(step))
    assert checkpoints.steps() == [10, 15]
    assert len(list(checkpoints.folder.iterdir())) == 2


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1])
def test_one_that_is_torn_is_passed_over_and_said(checkpoints: Checkpoints, caplog: Any, size: int) -> None:
    checkpoints.write(saved(5))
    checkpoints.write(saved(10))
    torn = newest(checkpoints)
    os.truncate(torn, size if size >= 0 else torn.stat().st_size - 1)
    assert_is(checkpoints.latest("run"), saved(5))
    assert f"{torn} is damaged" in caplog.text
    # It is neither taken for one of the two to keep nor written over.
    checkpoints.write(saved(10))
    assert checkpoints.steps() == [5, 10]
    assert torn.with_suffix(".damaged").exists()


def test_every_bit_of_one_is_checked(checkpoints: Checkpoints) -> None:
    checkpoints.write(saved(5))
    checkpoints.write(saved(10))
    whole = newest(checkpoints).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in (header, header + 11, len(whole) - 1, whole.index(b"num_samples") + 16):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        checkpoints._path(10).write_bytes(flipped)
        assert_is(checkpoints.latest("run"), saved(5))
        assert checkpoints.steps() == [5]


def test_where_none_is_intact_the_run_cannot_go_on(checkpoints: Checkpoints) -> None:
    checkpoints.write(saved(5))
    os.truncate(newest(checkpoints), 10)
    with pytest.raises(ServerError, match=r"no checkpoint in .* is intact"):
        checkpoints.latest("run")


def test_another_runs_checkpoint_is_refused(checkpoints: Checkpoints) -> None:
    checkpoints.write(saved(5, run="other"))
    with pytest.raises(ServerError, match="is of run other, not of run"):
        checkpoints.latest("run")
    assert checkpoints.steps() == [5]


def test_another_formats_checkpoint_is_refused_by_its_number(checkpoints: Checkpoints, monkeypatch: Any) -> None:
    monkeypatch.setattr("gpu_server.checkpoints.FORMAT", 7)
    checkpoints.write(saved(5))
    monkeypatch.undo()
    with pytest.raises(ServerError, match="has format 7, this version reads 1"):
        checkpoints.latest("run")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_that_is_full_leaves_the_checkpoints_before(checkpoints: Checkpoints, monkeypatch: Any, call: str) -> None:
    checkpoints.write(saved(5))
    checkpoints.write(saved(10))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ServerError, match="No space left on device; the ones before are kept"):
        checkpoints.write(saved(15))
    monkeypatch.undo()
    assert [path.name for path in sorted(checkpoints.folder.iterdir())] == ["000000005.safetensors", "000000010.safetensors"]
    assert_is(checkpoints.latest("run"), saved(10))


def test_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path: Path, disk_calls: list[str]) -> None:
    replace_file(tmp_path / "file", json.dumps(MEMBERSHIP).encode())
    assert disk_calls == [f"fsync {tmp_path}/file.part", "replace", f"fsync {tmp_path}"]


@pytest.mark.parametrize(
    ("seconds", "num_bytes", "pause"),
    [(0.0, 0, 1.0), (0.004, 10**5, 1.0), (0.05, 10**5, 5.0), (3.0, 10**5, 300.0), (0.004, 3_500_000, 3.5)],
)
def test_writing_takes_a_hundredth_of_the_time_and_a_megabyte_a_second_at_most(
    seconds: float, num_bytes: int, pause: float
) -> None:
    spacing = CheckpointSpacing()
    assert spacing.is_due(100.0)  # the first
    spacing.asked()
    assert not spacing.is_due(1e9)  # while it is written
    spacing.written(100.0, seconds=seconds, num_bytes=num_bytes)
    assert not spacing.is_due(100.0 + 0.99 * pause)
    assert spacing.is_due(100.0 + 1.01 * pause)


def test_devices_that_keep_their_states_until_they_are_saved_need_half_a_gigabyte_for_it_at_most() -> None:
    """Of the rounds since the last checkpoint but one: a device that forgot some would go on from another state."""
    spacing = CheckpointSpacing(10 * 2**20)
    assert spacing.is_due(0.0)
    spacing.asked()
    spacing.written(0.0, seconds=0.5, num_bytes=40 * 2**20)  # the next in 50 seconds
    for intervals in range(3):
        rounds = 1
        while not spacing.is_due(1.0):
            rounds += 1
        assert rounds == 26, intervals  # 260 MiB
        spacing.asked()  # and is written still


def test_size_of_a_checkpoint_is_that_of_its_file(checkpoints: Checkpoints) -> None:
    """Of very many devices, what is known of them is more than the adapter."""
    many = replace(saved(5), membership={f"device-{number}": MEMBERSHIP["a"] for number in range(1000)})
    assert checkpoints.write(many) == newest(checkpoints).stat().st_size > 50_000


def test_clock_decides_about_checkpoints_where_nothing_that_comes_out_depends_on_it(tiny_model: Path, tmp_path: Path) -> None:
    def decided(**options: Any) -> tuple[bool, int]:
        run = set_up({"model": str(tiny_model), "cut_layer": 1, "steps": 2, "run_dir": str(tmp_path / str(options)), **options})
        return run.spacing is not None, run.federation.checkpoint_every

    assert decided() == (True, 1)
    assert decided(aggregate_every=3) == (True, 1)
    assert decided(checkpoint_every=7) == (False, 7)
    assert decided(codec="delta") == (False, 10)
    assert decided(codec="delta", checkpoint_every=7) == (False, 7)
