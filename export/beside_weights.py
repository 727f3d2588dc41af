"""The files of a model folder that go on beside its weights."""

from pathlib import Path

from storage import FILES_BESIDE_WEIGHTS, Folder

from .errors import ExportError

__all__ = ["copy_files_beside_weights"]


def copy_files_beside_weights(source: Path, folder: Path) -> None:
    """
    Whatever of a model folder other programs want: its tokenizer, and how it is talked to. All of it is text.

    Raises:
        ExportError: one of the files cannot be read, or is a link that leaves the folder.
    """
    files = Folder(source, ExportError)
    for name in FILES_BESIDE_WEIGHTS:
        if files.find(name):
            (folder / name).write_bytes(files.read_text(name).encode())
