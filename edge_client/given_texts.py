"""Texts that a program gives as values, as the file that they would be: a list or an iterator of dicts, a datasets.Dataset."""

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from storage import shown
from terminal import user_path

from .data import DataError
from .text_file import FIELDS

__all__ = ["TextFiles", "Texts"]

Texts: TypeAlias = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A file's path, or its entries as dicts, each of which is what a line of a .jsonl file would be."""


class TextFiles:
    """
    The files of a device's texts. Those that are given as values are written to one that only the user can read, and that is
    gone when they are encoded. So they are read as any others: the same values have the same order, and a device that comes
    back with them goes on with its run.
    """

    def __init__(self) -> None:
        self._scratch: Path | None = None
        self._names: dict[Path, str] = {}
        self._remove: Callable[[], object] = lambda: None

    def path(self, texts: Texts, name: str) -> Path:
        """
        Where they can be read.

        Args:
            name: of values, in errors.

        Raises:
            DataError: they are neither a path nor dicts. What an iterator itself raises is raised as it is.
        """
        if isinstance(texts, str | os.PathLike):
            return user_path(texts)
        if isinstance(texts, Mapping):
            names = ", ".join(shown(key) for key in list(texts)[:4])
            raise DataError(
                f"{name} is one mapping, with {names or 'nothing'} in it: give a list of dicts, or of a DatasetDict one split"
            )
        if not isinstance(texts, Iterable) or isinstance(texts, bytes | bytearray):
            raise DataError(f"{name} is {shown(texts)}: give a file, or a list or an iterator of dicts")
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="splitlora-"))
            self._remove = weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        path, number = self._scratch / f"{name}.jsonl", 0
        try:
            with path.open("w", encoding="ascii") as file:
                for number, entry in enumerate(texts, 1):
                    file.write(_line(entry, f"{name}, line {number}") + "\n")
        except BaseException:
            self.remove()
            raise
        if not number and isinstance(texts, Iterator):
            raise DataError(f"{name} is empty: an iterator gives its entries once; make it anew")
        self._names[path] = name
        return path

    def remove(self) -> None:
        """They are read, and needed no more."""
        self._remove()

    def in_words(self, text: str) -> str:
        """The text with what values are called in place of their files."""
        for path, name in self._names.items():
            text = text.replace(str(path), name)
        return text


def _line(entry: object, where: str) -> str:
    if not isinstance(entry, Mapping):
        raise DataError(f"{where}: expected a dict, found {shown(entry)}")
    fields: dict[str, Any] = {}
    for key, value in entry.items():
        if not isinstance(key, str):
            raise DataError(f"{where}: {shown(key)} is no name of a member: names are texts")
        # A picture, a date: of what is not learnt, errors know the name.
        fields[key] = value if key.strip().lower() in FIELDS else None
    try:
        return json.dumps(fields, sort_keys=True, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: {error}; each value is a text, or lists and dicts of texts") from None


def _plain(value: object) -> object:
    """What numpy and torch make of a number or a list of them."""
    as_list = getattr(value, "tolist", None)
    if as_list is None:
        raise TypeError(f"found {shown(value)}")
    return as_list()
