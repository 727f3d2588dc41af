"""What a device keeps of a run, so that it finds back to its place after it was killed."""

import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from protocol import Array, Remembered, RunSettings, Welcome
from protocol.settings import LARGEST_COUNT
from split_model import DTYPES
from storage import CacheFolder, is_hub_name, remove_unfinished, replace_file

__all__ = ["Place", "SavedStep", "StateError"]


logger = logging.getLogger("edge_client")

NOTE = "place.json"
MOST_BYTES = 2**30
"""
Of steps that the server may go back to. It says itself how far back that is, and one that never moves its checkpoint would fill
the disk.
"""


class StateError(OSError):
    """The folder for the device's state cannot be written."""


@dataclass(frozen=True, kw_only=True)
class SavedStep(Remembered):
    """What the device had learnt when it had finished a step."""

    state: dict[str, Array]
    """See `TorchEngine.state`."""


class KeptHere(CacheFolder):
    """
    On this device. What is sent is kept, since the other side does so, too; whether there is room is asked before.

    Args:
        plan: bytes from which on no new samples are to be kept.
    """

    def __init__(self, folder: Path, plan: int) -> None:
        super().__init__(folder, max_bytes=2**62)
        self._plan = plan

    @property
    def is_full(self) -> bool:
        return self.num_bytes >= self._plan

    def keep(self, step: int, micro_batch: int, versions: dict[int, tuple[int, Array]]) -> None:
        """
        Raises:
            StateError: the disk is full. Of the other methods, too.
        """
        with _readable_errors(self._folder):
            super().keep(step, micro_batch, versions)

    def confirm(self, step: int, micro_batch: int) -> None:
        with _readable_errors(self._folder):
            super().confirm(step, micro_batch)

    def forget_after(self, step: int) -> None:
        with _readable_errors(self._folder):
            super().forget_after(step)

    def forget_before(self, step: int) -> None:
        with _readable_errors(self._folder):
            super().forget_before(step)


class Place:
    """
    A folder of its own for each server and name. It is there as long as the device has a place in an unfinished run.

    In rounds of one step only the run is noted; in longer ones the adapter and AdamW's moments, after every step: those of
    the last one, and those of rounds' ends that the server may still go back to, up to ``MOST_BYTES``.
    """

    def __init__(self, state_folder: Path, server: str, name: str) -> None:
        digest = hashlib.sha256(f"{server} {name}".encode()).hexdigest()
        self._server, self._name = server, name
        self._folder = state_folder / "places" / digest[:32]
        self._ends_round: dict[int, bool] = {}
        """Of the steps that are kept, as far as that is known."""
        self._has_warned = False

    @property
    def is_kept(self) -> bool:
        """Whether this device was killed in a run of this server."""
        return isinstance(self._note().get("run"), str)

    def welcome(self) -> Welcome | None:
        """How the run in which there is a place was announced last."""
        note = self._note()
        try:
            settings = {**note["settings"], "lora_targets": tuple(note["settings"]["lora_targets"])}
            fields = {name: note[name] for name in ("run", "fingerprint", "restarts")}
            return Welcome(**fields, settings=RunSettings(**settings))
        except (ValueError, KeyError, TypeError):
            return None

    def dtype(self, run: str) -> str | None:
        """Of the frozen weights with which this device takes part in the run, if it does."""
        note = self._note()
        return note["dtype"] if note.get("run") == run and str(note.get("dtype")) in DTYPES else None

    def model(self) -> str | None:
        """The base model's name on the hub, where this device took part with one that has a name there."""
        model = self._note().get("model")
        return model if isinstance(model, str) and is_hub_name(model) else None

    def keep(self, welcome: Welcome, dtype: str, model: str = "") -> None:
        """
        Note that there is a place in this run, of which dtype its frozen weights are, and which model it was told to use; what
        is known of another run is of no use any more.

        Raises:
            StateError: the folder cannot be written.
        """
        if self._note().get("run") != welcome.run:
            self.give_up()
        note = {**asdict(welcome), "server": self._server, "name": self._name, "dtype": dtype, "model": model}
        with _readable_errors(self._folder):
            self._folder.mkdir(parents=True, mode=0o700, exist_ok=True)
            remove_unfinished(self._folder)
            replace_file(self._folder / NOTE, json.dumps(note).encode())

    def samples(self, plan: int) -> KeptHere:
        """
        The device's samples as they arrived at the server, up to about ``plan`` bytes.

        Raises:
            StateError: the folder cannot be written.
        """
        with _readable_errors(self._folder):
            return KeptHere(self._folder / "samples", plan)

    def give_up(self) -> None:
        """The run is over for this device."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def save(self, saved: SavedStep, *, keep_from: int, is_round_end: bool) -> None:
        """
        Args:
            keep_from: the earliest step that the server may go back to.
            is_round_end: whether the server may go back to this one.

        Raises:
            StateError: the disk is full, or the folder cannot be written.
        """
        metadata = {"step": saved.step, "round": saved.round, "restarts": saved.restarts, "is_round_end": int(is_round_end)}
        with _readable_errors(self._folder):
            text = {name: str(value) for name, value in metadata.items()}
            replace_file(self._path(saved.step), save(saved.state, text))
            self._ends_round[saved.step] = is_round_end
            others = [path for path in self._paths() if int(path.stem) != saved.step]
            needed = [path for path in others if int(path.stem) >= keep_from and self._is_round_end(path)]
            for path in set(others) - set(self._within_bounds(needed)):
                path.unlink()

    def _within_bounds(self, paths: list[Path]) -> list[Path]:
        """The newest, as many as there is room for."""
        num_bytes = 0
        for number, path in enumerate(reversed(paths)):
            num_bytes += path.stat().st_size
            if num_bytes > MOST_BYTES:
                if not self._has_warned:
                    logger.warning(
                        "the server has not moved its checkpoint for %d rounds: this device forgets its oldest states beyond "
                        "%d MB in %s; if the server goes back to one of those, the result will be another one",
                        len(paths),
                        MOST_BYTES // 10**6,
                        self._folder,
                    )
                self._has_warned = True
                return paths[len(paths) - number :]
        return paths

    def _is_round_end(self, path: Path) -> bool:
        step = int(path.stem)
        if step not in self._ends_round:
            self._ends_round[step] = _is_round_end(path)
        return self._ends_round[step]

    def forget_after(self, step: int) -> None:
        """
        Later steps are not part of the run any more: a server that has gone back takes them again.

        Raises:
            StateError: the folder cannot be written.
        """
        with _readable_errors(self._folder):
            for path in self._paths():
                if int(path.stem) > step:
                    path.unlink()

    def load(self, step: int) -> SavedStep | None:
        """What is kept of the latest step up to ``step``, if anything is."""
        for path in reversed(self._paths()):
            if int(path.stem) <= step:
                try:
                    return _read(path)
                except (OSError, SafetensorError, KeyError, ValueError):
                    continue  # torn by a crash of the system: one before it may do
        return None

    def last_step(self) -> int:
        """The latest step that is kept whole; 0 if none."""
        saved = self.load(LARGEST_COUNT)
        return 0 if saved is None else saved.step

    def _note(self) -> dict[str, Any]:
        """What `keep` wrote; empty if nothing, or nothing that can be read."""
        try:
            note = json.loads((self._folder / NOTE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return note if isinstance(note, dict) else {}

    def _paths(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("*.safetensors") if path.stem.isdigit())

    def _path(self, step: int) -> Path:
        return self._folder / f"{step:010}.safetensors"


def _read(path: Path) -> SavedStep:
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}
    fields = {name: int(metadata[name]) for name in ("step", "round", "restarts")}
    return SavedStep(**fields, state=state)


def _is_round_end(path: Path) -> bool:
    try:
        with safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("is_round_end") == "1"
    except (OSError, SafetensorError):
        return False  # torn: nobody can go back there


@contextmanager
def _readable_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space there" if is_full else "choose another --state-dir"
        raise StateError(f"this device's state cannot be kept in {folder}: {reason}; {remedy}") from None
