"""When each device was in a run last, and from where, as the run's own files say."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .enrolment import Enrolment
from .errors import ConfigError
from .history import RunFiles

__all__ = ["Seen", "attendance", "not_seen_since"]

COMES, SPEAKS, GOES = {"joined", "back"}, {"part_fetched", "takes_part_again", "next_key"}, {"lost", "left"}
"""Kinds of events. The others about a device may be told while it is away."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A device in a run."""

    time: float
    """When it was there last, in seconds since 1970; 0 where that was before the run's files say when."""
    address: str = ""
    """From where it came then; empty where that is not known."""
    is_connected: bool = False


def attendance(files: RunFiles) -> dict[str, Seen]:
    """
    By name, every device that has ever been in the run.

    Raises:
        HistoryError: a file of the run cannot be read.
    """
    seen: dict[str, Seen] = {}
    for event in files.events():
        if event.kind == "server_started":  # the server before may have been killed, and told nothing
            seen = {name: replace(one, is_connected=False) for name, one in seen.items()}
        if event.client is None:
            continue
        before = seen.get(event.client, Seen(time=0.0))
        if event.kind in COMES:
            address = str(event.details.get("address", ""))
            seen[event.client] = Seen(time=event.time, address=address, is_connected=True)
        elif event.kind in SPEAKS or (event.kind in GOES and before.is_connected):
            is_connected = before.is_connected and event.kind not in GOES
            seen[event.client] = replace(before, time=event.time, is_connected=is_connected)
    for step in files.steps():
        for name in step.bytes_up:
            before = seen.get(name, Seen(time=0.0))
            seen[name] = replace(before, time=max(before.time, step.time))
    if not files.is_served:
        seen = {name: replace(one, is_connected=False) for name, one in seen.items()}
    return seen


def not_seen_since(time: float, clients: Mapping[str, Enrolment], files: RunFiles) -> list[str]:
    """
    Which of the enrolled devices were not in the run since then, nor enrolled or given a new secret.

    Args:
        time: seconds since 1970.
        clients: by name.

    Raises:
        ConfigError: the run's files do not reach so far back.
        HistoryError: a file of the run cannot be read.
    """
    first = next(iter(files.events()), None)
    seen = attendance(files)
    if any(not one.time for one in seen.values()) and (first is None or first.time > time):
        raise ConfigError(
            f"{files.path} does not say when its devices were seen so long ago: its server was updated "
            "since; revoke them one by one"
        )
    names = []
    for name, client in clients.items():
        enrolled = max(client.enrolled, client.renewed or client.enrolled).timestamp()
        one = seen.get(name)
        if max(enrolled, 0.0 if one is None else one.time) < time and (one is None or not one.is_connected):
            names.append(name)
    return names
