"""A file that grows by lines, for weeks: what is old is kept compressed beside it."""

import errno
import gzip
import json
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

from storage import remove_unfinished, replace_file

__all__ = ["LineFile"]

BYTES_OF_AN_END = 2**16
"""Of a file, in which its last line is looked for first."""


class LineFile:
    """
    Lines of JSON, written by one process and read by any.

    `rotate` moves what metrics.jsonl has into a segment beside it: metrics.0001.jsonl.gz, metrics.0002.jsonl.gz and so on, the
    oldest lines in the first. The file is renamed to metrics.0001.jsonl; that is compressed, and then removed; where both are
    there, the compressed one counts. So at every moment each line is there once, for whoever reads just then as for whoever
    comes after a crash.

    All methods raise an OSError if a file cannot be read or written, or a segment is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._segment = re.compile(rf"{re.escape(path.stem)}\.(\d+){re.escape(path.suffix)}(\.gz)?")

    def lines(self) -> Iterator[tuple[Path, int, bytes]]:
        """All, the oldest first: each with its file and its number there. One that is not finished is left out."""
        last = 0
        while True:
            for number in self._segments(after=last):
                path, segment = self._open_segment(number)
                with segment, _damage_of(path):
                    yield from _whole_lines(path, segment)
                last = number
            with _open_or_empty(self.path) as file:
                if not self._segments(after=last):  # else it was rotated before it was opened
                    yield from _whole_lines(self.path, file)
                    return

    def last(self) -> bytes | None:
        """The newest line that is finished, found from the end; None where there is none."""
        with _open_or_empty(self.path) as file:
            line = _last_of(file)
        if line is None:  # all was moved into segments
            for number in reversed(self._segments()):
                path, segment = self._open_segment(number)
                with segment, _damage_of(path):
                    newest = deque(_whole_lines(path, segment), maxlen=1)  # a compressed one is read from its beginning
                if newest:
                    return newest[0][2]
        return line

    def append(self, line: Mapping[str, Any]) -> None:
        """Readable for the owner of the file alone."""
        with open(self.path, "a", encoding="utf-8", opener=_private) as file:
            file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        """Have all lines on the disk."""
        if self.path.exists():
            with self.path.open("a") as file:
                os.fsync(file.fileno())

    def mend(self) -> None:
        """Finish or remove what a crash has cut off. Call it before the first line is appended, while nobody else writes."""
        remove_unfinished(self.path.parent, self.path.stem)
        for number in self._segments():
            self._compress(number)
        if self.path.exists():
            with self.path.open("rb+") as file:
                content = file.read()
                whole = content.rfind(b"\n") + 1
                if whole < len(content):
                    file.truncate(whole)

    def forget(self, is_over: Callable[[Mapping[str, Any]], bool]) -> None:
        """
        Take back lines, the newest first; as soon as a segment loses none, those before it are not read. Whoever is cut off
        calls it again.

        Args:
            is_over: whether a line is one of those; raises a KeyError, TypeError or ValueError for what is none. From such a
                line on, or one that is no JSON, all that its file has is taken back: a crash has left it.
        """
        if self.path.exists():
            content = self.path.read_bytes()
            kept = _without(content, is_over)
            if kept != content:
                replace_file(self.path, kept)
        for number in reversed(self._segments()):
            path, segment = self._open_segment(number)
            with segment, _damage_of(path):
                content = segment.read()
            kept = _without(content, is_over)
            if kept == content:
                break  # what is older is not over either
            self._write_segment(number, kept)

    def rotate(self, beyond: int) -> None:
        """Move the lines into a segment if the file has more bytes. Call it while nobody else writes, and after `mend`."""
        if self.path.exists() and self.path.stat().st_size > beyond:
            number = max(self._segments(), default=0) + 1
            os.rename(self.path, self._plain(number))
            self._compress(number)

    def _segments(self, after: int = 0) -> list[int]:
        """Numbers of those that there are, in their order."""
        found = map(self._segment.fullmatch, os.listdir(self.path.parent))
        return sorted({int(match[1]) for match in found if match is not None and int(match[1]) > after})

    def _plain(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.stem}.{number:04}{self.path.suffix}")

    def _compressed(self, number: int) -> Path:
        return self.path.with_name(f"{self._plain(number).name}.gz")

    def _open_segment(self, number: int) -> tuple[Path, BinaryIO]:
        compressed, plain = self._compressed(number), self._plain(number)
        try:
            return compressed, cast(BinaryIO, gzip.open(compressed))
        except FileNotFoundError:
            pass
        try:
            return plain, plain.open("rb")
        except FileNotFoundError:  # it is compressed meanwhile
            return compressed, cast(BinaryIO, gzip.open(compressed))

    def _compress(self, number: int) -> None:
        plain = self._plain(number)
        if plain.exists():
            if not self._compressed(number).exists():
                self._write_segment(number, plain.read_bytes())
            plain.unlink(missing_ok=True)

    def _write_segment(self, number: int, content: bytes) -> None:
        """A segment without lines is removed."""
        if content:
            replace_file(self._compressed(number), gzip.compress(content, 6, mtime=0))
        else:
            self._plain(number).unlink(missing_ok=True)
            self._compressed(number).unlink(missing_ok=True)


def _without(content: bytes, is_over: Callable[[Mapping[str, Any]], bool]) -> bytes:
    kept = []
    for line in content.splitlines(keepends=True):
        try:
            if not line.endswith(b"\n"):
                break
            if not is_over(json.loads(line)):
                kept.append(line)
        except (KeyError, TypeError, ValueError, RecursionError):
            break
    return b"".join(kept)


def _whole_lines(path: Path, file: BinaryIO) -> Iterator[tuple[Path, int, bytes]]:
    for number, line in enumerate(file, 1):
        if line.endswith(b"\n"):
            yield path, number, line


def _last_of(file: BinaryIO) -> bytes | None:
    end, size = file.seek(0, os.SEEK_END), BYTES_OF_AN_END
    while True:
        begin = max(0, end - size)
        file.seek(begin)
        whole, newline, _ = file.read(end - begin).rpartition(b"\n")
        _, newline_before, line = whole.rpartition(b"\n")
        if newline_before or (newline and not begin):
            return line + newline
        if not begin:
            return None
        size *= 8


@contextmanager
def _damage_of(segment: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise OSError(errno.EIO, f"{segment.name} is damaged: {error}") from None


def _open_or_empty(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return BytesIO()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
