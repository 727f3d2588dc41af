"""How soon devices come back, in a process that is a test's own."""

from edge_client import reconnector

__all__ = ["come_back_within"]


def come_back_within(seconds: float) -> None:
    """From now on no attempt to connect comes later after the one before."""
    assert {"SHORTEST_WAIT", "LONGEST_WAIT"} <= vars(reconnector).keys(), "the waits are somewhere else"
    reconnector.SHORTEST_WAIT, reconnector.LONGEST_WAIT = seconds / 10, seconds
