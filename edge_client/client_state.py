"""What a device keeps of a run on its disk, so that it finds back into the run after it was killed."""

import hashlib
import json
import os
import shutil
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from privacy import SECRET_BYTES
from protocol import Array, RunSettings, Welcome
from protocol.limits import CACHES_ON_DEVICE
from storage import CacheFolder, is_hub_name, remove_unfinished, replace_file

from .saved_steps import SavedSteps, StateError, readable_errors

__all__ = ["NO_TEMPLATE", "ClientState", "DeviceCache", "StateError", "WayToCompute", "allowed_cache_bytes"]

FOLDER, NOTE, CACHE, SECRET, LOGS = "places", "place.json", "samples", "noise", "logs"
"""Names on the disk are those of earlier versions: a device that was killed under one of them finds back."""
NO_TEMPLATE = "none"
DECIDES_ON_SAMPLES = {
    "data": "its content, --max-length, --long, --loss-on or --no-shuffle",
    "kind": "the file's kind",
    "template": "the model's chat template",
    "cache_bytes": "how much of its activations is kept (--cache-bytes)",
}
"""By the name in `WayToCompute`, for people."""
MOST_CACHE_BYTES = 2**30
"""Where the user says nothing. A server does not decide how much of a device's disk it fills."""


@dataclass(frozen=True)
class WayToCompute:
    """What has to stay the same when a device comes back to a run: another way gives another result."""

    engine: str
    dtype: str
    """Of the frozen weights."""
    part: str
    """The digest of the part that the server handed over; empty for a model of the device's own."""
    data: str = ""
    """The digest of the data, and how it is cut and ordered."""
    kind: str = ""
    """Of the data's file, as its suffix says."""
    template: str = ""
    """The digest of the model's chat template; NO_TEMPLATE of a model that has none."""
    cache_bytes: str = ""
    """How much of the samples' activations is kept, a number; empty in a run that keeps none."""

    @property
    def in_words(self) -> str:
        """What computes, for people: what is equal here computes to the bit alike with the same data."""
        return f"{self.engine} in {self.dtype}" + (f" on the server's part {self.part[:12]} of the model" if self.part else "")

    def other_data(self, before: "WayToCompute") -> list[str]:
        """
        What decides on the samples and is another than ``before``, in words for people. An earlier version noted less of it,
        and what is not noted is believed.
        """
        return [what for name, what in DECIDES_ON_SAMPLES.items() if getattr(before, name) not in ("", getattr(self, name))]


class ClientState:
    """
    A folder for each server and client name, which is there as long as this client belongs to an unfinished run. It holds a
    note of which run that is, the saved steps of a run with long rounds, the activation cache of a run that keeps samples, and
    the secret of a run with noise. Beside it is the log of all runs that this client has been in there, which stays.

    Args:
        state_folder: of everything that this device keeps, for all servers.
        server: its address.
        name: of this client there.
    """

    def __init__(self, state_folder: Path, server: str, name: str) -> None:
        # A digest: neither an address nor a name may choose a path.
        digest = hashlib.sha256(f"{server} {name}".encode()).hexdigest()
        self._server, self._name = server, name
        self._folder = state_folder / FOLDER / digest[:32]
        self.log_file = state_folder / LOGS / f"{name}-{digest[:8]}.jsonl"
        self.saved_steps = SavedSteps(self._folder)

    @property
    def is_in_a_run(self) -> bool:
        """Whether this client belongs to a run of this server: the device was killed in it, or keeps it after an error."""
        return isinstance(self._note().get("run"), str)

    def welcome(self) -> Welcome | None:
        """The run to which this client belongs, as the server announced it last."""
        note = self._note()
        try:
            settings = {**note["settings"], "lora_targets": tuple(note["settings"]["lora_targets"])}
            fields = {name: note[name] for name in ("run", "fingerprint", "restarts")}
            return Welcome(**fields, settings=RunSettings(**settings))
        except (ValueError, KeyError, TypeError):
            return None

    def way_to_compute(self, run: str) -> "WayToCompute | None":
        """How this client computes in ``run``; None if it does not take part in it."""
        note = self._note()
        if note.get("run") != run:
            return None
        # An earlier version had one engine, and noted none.
        return WayToCompute(*(str(note.get(name, default)) for name, default in asdict(WayToCompute("torch", "", "")).items()))

    def model(self) -> str | None:
        """The base model's name on the hub; None if this client uses a folder, or belongs to no run."""
        model = self._note().get("model")
        return model if isinstance(model, str) and is_hub_name(model) else None

    def enter(self, welcome: Welcome, way: "WayToCompute", *, model: str = "") -> None:
        """
        Note that this client belongs to a run now. What is left of another run is deleted.

        Args:
            model: the base model's name on the hub, if it was given by name.

        Raises:
            StateError: the folder cannot be written.
        """
        if self._note().get("run") != welcome.run:
            self.delete()
        note = {**asdict(welcome), "server": self._server, "name": self._name, **asdict(way), "model": model}
        with readable_errors(self._folder):
            self._folder.mkdir(parents=True, mode=0o700, exist_ok=True)
            remove_unfinished(self._folder)
            replace_file(self._folder / NOTE, json.dumps(note).encode())

    def activation_cache(self, cache_bytes: int) -> "DeviceCache":
        """
        Raises:
            StateError: the folder cannot be written.
        """
        with readable_errors(self._folder):
            return DeviceCache(self._folder / CACHE, CACHES_ON_DEVICE * cache_bytes)

    def noise_secret(self) -> bytes:
        """
        From what this device draws its noise in this run: made once, so that a step that is repeated after a kill has the same.

        Raises:
            StateError: it cannot be written, or is not what was written.
        """
        path = self._folder / SECRET
        with readable_errors(self._folder):
            if not os.path.lexists(path):
                replace_file(path, os.urandom(SECRET_BYTES))
        secret = _read_private(path, SECRET_BYTES)
        if secret is None:
            raise StateError(
                f"{path} is not the secret that this device has made for its noise, or others may read it; delete it, then "
                "steps that are repeated get new noise, which tells the server more of them"
            )
        return secret

    def delete(self) -> None:
        """The run is over for this client."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _note(self) -> dict[str, Any]:
        """What `enter` wrote; empty if nothing, or nothing that can be read."""
        try:
            note = json.loads((self._folder / NOTE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return note if isinstance(note, dict) else {}


def _read_private(path: Path, size: int) -> bytes | None:
    """A file's content; None if it is no file of that size which its owner alone may read."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or (os.name == "posix" and stat.S_IMODE(status.st_mode) & 0o077):
                return None
            content = file.read(size + 1)
    except OSError:
        return None
    return content if len(content) == size else None


class DeviceCache(CacheFolder):
    """
    A device's samples as they arrived at the server. Whatever was sent is kept, of any size, since the server keeps it, too;
    `is_full` is asked before.

    Args:
        plan: bytes from which on no new samples are to be kept.

    Raises:
        StateError: the disk is full. Of every method that writes.
    """

    def __init__(self, folder: Path, plan: int) -> None:
        super().__init__(folder, max_bytes=2**62)
        self._plan = plan

    @property
    def is_full(self) -> bool:
        return self.num_bytes >= self._plan

    def store(self, step: int, micro_batch: int, versions: dict[int, tuple[int, Array]]) -> None:
        with readable_errors(self._folder):
            super().store(step, micro_batch, versions)

    def confirm(self, step: int, micro_batch: int) -> None:
        with readable_errors(self._folder):
            super().confirm(step, micro_batch)

    def forget_after(self, step: int) -> None:
        with readable_errors(self._folder):
            super().forget_after(step)

    def forget_before(self, step: int) -> None:
        with readable_errors(self._folder):
            super().forget_before(step)


def allowed_cache_bytes(settings: RunSettings, limit: int | None) -> int:
    """
    What a device plans its activation cache with: as much as the server, or less.

    Args:
        limit: the user's; None if the user has said nothing.
    """
    return min(settings.cache_bytes, MOST_CACHE_BYTES if limit is None else limit)
