"""Fetches from the server what this device lacks of its part of the model."""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from protocol import AskPart, AskPiece, Part, PartFile, Piece, RemoteProtocolError
from protocol.limits import MAX_PART_FILE_BYTES
from storage import HEAD_WEIGHTS, PART_FILE, TOKENIZER_FILES, required_files
from terminal import count

from ..membership import Membership
from .graph_inspection import MOST_GRAPH_BYTES
from .part_cache import PartCache

__all__ = ["fetch_part", "part_digest"]

logger = logging.getLogger("edge_client")

GRAPH = ".onnx"
MOST_DESCRIPTION_BYTES, MOST_TOKENIZER_BYTES = 2**20, 2**26
MOST_ATTEMPTS = 2
"""Of a file that arrives whole and is not what the server says it is."""


def fetch_part(
    membership: Membership,
    cache: PartCache,
    report: Callable[[int, int], object] | None = None,
    *,
    only: Collection[str] | None = None,
) -> tuple[tuple[PartFile, ...], dict[str, Path]]:
    """
    The run's part of the model for devices. What ``cache`` has is not fetched; what it has a beginning of is fetched from
    there on, also after the connection was lost. Every content is verified by its digest.

    Args:
        report: called with how many bytes are there, and of how many, as they are fetched.
        only: the names of the files that are needed; None is all.

    Returns:
        The files as the server describes them, and where each lies, by its name.

    Raises:
        RemoteProtocolError: the server hands over something else than it says.
        StateError: there is no room, or the folder cannot be written.
        ConnectionFailed, Refused: as `Membership.ask`.
    """
    answer = membership.ask(AskPart(index=membership.next_index()), Part)
    settings = membership.welcome.settings
    files = _wanted(answer, settings.cut_layer, with_head=settings.labels == "device", trains=settings.trains_edge)
    if only is not None:
        files = tuple(file for file in files if file.name in only)
    contents = {file.sha256: file for file in files}
    found = {digest: cache.find(file) for digest, file in contents.items()}
    lacking = [file for digest, file in contents.items() if found[digest] is None]
    if lacking:
        cache.make_room(files)
        fetching = _Fetching(membership, cache, lacking, report)
        found |= {file.sha256: fetching.fetch(file) for file in lacking}
    paths = {file.name: path for file in files if (path := found[file.sha256]) is not None}
    return files, paths


def part_digest(files: Iterable[PartFile]) -> str:
    """SHA-256, in hex, of what the files are called and of what is in them."""
    lines = sorted(f"{file.sha256} {file.name}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class _Fetching:
    def __init__(
        self, membership: Membership, cache: PartCache, files: list[PartFile], report: Callable[[int, int], object] | None
    ) -> None:
        self._membership, self._cache, self._report = membership, cache, report
        self._total, self._finished = sum(file.size for file in files), 0

    def fetch(self, file: PartFile) -> Path:
        for _ in range(MOST_ATTEMPTS):
            path = self._attempt(file)
            if path is not None:
                self._finished += file.size
                return path
            logger.warning("%s arrived damaged: it is fetched again", file.name)
        raise RemoteProtocolError(
            f"the server does not keep to the protocol: {file.name} arrives with another SHA-256 than the server says"
        )

    def _attempt(self, file: PartFile) -> Path | None:
        with self._cache.unfinished(file) as unfinished:
            while True:
                if self._report is not None:
                    self._report(self._finished + unfinished.size, self._total)
                if unfinished.size == file.size:
                    return unfinished.finish()
                question = AskPiece(index=self._membership.next_index(), sha256=file.sha256, offset=unfinished.size)
                data = self._membership.ask(question, Piece).data
                if len(data) > file.size - unfinished.size:
                    size = count(file.size, "byte")
                    raise RemoteProtocolError(
                        f"the server does not keep to the protocol: a piece of {file.name} goes beyond its {size}"
                    )
                unfinished.append(data)


def _wanted(part: Part, cut_layer: int, *, with_head: bool, trains: bool) -> tuple[PartFile, ...]:
    """
    The files that a part has. What else a server may offer is not fetched.

    Raises:
        RemoteProtocolError: one is missing, or has a size that it cannot have.
    """
    if cut_layer > len(part.files):  # a server says how many blocks there are: as many names may be more than memory holds
        size = count(len(part.files), "file")
        raise RemoteProtocolError(f"the server's part of the model has {size}, too few for cut layer {cut_layer}")
    required = required_files(cut_layer, with_head=with_head, trains=trains)
    offered = {file.name: file for file in part.files}
    optional = (*TOKENIZER_FILES, *((HEAD_WEIGHTS,) if with_head else ()))
    for name in required:
        if name not in offered:
            raise RemoteProtocolError(f"the server's part of the model for cut layer {cut_layer} lacks {name}")
    files = tuple(offered[name] for name in (*required, *optional) if name in offered)
    for file in files:
        if file.size > (most := _most_bytes(file.name)):
            raise RemoteProtocolError(
                f"{file.name} of the server's part of the model has {file.size} bytes; it can have at most {most}"
            )
    return files


def _most_bytes(name: str) -> int:
    """Of a file that is read into memory as a whole; weights are not."""
    if name.endswith(GRAPH):
        return MOST_GRAPH_BYTES
    if name == PART_FILE:
        return MOST_DESCRIPTION_BYTES
    return MOST_TOKENIZER_BYTES if name in TOKENIZER_FILES else MAX_PART_FILE_BYTES
