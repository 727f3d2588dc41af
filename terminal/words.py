"""Numbers, names and durations as a sentence has them."""

from collections.abc import Iterable

__all__ = ["amount", "count", "duration", "in_words", "listed"]


def amount(num_bytes: float) -> str:
    """999 B, 12.3 kB, 1.5 GB: in decimal units, as network speeds are given."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB" if num_bytes < 999.5 else f"{num_bytes:,.0f} TB"


def count(number: int, one: str, several: str | None = None) -> str:
    """1 client, 2 clients, 1,000 clients; ``several`` where the plural is not the singular and an s."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def listed(items: Iterable[str], most: int = 10, *, of: int = 0) -> str:
    """
    a, b and c; beyond ``most`` the rest is counted.

    Args:
        of: how many there are, where ``items`` are only the first of them.
    """
    first = list(items)
    number = max(of, len(first))
    if number > (shown := min(most, len(first))):
        first = [*first[:shown], f"{number - shown:,} more"]
    return " and ".join(filter(None, [", ".join(first[:-1]), *first[-1:]]))


def duration(seconds: float) -> str:
    """0.5 s, 42 s, 3 min, 2 h 5 min, 3 d 4 h: as exactly as somebody who waits wants to know it."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def in_words(name: str) -> str:
    """server compute, of server_compute."""
    return name.replace("_", " ")
