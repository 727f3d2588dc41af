"""
Token ids of a device's texts on its disk: written piece by piece, mapped into memory instead of read, and found again at the
next start. Files beyond a limit go, those first that were not used for longest.
"""

import hashlib
import json
import logging
import mmap
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias, overload

import numpy as np

from protocol import Array
from storage import remove_unfinished, replace_file

from .saved_steps import readable_errors
from .text_file import DataError, TextFile

if sys.platform != "win32":
    import fcntl

__all__ = [
    "CUT",
    "LONG",
    "SKIP",
    "SPLIT",
    "Sample",
    "Samples",
    "Summary",
    "TokenFolder",
    "TokenWriter",
    "check_long",
    "kept_order",
]

logger = logging.getLogger("edge_client")

CUT, SPLIT, SKIP = LONG = ("cut", "split", "skip")
"""What becomes of a sample of more tokens than the greatest length."""
OVERLAP = 4
"""Of a sample that is split, each part but the first begins with tokens of the one before: this part of the greatest length."""
MOST_BYTES = 2**31
"""Of all token files of a device together; the one in use stays, of any size."""
MOST_NOTES = 100
"""Data files of which it is noted what they contain."""
MOST_ORDERS = 4
"""Orders that are kept beside a token file."""
RELEASED_AFTER = 256
"""Samples. For each the system maps up to 64 KiB around it, of each file."""
COARSEST_CLOCK_NS = 2 * 10**9
"""Of all file systems: the times of FAT are of two seconds."""
PIECE = 2**20
SUMMARY, PROGRESS, NOTES, LOCK, UNFINISHED, ORDER = "summary.json", "progress.json", "contents.json", "lock", ".part", "order-"
SEAL, STATES = "sha256", "states"
TOKENS, STARTS, LABEL_COUNTS = "tokens", "starts", "label_counts"
DIGEST_BYTES = 32
IdType: TypeAlias = "np.dtype[np.unsignedinteger[Any]]"
START, LABEL_COUNT, ORDER_NUMBER = np.dtype("<i8"), np.dtype("<u4"), np.dtype("<u4")


class Sample(NamedTuple):
    """One entry as token ids; the last ``num_labels`` of them are predicted."""

    tokens: Array
    num_labels: int

    @property
    def labels(self) -> Array:
        """(num_labels,) those that are predicted."""
        return self.tokens[len(self.tokens) - self.num_labels :]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What is known of all samples of a file without looking at each."""

    bytes_of_id: int
    """2 or 4."""
    num_entries: int = 0
    """Of the text file so far, those without a text included."""
    num_samples: int = 0
    num_tokens: int = 0
    num_cut: int = 0
    """How many samples had more tokens than the greatest length, so that they were cut, split or left out."""
    num_unlabelled: int = 0
    """How many samples have nothing left to predict within the greatest length."""
    longest: int = 0
    """Tokens of the longest sample."""
    highest_token: int = 0

    @classmethod
    def read(cls, path: Path) -> "Summary | None":
        """None if the file is not there, or is not what was written, or one of the files beside it is not."""
        try:
            found = json.loads(path.read_bytes())
            if found.pop(SEAL) != _seal(found):
                return None
            states = found[STATES]
            if any(_state(path.with_name(name)) != state for name, state in states.items()):
                return None
            return cls(**{field.name: found[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def write(self, path: Path, *, complete: bool) -> None:
        """
        Args:
            complete: whether the files beside it stay as they are from now on. To read them all at each start would take
                seconds: what the file system says of their last change is believed, as in `TokenFolder.content`.
        """
        states = {name: _state(path.with_name(name)) for name in self.sizes} if complete else {}
        content = {**asdict(self), STATES: states}
        replace_file(path, json.dumps({**content, SEAL: _seal(content)}).encode())

    @property
    def dtype(self) -> IdType:
        return np.dtype(f"<u{self.bytes_of_id}")

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            TOKENS: self.num_tokens * self.bytes_of_id,
            STARTS: (self.num_samples + 1) * START.itemsize,
            LABEL_COUNTS: self.num_samples * LABEL_COUNT.itemsize,
        }


class Samples(Sequence[Sample]):
    """
    The samples of one file, in its order. Only those that are asked for are read from the disk.

    Args:
        tokens: (T,) ids of all samples, one after the other.
        starts: (S + 1,) where each sample begins; the last number is T.
        label_counts: (S,)
        folder: of the token file; None if it is in memory.
        mappings: where the arrays lie, if they are files.
    """

    def __init__(
        self,
        tokens: Array,
        starts: Array,
        label_counts: Array,
        summary: Summary,
        folder: Path | None = None,
        mappings: Sequence[mmap.mmap] = (),
    ) -> None:
        self._tokens, self._label_counts = tokens, label_counts
        self.starts, self.summary, self.folder = starts, summary, folder
        self._mappings, self._num_read = mappings, 0

    @classmethod
    def open(cls, folder: Path) -> "Samples | None":
        """The token file in a folder; None if there is none, or not the whole of it."""
        summary = Summary.read(folder / SUMMARY)
        if summary is None or not summary.num_tokens:
            return None
        types = {TOKENS: summary.dtype, STARTS: START, LABEL_COUNTS: LABEL_COUNT}
        try:
            if any((folder / name).stat().st_size != size for name, size in summary.sizes.items()):
                return None
            mappings = [_mapped(folder / name) for name in types]
        except OSError:
            return None
        # Plain arrays: their slices are made faster than those of np.memmap.
        tokens, starts, label_counts = (
            np.frombuffer(mapping, types[name]) for name, mapping in zip(types, mappings, strict=True)
        )
        return cls(tokens, starts, label_counts, summary, folder, mappings)

    def __len__(self) -> int:
        return len(self._label_counts)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        num_labels = int(self._label_counts[index])  # IndexError beyond the last
        index %= len(self)
        tokens = self._tokens[self.starts[index] : self.starts[index + 1]].astype(np.int32)
        self._num_read += 1
        if self._num_read % RELEASED_AFTER == 0:
            self._release()
        return Sample(tokens, num_labels)

    def _release(self) -> None:
        """
        What was read of a mapped file does not count as this process's memory any more; the system has it still, as long as
        nobody needs the room. Otherwise the process would look as large as its data in the end.
        """
        for mapping in self._mappings:
            if hasattr(mmap, "MADV_DONTNEED"):
                mapping.madvise(mmap.MADV_DONTNEED)

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Samples":
        """In memory."""
        lengths = np.array([len(sample.tokens) for sample in samples], START)
        label_counts = np.array([sample.num_labels for sample in samples], LABEL_COUNT)
        tokens = np.concatenate([np.empty(0, np.int32), *(sample.tokens for sample in samples)])
        summary = Summary(
            bytes_of_id=tokens.itemsize,
            num_samples=len(samples),
            num_tokens=len(tokens),
            num_unlabelled=int((label_counts == 0).sum()),
            longest=int(lengths.max(initial=0)),
            highest_token=int(tokens.max(initial=0)),
        )
        return cls(tokens, np.cumsum([0, *lengths]), label_counts, summary)


def kept_order(folder: Path, seed: int, size: int, make: Callable[[], Array]) -> Array:
    """
    An order of the samples, (S,) uint32, that lies in the folder of a token file, or is made and kept there now.

    Raises:
        StateError: it cannot be written.
    """
    path = folder / f"{ORDER}{seed}"
    with suppress(OSError):
        if path.stat().st_size == DIGEST_BYTES + ORDER_NUMBER.itemsize * size:
            kept = _mapped(path)
            if kept[:DIGEST_BYTES] == hashlib.sha256(memoryview(kept)[DIGEST_BYTES:]).digest():
                return np.frombuffer(kept, ORDER_NUMBER, offset=DIGEST_BYTES)
    order = make()
    if folder.is_dir():  # other token files may have pushed this one out meanwhile, or it was only for the time being
        numbers = order.astype(ORDER_NUMBER).tobytes()
        with readable_errors(folder):
            replace_file(path, hashlib.sha256(numbers).digest() + numbers)
            for old in _by_age(folder.glob(f"{ORDER}*"))[:-MOST_ORDERS]:
                old.unlink(missing_ok=True)
    return order


def check_long(long: str) -> None:
    """
    Raises:
        DataError: it is none of LONG.
    """
    if long not in LONG:
        raise DataError(f"long must be {', '.join(LONG[:-1])} or {LONG[-1]}, got {long}")


def windows(num_tokens: int, num_labels: int, most: int) -> Iterator[tuple[int, int, int]]:
    """
    The parts of a sample, each of at most ``most`` tokens: where one begins and ends, and how many of its last tokens are
    predicted. Each label is predicted once, behind at least an `OVERLAP` of what is before it. A part without any is left out.
    """
    start, learnt = 0, num_tokens - num_labels
    while True:
        end = min(start + most, num_tokens)
        if end > learnt:
            yield start, end, end - learnt
            learnt = end
        if end == num_tokens:
            return
        start = end - max(1, most // OVERLAP)


class TokenWriter:
    """
    Writes a token file into a folder, going on where it was `commit`ted last.

    Args:
        max_length: the greatest number of tokens in a sample.
        long: what becomes of a sample that has more: one of LONG.

    Raises:
        StateError: the disk is full, or the folder cannot be written. Of every method.
    """

    def __init__(self, folder: Path, dtype: IdType, max_length: int, long: str = CUT) -> None:
        self._folder, self._max_length, self._long = folder, max_length, long
        self._files: dict[str, BinaryIO] = {}
        try:
            with readable_errors(folder):
                folder.mkdir(mode=0o700, exist_ok=True)
                remove_unfinished(folder)
                self.summary = self._take_up(dtype)
        except BaseException:
            self.close()
            raise

    def _take_up(self, dtype: IdType) -> Summary:
        """Open the files where they were committed last."""
        for name in (TOKENS, STARTS, LABEL_COUNTS):
            self._files[name] = _open_private(self._folder / name)
        done, sizes = Summary.read(self._folder / PROGRESS), {name: _size(file) for name, file in self._files.items()}
        if done is None or done.dtype != dtype or any(sizes[name] < size for name, size in done.sizes.items()):
            done = Summary(bytes_of_id=dtype.itemsize)
        for name, size in done.sizes.items():
            self._files[name].truncate(size)  # what was written after the last commit is written again
            self._files[name].seek(size)
        self._files[STARTS].seek(0)
        self._files[STARTS].write(bytes(START.itemsize))  # the first sample begins at 0
        self._files[STARTS].seek(done.sizes[STARTS])
        return done

    def add(self, num_entries: int, samples: Sequence[tuple[bytes, int]]) -> None:
        """
        Args:
            num_entries: of the text file, from which these samples come.
            samples: of each the ids, as bytes of the file's dtype, and how many of its last tokens are predicted.
        """
        done, size, most = self.summary, self.summary.bytes_of_id, self._max_length
        num_long = sum(len(tokens) > most * size for tokens, _ in samples)
        if num_long and self._long == SKIP:
            samples = [(tokens, count) for tokens, count in samples if len(tokens) <= most * size]
        elif num_long and self._long == SPLIT:
            samples = [
                (tokens[start * size : end * size], count)
                for tokens, num_labels in samples
                for start, end, count in windows(len(tokens) // size, num_labels, most)
            ]
        whole_lengths = np.array([len(tokens) // size for tokens, _ in samples], START)
        lengths = np.minimum(whole_lengths, most)
        label_counts = np.maximum(0, np.array([count for _, count in samples], START) - (whole_lengths - lengths))
        tokens = b"".join(tokens[: most * size] for tokens, _ in samples)
        with readable_errors(self._folder):
            self._files[TOKENS].write(tokens)
            self._files[STARTS].write((done.num_tokens + np.cumsum(lengths)).astype(START).tobytes())
            self._files[LABEL_COUNTS].write(label_counts.astype(LABEL_COUNT).tobytes())
        self.summary = replace(
            done,
            num_entries=done.num_entries + num_entries,
            num_samples=done.num_samples + len(samples),
            num_tokens=done.num_tokens + int(lengths.sum()),
            num_cut=done.num_cut + num_long,
            num_unlabelled=done.num_unlabelled + int((label_counts == 0).sum()),
            longest=max(done.longest, int(lengths.max(initial=0))),
            highest_token=max(done.highest_token, int(np.frombuffer(tokens, done.dtype).max(initial=0))),
        )

    def commit(self, name: str = PROGRESS) -> None:
        """What was added so far is on the disk from now on, power loss included."""
        with readable_errors(self._folder):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            self.summary.write(self._folder / name, complete=name == SUMMARY)

    def finish(self) -> None:
        """Write what makes it a token file."""
        self.commit(SUMMARY)
        self.close()
        (self._folder / PROGRESS).unlink(missing_ok=True)

    def close(self) -> None:
        """What was committed is on the disk; the rest need not be, and on a full disk cannot."""
        for file in self._files.values():
            with suppress(OSError):
                file.close()


class TokenFolder:
    """
    All token files of a device, each in a folder of its own that is named by what decides its content.

    Raises:
        StateError: the disk is full, or the folder cannot be written. Of every method that writes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with readable_errors(path):
            path.mkdir(parents=True, mode=0o700, exist_ok=True)

    def find(self, key: str) -> Samples | None:
        samples = Samples.open(self._path / key)
        if samples is not None:
            # It was used just now. Where another program makes room meanwhile it has gone; what is mapped stays.
            with readable_errors(self._path), suppress(FileNotFoundError):
                os.utime(self._path / key)
        return samples

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """
        Of several programs with this folder one makes a token file at a time; the others say that they wait, and may then find
        it.
        """
        if sys.platform == "win32":
            yield
            return
        with readable_errors(self._path):
            file = _open_private(self._path / LOCK)
        with file:
            with readable_errors(self._path):  # the system gives the lock back if this program is killed
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    logger.info("another program reads its data into %s: this one waits until that is done", self._path)
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def writer(self, key: str, dtype: IdType, max_length: int, long: str = CUT) -> Iterator[TokenWriter]:
        """
        The writer of a token file, which is there under its name when the block has been left, and not before. What a program
        that was killed has written is gone on with; what was written before an error is deleted.
        """
        unfinished = self._path / f"{key}{UNFINISHED}"
        with _deleted_after_an_error(unfinished), closing(TokenWriter(unfinished, dtype, max_length, long)) as writer:
            self._make_room(key)  # before a new file is as large as an old one
            yield writer
            writer.finish()
            with readable_errors(self._path):
                shutil.rmtree(self._path / key, ignore_errors=True)  # one that was there and is not whole
                unfinished.rename(self._path / key)
            self._make_room(key)

    def content(self, file: TextFile, report: Callable[[], object]) -> str:
        """
        SHA-256 of a text file, in hex. What was noted about it earlier is believed if the file system shows no change since:
        same path, device, inode, size, and times of its last change. Whoever writes a file cannot set the last of these times
        (ctime; Windows has none), and it has moved on if a file system's clock has ticked between. A file that was changed
        less than two ticks of the coarsest clock before it was read is therefore read again next time. A program that changes
        the file through a mapping while it is being read may go unnoticed.

        Args:
            report: called now and then while the file is being read.
        """
        path, begun = str(file.path.absolute()), time.time_ns()
        notes = self._notes()
        noted = notes.pop(path, None)
        if isinstance(noted, list) and len(noted) == 2 and noted[0] == list(file.state):
            return str(noted[1])
        digest = hashlib.sha256()
        for piece in file.pieces(PIECE):
            digest.update(piece)
            report()
        if max(file.state.modified_ns, file.state.changed_ns) + COARSEST_CLOCK_NS < begun:
            notes[path] = [file.state, digest.hexdigest()]
            kept = dict(list(notes.items())[-MOST_NOTES:])
            with readable_errors(self._path):
                replace_file(self._path / NOTES, json.dumps(kept).encode())
        return digest.hexdigest()

    def _notes(self) -> dict[str, object]:
        try:
            notes = json.loads((self._path / NOTES).read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return notes if isinstance(notes, dict) else {}

    def _make_room(self, key: str) -> None:
        """Delete token files beyond the limit, unfinished ones included; that of ``key`` stays, whatever its size."""
        num_bytes = 0
        with readable_errors(self._path):
            for folder in reversed(_by_age(path for path in self._path.iterdir() if path.is_dir())):
                with suppress(FileNotFoundError):  # another program deletes it, too
                    num_bytes += sum(path.lstat().st_size for path in folder.iterdir())
                if num_bytes > MOST_BYTES and folder.name not in (key, f"{key}{UNFINISHED}"):
                    shutil.rmtree(folder, ignore_errors=True)


def _by_age(paths: Iterable[Path]) -> list[Path]:
    """The one that was not changed for longest first. Those that another program deletes meanwhile are left out."""
    ages = []
    for path in paths:
        with suppress(FileNotFoundError):
            ages.append((path.lstat().st_mtime_ns, path))
    return [path for _, path in sorted(ages)]


@contextmanager
def _deleted_after_an_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception:  # whoever is killed, or stopped by Ctrl-C, goes on with it
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _state(path: Path) -> list[int]:
    """
    What the file system says of a file's last change.

    Raises:
        OSError: it is not there.
    """
    status = path.lstat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _open_private(path: Path) -> BinaryIO:
    """For writing, with what is in it; only its owner may read it."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return open(os.open(path, flags, 0o600), "r+b")
