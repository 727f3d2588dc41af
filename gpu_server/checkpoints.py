"""From what a run goes on after its server was killed. A file is there whole, or not at all."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from split_model import DamagedFile, read_sealed, seal
from storage import replace_file

from .errors import ServerError
from .history import checkpoint_files, tell

__all__ = ["CheckpointSpacing", "Checkpoints", "SavedRound"]


FORMAT = 1
FILES = 2
SHARE_OF_TIME = 0.01
BYTES_A_SECOND = 1e6  # at most 86 GB a day, of which a disk bears years
SHORTEST_PAUSE = 1.0  # seconds
BYTES_ON_A_DEVICE = 2**28  # a device keeps the rounds' ends since the last checkpoint but one, and a GiB of them at most


@dataclass(frozen=True, kw_only=True)
class SavedRound:
    """The end of a round."""

    run: str
    step: int
    """The last one that is in it."""
    membership: dict[str, dict[str, Any]]
    """See `Federation.membership`."""
    state: dict[str, Tensor]
    """See `Engine.round_end`."""
    judgements: list[dict[str, Any]] = field(default_factory=list)
    """See `EarlyStopping.state`."""


class CheckpointSpacing:
    """
    Which of the rounds' ends is worth a checkpoint: one whose writing keeps the share of the time that checkpoints take below a
    hundredth and what is written below a megabyte a second, and no two within a second. Where devices keep their states until
    they are in a checkpoint, one is due before these fill their disks, whatever it takes.

    The clock decides here from where a run may go on, and never what comes out of it: steps that are taken again are the same.

    Args:
        bytes_of_a_device: that a device keeps of each round; 0 where it keeps none.
    """

    def __init__(self, bytes_of_a_device: int = 0) -> None:
        self._bytes_of_a_device = bytes_of_a_device
        self._due_at = -math.inf
        self._rounds = 0
        """Since the last that is to be written."""

    def is_due(self, now: float) -> bool:
        """To be asked at the end of each round."""
        self._rounds += 1
        return now >= self._due_at or self._rounds * self._bytes_of_a_device > BYTES_ON_A_DEVICE

    def asked(self) -> None:
        """One is to be written: until `written` the clock makes no other due."""
        self._due_at, self._rounds = math.inf, 0

    def written(self, now: float, *, seconds: float, num_bytes: int) -> None:
        """
        Args:
            seconds: that the writing took.
            num_bytes: that were written.
        """
        self._due_at = now + max(SHORTEST_PAUSE, seconds / SHARE_OF_TIME, num_bytes / BYTES_A_SECOND)


class Checkpoints:
    """The folder ``checkpoints`` of a run: a safetensors file for each of the last two rounds that were written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, saved: SavedRound) -> int:
        """
        Returns:
            How many bytes it has.

        Raises:
            ServerError: the disk is full, or the folder cannot be written. Earlier checkpoints are untouched.
        """
        described = {"format": FORMAT, "run": saved.run, "step": saved.step, "membership": saved.membership}
        if saved.judgements:
            described["judgements"] = saved.judgements
        with _readable_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            content = seal(json.dumps(described), saved.state)
            replace_file(self._path(saved.step), content)
            for step in self.steps()[:-FILES]:
                self._path(step).unlink()
        return len(content)

    def latest(self, run: str) -> SavedRound | None:
        """
        The newest checkpoint that is intact; None where a run has written none. One that is damaged is put aside.

        Raises:
            ServerError: none is intact, or they are of another run.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                saved = _read(self._path(step))
            except DamagedFile as error:
                tell("note", f"checkpoint {self._path(step)} is damaged: {error}; trying the one before", level="warning")
                # Under another name it does not count as one of the two, and nothing is written over it.
                with _readable_errors(self.folder):
                    self._path(step).rename(self._path(step).with_suffix(".damaged"))
                continue
            if saved.run != run:
                raise ServerError(f"{self._path(step)} is of run {saved.run}, not of {run}")
            return saved
        if steps:
            raise ServerError(f"no checkpoint in {self.folder} is intact; the run cannot go on")
        return None

    def steps(self) -> list[int]:
        """The last steps of those that there are."""
        return list(checkpoint_files(self.folder))

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:09}.safetensors"


def _read(path: Path) -> SavedRound:
    text, state = read_sealed(path)
    described = json.loads(text)
    if described["format"] != FORMAT:
        raise ServerError(f"{path} has format {described['format']}, this version reads {FORMAT}")
    return SavedRound(
        run=described["run"],
        step=described["step"],
        membership=described["membership"],
        state=state,
        judgements=described.get("judgements", []),
    )


@contextmanager
def _readable_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ServerError(
            f"a checkpoint cannot be written to {folder}: {error.strerror}; the ones before are kept, and --resume goes on "
            f"from there when that is mended"
        ) from None
