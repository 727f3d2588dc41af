"""Reads the files of a folder that somebody else has made: a model, an adapter, an exported model, a run."""

import json
from codecs import BOM_UTF8
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

__all__ = ["Folder", "NamedFiles", "shown"]

Member = TypeVar("Member", int, float, str, dict[str, Any], list[Any])

EXPECTED = {int: "a whole number", float: "a number", str: "a text", dict: "an object", list: "a list"}


class Folder:
    """
    Reads the files of a folder, and never one outside it. A stranger may have put a link into it that leads to a private file
    of this machine; whoever reads or copies that would give it away. One kind of link may leave: a snapshot in the cache of
    the Hugging Face hub is a folder of links to the ``blobs`` beside it.

    Args:
        error: the class of whatever is raised. Its message names the file.
    """

    def __init__(self, path: Path, error: type[ValueError]) -> None:
        self.path, self.error = path, error

    def locate(self, name: str) -> Path:
        """
        The path of the file ``name``, whether it exists or not. The name may have folders in it.

        Raises:
            error: the file is outside the folder, by its name or by a link.
        """
        inner = PurePosixPath(name)
        if inner.is_absolute() or ".." in inner.parts:
            raise self.error(f"{self.path}: {shown(name)} is outside the folder")
        path = self.path / inner
        try:
            target, home = path.resolve(), self.path.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a circle of links, no permission, a name that no file can have
            raise self.error(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        # models--OWNER--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH
        blobs = [home.parent.parent / "blobs"] if home.parent.name == "snapshots" else []
        if not any(target.is_relative_to(folder) for folder in (home, *blobs)):
            raise self.error(f"{path} leads out of its folder by a link; replace the link by the file that is meant")
        return path

    def find(self, name: str) -> Path | None:
        """
        The path of the file ``name``; None if there is no such file.

        Raises:
            error: as `locate`.
        """
        path = self.locate(name)
        return path if path.is_file() else None

    def require(self, name: str) -> Path:
        """
        The path of the file ``name``.

        Raises:
            error: as `locate`, and if there is no such file.
        """
        path = self.find(name)
        if path is None:
            raise self.error(f"{self.path / name} is missing")
        return path

    def read_text(self, name: str) -> str:
        """
        The text of a file in UTF-8, without the byte order mark that some editors write before it.

        Raises:
            error: as `require`, and if the file cannot be read or is not UTF-8.
        """
        path = self.require(name)
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.error(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from None
        except OSError as error:
            raise self._unreadable(path, error) from None

    def read_bytes(self, name: str) -> bytes:
        """
        The content of a text file, without a byte order mark: of a large file it takes a half or less of what its text does.

        Raises:
            error: as `require`, and if the file cannot be read.
        """
        path = self.require(name)
        try:
            return path.read_bytes().removeprefix(BOM_UTF8)
        except OSError as error:
            raise self._unreadable(path, error) from None

    def _unreadable(self, path: Path, error: OSError) -> ValueError:
        return self.error(f"{path} cannot be read: {error.strerror or error}")

    def read_json(self, name: str) -> dict[str, Any]:
        """
        The JSON object that a file holds.

        Raises:
            error: as `read_text`, and if the file holds something else.
        """
        text, path = self.read_text(name), self.path / name
        try:
            value = json.loads(text)
            if "\\ud" in text.lower():  # JSON may write half of a character, which no UTF-8 text can have
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # refused here: else each user of the text would fail on it
            raise self.error(f"{path} has half a character: \\ud800 to \\udfff come in pairs") from None
        except RecursionError:
            raise self.error(f"{path} cannot be read: its JSON is nested too deeply") from None
        except ValueError as error:
            raise self.error(f"{path} cannot be read: {error}") from None
        if not isinstance(value, dict):
            raise self.error(f"{path} is not a JSON object but {shown(value)}")
        return value

    def member(self, name: str, value: dict[str, Any], key: str, kind: type[Member], remedy: str = "") -> Member:
        """
        What an object in the JSON file ``name`` has under a key, if it is of the type that belongs there.

        Args:
            remedy: what to do about the file, as the message ends.

        Raises:
            error: the key is missing, or something else is there.
        """
        if key not in value:
            raise self.error(f"{self.path / name}: {shown(key)} is missing{remedy}")
        found: Member = value[key]
        kinds = (int, float) if kind is float else (kind,)  # JSON has one kind of number
        if type(found) not in kinds:  # not isinstance: true and false are no whole numbers
            raise self.error(f"{self.path / name}: {key[:40]} is {shown(found)}; {EXPECTED[kind]} is expected{remedy}")
        return found


class NamedFiles(Folder):
    """
    Files that lie anywhere, by the names that they would have in a folder.

    Args:
        files: where each lies, by its name.
        error: as of Folder.
        title: what messages call the folder that there is not.
    """

    def __init__(self, files: Mapping[str, Path], error: type[ValueError], title: str) -> None:
        super().__init__(Path(title), error)
        self._files = files

    def locate(self, name: str) -> Path:
        return self._files.get(name, self.path / name)

    def find(self, name: str) -> Path | None:
        return super().find(name) if name in self._files else None


def shown(value: object) -> str:
    """A value of a JSON file as it stands in the file, for a message; a long one is cut."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
