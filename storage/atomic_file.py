"""Files that are never half written."""

import os
import secrets
from pathlib import Path

__all__ = ["remove_unfinished", "replace_file"]

UNFINISHED = ".part"


def replace_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """
    Write a file so that whatever happens, power loss included, it has its old content or its new one.

    Args:
        mode: who may read it, less what the umask takes away; by default its owner alone, from its first byte on.
    """
    # A new file under a name that nobody knows beforehand: a link that somebody has left there is not written through, and
    # two who write the same file at once do not meet.
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}{UNFINISHED}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(unfinished, flags, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)  # on a full disk half a file would keep the rest of the room
        raise
    if os.name == "posix":  # the new name has to reach the disk, too; elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_unfinished(folder: Path, name: str = "") -> None:
    """
    Remove what a program that was killed while it wrote has left in a folder. For the one program that writes there, before it
    does.

    Args:
        name: of the one file in question, where others write other files there.
    """
    for path in folder.glob(f"*{UNFINISHED}"):
        if path.name.startswith(name and f"{name}.") and (path.is_file() or path.is_symlink()):
            path.unlink(missing_ok=True)
