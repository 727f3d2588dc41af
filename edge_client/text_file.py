"""A user's file of texts, read line by line: no more of it is in memory than one entry. The text does not leave the device."""

import csv
import io
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from storage import shown

__all__ = ["DataError", "FileState", "Text", "TextFile", "check_file", "read_texts"]

FIELDS = ("prompt", "completion", "text")
SHOWN = 8
"""How many names of fields an error message gives."""
LONGEST_LINE = 2**24
"""Bytes of a line, and characters of a table's field: a file without lines, or with a quote too many, would fill the memory."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")


class DataError(ValueError):
    """A data file that cannot be used; the message names file, line and reason."""


class Text(NamedTuple):
    """One entry of a file. Without a prompt, the loss is on all of it."""

    prompt: str | None
    completion: str


class FileState(NamedTuple):
    """What the file system says of a file without reading it; another state is another content, or may be."""

    size: int
    modified_ns: int
    changed_ns: int
    """The file itself, its name or mode, too; a program cannot set this time. Windows has none."""
    inode: int
    device: int


class TextFile:
    """
    A .jsonl, .csv or .txt file that is open for reading.

    Raises:
        DataError: it is missing, or is none of these.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kind = path.suffix.lower()
        if self.kind not in READERS:
            raise DataError(f"{path}: data files end in {', '.join(READERS)}")
        self.position = 0
        """Bytes read so far."""
        self.line = 0
        """The number of the line that was read last, from 1 on."""
        try:
            if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():  # a pipe could be read only once, if ever
                raise DataError(f"{path} is no file that can be read twice; save the data in one")
            self._file = path.open("rb")
        except OSError as error:
            raise self._unreadable(error) from None
        self.state = self._read_state()
        """When it was opened."""
        self.size = self.state.size

    def __enter__(self) -> "TextFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def has_changed(self) -> bool:
        """Whether somebody has written to the file since it was opened."""
        return self._read_state() != self.state

    def pieces(self, num_bytes: int) -> Iterator[bytes]:
        """The content from its beginning on, ``num_bytes`` at a time; `texts` can be read after it."""
        try:
            self._file.seek(0)
            left = self.size  # what a writer adds meanwhile might never end
            while piece := self._file.read(min(num_bytes, left)):
                left -= len(piece)
                yield piece
        except OSError as error:
            raise self._unreadable(error) from None

    def texts(self) -> Iterator[Text]:
        """
        The entries, white space at their ends stripped.

        Raises:
            DataError: the file is malformed, or empty.
        """
        is_empty = True
        for prompt, completion in READERS[self.kind](self):
            is_empty = False
            prompt, completion = prompt and prompt.strip(), completion.strip()
            # A pair of two empty strings counts as an empty text.
            yield Text(prompt if completion else prompt or None, completion)
        if is_empty:
            raise DataError(f"{self.path} is empty")

    def lines(self) -> Iterator[str]:
        """
        Cut after each newline and nowhere else: a JSON string may hold the other line separators of Unicode as they are.
        In UTF-8 no other character has a newline's byte, so that each line can be decoded by itself.
        """
        self.position = self.line = 0
        try:
            self._file.seek(0)
            while data := self._file.readline(min(LONGEST_LINE + 1, self.size - self.position)):
                self.line += 1
                self.position += len(data)
                if len(data) > LONGEST_LINE:
                    raise self.error(
                        f"longer than {LONGEST_LINE >> 20} MiB; divide it, since of an entry only --max-length tokens are used"
                    )
                if self.line == 1:
                    data = data.removeprefix(BYTE_ORDER_MARK)
                try:
                    text = data.decode()
                except UnicodeDecodeError as error:
                    byte = data[error.start]
                    raise self.error(f"not UTF-8 (byte 0x{byte:02x}); convert the file first") from None
                if "\0" in text:
                    raise self.error("a NUL character, as files in UTF-16 have; convert the file to UTF-8 first")
                yield text
        except OSError as error:
            raise self._unreadable(error) from None

    def error(self, reason: str) -> DataError:
        """What is wrong with the line that was read last."""
        return DataError(f"{self.path}, line {self.line}: {reason}")

    def _read_state(self) -> FileState:
        found = os.fstat(self._file.fileno())
        return FileState(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)

    def _unreadable(self, error: OSError) -> DataError:
        return DataError(f"{self.path} cannot be read: {error.strerror}")


def check_file(path: Path) -> None:
    """
    Raises:
        DataError: this is no data file by its name, or it cannot be read; what is in it is not looked at.
    """
    TextFile(path).close()


def read_texts(path: Path) -> Iterator[Text]:
    """
    The entries of a .jsonl, .csv or .txt file, white space at their ends stripped.

    Raises:
        DataError: the file is missing, malformed, or empty.
    """
    with TextFile(path) as file:
        yield from file.texts()


def _read_jsonl(file: TextFile) -> Iterator[Text]:
    for line in file.lines():
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise file.error(f"broken JSON: {error.msg} at character {error.pos + 1}") from None
        except (ValueError, RecursionError) as error:  # an endless number, or endless nesting
            raise file.error(f"broken JSON: {error}") from None
        text = _text_of_fields(entry, f"{file.path}, line {file.line}")
        if HALF_A_CHARACTER.search(f"{text.prompt}{text.completion}"):
            raise file.error("a \\ud800 to \\udfff alone is half a character; they come in pairs")
        yield text


def _read_csv(file: TextFile) -> Iterator[Text]:
    csv.field_size_limit(LONGEST_LINE)  # the library's is 131,072 characters
    reader = csv.DictReader(_lines_of_csv(file), strict=True)
    try:
        columns = reader.fieldnames
        if columns is not None:
            _text_of_fields(dict.fromkeys(columns, ""), f"{file.path}, line {reader.line_num}")
            if len(set(columns)) < len(columns):
                twice = next(name for name in columns if columns.count(name) > 1)
                raise DataError(f"{file.path}, line {reader.line_num}: two columns have the name {shown(twice)}")
        for entry in reader:
            if None in entry:
                more = len(entry.pop(None))
                raise DataError(
                    f"{file.path}, line {reader.line_num}: {len(entry) + more} fields for {len(entry)} columns; "
                    "a field with a comma in it is written in quotes"
                )
            yield _text_of_fields(entry, f"{file.path}, line {reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{file.path}, line {reader.reader.line_num}: broken CSV: {error}") from None


def _lines_of_csv(file: TextFile) -> Iterator[str]:
    """A carriage return alone ends a line of a table, too."""
    for line in file.lines():
        if "\r" in line:
            yield from io.StringIO(line, newline="")
        else:
            yield line


def _read_txt(file: TextFile) -> Iterator[Text]:
    seen: dict[bool, list[int]] = {}
    """By whether a line has "||": how many there are, and the number of the first."""
    for line in file.lines():
        if not line.strip():
            continue
        prompt, bars, completion = line.partition("||")
        seen.setdefault(bool(bars), [0, file.line])[0] += 1
        if len(seen) == 1:
            yield Text(prompt, completion) if bars else Text(None, line)
        # Else the file is refused, and the rest is only counted.
    if len(seen) > 1:
        fewer = min(seen[True], seen[False], key=lambda kind: kind[0])
        raise DataError(
            f"{file.path}, line {fewer[1]}: '||' is in {seen[True][0]} of {seen[True][0] + seen[False][0]} lines, and this one "
            f"{'has it' if fewer is seen[True] else 'has not'}: "
            "each line is prompt||completion, or none is; texts with '||' in them can be written as .jsonl"
        )


READERS: dict[str, Callable[[TextFile], Iterator[Text]]] = {".jsonl": _read_jsonl, ".csv": _read_csv, ".txt": _read_txt}


def _text_of_fields(entry: object, where: str) -> Text:
    """The text in the fields "prompt" and "completion", or in "text"; their names may be in capitals."""
    fields: dict[str, object] = {}
    for key, value in entry.items() if isinstance(entry, dict) else ():
        name = key.strip().lower()
        if name in fields and name in FIELDS:
            raise DataError(f"{where}: {shown(key)} is there twice")
        fields[name] = value
    prompt, completion, text = (fields.get(name) for name in FIELDS)
    pair = Text(prompt, completion) if isinstance(prompt, str) and isinstance(completion, str) else None
    whole = Text(None, text) if isinstance(text, str) else None
    if pair is None and whole is None:
        raise DataError(f'{where}: expected "prompt" and "completion", or "text", each a string; {_found(entry, fields)}')
    # A table may have all three columns if each of its rows fills either the pair or the text.
    says = [one for one in (pair, whole) if one is not None and f"{one.prompt or ''}{one.completion}".strip()]
    if len(says) > 1:
        raise DataError(f'{where}: both a "prompt" with its "completion" and a "text"; leave one of them empty')
    return says[0] if says else Text(None, "")


def _found(entry: object, fields: dict[str, object]) -> str:
    if not isinstance(entry, dict):
        return f"found {shown(entry)}"
    wrong = [f'"{name}" is {shown(fields[name])}' for name in FIELDS if not isinstance(fields.get(name, ""), str)]
    names = ", ".join(shown(name) for name in list(entry)[:SHOWN]) + (", ..." if len(entry) > SHOWN else "")
    return ", ".join(wrong) or f"found {names or 'nothing'}"
