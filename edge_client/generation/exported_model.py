"""The folder that splitlora-export writes, as a device opens it: before anything is loaded, it is known what is in it."""

from pathlib import Path

from storage import ExportedManifest, Folder

__all__ = ["ExportedModelError", "open_exported"]


class ExportedModelError(ValueError):
    """A folder that cannot be used as an exported model; the message says why and what to do."""


def open_exported(folder: Path) -> ExportedManifest:
    """
    What the folder holds. Only the files of the precision that is chosen are required, by `ExportedManifest.require`.

    Raises:
        ExportedModelError: there is no such folder, it is of another kind, or its manifest is broken.
    """
    return ExportedManifest.read(Folder(folder, ExportedModelError))
