"""How a program ends: well, with one sentence, or by Ctrl-C."""

import os
import sys
from collections.abc import Callable
from importlib import metadata

__all__ = ["plain", "run_program", "version"]


def run_program(name: str, run: Callable[[], None], expected: Callable[[], tuple[type[Exception], ...]]) -> int:
    """
    Run a program and give its exit status: 0, 1 after an error a user can cause, 130 after Ctrl-C.

    Args:
        expected: gives the types of the errors a user can cause; called only after an error, for it may import much.
            Any other error is a defect of ours and keeps its traceback.
    """
    # Threads of torch that wait for each other give their core away instead of spinning: on a machine that does anything
    # else beside, such as a second client, a step is 2.5 times faster. It has to be said before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        run()
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)  # noqa: T201
        return 130
    except Exception as error:
        if not isinstance(error, expected()):
            raise
        print(f"{name}: {plain(str(error))}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def plain(text: str) -> str:
    """Somebody else's text on one line: what would move the cursor or imitate another line is shown as its escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def version() -> str:
    """Of the installed distribution."""
    return metadata.version("splitlora")
