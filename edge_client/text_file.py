"""
A user's file of texts or conversations, read piece by piece: no more of it is in memory than a line, or some rows of a table.
The text does not leave the device.
"""

import csv
import io
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from storage import Message, shown
from terminal import importing

__all__ = [
    "Conversation",
    "DataError",
    "Entry",
    "FileState",
    "Instruction",
    "Text",
    "TextFile",
    "check_file",
    "read_texts",
]

PAIR, TEXT, INSTRUCTION, INPUT, MESSAGES = ("prompt", "completion"), "text", ("instruction", "output"), "input", "messages"
FIELDS = (*PAIR, TEXT, *INSTRUCTION, INPUT, MESSAGES)
ROLES = ("system", "user", "assistant")
ANSWERS = "assistant"
ROWS_AT_ONCE = 256
"""Of a table of columns that is read row by row."""
SHOWN = 8
"""How many names of fields a message gives."""
LONGEST_LINE = 2**24
"""Bytes of a line, and characters of a table's field: a file without lines, or with a quote too many, would fill the memory."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NOTHING: tuple[object, ...] = (None, "", [], {})
"""Members that say nothing."""
HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")


class DataError(ValueError):
    """A data file that cannot be used; the message names file, line and reason."""


class Text(NamedTuple):
    """One entry of a file. Without a prompt, the loss is on all of it."""

    prompt: str | None
    completion: str
    where: str = ""
    """Where it stands, for messages of errors."""

    @property
    def content(self) -> str:
        """All that it says."""
        return f"{self.prompt or ''}{self.completion}"

    @property
    def length(self) -> int:
        """In characters."""
        return len(self.prompt or "") + len(self.completion)

    def stripped(self) -> "Text":
        """Without white space at the ends. A pair without a completion has no prompt either, and counts as an empty text."""
        prompt, completion = self.prompt and self.prompt.strip(), self.completion.strip()
        return type(self)(prompt if completion else None, completion, self.where)


class Instruction(Text):
    """A pair that is a conversation for models that take part in such."""


class Conversation(NamedTuple):
    """One entry of a file, as messages: what the assistant says is learnt."""

    messages: tuple[Message, ...]
    num_given: int = 0
    """So many messages at the beginning are given: of these, nothing is learnt."""
    where: str = ""
    """Where it stands, for messages of errors."""

    @property
    def content(self) -> str:
        """All that it says."""
        return "".join(message["content"] for message in self.messages)

    @property
    def length(self) -> int:
        """In characters."""
        return len(self.content)

    @property
    def answers(self) -> list[int]:
        """The numbers of the messages that are learnt."""
        numbers = range(self.num_given, len(self.messages))
        return [number for number in numbers if self.messages[number]["role"] == ANSWERS]


Entry = Text | Conversation


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
    A .jsonl, .csv, .txt or .parquet file that is open for reading.

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
        self.left_out: Counter[str] = Counter()
        """By the names of members that say something which `texts` leaves out: of how many entries so far."""
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

    def texts(self) -> Iterator[Entry]:
        """
        The entries, white space at the ends of texts stripped.

        Raises:
            DataError: the file is malformed, or empty.
        """
        is_empty = True
        self.left_out.clear()
        for entry in READERS[self.kind](self):
            is_empty = False
            yield entry.stripped() if isinstance(entry, Text) else entry
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
                        f"longer than {LONGEST_LINE >> 20} MiB, which no line may be; divide it into several entries"
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


def read_texts(path: Path) -> Iterator[Entry]:
    """
    The entries of a .jsonl, .csv, .txt or .parquet file, white space at the ends of texts stripped.

    Raises:
        DataError: the file is missing, malformed, or empty.
    """
    with TextFile(path) as file:
        yield from file.texts()


def _read_jsonl(file: TextFile) -> Iterator[Entry]:
    for line in file.lines():
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise file.error(f"broken JSON: {error.msg} at character {error.pos + 1}") from None
        except (ValueError, RecursionError) as error:  # an endless number, or endless nesting
            raise file.error(f"broken JSON: {error}") from None
        text = _entry(entry, file, f"line {file.line}")
        if "\\u" in line and HALF_A_CHARACTER.search(text.content):
            raise file.error("a \\ud800 to \\udfff alone is half a character; they come in pairs")
        yield text


def _read_csv(file: TextFile) -> Iterator[Entry]:
    csv.field_size_limit(LONGEST_LINE)  # the library's is 131,072 characters
    reader = csv.DictReader(_lines_of_csv(file), strict=True)
    try:
        columns = reader.fieldnames
        if columns is not None:
            _entry(dict.fromkeys(columns, ""), file, f"line {reader.line_num}")
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
            yield _entry(entry, file, f"line {reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{file.path}, line {reader.reader.line_num}: broken CSV: {error}") from None


def _lines_of_csv(file: TextFile) -> Iterator[str]:
    """A carriage return alone ends a line of a table, too."""
    for line in file.lines():
        if "\r" in line:
            yield from io.StringIO(line, newline="")
        else:
            yield line


def _read_txt(file: TextFile) -> Iterator[Entry]:
    seen: dict[bool, list[int]] = {}
    """By whether a line has "||": how many there are, and the number of the first."""
    for line in file.lines():
        if not line.strip():
            continue
        prompt, bars, completion = line.partition("||")
        seen.setdefault(bool(bars), [0, file.line])[0] += 1
        if len(seen) == 1:
            where = f"{file.path}, line {file.line}"
            yield _checked_pair(prompt, completion, 'what stands behind "||"', where) if bars else Text(None, line, where)
        # Else the file is refused, and the rest is only counted.
    if len(seen) > 1:
        fewer = min(seen[True], seen[False], key=lambda kind: kind[0])
        raise DataError(
            f"{file.path}, line {fewer[1]}: '||' is in {seen[True][0]} of {seen[True][0] + seen[False][0]} lines, and this one "
            f"{'has it' if fewer is seen[True] else 'has not'}: "
            "each line is prompt||completion, or none is; texts with '||' in them can be written as .jsonl"
        )


def _read_parquet(file: TextFile) -> Iterator[Entry]:
    with importing("a .parquet file", install="splitlora[parquet]", instead="save the data as .jsonl"):
        import pyarrow
        from pyarrow import parquet
    file.position, number = 0, 0
    try:
        table = parquet.ParquetFile(file.path)
        _check_columns(table.schema_arrow.names, file)
        for rows in table.iter_batches(batch_size=ROWS_AT_ONCE):
            for row in rows.to_pylist():
                number += 1
                file.position = file.size * number // max(1, table.metadata.num_rows)
                yield _entry(row, file, f"row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.path} cannot be read: {str(error).strip().splitlines()[0][:200]}") from None


def _entry(value: object, file: TextFile, place: str) -> Entry:
    """
    The entry that an object's members make: "messages"; "instruction", perhaps "input", and "output"; "prompt" and
    "completion", which are texts or lists of messages; or "text". Names may be in capitals; other members are left out, and
    counted where they say something. Of the members that are known, those that are null are not there; if all are, the entry is
    an empty text.

    Args:
        place: where in the file the object stands, for messages.

    Raises:
        DataError: there is none of these, or more than one that says something; or a message cannot be learnt from.
    """
    where, members = f"{file.path}, {place}", value if isinstance(value, dict) else {}
    names = {key: str(key).strip().lower() for key in members}
    fields: dict[str, object] = {}
    for key, name in names.items():
        if name in fields and name in FIELDS:
            raise DataError(f"{where}: {shown(key)} is there twice")
        fields[name] = members[key]
    entry, read = _entry_and_names(value, fields, where)
    if len(names) > len(read):
        file.left_out.update(str(key) for key, name in names.items() if name not in read and members[key] not in NOTHING)
    return entry


def _entry_and_names(value: object, fields: Mapping[str, object], where: str) -> tuple[Entry, tuple[str, ...]]:
    """The entry that an object's fields make, and the names of those that it is made of."""
    found = [(kind, entry) for kind in KINDS if kind.names[0] in fields and (entry := kind.read(fields, where)) is not None]
    if not found:
        known = fields.keys() & set(FIELDS)
        if known and all(fields[name] is None for name in known):
            return Text(None, "", where), ()
        raise DataError(f"{where}: {_missing(value, fields)}")
    if len(found) > 1:
        # A table may have columns of several kinds if each of its rows fills those of one.
        found = [(kind, entry) for kind, entry in found if isinstance(entry, Conversation) or entry.content.strip()]
    if len(found) > 1:
        raise DataError(f"{where}: both {found[0][0].what} and {found[1][0].what}; leave one of them empty")
    if not found:
        return Text(None, "", where), ()
    kind, entry = found[0]
    return entry, kind.names + kind.others


def _check_columns(names: list[str], file: TextFile) -> None:
    """
    Raises:
        DataError: none of these columns is known.
    """
    known = {name.strip().lower() for name in names} & set(FIELDS)
    if not known:
        _entry(dict.fromkeys(names), file, "columns")


READERS: dict[str, Callable[[TextFile], Iterator[Entry]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}


def _pair(fields: Mapping[str, object], where: str) -> Entry | None:
    prompt, completion = (fields.get(name) for name in PAIR)
    if isinstance(prompt, list) and isinstance(completion, list):
        given = _messages(prompt, f'{where}: "prompt"')
        conversation = Conversation((*given, *_messages(completion, f'{where}: "completion"')), len(given), where)
        if not conversation.answers:
            raise DataError(f'{where}: in "completion" the assistant says nothing, so there is nothing to learn')
        return conversation
    if not isinstance(prompt, str) or not isinstance(completion, str):
        return None
    return _checked_pair(prompt, completion, '"completion"', where)


def _checked_pair(prompt: str, completion: str, what: str, where: str) -> Text:
    if prompt.strip():
        _check_answer(completion, what, where)
    return Text(prompt, completion, where)


def _check_answer(answer: str, what: str, where: str) -> None:
    """
    Raises:
        DataError: the answer is empty.
    """
    if not answer.strip():
        raise DataError(f"{where}: {what} is empty: there is nothing to learn; leave the entry out, or write it")


def _text(fields: Mapping[str, object], where: str) -> Entry | None:
    text = fields.get(TEXT)
    return Text(None, text, where) if isinstance(text, str) else None


def _instruction(fields: Mapping[str, object], where: str) -> Entry | None:
    instruction, output, given = (fields.get(name) for name in (*INSTRUCTION, INPUT))
    if not isinstance(instruction, str) or not isinstance(output, str):
        return None
    if given is not None and not isinstance(given, str):
        raise DataError(f'{where}: "input" is {shown(given)}; a string is expected')
    asked = [part for part in (instruction.strip(), (given or "").strip()) if part]
    if asked:
        _check_answer(output, '"output"', where)
    return Instruction("\n\n".join(asked), output, where)


def _conversation(fields: Mapping[str, object], where: str) -> Entry | None:
    messages = fields.get(MESSAGES)
    return Conversation(_messages(messages, f'{where}: "messages"'), where=where) if isinstance(messages, list) else None


class Kind(NamedTuple):
    """What an entry can be."""

    what: str
    """It is called."""
    names: tuple[str, ...]
    """Of the members that it needs; without the first there is none."""
    shape: str
    """These have."""
    read: Callable[[Mapping[str, object], str], Entry | None]
    """Makes an entry of them; None if they are not there in this shape."""
    others: tuple[str, ...] = ()
    """Of members that it may have besides."""

    @property
    def needed(self) -> str:
        return " and ".join(f'"{name}"' for name in self.names)


KINDS = (
    Kind('a "prompt" with its "completion"', PAIR, "both strings, or both lists of messages", _pair),
    Kind('a "text"', (TEXT,), "a string", _text),
    Kind('an "instruction" with its "output"', INSTRUCTION, "both strings", _instruction, (INPUT,)),
    Kind('"messages"', (MESSAGES,), "a list of messages, as .jsonl and .parquet can hold", _conversation),
)


def _messages(values: list[Any], where: str) -> tuple[Message, ...]:
    """
    Raises:
        DataError: a message has no content, a role or a member that is not known, or the assistant says nothing in it.
    """
    if not values:
        raise DataError(f"{where} has no message")
    return tuple(_message(value, f"{where}, message {number}") for number, value in enumerate(values, 1))


def _message(value: object, where: str) -> Message:
    members = {key: member for key, member in value.items() if member is not None} if isinstance(value, dict) else None
    if members is None:
        raise DataError(f'{where}: expected an object with "role" and "content"; found {shown(value)}')
    role = members.get("role")
    for name in ("tool_calls", "function_call", "tool_call_id"):
        if members.get(name):
            raise DataError(f"{where}: {name} is {shown(members[name])}: calls of tools are not learnt; leave such entries out")
    if role in ("tool", "function"):
        raise DataError(f"{where}: its role is {shown(role)}: answers of tools are not known; leave such entries out")
    if role not in ROLES:
        raise DataError(f"{where}: role is {shown(role)}; {', '.join(ROLES[:-1])} and {ROLES[-1]} are known")
    content = members.get("content")
    if not isinstance(content, str):
        raise DataError(f"{where}: content is {shown(content)}; a string is expected")
    more = sorted(str(key) for key in members if key not in ("role", "content", "tool_calls", "function_call", "tool_call_id"))
    if more:
        raise DataError(f"{where}: {shown(more[0])} is not known; a message has role and content")
    if role == ANSWERS:
        _check_answer(content, "the assistant's content", where)
    return {"role": str(role), "content": content}


def _missing(entry: object, fields: Mapping[str, object]) -> str:
    """What an object of which no entry can be made should have, and what it has."""
    begun = [kind for kind in KINDS if any(fields.get(name) is not None for name in kind.names)]
    if begun:
        expected = ", or ".join(f"{kind.needed}, {kind.shape}" for kind in begun)
        return f"expected {expected}; {', '.join(_described(name, fields) for kind in begun for name in kind.names)}"
    expected = ", or ".join(kind.needed for kind in KINDS)
    if not isinstance(entry, dict):
        return f"expected {expected}, as members of an object; found {shown(entry)}"
    names = ", ".join(shown(name) for name in list(entry)[:SHOWN]) + (", ..." if len(entry) > SHOWN else "")
    return f"expected {expected}; found {names or 'nothing'}"


def _described(name: str, fields: Mapping[str, object]) -> str:
    if name not in fields:
        return f'there is no "{name}"'
    value = fields[name]
    return f'"{name}" is {"a string" if isinstance(value, str) else shown(value)}'
