"""Writes an output folder wholly, or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from terminal import user_path

from .errors import ExportError

__all__ = ["check_output", "output_folder"]


def check_output(path: Path, *, overwrite: bool, read: Iterable[Path | str | None] = ()) -> None:
    """
    Check, before long work begins, that `output_folder` can write to ``path``.

    Args:
        read: what the output is made of, as the user gave it.

    Raises:
        ExportError: ``path`` exists and may not be overwritten, is something other than a model folder, or has something in it
            that is read.
    """
    path = user_path(path)
    for given in read:
        if given and path.exists() and user_path(given).resolve().is_relative_to(path.resolve()):
            raise ExportError(f"{path} has {given} in it, which is read; --overwrite would remove it: choose another --output")
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists already; choose another --output, or replace it with --overwrite")
    if path.exists() and not path.is_dir():
        raise ExportError(f"{path} is a file; --output is a folder")
    if path.exists() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise ExportError(f"{path} is not a model folder, and --overwrite would remove all that is in it; choose another")


@contextmanager
def output_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """
    Within this context, an empty folder beside ``path``. It replaces ``path`` at the end, or is removed after an error.

    Raises:
        ExportError: ``path`` exists and may not be overwritten, or cannot be written; the disk is full.
    """
    path = Path(os.path.abspath(user_path(path)))
    check_output(path, overwrite=overwrite)
    with _readable_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        try:
            yield unfinished
            unfinished.chmod(0o777 & ~_umask())  # mkdtemp's folders are for their owner alone
            _replace(path, unfinished)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _replace(path: Path, finished: Path) -> None:
    """A folder can only be renamed over an empty one. So the old one is renamed first, and back if the second rename fails."""
    if not path.exists():
        finished.rename(path)
        return
    aside = finished.with_suffix(".old")
    path.rename(aside)
    try:
        finished.rename(path)
    except OSError:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(f"no space left for {path}; nothing of it was kept") from None
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
