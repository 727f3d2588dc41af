"""The lock by which one server at a time has a run directory. It needs no torch, so commands ask in no time."""

from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["is_served", "lock_of"]


def lock_of(run_dir: Path) -> FileLock:
    """The lock that a server holds as long as it serves the folder's run."""
    return FileLock(run_dir / ".lock", timeout=0)


def is_served(run_dir: Path) -> bool:
    """
    Whether a server holds the folder. To find out, the lock is taken for a moment; a server that starts just then waits for it,
    see `RunDirectory.hold`.
    """
    lock = lock_of(run_dir)
    try:
        if not Path(lock.lock_file).exists():
            return False  # nobody has served it here, and nothing is written where somebody only looks
        with lock:
            return False
    except (Timeout, OSError):
        return True
