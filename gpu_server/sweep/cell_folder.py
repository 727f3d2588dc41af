"""A cell's folder: that of its run, with a note of what it is, the logs of its programs, and what became of it."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storage import RunDescription, replace_file

from ..errors import ServerError
from ..history import RunFiles
from .grid import Cell

__all__ = ["CellFolder", "Result"]

NOTE, FINISHED, FAILED = "cell.json", "finished.json", "failed.txt"
REMOVED = ".removed"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished cell came to; more of it is in its files."""

    steps: int
    loss: float
    """Of its last step, nats per labelled token; NaN where the server knows none."""
    held_out: tuple[float, float] | None
    """Held-out loss before and after, nats per labelled token."""
    num_bytes: int
    """Of all clients, both ways."""
    seconds: float
    """Of all steps."""

    @classmethod
    def of(cls, run_dir: Path) -> "Result":
        """
        Raises:
            HistoryError: its files cannot be read.
        """
        files = RunFiles(run_dir)
        steps, loss, num_bytes, seconds = 0, math.nan, 0, 0.0
        for record in files.steps():
            steps, loss = record.number, record.loss
            num_bytes += record.num_bytes
            seconds += record.step_seconds
        held_out = [record.loss for record in files.evaluations()]
        return cls(
            steps=steps,
            loss=loss,
            held_out=(held_out[0], held_out[-1]) if held_out else None,
            num_bytes=num_bytes,
            seconds=seconds,
        )

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "loss": None if math.isnan(self.loss) else self.loss}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Result":
        """
        Raises:
            KeyError, TypeError, ValueError, OverflowError: it is none.
        """
        loss, held_out = content["loss"], content["held_out"]
        if held_out is not None:
            before, after = held_out
            held_out = float(before), float(after)
        return cls(
            steps=int(content["steps"]),
            loss=math.nan if loss is None else float(loss),
            held_out=held_out,
            num_bytes=int(content["num_bytes"]),
            seconds=float(content["seconds"]),
        )


class CellFolder:
    """
    Args:
        sweep: the folder of all cells.

    Raises:
        ServerError: of all methods that write: it cannot be written.
    """

    def __init__(self, sweep: Path, cell: Cell) -> None:
        # A cell is known by its digest: where the grid has got another axis since, its name has other words.
        before = sorted(path for path in sweep.glob(f"*-{cell.digest}") if path.is_dir())
        self.path = before[0] if before else sweep / cell.name
        self._cell = cell

    @property
    def is_finished(self) -> bool:
        """A mark that cannot be read is none: whether the run is complete is then said by its own files."""
        return self._marked() is not None

    def is_complete(self, *, with_held_out: bool) -> bool:
        """Whether the run is, though the sweep was killed before it said so."""
        adapter = self._run_json().get("adapter")
        if adapter is None or adapter["step"] != adapter["of"] or (self.path / FAILED).exists():
            return False
        evaluated = [record.step for record in RunFiles(self.path).evaluations()]
        return not with_held_out or adapter["of"] in evaluated

    @property
    def port(self) -> int | None:
        """Where a run was served that can go on; None if there is none."""
        run, port = self._run_json(), self._read(NOTE).get("port")
        # Where all steps are done some devices may be gone, for which the others would wait.
        if (
            not run
            or type(port) is not int
            or (run.get("adapter") is not None and run["adapter"]["step"] == run["adapter"]["of"])
        ):
            return None
        return None if (self.path / FAILED).exists() else port

    def begin(self, **more: Any) -> None:
        """
        Anew: what a sweep has left there is deleted.

        Args:
            more: what is noted with the cell's settings.

        Raises:
            ServerError: what is there is somebody else's.
        """
        try:
            self._remove()
            self.path.mkdir(mode=0o700)
        except OSError as error:
            raise ServerError(f"{self.path} cannot be written: {error.strerror or error}") from None
        cell = self._cell
        self._write(NOTE, {"mode": cell.mode, "server": cell.server, "device": cell.device, **more})

    def _remove(self) -> None:
        # A folder that is half deleted would look like somebody else's: it gets another name first.
        removed = self.path.with_name(f"{self.path.name}{REMOVED}")
        if removed.exists():
            shutil.rmtree(removed)
        if not os.path.lexists(self.path):
            return
        left = os.listdir(self.path)
        is_ours = NOTE in left or all(name.startswith(NOTE) for name in left)  # of one that was killed while it began
        if self.path.is_symlink() or not is_ours:
            raise ServerError(f"{self.path} was made by no sweep; move it away, or choose another --output")
        os.replace(self.path, removed)
        shutil.rmtree(removed)

    def finish(self) -> None:
        """Mark the cell as finished: it is not done again."""
        self._write(FINISHED, Result.of(self.path).as_json())

    def fail(self, why: str) -> None:
        self._write(FAILED, why + "\n")

    def result(self) -> Result:
        """Of a finished cell."""
        result = self._marked()
        assert result is not None
        return result

    def _marked(self) -> Result | None:
        try:
            return Result.from_json(self._read(FINISHED))
        except (KeyError, TypeError, ValueError, OverflowError):
            return None

    def _run_json(self) -> dict[str, Any]:
        description = RunDescription.read(self.path, ServerError) if self.path.is_dir() else None
        return {} if description is None else vars(description)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return {}

    def _write(self, name: str, content: str | Mapping[str, Any]) -> None:
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        try:
            replace_file(self.path / name, text.encode())
        except OSError as error:
            raise ServerError(f"{self.path / name} cannot be written: {error.strerror}") from None
