"""Lines that are kept for weeks: rotated, taken back, cut off in the middle of either, read meanwhile. Each is there once."""

import functools
import gzip
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from conftest import permissions
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_server.history.line_file import LineFile


def file_of(folder: Path) -> LineFile:
    return LineFile(folder / "metrics.jsonl")


def steps(file: LineFile) -> list[int]:
    return [json.loads(line)["step"] for _, _, line in file.lines()]


def after(step: int) -> Callable[[Any], bool]:
    return lambda line: bool(line["step"] > step)


def append(file: LineFile, *numbers: int) -> None:
    for number in numbers:
        file.append({"step": number})


@pytest.fixture
def file(tmp_path: Path) -> LineFile:
    """Steps 1 to 6 in two segments and the file."""
    file = file_of(tmp_path)
    append(file, 1, 2)
    file.rotate(0)
    append(file, 3, 4)
    file.rotate(0)
    append(file, 5, 6)
    return file


def names(file: LineFile) -> list[str]:
    return sorted(path.name for path in file.path.parent.iterdir())


@pytest.mark.parametrize("length", [1, 50, 2**16 - 12, 2**16 - 11, 2**16 - 10, 2**16, 2**20])
def test_last_line_is_found_from_the_end_however_long_it_is(tmp_path: Path, length: int) -> None:
    file = file_of(tmp_path)
    assert file.last() is None
    for number in (1, 2):
        file.append({"step": number, "long": "x" * length})
    with file.path.open("a") as unfinished:
        unfinished.write('{"step": 3')
    last = file.last()
    assert last is not None
    assert json.loads(last) == {"step": 2, "long": "x" * length}
    file.mend()
    assert file.last() == last
    file.rotate(0)
    assert file.last() == last


def test_lines_are_read_in_their_order_over_all_segments(file: LineFile) -> None:
    assert names(file) == ["metrics.0001.jsonl.gz", "metrics.0002.jsonl.gz", "metrics.jsonl"]
    assert [(path.name, number, json.loads(line)["step"]) for path, number, line in file.lines()] == [
        ("metrics.0001.jsonl.gz", 1, 1),
        ("metrics.0001.jsonl.gz", 2, 2),
        ("metrics.0002.jsonl.gz", 1, 3),
        ("metrics.0002.jsonl.gz", 2, 4),
        ("metrics.jsonl", 1, 5),
        ("metrics.jsonl", 2, 6),
    ]
    assert {permissions(path) for path in file.path.parent.iterdir()} == {0o600}


def test_segment_is_what_gunzip_reads(file: LineFile) -> None:
    assert gzip.decompress((file.path.parent / "metrics.0002.jsonl.gz").read_bytes()) == b'{"step": 3}\n{"step": 4}\n'


def test_more_than_9999_segments_stay_in_their_order(file: LineFile) -> None:
    (file.path.parent / "metrics.0002.jsonl.gz").rename(file.path.parent / "metrics.9999.jsonl.gz")
    file.rotate(0)
    assert "metrics.10000.jsonl.gz" in names(file)
    assert steps(file) == [1, 2, 3, 4, 5, 6]


def test_file_is_rotated_only_when_it_is_large(file: LineFile) -> None:
    size = file.path.stat().st_size
    file.rotate(size)
    assert len(names(file)) == 3
    file.rotate(size - 1)
    assert names(file)[-1] == "metrics.0003.jsonl.gz"
    assert steps(file) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("last", range(8))
def test_lines_are_taken_back_over_segments(file: LineFile, last: int) -> None:
    file.forget(after(last))
    assert steps(file) == [step for step in range(1, 7) if step <= last]
    append(file, 9)
    file.rotate(0)
    assert steps(file) == [*range(1, min(last, 6) + 1), 9]


def test_segments_before_one_that_loses_nothing_are_not_read(file: LineFile) -> None:
    (file.path.parent / "metrics.0001.jsonl.gz").write_bytes(b"no gzip")
    file.forget(after(4))
    with pytest.raises(OSError, match=r"metrics\.0001\.jsonl\.gz is damaged"):
        file.forget(after(2))


def test_nothing_is_written_where_nothing_is_taken_back(file: LineFile) -> None:
    before = {path: path.stat().st_mtime_ns for path in file.path.parent.iterdir()}
    file.forget(after(6))
    file.mend()
    file.rotate(10**6)
    assert {path: path.stat().st_mtime_ns for path in file.path.parent.iterdir()} == before


def test_files_of_others_are_left_alone(file: LineFile) -> None:
    others = {
        "metrics.old.jsonl",
        "metrics.1.csv",
        "my-metrics.0001.jsonl.gz",
        "metricsx0001.jsonl",
        "metrics.0001.jsonl.gz.bak",
    }
    for name in others:
        (file.path.parent / name).write_text('{"step": 77}\n')
    assert steps(file) == [1, 2, 3, 4, 5, 6]
    file.forget(after(0))
    file.mend()
    file.rotate(0)
    assert {name for name in names(file) if (file.path.parent / name).stat().st_size} == others


@pytest.mark.parametrize("rest", ['{"step": 7', '{"step": 7}', "\0\0\0\0", '{"step": 7'.ljust(5000)])
def test_line_that_a_crash_has_torn_is_not_there_and_does_not_spoil_the_next(file: LineFile, rest: str) -> None:
    with file.path.open("a") as torn:
        torn.write(rest)
    assert steps(file) == [1, 2, 3, 4, 5, 6]
    file.mend()
    append(file, 7)
    assert steps(file) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("garbage", ["\0\0\0\n", "{}\n", "[1]\n", '{"step": "7"}\n', '{"step": 7\n'])
def test_what_a_crash_has_left_is_taken_back_with_what_follows(file: LineFile, garbage: str) -> None:
    with file.path.open("a") as damaged:
        damaged.write(garbage + '{"step": 8}\n')
    file.forget(after(9))
    assert steps(file) == [1, 2, 3, 4, 5, 6]


CUT = gzip.compress(b'{"step": 3}\n', mtime=0)[:-9]


@pytest.mark.parametrize("content", [b"", b"no gzip", CUT], ids=["empty", "no gzip", "cut"])
def test_damaged_segment_is_named(file: LineFile, content: bytes) -> None:
    (file.path.parent / "metrics.0002.jsonl.gz").write_bytes(content)
    if not content:
        assert steps(file) == [1, 2, 5, 6]  # gzip knows an empty file as one without content
        return
    for read in (lambda: steps(file), lambda: file.forget(after(9))):
        with pytest.raises(OSError, match=r"metrics\.0002\.jsonl\.gz is damaged"):
            read()


# While others read


@pytest.mark.parametrize("read_before", range(7))
def test_whoever_reads_while_a_file_is_rotated_sees_each_line_once(file: LineFile, read_before: int) -> None:
    reading: Iterator[Any] = file_of(file.path.parent).lines()
    seen = [json.loads(next(reading)[2])["step"] for _ in range(read_before)]
    file.rotate(0)
    append(file, 7)
    seen += [json.loads(line)["step"] for _, _, line in reading]
    assert seen[:6] == [1, 2, 3, 4, 5, 6]
    assert seen[6:] in ([], [7])


# Crashes


class Killed(BaseException):
    """The process is dead: nothing that would tidy up is done either."""


class Disk:
    """Dies at a call that changes the disk, before it is done; and every later one of what still runs fails, too."""

    CHANGES = ("rename", "replace", "unlink", "open", "fsync")

    def __init__(self, patch: pytest.MonkeyPatch, calls: int) -> None:
        self.left = calls
        for name in self.CHANGES:
            patch.setattr(os, name, self._dying(getattr(os, name)))

    def _dying(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.left <= 0:
                raise Killed
            self.left -= 1
            return change(*arguments, **options)

        return call


def killed_after(calls: int, work: Callable[[], None]) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, calls)
        try:
            work()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("calls", range(12))
def test_rotation_that_is_cut_off_loses_no_line_and_doubles_none(file: LineFile, calls: int) -> None:
    # Rename, open, fsync, replace, open, fsync; and unlink, which Python 3.10 does not look up here.
    assert killed_after(calls, lambda: file.rotate(0)) == (calls < (7 if sys.version_info >= (3, 11) else 6))
    assert steps(file) == [1, 2, 3, 4, 5, 6]
    append(file, 7)  # whoever came next would mend the file first, but nothing depends on it
    assert steps(file) == [1, 2, 3, 4, 5, 6, 7]
    file.mend()
    file.rotate(0)
    assert steps(file) == [1, 2, 3, 4, 5, 6, 7]
    assert not [name for name in names(file) if not name.endswith(".gz")]


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from(["append", "rotate", "forget", "mend"]), st.integers(0, 6), st.integers(0, 25)), max_size=12
    )
)
def test_lines_are_those_of_a_list_whatever_is_done_and_wherever_it_is_cut_off(todo: list[tuple[str, int, int]]) -> None:
    """After each crash a server comes back, mends the file and does again what was cut off."""
    expected: list[int] = []
    with TemporaryDirectory() as folder:
        file = file_of(Path(folder))
        for what, number, calls in todo:
            last = expected[-1] if expected else 0
            if what == "append":
                append(file, *range(last + 1, last + 1 + number))
                expected += range(last + 1, last + 1 + number)
                continue
            goal = [step for step in expected if what != "forget" or step <= last - number]
            do = {
                "rotate": functools.partial(file.rotate, 10 * number),
                "forget": functools.partial(file.forget, after(last - number)),
                "mend": file.mend,
            }[what]
            if killed_after(calls, do):
                between = steps(file)
                assert between == expected[: len(between)]
                assert len(between) >= len(goal)
                file.mend()
                assert steps(file) == between
                do()
            expected = goal
            assert steps(file) == expected
        file.mend()
        assert not list(Path(folder).glob("*.part"))
