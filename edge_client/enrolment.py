"""What a device keeps of its invitations: one private file for each server and name."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from protocol.invitation import InvalidInvitation, Invitation, normal_host
from storage import replace_file
from terminal import PathError, user_path

__all__ = ["EnrolmentError", "find", "state_folder", "store"]


class EnrolmentError(ValueError):
    """What is stored of this device's enrolments cannot be used; the message names the file or the choice."""


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
    Keep an invitation, instead of an earlier one for the same server and name.

    Raises:
        EnrolmentError: it cannot be written.
    """
    enrolments = folder / "enrolments"
    path = enrolments / _file_name(invitation.host, invitation.port, invitation.name)
    try:
        enrolments.mkdir(parents=True, exist_ok=True)
        enrolments.chmod(0o700)  # also if it existed before
        replace_file(path, json.dumps(asdict(invitation), indent=2).encode())
    except OSError as error:
        raise EnrolmentError(f"the enrolment cannot be kept in {enrolments}: {error.strerror}") from None


def find(folder: Path, host: str, port: int, name: str | None) -> Invitation | None:
    """
    The invitation kept for a server; without a name, the only one that is.

    Raises:
        EnrolmentError: there are several and no name, or a file cannot be read.
    """
    try:
        host = normal_host(host)
    except InvalidInvitation:
        return None  # no invitation has such a host
    pattern = _file_name(host, port, "*" if name is None else name)
    stored = [_read(path) for path in sorted((folder / "enrolments").glob(pattern))]
    found = {item.name: item for item in stored if (item.host, item.port) == (host, port) and name in (None, item.name)}
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


def _read(path: Path) -> Invitation:
    try:
        return Invitation(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise EnrolmentError(f"the enrolment {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError):
        raise EnrolmentError(f"the enrolment {path} is damaged; delete it and join again with splitlora-edge join") from None
