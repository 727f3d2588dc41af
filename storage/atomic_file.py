"""Files that are never half written, and private from their first byte on unless they are meant for others."""

import os
import secrets
from pathlib import Path

__all__ = ["remove_unfinished", "replace_file"]

UNFINISHED = ".part"


def replace_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """
    Write a file so that whatever happens, power loss included, it has its old content or its new one. Two writers of the same
    file do not disturb each other: the later one's content stays.

    Args:
        mode: who may read it, less what the umask takes away; by default its owner alone, from its first byte on.

    Raises:
        OSError: it cannot be written; ``path`` is as it was before, unless only its folder could not be written to the disk.
    """
    # A new file under a name that nobody knows beforehand: a link that somebody has left there is not written through, and
    # two who write the same file at once do not meet. It has its mode from its creation on: who opened it before a later chmod
    # would still read what is written after.
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}{UNFINISHED}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(unfinished, flags, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:  # also Ctrl-C: the half file may hold a secret, and on a full disk it would keep the rest of the room
        unfinished.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name has to reach the disk, too; elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_unfinished(folder: Path, name: str = "") -> None:
    """
    Remove what `replace_file` has left in a folder because its program was killed. Call it only while no other program can be
    writing the same files: it would lose what it has begun.

    Args:
        name: only what is left of this file; by default of every file in the folder.
    """
    for path in folder.glob(f"*{UNFINISHED}"):
        if path.name.startswith(name and f"{name}.") and (path.is_file() or path.is_symlink()):
            path.unlink(missing_ok=True)
