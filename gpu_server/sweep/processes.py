"""The processes of a cell: started together, waited for together, ended together."""

import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from terminal import count, plain

__all__ = ["CellFailed", "Processes", "Program"]

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_SAVE = 60.0
"""Until a program that was told to end is killed."""
SECONDS_TO_FAIL_TOO = 2.0
"""What has gone wrong in one program is often said by the others as well."""
SECONDS_TO_FOLLOW = 300.0
"""Between the end of the program that leads and that of the last one."""
LINES_OF_AN_ERROR = 12


class CellFailed(RuntimeError):
    """A program of a cell ended with an error; the message has the last lines of what it said."""


@dataclass(frozen=True, eq=False)
class Program:
    """What is to be started."""

    name: str
    """Of its log, too."""
    words: Sequence[str]
    """A module that Python can run, and its arguments."""
    leads: bool = False
    """Whether the others end with it; then it has something to save when it is told to end."""


class Processes:
    """
    All programs of a cell. They are gone when it is left: the one that leads is told to end, and waited for, before the others.

    Args:
        folder: for a log of each.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ended = queue.SimpleQueue[Program]()
        self._running: dict[Program, subprocess.Popen[bytes]] = {}

    def start(self, program: Program) -> None:
        # In sessions of their own: Ctrl-C in the terminal is for whoever started them, who ends them in the right order.
        with self._log(program).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "gpu_server.sweep.child", *program.words],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._running[program] = process

        def wait() -> None:
            process.wait()
            self._ended.put(program)

        threading.Thread(target=wait, daemon=True).start()

    def wait(self, look: Callable[[], object]) -> None:
        """
        Until all have ended, and well.

        Args:
            look: called now and then meanwhile.

        Raises:
            CellFailed: one has not.
        """
        waiting, patience = set(self._running), SECONDS_TO_FOLLOW
        while waiting:
            look()
            try:
                program = self._ended.get(timeout=SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                if any(program.leads for program in self._running.keys() - waiting):
                    patience -= SECONDS_BETWEEN_LOOKS
                if patience <= 0:
                    late = ", ".join(sorted(program.name for program in waiting))
                    raise CellFailed(f"the run is over, and {late} did not end with it") from None
                continue
            waiting.discard(program)
            if self._running[program].returncode:
                raise CellFailed("\n".join(self._said_by(each) for each in [program, *self._that_fail_too()]))

    def _that_fail_too(self) -> list[Program]:
        found: list[Program] = []
        try:
            while len(found) + 1 < len(self._running):
                program = self._ended.get(timeout=SECONDS_TO_FAIL_TOO)
                if self._running[program].returncode:
                    found.append(program)
        except queue.Empty:
            pass
        return found

    def _said_by(self, program: Program) -> str:
        lines = self._log(program).read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_OF_AN_ERROR:]
        status = self._running[program].returncode
        return "\n".join(
            [f"{program.name} ended with status {status}; its last {count(len(lines), 'line')}:", *map(plain, lines)]
        )

    def _log(self, program: Program) -> Path:
        return self._folder / f"{program.name}.log"

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        running = sorted(self._running.items(), key=lambda item: not item[0].leads)
        for program, process in running:
            if program.leads and process.poll() is None:
                process.terminate()
                try:
                    process.wait(SECONDS_TO_SAVE)
                except subprocess.TimeoutExpired:
                    pass  # it is killed below
        for _, process in running:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
