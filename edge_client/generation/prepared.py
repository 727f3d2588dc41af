"""
Quantised weights, rearranged for the processor of this device. onnxruntime rearranges them in memory whenever it loads them; if
they are saved once in that form, it maps the file instead, which takes a tenth of the memory.
"""

import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from storage import ExportedManifest

from .decoder import open_session, runtime_version
from .exported_model import ExportedModelError

__all__ = ["PACKED", "Prepared", "find_prepared", "precisions_to_prepare", "prepare"]

FOLDER, NOTE = "prepared", "prepared.json"
GRAPH = ".prepared"
"""Not .onnx: programs that look for graphs in the whole folder would think that it is one of the model's."""
PACKED = ("q8", "q4")
"""The precisions whose weights onnxruntime rearranges; it maps the files of the others as they are."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The graphs prepared for one precision."""

    graphs: tuple[Path, ...] | None
    """None where there are none that can be used here."""
    reason: str
    """Why not, for a person."""


def prepare(model: ExportedManifest) -> Iterator[str]:
    """
    Save the weights of every quantised precision, rearranged for this processor and this version of onnxruntime.

    Yields:
        The name of each precision when it is done.

    Raises:
        ExportedModelError: nothing here is quantised, or the folder cannot be written or is incomplete.
        RuntimeMissing: there is no onnxruntime.
    """
    precisions = precisions_to_prepare(model)
    unfinished = model.folder / f"{FOLDER}.part"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for precision in precisions:
            _save(model, precision, unfinished)
            yield precision
        _write_note(model, precisions, unfinished)
        shutil.rmtree(model.folder / FOLDER, ignore_errors=True)
        unfinished.rename(model.folder / FOLDER)
    except OSError as error:
        raise ExportedModelError(f"{model.folder} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def precisions_to_prepare(model: ExportedManifest) -> list[str]:
    """
    Raises:
        ExportedModelError: nothing here is quantised.
    """
    precisions = [name for name in PACKED if name in model.precisions]
    if not precisions:
        raise ExportedModelError(f"{model.folder} has neither {' nor '.join(PACKED)}: other weights need no preparation")
    return precisions


def find_prepared(model: ExportedManifest, precision: str) -> Prepared:
    """
    What was prepared for a precision. It can be used if it was made on this processor, by this version of onnxruntime and from
    the files that are there now. The note beside it says so; no weights are loaded to find out.
    """
    if precision not in PACKED:
        return Prepared(graphs=None, reason="mapped as they are")
    folder = model.folder / FOLDER
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        sizes = {str(name): int(size) for name, size in note["precisions"][precision].items()}
        for key, value in _surroundings().items():
            if note[key] != value:
                return Prepared(graphs=None, reason=f"prepared for {key} {note[key]}, and here is {value}")
        if note["made_of"][precision] != _state_of(model, precision):
            return Prepared(graphs=None, reason="prepared from other files than are there now")
        if sizes != _sizes(folder, precision):
            return Prepared(graphs=None, reason="what was prepared is incomplete")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return Prepared(graphs=None, reason="not prepared; splitlora-edge prepare would save memory and time")
    graphs = (_graph(folder, precision, number) for number in range(len(model.require(precision).graphs)))
    return Prepared(graphs=tuple(graphs), reason="prepared")


def _graph(folder: Path, precision: str, number: int) -> Path:
    return folder / f"{precision}-{number}{GRAPH}"


def _sizes(folder: Path, precision: str) -> dict[str, int]:
    """Bytes of all prepared files of a precision, by name."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob(f"{precision}-*"))}


def _save(model: ExportedManifest, precision: str, folder: Path) -> None:
    for number, path in enumerate(model.require(precision).graphs):
        graph = _graph(folder, precision, number)
        configuration = {
            "session.save_external_prepacked_constant_initializers": "1",
            "session.optimized_model_external_initializers_file_name": f"{graph.name}_data",
        }
        try:
            open_session(path, configuration, save_to=graph)
            open_session(graph, {})  # raises if not all of it has come to the disk
        except ExportedModelError:
            open_session(path, {})  # raises if the model's own graph is at fault; otherwise the disk was
            free, size = shutil.disk_usage(folder).free, model.require(precision).num_bytes
            raise ExportedModelError(
                f"{model.folder / FOLDER} cannot be written: prepared weights of {precision} take more than {size:,} bytes, "
                f"{free:,} are free"
            ) from None


def _write_note(model: ExportedManifest, precisions: list[str], folder: Path) -> None:
    files = {name: _sizes(folder, name) for name in precisions}
    made_of = {name: _state_of(model, name) for name in precisions}
    note = {**_surroundings(), "precisions": files, "made_of": made_of}
    with (folder / NOTE).open("w", encoding="utf-8") as file:
        json.dump(note, file, indent=2)
        os.fsync(file.fileno())


def _surroundings() -> dict[str, str]:
    return {"processor": _processor(), "onnxruntime": runtime_version()}


def _state_of(model: ExportedManifest, precision: str) -> dict[str, Any]:
    """Size and time of each file, by name. The time, since the export of another run has files of the same sizes."""
    states = {path.name: path.stat() for path in model.require(precision).sizes}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


def _processor() -> str:
    """The processor's name, and a digest of the instructions it has: virtual machines may hide some."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return f"{platform.machine()} {platform.processor()}".strip()
    name = re.search(r"^(?:model name|Model|CPU part)\s*:\s*(.+)$", text, re.M)
    instructions = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)
    digest = sha256((instructions[1] if instructions else "").encode()).hexdigest()[:8]
    return f"{platform.machine()} {name[1] if name else 'unknown'} {digest}"
