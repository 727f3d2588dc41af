"""What a device keeps of its invitations: one private file for each server and name."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from protocol.invitation import InvalidInvitation, Invitation, normal_host
from storage import replace_file
from terminal import PathError, user_path

__all__ = ["Enrolment", "EnrolmentError", "find", "keep_pins", "state_folder", "store"]


class EnrolmentError(ValueError):
    """What is stored of this device's enrolments cannot be used; the message names the file or the choice."""


@dataclass(frozen=True, kw_only=True)
class Enrolment:
    """An invitation as it is kept, with what the server has said of its key since."""

    invitation: Invitation
    """Its pin is that of the key that the server had when this device heard of it last."""
    next_pin: str | None = None
    """Of the key that the server will have next, if it has announced any."""

    @property
    def pins(self) -> tuple[str, ...]:
        return tuple(pin for pin in (self.invitation.pin, self.next_pin) if pin is not None)


def state_folder(state_dir: str | os.PathLike[str] | None) -> Path:
    """
    Where this device keeps its state: the folder that is asked for, else the platform's own for the user.

    Raises:
        EnrolmentError: the user has none.
    """
    if state_dir is not None:
        return user_path(state_dir)
    import platformdirs

    try:
        # user_path: some versions of platformdirs say themselves that there is no home, others leave the ~ where it is.
        return user_path(platformdirs.user_state_dir("splitlora", appauthor=False))
    except (PathError, RuntimeError):
        raise EnrolmentError("this user has no home folder: give --state-dir DIR, where this device keeps its state") from None


def store(folder: Path, invitation: Invitation) -> None:
    """
    Keep an invitation, instead of an earlier one for the same server and name. One that is kept already stays as it is: the
    device may have heard of another key since.

    Raises:
        EnrolmentError: it cannot be written.
    """
    path = folder / "enrolments" / _file_name(invitation.host, invitation.port, invitation.name)
    try:
        if path.exists() and _read(path).invitation.secret == invitation.secret:
            return
    except EnrolmentError:
        pass  # what cannot be read is replaced
    _write(path, Enrolment(invitation=invitation))


def keep_pins(folder: Path, invitation: Invitation, pins: Sequence[str]) -> None:
    """
    Keep which key the server has, and which one comes next; nothing, where the device has another invitation by now.

    Args:
        pins: one or two, as of `Enrolment`.

    Raises:
        EnrolmentError: it cannot be written, or what is kept cannot be read.
    """
    path = folder / "enrolments" / _file_name(invitation.host, invitation.port, invitation.name)
    if path.exists() and _read(path).invitation.secret == invitation.secret:
        known = replace(invitation, pin=pins[0])
        _write(path, Enrolment(invitation=known, next_pin=pins[1] if len(pins) > 1 else None))


def find(folder: Path, host: str, port: int, name: str | None) -> Enrolment | None:
    """
    What is kept for a server; without a name, the only one that is.

    Raises:
        EnrolmentError: there are several and no name, or a file cannot be read.
    """
    try:
        host = normal_host(host)
    except InvalidInvitation:
        return None  # no invitation has such a host
    pattern = _file_name(host, port, "*" if name is None else name)
    stored = [_read(path) for path in sorted((folder / "enrolments").glob(pattern))]
    found = {}
    for item in stored:
        kept = item.invitation
        if (kept.host, kept.port) == (host, port) and name in (None, kept.name):
            found[kept.name] = item
    if len(found) > 1:
        names = ", ".join(sorted(found))
        raise EnrolmentError(f"this device is enrolled at {host}:{port} as {names}; choose one of them with --name")
    return next(iter(found.values()), None)


def _file_name(host: str, port: int, name: str) -> str:
    """
    16 digits for the server and 16 for the name: nothing but safe characters, and the files of one server are found without
    reading those of others.

    Args:
        name: "*", which is no name, gives a pattern for all files of the server.
    """
    digits = "*" if name == "*" else _digits(name)
    return f"{_digits(f'{host} {port}')}{digits}.json"


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _write(path: Path, enrolment: Enrolment) -> None:
    content = asdict(enrolment.invitation)
    if enrolment.next_pin is not None:
        content["next_pin"] = enrolment.next_pin
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)  # also if it existed before
        replace_file(path, json.dumps(content, indent=2).encode())
    except OSError as error:
        raise EnrolmentError(f"the enrolment cannot be kept in {path.parent}: {error.strerror}") from None


def _read(path: Path) -> Enrolment:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        next_pin = content.pop("next_pin", None)
        if next_pin is not None:
            Invitation(**{**content, "pin": next_pin})  # which says whether it can be one
        return Enrolment(invitation=Invitation(**content), next_pin=next_pin)
    except OSError as error:
        raise EnrolmentError(f"the enrolment {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError):
        raise EnrolmentError(f"the enrolment {path} is damaged; delete it and join again with splitlora-edge join") from None
