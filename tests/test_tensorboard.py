"""A run's event files, read by TensorBoard's own reader: what a step says, each step once, over crashes and restarts."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import permissions, run_split
from steps import a_step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpu_server import GpuServer
from gpu_server.federation import StepRecord
from gpu_server.history import MOST_CLIENTS, EvaluationRecord, RunEvent, telling_to
from gpu_server.run_directory import RunDirectory
from gpu_server.tensorboard import TensorBoardObserver, scalars_of
from protocol import Seconds
from storage import RunDescription

Curves = dict[str, dict[int, float]]
"""By tag and step."""


def step(number: int, **more: Any) -> StepRecord:
    seconds = {"a": Seconds(edge_compute=0.25), "b": Seconds(uplink=0.5)}
    return a_step(number, **{"loss": 4.0 - number / 8, "losses": {"a": 1.0, "b": 3.0}, "seconds": seconds, **more})


def held_out(step: int, client: str, loss: float, labelled_tokens: int = 10) -> EvaluationRecord:
    return EvaluationRecord(step=step, time=1e9 + step, client=client, loss=loss, labelled_tokens=labelled_tokens)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.describe(RunDescription(run="r", fingerprint="f", config={}, dtype="float32", versions={}))
    return directory


class Serving:
    """A server that writes metrics, and tells the observer of them, from step to step."""

    def __init__(
        self, directory: RunDirectory, done: int = 0, *, with_tensorboard: bool = True, clients: int = MOST_CLIENTS
    ) -> None:
        self.directory, self.number = directory, done
        directory.forget_after(done)
        self.observer = TensorBoardObserver(directory.path, directory.checkpoints, clients) if with_tensorboard else None
        if self.observer:
            self.observer.serving_begins(done)

    def step(self, record: StepRecord) -> None:
        self.directory.append_metrics(record)
        if self.observer:
            self.observer.step_finished(record)

    def steps(self, last: int, **more: Any) -> None:
        for number in range(self.number + 1, last + 1):
            self.step(step(number, **more))
        self.number = last

    def evaluated(self, record: EvaluationRecord) -> None:
        self.directory.append_evaluation(record)
        if self.observer:
            self.observer.evaluated(record)

    def checkpoints(self, *steps: int) -> None:
        folder = self.directory.checkpoints.folder
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for number in steps:
            (folder / f"{number:09}.safetensors").touch()

    def end(self) -> Curves:
        assert self.observer
        self.observer.serving_ends()
        return curves(self.directory.path)


def curves(run_dir: Path) -> Curves:
    """As TensorBoard draws them. Each step is there once."""
    read = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = {tag: read.Scalars(tag) for tag in read.Tags()["scalars"]}
    for tag, points in found.items():
        steps = [point.step for point in points]
        assert steps == sorted(set(steps)), tag
    return {tag: {point.step: point.value for point in points} for tag, points in found.items()}


def test_step_is_written_with_its_figures_and_its_time(directory: RunDirectory) -> None:
    serving = Serving(directory)
    serving.steps(2)
    found = serving.end()
    assert found["train/loss"] == {1: 3.875, 2: 3.75}
    assert {tag: points[2] for tag, points in found.items() if tag != "train/loss"} == {
        "train/learning_rate": 0.25,
        "train/grad_norm": 2.0,
        "train_loss/a": 1.0,
        "train_loss/b": 3.0,
        "throughput/tokens_per_second": 60.0,
        "throughput/bytes_up_per_second": 600.0,
        "throughput/bytes_down_per_second": 1400.0,
        "time/step": 0.5,
        "time/engine": 0.125,
        "time/edge_compute": 0.125,
        "time/uplink": 0.25,
        **{f"time/{part}": 0.0 for part in ("encode", "queue", "server_compute", "downlink", "decode")},
    }
    read = EventAccumulator(str(directory.path / "tensorboard")).Reload()
    assert [point.wall_time for point in read.Scalars("train/loss")] == [1e9 + 1, 1e9 + 2]
    assert permissions(directory.path / "tensorboard") == 0o700


def test_devices_of_a_run_of_very_many_have_no_curves_of_their_own(directory: RunDirectory) -> None:
    serving = Serving(directory, clients=MOST_CLIENTS + 1)
    serving.evaluated(held_out(0, "a", 5.0))
    serving.steps(2)
    serving.evaluated(held_out(2, "a", 1.0))
    found = serving.end()
    assert (found["train/loss"][2], found["eval/loss"]) == (3.75, {0: 5.0, 2: 1.0})
    assert {tag.partition("/")[0] for tag in found} == {"train", "throughput", "time", "eval"}


def test_figure_that_is_no_number_is_left_out() -> None:
    unknown = step(1, loss=math.nan, learning_rate=math.nan, gradient_norm=math.inf, step_seconds=0.0, seconds={}, losses={})
    assert {tag for tag, value in scalars_of(unknown).items() if math.isfinite(value)} == {"time/engine"}


def test_held_out_loss_of_all_devices_is_weighted_by_their_tokens(directory: RunDirectory) -> None:
    serving = Serving(directory)
    serving.steps(2)
    serving.evaluated(held_out(2, "a", 1.0, labelled_tokens=30))
    serving.evaluated(held_out(2, "b", 5.0, labelled_tokens=10))
    serving.steps(3)
    serving.evaluated(held_out(2, "late", 9.0))
    serving.steps(4)
    serving.evaluated(held_out(4, "b", 3.0))
    found = serving.end()
    assert found["eval/loss"] == {2: 2.0, 4: 3.0}
    assert found["eval/perplexity"] == {2: pytest.approx(math.exp(2.0)), 4: pytest.approx(math.exp(3.0))}
    assert [found[f"eval_loss/{name}"] for name in ("a", "b", "late")] == [{2: 1.0}, {2: 5.0, 4: 3.0}, {2: 9.0}]


def test_steps_that_are_done_again_show_once_and_as_they_were_done_last(directory: RunDirectory) -> None:
    before = Serving(directory)
    before.steps(5)
    before.evaluated(held_out(4, "a", 2.0))
    before.checkpoints(2, 3)
    before.end()
    again = Serving(directory, 3)
    again.steps(7, loss=1.0)
    found = again.end()
    assert found["train/loss"] == {1: 3.875, 2: 3.75, 3: 3.625, **dict.fromkeys(range(4, 8), 1.0)}
    assert "eval/loss" not in found  # it was of a step that was taken back


def test_what_a_crash_kept_from_the_files_is_in_them_after_it(directory: RunDirectory) -> None:
    before = Serving(directory)
    before.steps(2)
    before.end()
    lost = Serving(directory, 2, with_tensorboard=False)  # it writes metrics, and dies before TensorBoard hears of them
    lost.steps(3)
    lost.evaluated(held_out(3, "a", 2.0))
    lost.steps(5)
    lost.checkpoints(2, 5)
    found = Serving(directory, 5).end()
    assert found["train/loss"] == {number: 4.0 - number / 8 for number in range(1, 6)}
    assert found["eval/loss"] == {3: 2.0}


def test_what_was_held_out_before_the_first_step_shows_once(directory: RunDirectory) -> None:
    before = Serving(directory)
    before.evaluated(held_out(0, "a", 5.0))  # and no checkpoint: the run had not begun
    before.end()
    directory.forget_after(-1)
    again = Serving(directory)
    again.evaluated(held_out(0, "a", 5.0))
    again.checkpoints(0)
    again.steps(2)
    again.end()
    last = Serving(directory, 0)
    last.evaluated(held_out(0, "b", 3.0))
    assert last.end()["eval/loss"] == {0: 4.0}


def test_run_that_is_reported_only_later_is_there_from_its_first_step(directory: RunDirectory) -> None:
    before = Serving(directory, with_tensorboard=False)
    before.steps(4)
    before.checkpoints(3, 4)
    later = Serving(directory, 4)
    later.steps(5)
    assert list(later.end()["train/loss"]) == [1, 2, 3, 4, 5]


def test_run_goes_on_without_event_files_that_cannot_be_written(directory: RunDirectory) -> None:
    (directory.path / "tensorboard").write_text("not a folder")
    told: list[RunEvent] = []
    with telling_to(told.append):
        serving = Serving(directory)
        serving.steps(3)
        serving.observer.serving_ends()  # type: ignore[union-attr]
    (event,) = told
    assert event.level == "warning"
    assert event.text == "event files for TensorBoard cannot be written: File exists; the run goes on without them"


def test_defect_is_raised_where_the_run_is_served(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: StepRecord) -> dict[str, float]:
        raise ZeroDivisionError

    monkeypatch.setattr("gpu_server.tensorboard.scalars_of", fail)
    serving = Serving(directory)
    serving.steps(1)
    with pytest.raises(ZeroDivisionError):
        serving.observer.serving_ends()  # type: ignore[union-attr]


def test_run_that_goes_on_is_one_run_in_tensorboard(tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]) -> None:
    options = {"model": tiny_model, "run_dir": str(tmp_path / "run"), "checkpoint_every": 2, "report_to": ("tensorboard",)}
    data = {"a": {"data": pairs_file("a", 6)}}
    first = run_split({**options, "steps": 5}, data)
    again = run_split({"model": tiny_model, "run_dir": options["run_dir"], "resume": True, "steps": 8}, data)  # it is recorded
    expected = {record.number: record.loss for record in [*first.records, *again.records]}
    found = curves(first.run_dir)["train/loss"]
    assert found == pytest.approx(expected, rel=1e-6)
    assert list(found) == list(range(1, 9))


@pytest.mark.parametrize("report_to", [(), ("none",)])
def test_nothing_is_written_or_imported_for_who_does_not_ask(
    tiny_model: Path, tmp_path: Path, report_to: tuple[str, ...]
) -> None:
    options = {"model": str(tiny_model), "run_dir": str(tmp_path / "run"), "steps": 1, "port": 0, "report_to": report_to}
    check = f"import sys, gpu_server; gpu_server.GpuServer(**{options!r}); sys.exit('tensorboard' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
    assert not (tmp_path / "run/tensorboard").exists()


def test_installation_without_tensorboard_is_told_what_to_install(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "gpu_server.tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(Exception, match=r"--report-to tensorboard needs .*splitlora\[tensorboard\]"):
        GpuServer(model=str(tiny_model), run_dir=str(tmp_path / "run"), steps=1, port=0, report_to="tensorboard")
