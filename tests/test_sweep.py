"""A grid of settings: which cells a file makes, and that they are run to the end whatever happens in between."""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, adapter_bytes, metrics, run_split
from programs import arguments, program
from test_contestants import run as train_whole
from test_parity import rows, write_pairs

import edge_client.cli
import gpu_server.report
from gpu_server.cli import main
from gpu_server.config import ServerConfig
from gpu_server.errors import ServerError
from gpu_server.flags import add_flags
from gpu_server.history import RunFiles
from gpu_server.run_directory import RunDirectory
from gpu_server.run_lock import is_served, lock_of
from gpu_server.sweep.cell_folder import CellFolder, Result
from gpu_server.sweep.grid import Cell, Sweep, read_sweep
from gpu_server.sweep.processes import CellFailed, Processes, Program
from gpu_server.sweep.settings import MODES, DeviceConfig, device_names, known_of_device, known_of_server
from storage import RunDescription

STEPS = 40


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sweep starts computes as this process does: sums of another order differ in their last bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def write(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """``write(lines, server lines, device lines)``: a sweep's file, with two small data files and its model."""
    for name, offset in (("a", 0), ("b", 20), ("valid", 40)):
        write_pairs(tmp_path / f"{name}.jsonl", rows(9, offset=offset))

    def write(lines: str = "", server: str = "", device: str = "", *, data: str = "") -> Path:
        path = tmp_path / "sweep.toml"
        data = data or f'data = ["{tmp_path}/a.jsonl", "{tmp_path}/b.jsonl"]'
        model = "" if server.startswith("model") else f'model = "{tiny_model}"\n'
        steps = "" if "steps" in server else "steps = 3\n"
        path.write_text(f"{data}\n{lines}\n[server]\n{model}{steps}{server}\n[device]\n{device}\n")
        return path

    return write


def words(sweep: Sweep) -> list[str]:
    return [cell.words for cell in sweep.cells]


# Which cells there are


def test_grid_is_the_product_of_all_lists_and_the_last_one_changes_fastest(write: Callable[..., Path]) -> None:
    sweep = read_sweep(write(server="cut-layer = [1, 2]\nlora_rank = 4\nseed = [0, 1]", device="batch_size = [2, 3]"))
    assert words(sweep) == [
        f"split-cut-layer-{cut}-seed-{seed}-batch-size-{size}" for cut in (1, 2) for seed in (0, 1) for size in (2, 3)
    ]
    assert sweep.cells[0].server["lora_rank"] == 4
    assert {len(cell.name) - len(cell.words) for cell in sweep.cells} == {len("-12345678")}
    assert len({cell.digest for cell in sweep.cells}) == 8


def test_what_a_mode_does_not_know_multiplies_nothing_of_it(write: Callable[..., Path]) -> None:
    lines = 'mode = ["split", "federated", "centralised"]'
    server = 'cut_layer = [1, 2]\nlora_rank = [4, 8]\naggregate_every = [1, 5]\ncodec = "int8"'
    sweep = read_sweep(write(lines, server, "in_flight = [1, 2]"))
    modes = [cell.mode for cell in sweep.cells]
    assert {mode: modes.count(mode) for mode in MODES} == {"split": 16, "federated": 4, "centralised": 2}
    assert words(sweep)[-2:] == ["centralised-lora-rank-4", "centralised-lora-rank-8"]
    assert sweep.cells[-1].server.keys() == {"model", "steps", "lora_rank"}
    assert sweep.cells[-1].device == {}


def test_lists_of_layers_are_texts_with_commas(write: Callable[..., Path]) -> None:
    sweep = read_sweep(write(server='lora_targets = ["c_attn", "c_attn,c_proj"]'))
    assert [cell.server["lora_targets"] for cell in sweep.cells] == [("c_attn",), ("c_attn", "c_proj")]
    assert words(sweep)[1] == "split-lora-targets-c-attn-c-proj"


def digests(path: Path) -> list[str]:
    return [cell.digest for cell in read_sweep(path).cells]


def test_cell_is_the_same_as_long_as_its_result_is(write: Callable[..., Path], tmp_path: Path) -> None:
    before = digests(write(server="lora_rank = 4"))
    assert digests(write(server="lora_rank = 4\nlora_alpha = 32\ncut_layer = 3", device="batch_size = 8")) == before
    assert before[0] in digests(write(server="lora_rank = [2, 4]"))
    assert digests(write(server="lora_rank = 4\nlora_alpha = 31")) != before
    assert digests(write(f'eval_data = "{tmp_path}/valid.jsonl"', "lora_rank = 4")) != before
    shutil.move(tmp_path / "a.jsonl", tmp_path / "c.jsonl")
    moved = f'data = ["{tmp_path}/c.jsonl", "{tmp_path}/b.jsonl"]'
    assert digests(write(server="lora_rank = 4", data=moved)) == before
    (tmp_path / "c.jsonl").write_text('{"text": "other"}\n')
    assert digests(write(server="lora_rank = 4", data=moved)) != before


@pytest.mark.parametrize("what", ["a folder", "a link"])
def test_what_no_sweep_has_made_is_not_deleted(write: Callable[..., Path], tmp_path: Path, what: str) -> None:
    (cell,) = read_sweep(write(server="lora_rank = 4")).cells
    place, mine = tmp_path / cell.name, tmp_path / "mine"
    (mine if what == "a link" else place).mkdir()
    if what == "a link":
        place.symlink_to(mine)
    (place / "letter").write_text("dear all")
    with pytest.raises(ServerError, match="was made by no sweep; move it away"):
        CellFolder(tmp_path, cell).begin()
    assert (place / "letter").read_text() == "dear all"


@pytest.mark.parametrize("left", [[], ["cell.json.x1"], ["cell.json", "metrics.jsonl"]])
def test_cell_that_was_killed_at_any_moment_begins_anew(write: Callable[..., Path], tmp_path: Path, left: list[str]) -> None:
    (cell,) = read_sweep(write(server="lora_rank = 4")).cells
    folder = CellFolder(tmp_path, cell)
    for place in (folder.path, folder.path.with_name(f"{folder.path.name}.removed")):
        place.mkdir()
        for name in left:
            (place / name).write_text("{")
    folder.begin()
    assert [path.name for path in folder.path.iterdir()] == ["cell.json"]
    assert list(tmp_path.glob("*.removed")) == []


def test_finished_cell_is_found_when_the_grid_has_got_another_axis(write: Callable[..., Path], tmp_path: Path) -> None:
    (cell,) = read_sweep(write(server="lora_rank = 4")).cells
    folder = CellFolder(tmp_path, cell)
    folder.begin()
    wider = {cell.words: cell for cell in read_sweep(write(server="lora_rank = [4, 8]")).cells}
    assert CellFolder(tmp_path, wider["split-lora-rank-4"]).path == folder.path
    assert CellFolder(tmp_path, wider["split-lora-rank-8"]).path == tmp_path / wider["split-lora-rank-8"].name


@pytest.mark.parametrize(
    ("lines", "server", "device", "said"),
    [
        ("modes = 'split'", "", "", "unknown key 'modes'; the nearest known one is 'mode'"),
        ("cut_layer = 2", "", "", "cut-layer belongs below [server]"),
        ("dtype = 'float32'", "", "", "dtype belongs below [server] or [device]"),
        ("mode = 'sliced'", "", "", "mode must be among split, federated, centralised; got 'sliced'"),
        ("mode = []", "", "", "mode has no value: the grid is empty"),
        ("eval_every = 2", "", "", "eval-every needs eval-data"),
        ("eval_data = 'nowhere.jsonl'", "", "", "nowhere.jsonl cannot be read: No such file or directory"),
        ("eval_data = 1", "", "", "eval-data must be a text, got [1]"),
        ("eval_data = 'a'\neval_every = 0", "", "", "eval-every must be a whole number from 1 on, got 0"),
        ("output = 3", "", "", "output must be a text, got [3]"),
        ("", "cut_leyer = 2", "", "unknown setting 'cut_leyer'; the nearest known one is 'cut-layer'"),
        ("", "", "batchsize = 2", "unknown setting 'batchsize'; the nearest known one is 'batch-size'"),
        ("", "cut_layer = [1, 'two']", "", "cut-layer must be a whole number, got 'two'"),
        ("", "lora_rank = true", "", "lora-rank must be a whole number, got True"),
        ("", "codec = ['int8', 'int9']", "", "codec must be one of auto, float32, bfloat16, int8, int4, delta; got 'int9'"),
        ("", "", "no_shuffle = 1", "no-shuffle must be true or false, got 1"),
        ("", "lora_rank = []", "", "lora-rank has no value: the grid is empty"),
        ("", "seed = [0, 1, 0]", "", "seed has the value 0 twice: two cells would have one name"),
        ("", "lr = [1, 1.0]", "", "lr has the value 1 twice"),
        ("", "clients = 3", "", "clients is the sweep's own: there is a device for every file in data"),
        ("", "run-dir = 'x'", "", "run-dir is the sweep's own"),
        ("", "resume = true", "", "resume is the sweep's own"),
        ("", "dtype = 'float64'", "", "dtype float64 is for programs in Python"),
        ("", "lora_rank = 4\nlora-rank = 5", "", "gives both lora_rank and lora-rank"),
        ("", "", "batch_size = [2, 0]", "batch-size must be at least 1, got 0 (cell split-batch-size-0)"),
        ("", "lora_rank = [4, 0]", "", "lora-rank must be 1 to 2147483647, got 0 (cell split-lora-rank-0)"),
        ("", "steps = 3\nepochs = 2", "", "give steps or epochs, not both"),
        ("mode = 'centralised'", "codec = 'int8'", "", "codec means nothing to mode centralised; delete it, or add a mode"),
    ],
)
def test_bad_file_is_told_before_anything_is_started(
    write: Callable[..., Path], tmp_path: Path, lines: str, server: str, device: str, said: str, capsys: Any
) -> None:
    path = write(lines, server, device)
    assert main(["sweep", str(path), "--output", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"splitlora-server: {path}")
    assert said in shown
    assert not (tmp_path / "out").exists()


def test_file_without_data_or_output_or_toml_is_told(write: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    for data, said in (
        ("# none", "data names no file"),
        ("data = []", "data names no file"),
        ("data = 'a.jsonl'", "data must be a list of texts, got 'a.jsonl'"),
        ("data = [['a.jsonl']]", "data must be a list of texts, got [['a.jsonl']]"),
    ):
        assert main(["sweep", str(write(data=data)), "--output", str(tmp_path / "out")]) == 1
        assert said in capsys.readouterr().err
    missing = f"data = ['{tmp_path}/a.jsonl', '{tmp_path}/z.jsonl']"
    assert main(["sweep", str(write(data=missing)), "--output", str(tmp_path / "out")]) == 1
    assert f"{tmp_path}/z.jsonl cannot be read: No such file" in capsys.readouterr().err
    assert main(["sweep", str(write())]) == 1
    assert "output is missing" in capsys.readouterr().err
    (tmp_path / "sweep.toml").write_text("mode = [")
    assert main(["sweep", str(tmp_path / "sweep.toml")]) == 1
    assert "is not TOML" in capsys.readouterr().err
    assert main(["sweep", str(write(server="model = 'no/such/model'")), "--output", str(tmp_path / "out")]) == 1
    assert "no/such/model" in capsys.readouterr().err


def test_example_and_document_are_files_of_which_these_cells_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert words(read_sweep(Path("examples/sweep.toml"))) == [
        *(f"split-cut-layer-{cut}-aggregate-every-{every}" for cut in (1, 2) for every in (1, 10)),
        *("federated-aggregate-every-1", "federated-aggregate-every-10", "centralised"),
    ]
    document = (REPOSITORY / "docs/training.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```toml\n(.*?)```", document, re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.toml").write_text(shown)
    for name in ("a", "b", "held-out"):
        (tmp_path / f"{name}.jsonl").touch()
    modes = [cell.mode for cell in read_sweep(tmp_path / "sweep.toml").cells]
    assert {mode: modes.count(mode) for mode in MODES} == {"split": 24, "federated": 6, "centralised": 3}
    for said in ("= 24 split runs", "= 6 federated ones and 3 centralised ones"):
        assert said in " ".join(document.split())


def test_document_lists_what_each_mode_knows() -> None:
    document = (REPOSITORY / "docs/training.md").read_text(encoding="utf-8")
    row = next(line for line in document.splitlines() if line.startswith("| `federated` |"))
    listed = set(re.findall(r"`(\w+)`", row.partition("of the server:")[2])) - {"lora_"}
    assert listed | {name for name in known_of_server("federated") if name.startswith("lora_")} == (
        known_of_server("federated") | known_of_device("federated")
    )


# Tables that have to agree


def actions_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser._actions}


def test_device_settings_are_flags_of_a_device() -> None:
    commands = next(
        action for action in edge_client.cli.build_parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    of_device, ours = actions_of(commands.choices["train"]), argparse.ArgumentParser()
    add_flags(ours, DeviceConfig)
    defaults = {item.name: item.default for item in fields(DeviceConfig)}
    for name, action in actions_of(ours).items():
        if name == "help":
            continue
        flag = of_device[name]
        assert (flag.type or str, flag.nargs) == (action.type or str, action.nargs), name
        assert flag.default == defaults[name], name
        assert list(flag.choices or []) == list(action.choices or []), name


def test_every_mode_knows_only_settings_that_there_are() -> None:
    of_server, of_device = ({item.name for item in fields(table)} for table in (ServerConfig, DeviceConfig))
    for mode in MODES:
        assert known_of_server(mode) <= of_server
        assert known_of_device(mode) <= of_device
        assert {name for name in of_server if name.startswith("lora_")} <= known_of_server(mode)  # which all of them use
    assert known_of_server("federated") - known_of_server("centralised") == {"aggregate_every"}


# Running


def losses(run_dir: Path) -> list[float]:
    found = metrics(run_dir)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row["loss"] for row in found]


def evaluations(run_dir: Path) -> list[tuple[int, float, int]]:
    return [(record.step, record.loss, record.labelled_tokens) for record in RunFiles(run_dir).evaluations()]


def expected(cell: Cell, sweep: Sweep, folder: Path) -> Path:
    """The run of a cell that nothing disturbs, in this process; of a sweep with one device."""
    options = {"dtype": "float32", "lr": 1e-3, **cell.server, "run_dir": str(folder)}
    held_out = {"eval_data": sweep.eval_data, "eval_every": sweep.eval_every}
    if cell.mode != "split":
        return train_whole(cell.mode, list(sweep.data), dict(cell.device), **options, **held_out)
    (name,) = device_names(len(sweep.data))
    return run_split({**options, "micro_batches": 1}, {name: {"data": sweep.data[0], **held_out, **cell.device}}).run_dir


def started(path: Path, output: Path) -> Any:
    return program("gpu_server", "sweep", str(path), *arguments({"output": output}))


def wait_until_it_is_in(process: "subprocess.Popen[str]", folder: Path, step: int) -> None:
    """That a cell has come to a step."""
    file = folder / "metrics.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < step:
        with pytest.raises(subprocess.TimeoutExpired):  # it goes on
            process.wait(0.01)


def test_sweep_that_is_killed_twice_and_stopped_once_ends_as_one_that_is_not(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    grid = f"steps = {STEPS}\naggregate_every = [1, 2, 3]\ndtype = 'float32'\ncut_layer = 2\ncheckpoint_every = 1"
    data, held_out = f'data = ["{tmp_path}/a.jsonl"]', f'eval_data = "{tmp_path}/valid.jsonl"\neval_every = 10'
    path = write(
        f"mode = ['split', 'centralised']\n{held_out}", grid, "engine = 'torch'\ndtype = 'float32'\nbatch_size = 2", data=data
    )
    sweep, output = read_sweep(path), tmp_path / "out"
    (output / "devices").mkdir(parents=True)
    (output / "devices" / "mine").write_text("somebody else's")
    folders = [output / cell.name for cell in sweep.cells]
    assert len(folders) == 3 + 1  # centralised training knows no rounds
    finished: dict[Path, int] = {}

    def check_finished() -> None:
        """What is finished stays as it is."""
        for folder, written in finished.items():
            assert (folder / "finished.json").stat().st_mtime_ns == written
        finished.update({f: (f / "finished.json").stat().st_mtime_ns for f in folders if (f / "finished.json").exists()})

    for ending, stop in ((0, signal.SIGKILL), (1, signal.SIGTERM), (3, signal.SIGKILL)):
        with started(path, output) as process:
            wait_until_it_is_in(process, folders[ending], 5)
            process.send_signal(stop)
            status = process.wait(60)
        assert status == (-signal.SIGKILL if stop == signal.SIGKILL else 128 + signal.SIGTERM)
        check_finished()
        assert list(finished) == folders[:ending]
        if stop == signal.SIGTERM:  # its children are gone, and have saved what they could
            assert not is_served(folders[ending])
            assert "--resume goes on from there" in (folders[ending] / "server.log").read_text()
    with started(path, output) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    check_finished()
    assert list(finished) == folders
    assert "Traceback" not in "".join(log.read_text() for folder in folders for log in folder.glob("*.log"))

    for cell, folder in zip(sweep.cells, folders, strict=True):
        reference = expected(cell, sweep, tmp_path / "expected" / cell.name)
        assert losses(folder) == losses(reference), cell.name
        assert adapter_bytes(folder) == adapter_bytes(reference), cell.name
        assert evaluations(folder) == evaluations(reference), cell.name
    restarts = [description(folder).restarts for folder in folders]
    assert restarts == [1, 1, 0, 0]  # split runs have gone on, the centralised one has begun anew
    assert {path.name for path in output.iterdir() if path.is_dir()} == {"devices", "report", *(f.name for f in folders)}
    assert (output / "devices" / "mine").read_text() == "somebody else's"
    assert (output / "report" / "index.html").exists()


def description(folder: Path) -> RunDescription:
    return RunFiles(folder).description


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[list[Path]]:
    """The runs of each report that is asked for, instead of the reports."""
    asked: list[list[Path]] = []
    monkeypatch.setattr(gpu_server.report, "write_report", lambda runs, output: asked.append(runs))
    return asked


def test_cell_that_fails_is_recorded_and_the_others_go_on(
    write: Callable[..., Path], tmp_path: Path, reported: list[list[Path]], capsys: Any
) -> None:
    path, output = write("mode = ['split', 'centralised']", "cut_layer = 9", "batch_size = 2"), tmp_path / "out"
    split, centralised = (output / cell.name for cell in read_sweep(path).cells)
    assert main(["sweep", str(path), "--output", str(output)]) == 1
    said = capsys.readouterr()
    assert f"1 of 2 cells failed: split, see {split}/failed.txt" in said.err
    assert said.out.startswith("centralised: 3 steps, loss")
    why = (split / "failed.txt").read_text()
    assert "server ended with status 1" in why
    assert "cut layer must be between 1 and 3 for a model of 4 blocks, got 9" in why
    assert reported == [[centralised]]

    # Once more: what has failed is tried again, what is finished is not.
    (split / "failed.txt").write_text("before")
    finished = (centralised / "finished.json").stat().st_mtime_ns
    assert main(["sweep", str(path), "--output", str(output)]) == 1
    assert (split / "failed.txt").read_text() != "before"
    assert (centralised / "finished.json").stat().st_mtime_ns == finished


def test_sweep_that_is_finished_starts_nothing_and_makes_its_report_again(
    write: Callable[..., Path], tmp_path: Path, reported: list[list[Path]], capsys: Any
) -> None:
    path, output = write("mode = 'centralised'"), tmp_path / "out"
    assert main(["sweep", str(path), "--output", str(output)]) == 0
    (cell,) = read_sweep(path).cells
    log = output / cell.name / "centralised.log"
    log.unlink()
    # As if it had been killed between the run's end and the mark.
    (output / cell.name / "finished.json").unlink()
    assert main(["sweep", str(path), "--output", str(output)]) == 0
    assert "1 cell in" in capsys.readouterr().err
    assert not log.exists()
    assert reported == [[output / cell.name]] * 2


@pytest.mark.parametrize("mark", ["", "5", '{"steps": 1}', '{"steps": 1, "loss": "low", "held_out": [1]}'])
def test_mark_of_a_finished_cell_that_cannot_be_read_is_written_again(
    write: Callable[..., Path], tmp_path: Path, mark: str
) -> None:
    (cell,) = read_sweep(write("mode = 'centralised'")).cells
    run = RunDirectory(tmp_path / cell.name)
    run.describe(RunDescription(run="r", fingerprint="f", config={}, dtype="float32", versions={}).with_adapter(step=1, of=1))
    folder = CellFolder(tmp_path, cell)
    folder.finish()
    result = folder.result()
    (folder.path / "finished.json").write_text(mark)
    assert not folder.is_finished
    assert folder.is_complete(with_held_out=False)
    folder.finish()
    assert str(folder.result()) == str(result)


def test_two_sweeps_do_not_write_into_one_folder(write: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    with lock_of(tmp_path / "out"):
        assert main(["sweep", str(write()), "--output", str(tmp_path / "out")]) == 1
    assert "is in use by another sweep" in capsys.readouterr().err


# Processes


def test_program_ends_when_whoever_started_it_is_gone(tmp_path: Path) -> None:
    """The pipe of its standard input is closed by the system then."""
    (tmp_path / "endless.py").write_text("import threading\nprint('ready', flush=True)\nthreading.Event().wait()\n")
    words = [sys.executable, "-m", "gpu_server.sweep.child", "endless"]
    more = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{tmp_path}"}}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **more) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == b"ready\n"
        child.stdin.close()
        assert child.wait(60) == 1


def test_all_programs_are_ended_when_one_fails_and_what_they_said_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{tmp_path}")
    (tmp_path / "endless.py").write_text("import threading\nthreading.Event().wait()\n")
    (tmp_path / "failing.py").write_text("import sys\nprint('x' * 20)\nsys.exit('it is \\x1b[31mred')\n")
    endless = Program("endless", ["endless"])
    with Processes(tmp_path) as processes:
        processes.start(endless)
        processes.start(Program("failing", ["failing"]))
        with pytest.raises(CellFailed) as failed:
            processes.wait(lambda: None)
    assert str(failed.value).splitlines() == [
        "failing ended with status 1; its last 2 lines:",
        "x" * 20,
        "it is \\x1b[31mred",
    ]
    assert processes._running[endless].returncode == -signal.SIGKILL


@pytest.mark.parametrize("loss", [1.5, math.nan])
@pytest.mark.parametrize("held_out", [None, (2.0, 1.0)])
def test_result_is_read_as_it_was_written(loss: float, held_out: tuple[float, float] | None) -> None:
    result = Result(steps=3, loss=loss, held_out=held_out, num_bytes=10, seconds=0.5)
    read = Result.from_json(json.loads(json.dumps(result.as_json(), allow_nan=False)))
    assert str(read) == str(result)
