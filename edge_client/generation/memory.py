"""What a process has of the machine's memory, where the system tells."""

import re
from pathlib import Path

__all__ = ["available_memory", "process_memory"]


def process_memory(field: str, process: int | str = "self") -> int | None:
    """
    Bytes that Linux counts for a process: "VmRSS" is what is resident, "VmHWM" its peak, "RssAnon" what no file stands behind.

    Args:
        process: its number; "self" is this one.

    Not `resource.getrusage`: its peak is inherited from the program that started this one.
    """
    return _read(Path(f"/proc/{process}/status"), field)


def available_memory() -> int | None:
    """Bytes that programs can still have without swapping."""
    return _read(Path("/proc/meminfo"), "MemAvailable")


def _read(path: Path, field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB$", path.read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
