"""When each device was in a run last, and from where, as the run's own files say."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .enrolment import Enrolment
from .errors import ConfigError
from .history import TOGETHER, RunFiles

__all__ = ["Seen", "attendance", "not_seen_since"]

COMES, SPEAKS, GOES = {"joined", "back"}, {"part_fetched", "takes_part_again", "next_key"}, {"lost", "left"}
"""Kinds of events. The others about a device may be told while it is away."""
ENDS = {"complete", "stopped", "failed"}


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
    until, is_all_told = 0.0, False
    """When the run was heard of last, so far; whether events say of every device until when it was there."""
    for number, event in enumerate(files.events()):
        if event.kind == "server_started":
            restarts, last_step_time = event.details.get("restarts"), event.details.get("last_step_time")
            if not number:
                is_all_told = restarts == 0  # else there were no events before, or somebody has moved them elsewhere
            elif not isinstance(last_step_time, float) and any(one.is_connected for one in seen.values()):
                is_all_told = False  # as earlier versions told it
            # The server before may have been killed, and have told nothing.
            seen = _all_gone(seen, max(until, last_step_time) if isinstance(last_step_time, float) else until)
        until = max(until, event.time)
        if event.kind in ENDS:
            seen = {name: _seen_at(one, event.time) if one.is_connected else one for name, one in seen.items()}
        if event.client is None:
            continue
        one = seen.get(event.client, Seen(time=0.0))
        if event.kind in COMES:
            address = str(event.details.get("address", ""))
            seen[event.client] = Seen(time=event.time, address=address, is_connected=True)
        elif event.kind in SPEAKS or (event.kind in GOES and one.is_connected):
            is_connected = one.is_connected and event.kind not in GOES
            seen[event.client] = replace(one, time=event.time, is_connected=is_connected)
    last_step_time = files.last_step_time() or 0.0
    if not is_all_told:
        for step in files.steps():
            for name in step.bytes_up.keys() - {TOGETHER}:
                seen[name] = _seen_at(seen.get(name, Seen(time=0.0)), step.time)
    if files.is_served:
        return {name: _seen_at(one, last_step_time) if one.is_connected else one for name, one in seen.items()}
    return _all_gone(seen, max(until, last_step_time))


def _seen_at(one: Seen, time: float) -> Seen:
    return replace(one, time=max(one.time, time))


def _all_gone(seen: Mapping[str, Seen], until: float) -> dict[str, Seen]:
    """Of a server that ended, known only by what it did last: whoever was connected was there until then."""
    return {name: replace(_seen_at(one, until), is_connected=False) if one.is_connected else one for name, one in seen.items()}


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
    seen = attendance(files)
    if not (_reach_back(files, time) or (_steps_name_all(files) and all(one.time for one in seen.values()))):
        raise ConfigError(
            f"{files.path} does not say when its devices were seen so long ago: its server was updated since, or older files "
            "were moved elsewhere; revoke them one by one"
        )
    names = []
    for name, client in clients.items():
        enrolled = max(client.enrolled, client.renewed or client.enrolled).timestamp()
        one = seen.get(name)
        if max(enrolled, 0.0 if one is None else one.time) < time and (one is None or not one.is_connected):
            names.append(name)
    return names


def _reach_back(files: RunFiles, time: float) -> bool:
    """Whether events are there since then, or since the run began."""
    first = next(iter(files.events()), None)
    return first is not None and (first.time <= time or (first.kind == "server_started" and first.details.get("restarts") == 0))


def _steps_name_all(files: RunFiles) -> bool:
    """Whether steps, which are there since the run began, say of each who was in them."""
    first = next(iter(files.steps()), None)
    return first is None or (first.number == 1 and not first.together)
