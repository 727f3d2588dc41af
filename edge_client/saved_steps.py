"""
The steps that a device keeps on its disk, so that it can go on after it was killed. Only in runs with rounds of several steps:
in rounds of one step the server sends the adapter, and has taken the optimiser's step itself.
"""

import errno
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from protocol import Remembered, Tensors
from protocol.settings import LARGEST_COUNT
from storage import replace_file

__all__ = ["SavedStep", "SavedSteps", "StateError", "readable_errors"]

logger = logging.getLogger("edge_client")

SUFFIX, OLD_SUFFIX = ".npz", ".safetensors"
"""Of the files now, and of those that earlier versions wrote: nothing reads these any more, and the next step removes them."""
METADATA = "metadata"
"""The step, its round, the run's restarts, 1 or 0 for whether it ends its round, and the number of the state's arrays."""
MOST_BYTES = 2**30
"""
Of all steps that the server may go back to. The server says how far back that is: one that never moved its checkpoint would
fill the disk.
"""


class StateError(OSError):
    """The folder for the device's state cannot be written."""


@contextmanager
def readable_errors(folder: Path) -> Iterator[None]:
    """
    Raises:
        StateError: instead of whatever the system says while something is written to ``folder``.
    """
    try:
        yield
    except OSError as error:
        remedy = "free some space there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another --state-dir"
        raise StateError(f"this device's state cannot be kept in {folder}: {error.strerror or error}; {remedy}") from None


@dataclass(frozen=True, kw_only=True)
class SavedStep(Remembered):
    """What the device had learnt when it had finished a step."""

    state: Tensors
    """See `Engine.state`."""


class SavedSteps:
    """
    One file for each step that may be needed again: the last one, and the rounds' ends to which the server may still go back,
    as many of these as `MOST_BYTES` allows.

    Raises:
        StateError: the disk is full, or the folder cannot be written. Of every method that writes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ends_round: dict[int, bool] = {}
        """By step. Files say it of themselves, too; this saves opening them at every step."""
        self._has_warned = False

    def save(self, saved: SavedStep, *, keep_from: int, is_round_end: bool) -> None:
        """
        Keep a step, and forget those that are not needed any more.

        Args:
            keep_from: the earliest step that the server may go back to.
            is_round_end: whether the server may go back to this one.
        """
        metadata = np.array([saved.step, saved.round, saved.restarts, is_round_end, len(saved.state)], np.int64)
        arrays: dict[str, Any] = {METADATA: metadata, **saved.state}
        content = io.BytesIO()
        np.savez(content, **arrays)
        with readable_errors(self._folder):
            replace_file(self._path(saved.step), content.getvalue())
            self._ends_round[saved.step] = is_round_end
            # Only after the new file is on the disk: whenever this device is killed, a step is there to go on from.
            others = [path for path in self._paths() if _step(path) != saved.step]
            needed = [path for path in others if _step(path) >= keep_from and self._is_round_end(path)]
            for path in {*others, *self._paths(OLD_SUFFIX)} - set(self._newest_that_fit(needed)):
                path.unlink()

    def forget_after(self, step: int) -> None:
        """Later steps are not part of the run any more: a server that has gone back takes them again."""
        with readable_errors(self._folder):
            for path in self._paths():
                if _step(path) > step:
                    path.unlink()

    def load(self, step: int) -> SavedStep | None:
        """The latest kept step up to ``step``, if there is one."""
        for path in reversed(self._paths()):
            if _step(path) <= step:
                found = _read(path)
                if found is not None:  # else torn by a crash of the system: one before it may do
                    return found[0]
        return None

    def last_step(self) -> int:
        """The latest step that is kept whole; 0 if none."""
        saved = self.load(LARGEST_COUNT)
        return 0 if saved is None else saved.step

    def _newest_that_fit(self, paths: list[Path]) -> list[Path]:
        """Of files from the oldest to the newest, as many of the newest as there is room for."""
        num_bytes = 0
        for number, path in enumerate(reversed(paths)):
            num_bytes += path.stat().st_size
            if num_bytes > MOST_BYTES:
                self._warn_once(len(paths))
                return paths[len(paths) - number :]
        return paths

    def _warn_once(self, num_rounds: int) -> None:
        if not self._has_warned:
            logger.warning(
                "the server has not moved its checkpoint for %d rounds: this device forgets its oldest states beyond "
                "%d MB in %s; if the server goes back to one of those, the result will be another one",
                num_rounds,
                MOST_BYTES // 10**6,
                self._folder,
            )
        self._has_warned = True

    def _is_round_end(self, path: Path) -> bool:
        step = _step(path)
        if step not in self._ends_round:
            found = _read(path)
            self._ends_round[step] = found is not None and found[1]  # nobody can go back to a torn one
        return self._ends_round[step]

    def _paths(self, suffix: str = SUFFIX) -> list[Path]:
        """In the order of their steps."""
        return sorted(path for path in self._folder.glob(f"*{suffix}") if path.stem.isdigit())

    def _path(self, step: int) -> Path:
        return self._folder / f"{step:010}{SUFFIX}"


def _step(path: Path) -> int:
    return int(path.stem)


def _read(path: Path) -> tuple[SavedStep, bool] | None:
    """What a file holds, and whether the step ends its round; None if the file is torn."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            # A damaged array may claim any size: all checksums are compared before one is read.
            if arrays.zip.testzip() is not None:
                return None
            state = {name: arrays[name] for name in arrays.files}
        step, round_, restarts, is_round_end, num_arrays = state.pop(METADATA).tolist()
    except Exception:  # of the zip, of what its entries are compressed with, of numpy
        return None
    if len(state) != num_arrays:  # the zip's list of them is the one thing that has no checksum
        return None
    return SavedStep(step=step, round=round_, restarts=restarts, state=state), bool(is_round_end)
