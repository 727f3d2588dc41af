"""Samples' activations as they arrived, on the disk: what both sides of a run keep for `protocol.changes`."""

import io
import threading
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .atomic_file import replace_file

__all__ = ["CacheFolder"]

Rows = NDArray[np.uint16]
"""Of one sample: (n, d) bfloat16."""
Question = tuple[int, int]
"""Step and micro-batch."""

Place = tuple[Question, int]
"""Of a version: its file, and the step whose version it is a change of; 0: of none."""

COUNTS, PENDING = ".npz", ".pending"
SINCE = "since"
"""Beside a file's samples, in their order: the steps whose versions they are changes of."""
DAMAGE = (OSError, EOFError, ValueError, zipfile.BadZipFile)


class CacheFolder:
    """
    One client's samples, a file for each micro-batch; see `protocol.KeptSamples`. The system's page cache keeps in memory
    what there is room for. Threads may share it.

    Args:
        max_bytes: the most that all files together may take.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._lock = threading.Lock()
        self._steps: defaultdict[int, dict[int, Place]] = defaultdict(dict)
        """Of each sample, the steps with a version that counts."""
        self._pending: dict[Question, dict[int, int]] = {}
        """Samples, and since when."""
        self._needed: Counter[Question] = Counter()
        """How many samples of a file are."""
        self._sizes: dict[Question, int] = {}
        self._earliest = 0
        for path in folder.glob(f"*{PENDING}*"):
            path.unlink()
        for path in sorted(folder.glob(f"*{COUNTS}")):
            self._find(path)

    @property
    def is_full(self) -> bool:
        """Whether nothing more should be kept for now."""
        return self.num_bytes >= self._max_bytes

    @property
    def newest(self) -> int:
        """The latest step of which there is a version that counts; 0 if none."""
        with self._lock:
            return max((step for step, _ in self._needed), default=0)

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(self._sizes.values())

    def latest(self, sample: int, before: int) -> tuple[int, Rows] | None:
        """Step and rows of the newest version of an earlier step; None also where its file is damaged."""
        with self._lock:
            step = max((step for step in self._steps.get(sample, {}) if step < before), default=None)
        rows = None if step is None else self.version(sample, step)
        return None if step is None or rows is None else (step, rows)

    def version(self, sample: int, step: int) -> Rows | None:
        with self._lock:
            place = self._steps.get(sample, {}).get(step)
        if place is None:
            return None
        try:
            with self._path(place[0], COUNTS).open("rb") as stream, np.load(stream) as file:
                rows: Rows = file[str(sample)]
                return rows
        except (*DAMAGE, KeyError):
            return None

    def keep(self, step: int, micro_batch: int, versions: dict[int, tuple[int, Rows]]) -> None:
        """
        Args:
            versions: by sample, with the steps whose versions they are changes of; 0: of none.

        Raises:
            ValueError: it is more than may be kept.
        """
        if not versions:
            return
        since = {sample: earlier for sample, (earlier, _) in versions.items()}
        arrays = {str(sample): rows for sample, (_, rows) in versions.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays, **{SINCE: np.array(list(since.values()), np.int32)})  # type: ignore[arg-type]
        data, question = buffer.getvalue(), (step, micro_batch)
        with self._lock:
            if self._needed.get(question) and self._path(question, COUNTS).read_bytes() == data:
                return  # it was sent before, and counts
            self._drop(question)
            if self.num_bytes + len(data) > self._max_bytes:
                raise ValueError(f"samples of {self.num_bytes + len(data)} bytes, at most {self._max_bytes} are kept")
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_file(self._path(question, PENDING), data)
            self._pending[question], self._sizes[question] = since, len(data)

    def confirm(self, step: int, micro_batch: int) -> None:
        question = step, micro_batch
        with self._lock:
            since = self._pending.pop(question, None)
            if since is not None:
                self._path(question, PENDING).replace(self._path(question, COUNTS))
                self._enter(question, since)

    def forget_after(self, step: int) -> None:
        with self._lock:
            for question in list(self._sizes):
                if question[0] > step + 1 or question in self._pending:
                    self._drop(question)

    def forget_before(self, step: int) -> None:
        with self._lock:
            if step == self._earliest:
                return
            self._earliest = step
            for steps in self._steps.values():
                older = [other for other in steps if other <= step]
                if not older:
                    continue
                newest = max(older)
                _, before = steps[newest]
                for unneeded in set(older) - {newest, before}:
                    question, _ = steps.pop(unneeded)
                    self._needed[question] -= 1
                    if not self._needed[question]:
                        self._remove(question)

    def _find(self, path: Path) -> None:
        step, _, micro_batch = path.stem.partition("-")
        try:
            with path.open("rb") as stream, np.load(stream) as file:
                samples = [int(name) for name in file.files if name != SINCE]
                since = dict(zip(samples, file[SINCE].tolist(), strict=True))
        except (*DAMAGE, KeyError):
            path.unlink()  # torn by a crash of the system
            return
        question = int(step), int(micro_batch)
        self._sizes[question] = path.stat().st_size
        self._enter(question, since)

    def _enter(self, question: Question, since: dict[int, int]) -> None:
        for sample, earlier in since.items():
            self._steps[sample][question[0]] = question, earlier
        self._needed[question] = len(since)

    def _drop(self, question: Question) -> None:
        """A file, whatever still needs it."""
        self._pending.pop(question, None)
        if self._needed.get(question):
            for steps in self._steps.values():
                if question[0] in steps and steps[question[0]][0] == question:
                    del steps[question[0]]
        self._remove(question)

    def _remove(self, question: Question) -> None:
        self._needed.pop(question, None)
        if self._sizes.pop(question, None) is not None:
            for suffix in (COUNTS, PENDING):
                self._path(question, suffix).unlink(missing_ok=True)

    def _path(self, question: Question, suffix: str) -> Path:
        return self._folder / f"{question[0]:010}-{question[1]}{suffix}"
