"""Every cell of a sweep, one after the other. Whatever is finished stays so; a sweep that was killed goes on with its rest."""

import json
import math
import os
import random
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import Timeout

from protocol.settings import LARGEST_COUNT
from storage import find_model
from terminal import PackageMissing, Progress, count, duration

from ..errors import ConfigError, ServerError
from ..history.run_files import METRICS
from ..run_lock import lock_of
from .cell_folder import CellFolder, Result
from .grid import Cell, Sweep, read_sweep
from .processes import CellFailed, Processes, Program
from .settings import device_names

__all__ = ["SweepFailed", "run_sweep"]

BEFORE_AND_AFTER = LARGEST_COUNT  # steps between two evaluations, of which no run has so many
STATE, REPORT = "state-of-devices", "report"  # the first is deleted: its name is nobody else's
TAIL_BYTES = 2**16
SECONDS_TO_FIND_THE_SERVER = 3600.0
"""Devices are started with their server. They are ended with it, too, so this is only to be long enough for it to start."""
LARGEST_EXPONENT = 700.0  # exp() of more is no float


class SweepFailed(ServerError):
    """Some cells have failed; all others are finished."""


def run_sweep(path: Path, output: Path | None = None) -> None:
    """
    Run what is not finished yet of the sweep in a file, and lay all its runs side by side in a report.

    Args:
        output: the folder of its cells; None: the file says which.

    Raises:
        ConfigError: something is wrong with the file; nothing was started.
        SweepFailed: some cells have failed. Each has the reason in its folder.
        ServerError, ModelError: the folder cannot be written, or is another sweep's just now; there is no such model.
    """
    sweep = read_sweep(path)
    folder = output or sweep.output
    if folder is None:
        raise ConfigError(f"{path}: output is missing: the folder for the cells; write it there, or give --output")
    for model in dict.fromkeys(str(cell.server["model"]) for cell in sweep.cells):
        find_model(model)  # fetches one from the hub before many ask for it
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with lock_of(folder):
            _run(sweep, folder)
    except Timeout:
        raise ServerError(f"{folder} is in use by another sweep") from None
    except OSError as error:
        raise ServerError(f"{folder} cannot be written: {error.strerror}") from None


def _run(sweep: Sweep, output: Path) -> None:
    folders = {cell: CellFolder(output, cell) for cell in sweep.cells}
    for folder in folders.values():
        if not folder.is_finished and folder.is_complete(with_held_out=sweep.eval_data is not None):
            folder.finish()
    rest = [cell for cell in sweep.cells if not folders[cell].is_finished]
    done = len(sweep.cells) - len(rest)
    _say(f"{count(len(sweep.cells), 'cell')} in {output}, {done} of them finished before")
    failed: list[Cell] = []
    with Progress(len(sweep.cells), done, unit="cell") as progress:
        for cell in rest:
            try:
                _run_cell(cell, folders[cell], sweep, output, progress)
            except CellFailed as error:
                folders[cell].fail(str(error))
                failed.append(cell)
                progress.advance(f"{cell.words}: failed")
            else:
                folders[cell].finish()
                progress.advance(f"{cell.words}: {_in_words(folders[cell].result())}")
    finished = [folders[cell] for cell in sweep.cells if folders[cell].is_finished]
    for cell in sweep.cells:
        if folders[cell].is_finished:
            print(f"{cell.words}: {_in_words(folders[cell].result())}")  # noqa: T201
    if finished:
        _report([folder.path for folder in finished], output / REPORT)
    if failed:
        reasons = "; ".join(f"{cell.words}, see {folders[cell].path / 'failed.txt'}" for cell in failed)
        raise SweepFailed(f"{len(failed)} of {count(len(sweep.cells), 'cell')} failed: {reasons}")
    shutil.rmtree(output / STATE, ignore_errors=True)


def _run_cell(cell: Cell, folder: CellFolder, sweep: Sweep, output: Path, progress: Progress) -> None:
    """
    Raises:
        CellFailed: one of its programs ended with an error.
    """
    programs = _split(cell, folder, sweep, output) if cell.mode == "split" else [_contestant(cell, folder, sweep, output)]
    with Processes(folder.path) as processes:
        for program in programs:
            processes.start(program)
        processes.wait(lambda: progress.advance(_stand(cell, folder.path), units=0))


def _split(cell: Cell, folder: CellFolder, sweep: Sweep, output: Path) -> list[Program]:
    """A server, and a device for every file. A run that was begun goes on at its port: there its devices look for it."""
    port = folder.port
    resumes = port is not None and _is_free(port)
    if not resumes or port is None:
        port = _free_port()
        folder.begin(port=port)
    server = {**cell.server, "clients": len(sweep.data), "run_dir": folder.path, "port": port}
    programs = [Program("server", ["gpu_server", "serve", *_flags(server), *(["--resume"] if resumes else [])], leads=True)]
    for name, data in zip(device_names(len(sweep.data)), sweep.data, strict=True):
        device = {**cell.device, "server": f"ws://127.0.0.1:{port}", "name": name, "data": data, "state_dir": output / STATE}
        device["give_up_after"] = SECONDS_TO_FIND_THE_SERVER
        if cell.device.get("engine") == "torch":
            device["model"] = cell.server["model"]
        if name == device_names(1)[0]:
            device |= _held_out(sweep)
        programs.append(Program(name, ["edge_client", "train", *_flags(device)]))
    return programs


def _contestant(cell: Cell, folder: CellFolder, sweep: Sweep, output: Path) -> Program:
    """It keeps nothing to go on from, so it always begins anew."""
    folder.begin()
    flags = {
        **cell.server,
        **cell.device,
        "run_dir": folder.path,
        "token_folder": output / STATE / "tokens",
        **_held_out(sweep),
    }
    data = [flag for file in sweep.data for flag in _flags({"data": file})]
    return Program(cell.mode, ["contestants", cell.mode, *_flags(flags), *data])


def _held_out(sweep: Sweep) -> dict[str, Any]:
    if sweep.eval_data is None:
        return {}
    return {"eval_data": sweep.eval_data, "eval_every": sweep.eval_every or BEFORE_AND_AFTER}


def _flags(values: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags += [flag] if value else []
        else:
            flags.append(f"{flag}={','.join(value) if isinstance(value, tuple) else value}")
    return flags


def _free_port() -> int:
    """
    One that the system gives to nobody by itself, as it does those from 32768 on to whoever connects: a run that goes on finds
    it free.
    """
    for port in random.SystemRandom().sample(range(20000, 32768), 100):
        if _is_free(port):
            return port
    raise ServerError("a hundred ports from 20000 to 32767 are in use on this machine; end what uses them")


def _is_free(port: int) -> bool:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        return False


def _stand(cell: Cell, run_dir: Path) -> str:
    """Of a cell that is running, by its last whole line of metrics."""
    try:
        with (run_dir / METRICS).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            *_, line, _ = file.read().split(b"\n")
        row = json.loads(line)
        loss = "" if row["loss"] is None else f", loss {row['loss']:.3f}"
        return f"{cell.words}: step {row['step']}{loss}"
    except (OSError, ValueError, KeyError):
        return f"{cell.words}: starting"


def _in_words(result: Result) -> str:
    words = [count(result.steps, "step")]
    if not math.isnan(result.loss):
        words.append(f"loss {result.loss:.3f}")
    if result.held_out is not None:
        before, after = (math.exp(min(loss, LARGEST_EXPONENT)) for loss in result.held_out)
        words.append(f"held-out perplexity {before:.2f} before and {after:.2f} after")
    return ", ".join([*words, f"{result.num_bytes / 1e6:.2f} MB", duration(result.seconds)])


def _report(runs: Sequence[Path], output: Path) -> None:
    from ..report import RunsLeftOut, write_report

    try:
        _say(f"the report is {write_report(runs, output)}")
    except (PackageMissing, RunsLeftOut) as error:  # the runs are in place, and may be laid side by side again
        _say(str(error))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201
