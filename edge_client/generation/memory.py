"""How much memory a process has and the machine has left, on systems that have /proc (Linux). Elsewhere None."""

import re
from pathlib import Path

__all__ = ["available_memory", "process_memory"]


def process_memory(field: str, process: int | str = "self") -> int | None:
    """
    Bytes of memory of a process.

    Not from `resource.getrusage`: a process inherits that peak from the program that started it.

    Args:
        field: of /proc/PID/status: "VmRSS" is resident, "VmHWM" its peak, "RssAnon" the part of it that is backed by no file.
        process: its number; "self" is this one.
    """
    return _read(Path(f"/proc/{process}/status"), field)


def available_memory() -> int | None:
    """Bytes that programs can still take before the machine swaps."""
    return _read(Path("/proc/meminfo"), "MemAvailable")


def _read(path: Path, field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB$", path.read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
