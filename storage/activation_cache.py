"""The activation cache of one client on the disk, as both sides of a run keep it for `protocol.delta` and `protocol.recall`."""

import io
import threading
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .atomic_file import replace_file

__all__ = ["CacheFolder"]

Rows = NDArray[Any]
"""Of one sample: (n, d), bfloat16 for `protocol.delta`; as they arrived for `protocol.recall`, where a device keeps none."""
Key = tuple[int, int]
"""Of a file: step and micro-batch of the message whose rows it holds."""
Version = tuple[Key, int]
"""Its file, and the step of the version that it is a change of; 0: of none."""

COUNTS, PENDING = ".npz", ".pending"
"""COUNTS ends the name of a file whose versions count, PENDING of one whose versions do not yet: to confirm is to rename."""
SINCE = "since"
"""In a file beside the samples, in their order: the steps of the versions that they are changes of."""
DAMAGE = (OSError, EOFError, ValueError, zipfile.BadZipFile)


class CacheFolder:
    """
    A `protocol.ActivationCache` with a file for each micro-batch. Only the index is in memory; what is read often, the
    system's page cache keeps there. Threads may share it.

    Args:
        folder: made when the first file is written. What is in it from before a crash is taken up.
        max_bytes: the most that all files together may take.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._lock = threading.Lock()
        self._versions: defaultdict[int, dict[int, Version]] = defaultdict(dict)
        """By sample and step, the versions that count."""
        self._pending: dict[Key, dict[int, int]] = {}
        """Of the files that do not count yet: by sample, the step of the version that it is a change of."""
        self._needed: Counter[Key] = Counter()
        """How many versions of a file are needed still. A file goes with the last of them: rows are not rewritten."""
        self._sizes: dict[Key, int] = {}
        """Bytes of every file, pending or not."""
        self._earliest = 0
        """The last step that `forget_before` was told: a round's end is told by every answer, and has nothing new to say."""
        for path in folder.glob(f"*{PENDING}*"):
            path.unlink()  # no answer to it was seen before the crash: the message is coded and sent again
        for path in sorted(folder.glob(f"*{COUNTS}")):
            self._take_up(path)

    @property
    def is_full(self) -> bool:
        """Whether no more versions should be added for now."""
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
        """Step and rows of the newest version of a step earlier than ``before``; None also where its file is damaged."""
        with self._lock:
            step = max((step for step in self._versions.get(sample, {}) if step < before), default=None)
        rows = None if step is None else self.version(sample, step)
        return None if step is None or rows is None else (step, rows)

    def version(self, sample: int, step: int) -> Rows | None:
        """The rows of a step; None if they do not count, or their file is damaged."""
        with self._lock:
            found = self._versions.get(sample, {}).get(step)
        if found is None:
            return None
        try:
            with self._path(found[0], COUNTS).open("rb") as stream, np.load(stream) as file:
                rows: Rows = file[str(sample)]
                return rows
        except (*DAMAGE, KeyError):
            return None

    def store(self, step: int, micro_batch: int, versions: dict[int, tuple[int, Rows]]) -> None:
        """
        Write the file of a micro-batch; its versions do not count yet.

        Args:
            versions: by sample its rows, each with the step of the version that they were sent as a change of; 0: of none.

        Raises:
            ValueError: with it the files would be larger than they may be.
            OSError: it cannot be written.
        """
        if not versions:
            return
        since = {sample: earlier for sample, (earlier, _) in versions.items()}
        arrays = {str(sample): rows for sample, (_, rows) in versions.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays, **{SINCE: np.array(list(since.values()), np.int32)})  # type: ignore[arg-type]
        data, key = buffer.getvalue(), (step, micro_batch)
        with self._lock:
            if self._needed.get(key) and self._path(key, COUNTS).read_bytes() == data:
                return  # the message was delivered twice, and its versions count already
            self._drop(key)
            if self.num_bytes + len(data) > self._max_bytes:
                raise ValueError(f"samples of {self.num_bytes + len(data)} bytes, at most {self._max_bytes} are kept")
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_file(self._path(key, PENDING), data)
            self._pending[key], self._sizes[key] = since, len(data)

    def confirm(self, step: int, micro_batch: int) -> None:
        key = step, micro_batch
        with self._lock:
            since = self._pending.pop(key, None)
            if since is not None:
                self._path(key, PENDING).replace(self._path(key, COUNTS))
                self._enter(key, since)

    def forget_after(self, step: int) -> None:
        with self._lock:
            for key in list(self._sizes):
                if key[0] > step + 1 or key in self._pending:
                    self._drop(key)

    def forget_before(self, step: int) -> None:
        with self._lock:
            if step == self._earliest:
                return
            self._earliest = step
            for steps in self._versions.values():
                older = [other for other in steps if other <= step]
                if not older:
                    continue
                newest = max(older)
                _, before = steps[newest]
                for unneeded in set(older) - {newest, before}:
                    key, _ = steps.pop(unneeded)
                    self._needed[key] -= 1
                    if not self._needed[key]:
                        self._remove(key)

    def _take_up(self, path: Path) -> None:
        step, _, micro_batch = path.stem.partition("-")
        try:
            with path.open("rb") as stream, np.load(stream) as file:
                samples = [int(name) for name in file.files if name != SINCE]
                since = dict(zip(samples, file[SINCE].tolist(), strict=True))
        except (*DAMAGE, KeyError):
            path.unlink()  # torn by a crash of the system; its samples come as they are when they come again
            return
        key = int(step), int(micro_batch)
        self._sizes[key] = path.stat().st_size
        self._enter(key, since)

    def _enter(self, key: Key, since: dict[int, int]) -> None:
        for sample, earlier in since.items():
            self._versions[sample][key[0]] = key, earlier
        self._needed[key] = len(since)

    def _drop(self, key: Key) -> None:
        """Remove a file and all its versions, needed or not."""
        self._pending.pop(key, None)
        if self._needed.get(key):
            for steps in self._versions.values():
                if key[0] in steps and steps[key[0]][0] == key:
                    del steps[key[0]]
        self._remove(key)

    def _remove(self, key: Key) -> None:
        self._needed.pop(key, None)
        if self._sizes.pop(key, None) is not None:
            for suffix in (COUNTS, PENDING):
                self._path(key, suffix).unlink(missing_ok=True)

    def _path(self, key: Key, suffix: str) -> Path:
        return self._folder / f"{key[0]:010}-{key[1]}{suffix}"
