"""run.json: what a run is, how and where it is served. The server writes it; its commands and splitlora-export read it."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .atomic_file import replace_file
from .folder import Folder, Member, shown

__all__ = ["REMEDY", "RUN_FILE", "RunDescription"]

RUN_FILE = "run.json"
REMEDY = "; restore the file, or choose another run directory"


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """As the server wrote it when it was last started, and once more when it saved an adapter."""

    run: str
    """The run's identifier, the same for as long as it is gone on with."""
    restarts: int = 0
    fingerprint: str
    """Of the base model and its tokenizer."""
    config: dict[str, Any]
    """All fields of the server's configuration. Their values are not checked here: who uses one says what is wrong with it."""
    device: str = ""
    dtype: str
    """Of the server's frozen weights."""
    versions: dict[str, Any]
    """Of splitlora and of the libraries that compute."""
    url: str = ""
    """Where the server listens, or did when it was last started."""
    noise: dict[str, Any] | None = None
    """By client: what the noise that it adds is worth, as ``privacy.NoiseReport`` says it. None in a run without noise."""
    of_the_run: list[str] = field(default_factory=list)
    """Which of the settings decide what comes of the run: a version that does not know one of them cannot go on with it."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """
    With which ``versions`` and on which ``host`` it was served, the first first: an entry where one of them has changed, with
    the ``time`` in UTC and how many ``restarts`` there had been. Where earlier versions began the run, the first entry says no
    more than ``versions``.
    """
    adapter: dict[str, Any] | None = None
    """
    Which ``step`` ``of`` how many the run had reached when the adapter in the folder was saved. That is the last step in the
    adapter, unless ``best_step`` says an earlier one, the best. None while the run is served, and after its server was killed:
    the adapter may then be of an earlier stop, or half written.
    """

    @classmethod
    def read(cls, run_dir: Path, error: type[ValueError]) -> "RunDescription | None":
        """
        None where no server has been started yet. Members that this version does not know are left out.

        Raises:
            error: the file cannot be read, or describes no run.
        """
        files = Folder(run_dir, error)
        if files.find(RUN_FILE) is None:
            return None
        # What the first versions did not write, as they meant it.
        raw = {"restarts": 0, "device": "", "versions": {}, "url": "", "of_the_run": [], "history": []} | files.read_json(
            RUN_FILE
        )
        noise, adapter = (None if raw.get(key) is None else _member(files, raw, key, dict) for key in ("noise", "adapter"))
        if adapter is not None:
            step, last = (_member(files, adapter, key, int) for key in ("step", "of"))
            best = _member(files, {"best_step": step} | adapter, "best_step", int)
            if not 0 <= step <= last:
                raise error(f"{run_dir / RUN_FILE}: the adapter cannot be that of step {shown(step)} of {shown(last)}{REMEDY}")
            if not 0 <= best <= step:
                found = f"that of step {shown(best)} where the run has reached {shown(step)}"
                raise error(f"{run_dir / RUN_FILE}: the adapter cannot be {found}{REMEDY}")
        return cls(
            run=_member(files, raw, "run", str),
            restarts=_member(files, raw, "restarts", int),
            fingerprint=_member(files, raw, "fingerprint", str),
            config=_member(files, raw, "config", dict),
            device=_member(files, raw, "device", str),
            dtype=_member(files, raw, "dtype", str),
            versions=_member(files, raw, "versions", dict),
            url=_member(files, raw, "url", str),
            noise=noise,
            of_the_run=[str(name) for name in _member(files, raw, "of_the_run", list)],
            history=[entry for entry in _member(files, raw, "history", list) if isinstance(entry, dict)],
            adapter=adapter,
        )

    def write(self, run_dir: Path) -> None:
        """
        Raises:
            OSError: it cannot be written.
        """
        content = {name: value for name, value in asdict(self).items() if value is not None}
        replace_file(run_dir / RUN_FILE, (json.dumps(content, indent=2) + "\n").encode())

    def served_with(self, versions: dict[str, Any], host: str, time: str) -> list[dict[str, Any]]:
        """The history, when the run is served once more."""
        before = self.history or [{"versions": self.versions}]
        now = {"versions": versions, "host": host}
        if {name: before[-1].get(name) for name in now} == now:
            return before
        return [*before, {**now, "time": time, "restarts": self.restarts + 1}]

    def served_at(self, url: str) -> "RunDescription":
        return replace(self, url=url)

    def with_noise(self, noise: dict[str, Any]) -> "RunDescription":
        return replace(self, noise=noise)

    def with_adapter(self, *, step: int, of: int, best_step: int = 0) -> "RunDescription":
        return replace(self, adapter={"step": step, "of": of, **({"best_step": best_step} if best_step else {})})


def _member(files: Folder, value: dict[str, Any], key: str, kind: type[Member]) -> Member:
    return files.member(RUN_FILE, value, key, kind, REMEDY)
