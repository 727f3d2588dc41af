"""Where the time of a split run went, in a line or two."""

from collections.abc import Mapping

from .words import in_words

__all__ = ["where_time_went"]


def where_time_went(seconds: Mapping[str, float], advice: Mapping[str, str]) -> str:
    """
    Args:
        seconds: by part, such as edge_compute or uplink.
        advice: by part, what its reader can change about it.

    Returns:
        The parts' shares, and what to change about the largest. Empty where no time went.
    """
    total = sum(seconds.values())
    if total <= 0:
        return ""
    shares = ", ".join(f"{in_words(part)} {100 * spent / total:.0f} %" for part, spent in seconds.items())
    largest = max(seconds, key=lambda part: seconds[part])
    return f"time: {shares}\nmost of it goes to {in_words(largest)}: {advice[largest]}"
