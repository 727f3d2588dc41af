"""
The files of parts on a device's disk, by what is in them: each under its SHA-256. A second run with the same base model finds
them there, and so does a second client of this device.
"""

import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from protocol import PartFile

from ..saved_steps import StateError, readable_errors

try:
    import fcntl
except ModuleNotFoundError:  # not on every system; there nobody can see whether another client writes a file
    fcntl = None  # type: ignore[assignment]

__all__ = ["PART_BYTES", "PartCache", "Unfinished"]

logger = logging.getLogger("edge_client")

PART_BYTES = 4 * 2**30
"""Most bytes of parts of models on this device's disk, where the user says nothing."""
UNFINISHED = ".partial"
CHUNK = 1 << 20  # bytes that are read at a time


class PartCache:
    """
    Several clients may use one folder at once.

    Args:
        folder: made when the first file is fetched.
        max_bytes: what is used least recently goes when more would be kept.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    def find(self, file: PartFile) -> Path | None:
        """
        Where the content of ``file`` lies; None if it is not here. It is read and compared each time: what a disk damages, or
        somebody edits, is found, said and forgotten.

        Raises:
            StateError: it cannot be read, or not be deleted.
        """
        path = self._folder / file.sha256
        with readable_errors(self._folder):
            try:
                with path.open("rb") as content:
                    is_whole = os.fstat(content.fileno()).st_size == file.size and _digest(content) == file.sha256
            except FileNotFoundError:
                return None
            if is_whole:
                os.utime(path)  # used now; see `make_room`
                return path
            logger.warning(
                "%s, kept of %s, is not what was fetched: it was edited or damaged; it is fetched again", path, file.name
            )
            path.unlink(missing_ok=True)
            return None

    def make_room(self, files: Iterable[PartFile]) -> None:
        """
        Forget other contents, those used least recently first, until all of ``files`` may be kept.

        Raises:
            StateError: there is not room enough for them, by the cache's bound or on the disk.
        """
        sizes = {file.sha256: file.size for file in files}
        needed = sum(sizes.values())
        if needed > self._max_bytes:
            raise StateError(
                f"the server's part of the model has {_amount(needed)}, and this device keeps at most "
                f"{_amount(self._max_bytes)}: raise --part-bytes, if the disk has room for it"
            )
        with readable_errors(self._folder):
            self._folder.mkdir(parents=True, mode=0o700, exist_ok=True)
            others, lacking = [], needed
            # Of a content that is wanted, the whole file counts, or else its longest beginning. Others may be left of clients
            # that fetched it at the same time.
            for path in sorted(self._folder.iterdir(), key=lambda path: (path.suffix == UNFINISHED, -_size(path))):
                with suppress(FileNotFoundError):  # another client has forgotten it, or finished it, meanwhile
                    status = path.stat()
                    digest = path.name.partition(".")[0]
                    if digest in sizes:
                        lacking -= min(status.st_size, sizes.pop(digest))
                    else:
                        others.append((status.st_mtime_ns, status.st_size, path))
            room = self._max_bytes - needed
            for _, size, path in sorted(others, reverse=True):
                room -= size
                if room < 0:
                    _forget(path)
            free = shutil.disk_usage(self._folder).free
        if lacking > free:
            raise StateError(
                f"this device's state cannot be kept in {self._folder}: {_amount(lacking)} of the server's part of the model "
                f"are still to be fetched, and {_amount(free)} are free; free some space there, or choose another --state-dir"
            )

    @contextmanager
    def unfinished(self, file: PartFile) -> Iterator["Unfinished"]:
        """
        What is here of a file that is being fetched: as much as there was when this or another client was killed. While this
        client holds it, no other adds to it.

        Raises:
            StateError: the disk is full, or the folder cannot be written.
        """
        with readable_errors(self._folder):
            self._folder.mkdir(parents=True, mode=0o700, exist_ok=True)
            path, content = self._take_up(file)
        with content:
            yield Unfinished(file, path, content)

    def _take_up(self, file: PartFile) -> tuple[Path, BinaryIO]:
        begun = self._folder.glob(f"{file.sha256}.*{UNFINISHED}") if fcntl is not None else ()
        for path in sorted(begun, key=_size, reverse=True):
            content = _open_alone(path)
            if content is not None:
                return path, content
        while True:
            path = self._folder / f"{file.sha256}.{secrets.token_hex(8)}{UNFINISHED}"
            content = _open_alone(path, os.O_CREAT | os.O_EXCL)
            if content is not None:  # else another client was quick to take it up
                return path, content


class Unfinished:
    """
    A file of which the first ``size`` bytes are here.

    Raises:
        StateError: the disk is full, or the folder cannot be written. Of every method.
    """

    def __init__(self, file: PartFile, path: Path, content: BinaryIO) -> None:
        self._file, self._path, self._content = file, path, content
        self._digest = hashlib.sha256()
        self.size = 0
        with readable_errors(path.parent):
            for chunk in _chunks(content):
                self._digest.update(chunk)
                self.size += len(chunk)
        if self.size > file.size:
            self.forget()

    def append(self, data: bytes) -> None:
        rest = memoryview(data)
        with readable_errors(self._path.parent):
            while rest:  # nothing is buffered: who is killed has it on the disk
                rest = rest[self._content.write(rest) :]
        self._digest.update(data)
        self.size += len(data)

    def finish(self) -> Path | None:
        """Keep the whole file under its digest, where it has that; else begin anew, and return None."""
        if self._digest.hexdigest() != self._file.sha256:
            self.forget()
            return None
        kept = self._path.with_name(self._file.sha256)
        with readable_errors(self._path.parent):
            os.fsync(self._content.fileno())
            os.replace(self._path, kept)
        return kept

    def forget(self) -> None:
        """Begin anew."""
        with readable_errors(self._path.parent):
            self._content.seek(0)
            self._content.truncate()
        self._digest, self.size = hashlib.sha256(), 0


def _open_alone(path: Path, flags: int = 0) -> BinaryIO | None:
    """An unfinished file; None if another client is at work on it, or has finished or forgotten it."""
    flags |= os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        content = os.fdopen(os.open(path, flags, 0o600), "r+b", buffering=0)
    except FileNotFoundError:
        return None
    try:
        if fcntl is not None:
            fcntl.flock(content, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(content.fileno()), path.stat()):  # else it was finished before it was locked
            return content
    except (BlockingIOError, FileNotFoundError):
        pass
    content.close()
    return None


def _forget(path: Path) -> None:
    """Delete a file, but none that another client is at work on."""
    if path.suffix != UNFINISHED or fcntl is None:
        path.unlink(missing_ok=True)
    elif content := _open_alone(path):
        with content:  # so nobody takes it up meanwhile
            path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another client has finished it
        return -1


def _digest(content: BinaryIO) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(content):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(content: BinaryIO) -> Iterator[memoryview]:
    """Into one buffer: what is read is not to show in the memory of a small device."""
    buffer = memoryview(bytearray(CHUNK))
    while count := content.readinto(buffer):  # type: ignore[attr-defined]
        yield buffer[:count]


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.3g} MB" if num_bytes < 1e8 else f"{num_bytes / 1e6:,.0f} MB"
