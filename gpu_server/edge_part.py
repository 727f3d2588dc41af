"""The files that are handed to devices which have no model: made once for a run, read piece by piece, kept in its folder."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from protocol import PIECE_BYTES, PartFile
from protocol.limits import MAX_PART_FILES
from storage import ModelError, replace_file
from terminal import PackageMissing, count

from .errors import ServerError
from .history import tell

__all__ = ["EdgePartStore", "PartUnavailable", "remove_unfinished_part"]


MANIFEST = "manifest.json"


class PartUnavailable(ServerError):
    """The part cannot be made, or not be read any more."""

    def __init__(self, reason: str, *, may_be_mended: bool) -> None:
        super().__init__(reason)
        self.may_be_mended = may_be_mended
        """Whether asking again later may help: a disk was full, for example."""


class EdgePartStore:
    """
    The files of one part. Nothing is made before it is asked for.

    Args:
        folder: where they lie; whatever else lies there is removed.
        weights: in which precision they are: one of EDGE_WEIGHTS.
        wanted: everything else that they follow from, as JSON. Files that follow from something else are made anew.
        build: makes the files, in a folder that is empty.
    """

    def __init__(self, folder: Path, weights: str, wanted: Mapping[str, Any], build: Callable[[Path], object]) -> None:
        self.folder, self.weights, self._build = folder, weights, build
        self._wanted = json.loads(json.dumps({**wanted, "weights": weights}))
        self.files: tuple[PartFile, ...] | None = None
        """What a device is told of them, once they are there: see `make`."""

    def make(self) -> tuple[PartFile, ...]:
        """
        Make the files, or find those that an earlier server has made; both take seconds. One thread at a time may call it.

        Raises:
            PartUnavailable: they cannot be made.
        """
        self.files = self._found() or self._made()
        return self.files

    def piece(self, sha256: str, offset: int) -> bytes:
        """
        The bytes of a file from ``offset`` on, at most `PIECE_BYTES`.

        Raises:
            LookupError: there is no such file, or it has no such byte; the message says so.
            PartUnavailable: the files are not there, or not any more.
        """
        files = self.files  # another thread may find at any moment that they are lost
        if files is None:
            raise PartUnavailable("the devices' part of the model is not made yet", may_be_mended=True)
        file = next((file for file in files if file.sha256 == sha256), None)
        if file is None:
            raise LookupError(f"no file of the part has the SHA-256 {sha256}")
        if offset >= file.size:
            size = count(file.size, "byte")
            raise LookupError(f"{file.name} of the part has {size}, and no piece from byte {offset} on")
        path = self.folder / file.name
        try:
            with path.open("rb") as opened:
                opened.seek(offset)
                data = opened.read(PIECE_BYTES)
        except OSError as error:
            raise self._lost(f"{path} cannot be read: {error.strerror or error}") from None
        if len(data) != min(PIECE_BYTES, file.size - offset):
            raise self._lost(f"{path} was cut off")
        return data

    def _lost(self, reason: str) -> PartUnavailable:
        self.files = None  # they are made anew for whoever asks next
        return PartUnavailable(f"{reason}; the devices' part of the model will be made anew", may_be_mended=True)

    def _found(self) -> tuple[PartFile, ...] | None:
        """The files that an earlier server has made, if all are whole and what is wanted."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            if manifest["wanted"] != self._wanted:
                return None
            files = tuple(PartFile(**file) for file in manifest["files"])
            is_whole = all(_described(self.folder / file.name) == file for file in files)
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return files if is_whole else None

    def _made(self) -> tuple[PartFile, ...]:
        began, unfinished = time.monotonic(), _unfinished(self.folder)
        try:
            for folder in (self.folder, unfinished):
                shutil.rmtree(folder, ignore_errors=True)
            unfinished.mkdir(mode=0o700)
            self._build(unfinished)
            files = tuple(_described(path) for path in sorted(unfinished.iterdir()))
            if len(files) > MAX_PART_FILES:
                raise ModelError(
                    f"the devices' part of the model has {len(files)} files, and at most {MAX_PART_FILES} can be handed over; "
                    "use a smaller --cut-layer, or start the devices with --model"
                )
            manifest = {"wanted": self._wanted, "files": [vars(file) for file in files]}
            replace_file(unfinished / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
            os.replace(unfinished, self.folder)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PartUnavailable(
                f"the devices' part of the model cannot be written to {self.folder}: {reason}; "
                "mend that, or start the devices with --model",
                may_be_mended=True,
            ) from None
        except (ModelError, PackageMissing) as error:
            raise PartUnavailable(str(error), may_be_mended=False) from None
        finally:
            remove_unfinished_part(self.folder)
        made = f"{count(len(files), 'file')}, {sum(file.size for file in files) / 1e6:.1f} MB"
        tell("note", f"the devices' part of the model was made in {time.monotonic() - began:.1f} s: {made}")
        return files


def remove_unfinished_part(folder: Path) -> None:
    """Remove what a server has left that was killed while it made the files for this folder."""
    shutil.rmtree(_unfinished(folder), ignore_errors=True)


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.unfinished")


def _described(path: Path) -> PartFile:
    """
    Raises:
        OSError: it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(PIECE_BYTES):
            digest.update(data)
            size += len(data)
    return PartFile(name=path.name, size=size, sha256=digest.hexdigest())
