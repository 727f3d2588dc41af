"""Copies the files of a model folder that are neither weights nor configuration."""

from pathlib import Path

from storage import FILES_BESIDE_WEIGHTS, Folder

from .errors import ExportError

__all__ = ["copy_files_beside_weights"]


def copy_files_beside_weights(source: Path, folder: Path, *more: str) -> None:
    """
    Copy the text files that other programs want besides weights and configuration: the tokenizer's, and the chat template.

    Args:
        more: names of others, which are copied where they are there, too.

    Raises:
        ExportError: one of the files cannot be read, or is a link that leaves the folder.
    """
    files = Folder(source, ExportError)
    for name in (*FILES_BESIDE_WEIGHTS, *more):
        if files.find(name):
            (folder / name).write_bytes(files.read_text(name).encode())
