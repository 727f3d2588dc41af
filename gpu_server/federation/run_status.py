"""A run as somebody sees it who watches: a page, a metric, a test."""

from dataclasses import dataclass

__all__ = ["RunStatus"]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A snapshot, which does not change when the run does."""

    run: str
    clients: int
    """How many the run starts with."""
    connected: int
    """Members that are connected."""
    members: dict[str, str]
    """By name: the value of its `Presence`."""
    unfinished: tuple[str, ...]
    """Members that have not said goodbye."""
    phase: str
    """The value of its `Phase`: what the run waits for, or computes."""
    step: int
    """Steps trained."""
    round: int
    """The last step that is in the edge adapter."""
    total_steps: int
    """0 until the run starts."""
    is_saved: bool
    """Whether its adapter is saved, so that nothing is left but to fetch it."""
