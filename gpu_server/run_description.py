"""run.json: what a run is, with which settings it is served, and where. It needs no torch, so commands read it in no time."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from storage import replace_file

from .errors import ServerError

__all__ = ["RunDescription", "is_served", "lock_of"]


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """As the server wrote it when it was last started; and once more when it saved an adapter."""

    run: str
    """The run's identifier, the same for as long as it is gone on with."""
    restarts: int = 0
    fingerprint: str
    """Of the base model and its tokenizer."""
    config: dict[str, Any]
    """All fields of `ServerConfig`."""
    device: str = ""
    dtype: str
    """Of the server's frozen weights."""
    versions: dict[str, str]
    """Of splitlora and of the libraries that compute."""
    url: str = ""
    """Where the server listens, or did when it was last started."""
    adapter: dict[str, int] | None = None
    """Which ``step`` ``of`` how many the adapter in the folder has reached; None while there is none."""

    @classmethod
    def read(cls, run_dir: Path) -> "RunDescription | None":
        """
        None where no server has been started yet.

        Raises:
            ServerError: the file cannot be read, or describes no run.
        """
        path = _path(run_dir)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
            return cls(**{"versions": {}, **known, "config": dict(content["config"])})
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ServerError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ServerError(f"{path} does not describe a run; restore it, or choose another --run-dir") from None

    def write(self, run_dir: Path) -> None:
        """
        Raises:
            OSError: it cannot be written.
        """
        content = {name: value for name, value in asdict(self).items() if name != "adapter" or value is not None}
        replace_file(_path(run_dir), (json.dumps(content, indent=2) + "\n").encode())

    def served_at(self, url: str) -> "RunDescription":
        return replace(self, url=url)

    def with_adapter(self, *, step: int, of: int) -> "RunDescription":
        return replace(self, adapter={"step": step, "of": of})


def lock_of(run_dir: Path) -> FileLock:
    """The lock that a server holds as long as it serves the folder's run."""
    return FileLock(run_dir / ".lock", timeout=0)


def is_served(run_dir: Path) -> bool:
    """
    Whether a server holds the folder at this moment. Whoever asks holds it for a moment, too, which a server that starts just
    then waits for: see `RunDirectory.hold`.
    """
    try:
        with lock_of(run_dir):
            return False
    except (Timeout, OSError):
        return True


def _path(run_dir: Path) -> Path:
    return run_dir / "run.json"
