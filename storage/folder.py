"""The files of a folder that somebody else has made: a model, an adapter, an exported model."""

import json
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

__all__ = ["Folder", "shown"]

Member = TypeVar("Member", int, str, dict[str, Any])

EXPECTED = {int: "a whole number", str: "a text", dict: "an object"}


class Folder:
    """
    Gives a folder's files, and no others: a stranger's link that leaves the folder is refused, since whoever reads or copies it
    would give away a file of this machine. The cache of the Hugging Face hub goes on working, whose snapshots are folders of
    links to ``blobs`` beside them.

    Args:
        error: what is raised for whatever is wrong; its message names the file.
    """

    def __init__(self, path: Path, error: type[ValueError]) -> None:
        self.path, self.error = path, error

    def place(self, name: str) -> Path:
        """
        Where the file ``name`` is, or would be; it may lie in a folder of the folder.

        Raises:
            error: it is outside, by its name or by a link.
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
        The file ``name``; None if there is none.

        Raises:
            error: as `place`.
        """
        path = self.place(name)
        return path if path.is_file() else None

    def require(self, name: str) -> Path:
        """
        Raises:
            error: as `find`, and if there is no such file.
        """
        path = self.find(name)
        if path is None:
            raise self.error(f"{self.path / name} is missing")
        return path

    def read_text(self, name: str) -> str:
        """
        What a file in UTF-8 holds, without the byte order mark that some editors write before it.

        Raises:
            error: as `require`, and if it cannot be read.
        """
        path = self.require(name)
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.error(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from None
        except OSError as error:
            raise self.error(f"{path} cannot be read: {error.strerror or error}") from None

    def read_json(self, name: str) -> dict[str, Any]:
        """
        A file's JSON object.

        Raises:
            error: as `read_text`, and if it is something else.
        """
        text, path = self.read_text(name), self.path / name
        try:
            value = json.loads(text)
            if "\\ud" in text.lower():
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # it would come up wherever the text is used
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
        found = value[key]
        if type(found) is not kind:  # not isinstance: true and false are no whole numbers
            raise self.error(f"{self.path / name}: {key[:40]} is {shown(found)}; {EXPECTED[kind]} is expected{remedy}")
        return found


def shown(value: object) -> str:
    """A value of a JSON file as it stands there, for a message; long ones are cut."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
