"""The folder that splitlora-export writes: what is in it, and whether all of it is there. Loads nothing."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.folder import Folder, shown

__all__ = ["KIND", "SPLIT_KIND", "ExportedModel", "ExportedModelError"]

MANIFEST = "splitlora.json"
FORMAT, LARGEST = 1, 1 << 31
KIND, SPLIT_KIND = "language model", "split language model"
GRAPHS_OF = {KIND: ("graph",), SPLIT_KIND: ("edge_graph", "server_graph")}


class ExportedModelError(ValueError):
    """A folder that cannot be used as an exported model; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """One precision of a model."""

    paths: tuple[Path, ...]
    """One graph, or those of the edge part and the server part."""
    num_bytes: dict[Path, int]
    """The size of every file of the graphs."""


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """What the manifest of an exported folder says."""

    folder: Path
    kind: str
    attention: str
    adapter: Path | None
    """The adapter that came with it, if its graphs hold the base model and have room for one."""
    vocabulary_size: int
    context: int
    """Most tokens, prompt and continuation together."""
    end_token: int
    precisions: dict[str, Graphs]

    @classmethod
    def open(cls, folder: Path) -> "ExportedModel":
        """
        Raises:
            ExportedModelError: there is no such folder, it is of another kind, or its manifest is broken.
        """
        raw = _read_manifest(folder)
        if str(raw.get("kind")) not in GRAPHS_OF:
            raise ExportedModelError(
                f"{folder} is of the kind {str(raw.get('kind'))[:40]!r}; only these generate text: {', '.join(GRAPHS_OF)}"
            )
        try:
            model = cls(
                folder=folder,
                kind=raw["kind"],
                attention=str(raw["attention"]),
                adapter=None if raw["adapter"] is None else Folder(folder, ExportedModelError).place(raw["adapter"]),
                vocabulary_size=int(raw["vocabulary_size"]),
                context=int(raw["context"]),
                end_token=int(raw["end_token"]),
                precisions={name: _graphs(folder, raw["kind"], entry) for name, entry in raw["precisions"].items()},
            )
            if not 0 <= model.end_token < model.vocabulary_size < LARGEST or not 1 < model.context < LARGEST:
                sizes = f"{model.end_token}, {model.vocabulary_size} and {model.context}"
                raise ValueError(f"end_token, vocabulary_size and context cannot be {sizes[:80]}")
            return model
        except ExportedModelError:
            raise
        except KeyError as error:
            raise ExportedModelError(f"{folder / MANIFEST}: {error} is missing; export the model again") from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ExportedModelError(f"{folder / MANIFEST} is broken: {error}; export the model again") from None

    def graphs(self, precision: str) -> Graphs:
        """
        The files of a precision, each there with its full size.

        Raises:
            ExportedModelError: it was not exported, or not all of it has come.
        """
        if precision not in self.precisions:
            exported = ", ".join(self.precisions) or "none"
            raise ExportedModelError(f"{self.folder} was exported without {precision}; there is {exported}")
        graphs = self.precisions[precision]
        for path, expected in graphs.num_bytes.items():
            require_whole(path, expected)
        return graphs


def require_whole(path: Path, expected: int) -> None:
    """
    Raises:
        ExportedModelError: the file is not there, or of another size than it was written with.
    """
    if not os.path.isfile(path):  # of a path that cannot be one, Path.is_file would not say no
        raise ExportedModelError(f"{path} is missing: the folder is incomplete; copy or export it again")
    found = path.stat().st_size
    if found != expected:
        raise ExportedModelError(f"{path} has {found:,} bytes of {expected:,}: copy or export the folder again")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ExportedModelError(f"no folder at {folder}; splitlora-export onnx makes one")
    files = Folder(folder, ExportedModelError)
    if files.find(MANIFEST) is None:
        raise ExportedModelError(f"{folder} is not an exported model: no {MANIFEST}; splitlora-export onnx writes one")
    raw = files.read_json(MANIFEST)
    if raw.get("format") != FORMAT:
        raise ExportedModelError(f"{path} has format {shown(raw.get('format'))}; this splitlora reads format {FORMAT}")
    return raw


def _graphs(folder: Path, kind: str, entry: dict[str, Any]) -> Graphs:
    files = Folder(folder, ExportedModelError)
    num_bytes = {files.place(name): int(size) for name, size in entry["bytes"].items()}
    paths: Sequence[Path] = [files.place(entry[key]) for key in GRAPHS_OF[kind]]
    for path in paths:
        if path not in num_bytes:
            raise ValueError(f"the size of {path.name} is not given")
    return Graphs(paths=tuple(paths), num_bytes=num_bytes)
