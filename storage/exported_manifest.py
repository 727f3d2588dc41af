"""
splitlora.json, by which `splitlora-export` tells other programs what it has put into a folder. The folder may be a stranger's,
so every value is checked before anything is done with it.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .fingerprint import FINGERPRINT
from .folder import Folder, Member, shown

__all__ = ["FORMAT", "KIND", "MANIFEST", "SPLIT_KIND", "ExportedManifest", "ExportedPrecision"]

MANIFEST, FORMAT = "splitlora.json", 1
KIND, SPLIT_KIND = "language model", "split language model"
GRAPHS_OF = {KIND: ("graph",), SPLIT_KIND: ("edge_graph", "server_graph")}
"""By the kind of the folder: under which names a precision's graphs stand, in the order in which they are computed."""
LARGEST = 1 << 31


@dataclass(frozen=True, kw_only=True)
class ExportedPrecision:
    """The files of a model in one precision."""

    graphs: tuple[Path, ...]
    """One graph, or those of the edge part and the server part."""
    sizes: Mapping[Path, int]
    """The bytes of every file, the graphs' weights included, when it was written."""

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(self.sizes.values())


@dataclass(frozen=True, kw_only=True)
class ExportedManifest:
    """What an exported folder's manifest says. That it says so does not mean that the files are there: see `require`."""

    files: Folder
    kind: str
    fingerprint: str
    """Of the base model, see `PretrainedModel.fingerprint`."""
    attention: str
    adapter: Path | None
    """The adapter, as onnxruntime takes it, where the graphs hold the base model and have room for one."""
    peft_adapter: Path | None
    """The same adapter as a PEFT folder."""
    vocabulary_size: int
    context: int
    """Most tokens of a sequence, prompt and continuation together."""
    end_token: int
    """Which training puts at the end of a text."""
    stop_tokens: tuple[int, ...]
    """Other tokens with which the model ends what it generates."""
    precisions: Mapping[str, ExportedPrecision]
    """By name, such as "q8". Some may be unknown to this version of splitlora."""

    @property
    def ends(self) -> tuple[int, ...]:
        """All tokens with which the model ends what it generates."""
        return (self.end_token, *self.stop_tokens)

    @property
    def folder(self) -> Path:
        return self.files.path

    @classmethod
    def read(cls, files: Folder) -> "ExportedManifest":
        """
        Args:
            files: the exported folder. Its error class is what is raised, here and by `require`.

        Raises:
            files.error: there is no such folder, no manifest in it, or one of another kind or format; a value cannot be right.
        """
        path = files.path / MANIFEST
        if not files.path.is_dir():
            raise files.error(f"no folder at {files.path}; splitlora-export onnx makes one")
        if files.find(MANIFEST) is None:
            raise files.error(f"{files.path} is not an exported model: no {MANIFEST}; splitlora-export onnx writes one")
        # Folders of earlier versions say nothing of a PEFT folder, or of other tokens than one that end a text.
        raw = {"peft_adapter": None, "stop_tokens": []} | files.read_json(MANIFEST)
        if raw.get("format", FORMAT) != FORMAT:  # another format may be wrong in everything that is checked from here on
            raise files.error(f"{path} has format {shown(raw['format'])}; this splitlora reads format {FORMAT}")
        _member(files, raw, "format", int)
        kind = raw.get("kind")
        if not isinstance(kind, str) or kind not in GRAPHS_OF:
            raise files.error(f"{files.path} is of the kind {shown(kind)}; only these are known: {', '.join(GRAPHS_OF)}")
        precisions = _member(files, raw, "precisions", dict)
        manifest = cls(
            files=files,
            kind=kind,
            fingerprint=_fingerprint(files, _member(files, raw, "base", dict)),
            attention=_member(files, raw, "attention", str),
            adapter=_file_or_none(files, raw, "adapter"),
            peft_adapter=_file_or_none(files, raw, "peft_adapter"),
            vocabulary_size=_member(files, raw, "vocabulary_size", int),
            context=_member(files, raw, "context", int),
            end_token=_member(files, raw, "end_token", int),
            stop_tokens=tuple(_member(files, raw, "stop_tokens", list)),
            precisions={name: _precision(files, kind, _member(files, precisions, name, dict)) for name in precisions},
        )
        if not all(_is_token(token, manifest.vocabulary_size) for token in manifest.stop_tokens):
            raise files.error(f"{path}: stop_tokens cannot be {shown(raw['stop_tokens'])}; export the model again")
        if not 0 <= manifest.end_token < manifest.vocabulary_size < LARGEST or not 1 < manifest.context < LARGEST:
            sizes = f"{manifest.end_token}, {manifest.vocabulary_size} and {manifest.context}"
            raise files.error(f"{path}: end_token, vocabulary_size and context cannot be {sizes[:80]}; export the model again")
        return manifest

    def require(self, precision: str) -> ExportedPrecision:
        """
        A precision whose files are all there, each with the size it was written with.

        Raises:
            files.error: it was not exported, or a file is missing or cut short.
        """
        if precision not in self.precisions:
            exported = ", ".join(self.precisions) or "none"
            raise self.files.error(f"{self.folder} was exported without {precision}; there is {exported}")
        for path, expected in self.precisions[precision].sizes.items():
            if not os.path.isfile(path):  # Path.is_file would raise an OSError for a name that no file can have
                raise self.files.error(f"{path} is missing: the folder is incomplete; copy or export it again")
            if (found := path.stat().st_size) != expected:
                raise self.files.error(f"{path} has {found:,} bytes of {expected:,}: copy or export the folder again")
        return self.precisions[precision]


def _member(files: Folder, value: dict[str, Any], key: str, kind: type[Member]) -> Member:
    return files.member(MANIFEST, value, key, kind, "; export the model again")


def _fingerprint(files: Folder, base: dict[str, Any]) -> str:
    found = base.get("fingerprint")
    if not isinstance(found, str) or not re.fullmatch(FINGERPRINT, found):
        where = f"{files.path / MANIFEST}: the fingerprint of base"
        raise files.error(f"{where} is {shown(found)}; 32 hexadecimal digits are expected; export the model again")
    return found


def _is_token(value: object, vocabulary_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocabulary_size


def _file_or_none(files: Folder, value: dict[str, Any], key: str) -> Path | None:
    """The path of a file of the folder. The manifest says null where there is none, and always says something."""
    return None if key in value and value[key] is None else files.locate(_member(files, value, key, str))


def _precision(files: Folder, kind: str, entry: dict[str, Any]) -> ExportedPrecision:
    sizes = _member(files, entry, "bytes", dict)
    precision = ExportedPrecision(
        graphs=tuple(files.locate(_member(files, entry, key, str)) for key in GRAPHS_OF[kind]),
        sizes={files.locate(name): _member(files, sizes, name, int) for name in sizes},
    )
    for graph in precision.graphs:
        if graph not in precision.sizes:
            raise files.error(f"{files.path / MANIFEST}: the size of {shown(graph.name)} is missing; export the model again")
    return precision
