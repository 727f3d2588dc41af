"""The enrolled devices' names and the hashes of their secrets, in a file that commands change while the server runs."""

import difflib
import getpass
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

from protocol import check_name
from storage import remove_unfinished, replace_file
from terminal import listed, plain

from .errors import ConfigError, ServerError
from .history import tell

__all__ = ["Enrolment", "Enrolments"]


FORMAT = 1
NOBODYS_HASH = bytes(32)  # compared with where a name is unknown


@dataclass(frozen=True)
class Enrolment:
    """What the file says of an enrolled device."""

    secret_sha256: bytes = field(repr=False)
    enrolled: datetime
    """When, to the microsecond: so a device differs from one that had its name before."""
    enrolled_by: str = ""
    """The user of this machine who typed the command; empty where no name is known."""
    renewed: datetime | None = None
    """When it was given the secret that it has now; None where that is its first one."""

    def is_same_device(self, other: "Enrolment | None") -> bool:
        """Whether both speak of one device, which may have had a new secret in between."""
        return other is not None and self.enrolled == other.enrolled


class Enrolments:
    """The file at ``path``, which need not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: tuple[tuple[int, ...] | None, Mapping[str, Enrolment]] = None, {}
        """What the file looked like when it was last read without fault, and what was in it. Two threads look at both."""
        self._complained = False

    def enrol(self, name: str) -> str:
        """
        Let a device in; give its secret, which is stored nowhere.

        Raises:
            InvalidName: no device can have this name.
            ConfigError: the name is taken.
            ServerError: the file cannot be read or written.
        """
        check_name(name)
        secret = secrets.token_urlsafe(32)
        with self._changing() as clients:
            if name in clients:
                raise ConfigError(
                    f"{name} is enrolled already: to give this device a new secret, add --renew; to give the name to another "
                    "device, revoke it first"
                )
            clients[name] = Enrolment(_sha256(secret), datetime.now(timezone.utc), _user())
        return secret

    def renew(self, name: str) -> str:
        """
        Give an enrolled device a new secret, which is stored nowhere. It stays the same device, with its place in the run, and
        its old secret opens nothing any more.

        Raises:
            ConfigError: it is not enrolled.
            ServerError: the file cannot be read or written.
        """
        self._require(name, self._read())  # see `revoke`
        secret = secrets.token_urlsafe(32)
        with self._changing() as clients:
            self._require(name, clients)
            clients[name] = replace(clients[name], secret_sha256=_sha256(secret), renewed=datetime.now(timezone.utc))
        return secret

    def revoke(self, *names: str) -> None:
        """
        Let these devices in no longer; all of them at once, or none.

        Raises:
            ConfigError: one is not enrolled.
            ServerError: the file cannot be read or written.
        """
        # Before the lock is taken, since that would make a folder of a mistyped name, and again while it is held.
        before = self._read()
        for name in names:
            self._require(name, before)
        with self._changing() as clients:
            for name in names:
                self._require(name, clients)
                del clients[name]

    def clients(self) -> Mapping[str, Enrolment]:
        """
        The enrolled devices, by their names and in the order of these; the same object as long as the file is the same.

        Raises:
            ServerError: the file cannot be read.
        """
        try:
            return self._latest()
        except FileNotFoundError:
            return {}  # nobody was ever enrolled
        except OSError as error:
            raise ServerError(f"{self.path} cannot be read: {error.strerror}") from None

    def exists(self) -> bool:
        """
        Is anybody enrolled?

        Raises:
            ServerError: the file cannot be read.
        """
        return bool(self._read())

    def admits(self, name: str, secret: str) -> Enrolment | None:
        """
        This device's enrolment, according to the file as it is now; None if it has none, or another secret. Which of the two it
        is cannot be told from how long the answer takes.
        """
        client = self._current().get(name)
        same = hmac.compare_digest(NOBODYS_HASH if client is None else client.secret_sha256, _sha256(secret))
        return client if same else None

    def _require(self, name: str, clients: dict[str, Enrolment]) -> None:
        if name not in clients:
            nearest = difflib.get_close_matches(name, clients, n=1)
            if nearest:
                hint = f"did you mean {nearest[0]}?"
            else:
                hint = f"the devices that are: {listed(sorted(clients))}" if clients else f"nobody is in {self.path}"
            raise ConfigError(f"{name[:80]!r} is not enrolled; {hint}")

    def _current(self) -> Mapping[str, Enrolment]:
        """The clients of the file. While it cannot be read there are none, which is logged once."""
        try:
            clients = self._latest()
        except (OSError, ServerError) as error:
            if isinstance(error, FileNotFoundError) and self._known[0] is None:
                return {}  # there is none yet, which is no fault
            self._known = None, {}
            if not self._complained:
                reason = f"{self.path} cannot be read: {error.strerror}" if isinstance(error, OSError) else error
                tell("note", f"{reason}; no device is admitted until it can be read", level="error")
            self._complained = True
            return {}
        self._complained = False
        return clients

    def _latest(self) -> Mapping[str, Enrolment]:
        """
        What is in the file, which is read again only if it has changed: with thousands of devices that takes a while, and a
        server looks every second.

        Raises:
            OSError, ServerError: it cannot be read, or there is none.
        """
        stat = os.stat(self.path)  # looked at before it is read: a change between the two is seen the next time
        looks = stat.st_mtime_ns, stat.st_size, stat.st_ino
        known, clients = self._known
        if looks != known:
            clients = dict(sorted(self._read().items()))
            self._known = looks, clients
        return clients

    def _read(self) -> dict[str, Enrolment]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ServerError(f"{self.path} is of format {content['format']!r}, this version reads format {FORMAT}")
            return {check_name(name): _enrolment(entry) for name, entry in content["clients"].items()}
        except FileNotFoundError:
            return {}  # nobody was ever enrolled
        except OSError as error:
            raise ServerError(f"{self.path} cannot be read: {error.strerror}") from None
        except ServerError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ServerError(
                f"{self.path} is not a list of enrolled devices; restore it, or delete it and enrol them again"
            ) from None

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Enrolment]]:
        """The file's content for the block to change. It is written when the block ends without an error."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f"{self.path.name}.lock"), mode=0o600):
                remove_unfinished(self.path.parent, self.path.name)
                clients = self._read()
                yield clients
                replace_file(self.path, _json(clients))
        except OSError as error:
            raise ServerError(f"{self.path} cannot be written: {error.strerror}") from None
        self._known = None, {}  # two changes within one tick of the file system's clock may look alike


def _sha256(secret: str) -> bytes:
    # A slow hash makes guessing passwords dear. These are 256 random bits, which nobody guesses at any speed.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _user() -> str:
    """Who types the command; with sudo, who has typed that."""
    try:
        return plain(os.environ.get("SUDO_USER") or getpass.getuser())[:64]
    except (KeyError, OSError, ImportError):  # a user id without a name, as in a container
        return ""


def _enrolment(entry: Any) -> Enrolment:
    renewed = entry.get("renewed")
    enrolment = Enrolment(
        bytes.fromhex(entry["secret_sha256"]),
        datetime.fromisoformat(entry["enrolled"]),
        plain(str(entry.get("enrolled_by", ""))),
        None if renewed is None else datetime.fromisoformat(renewed),
    )
    times = [enrolment.enrolled, *([] if enrolment.renewed is None else [enrolment.renewed])]
    if len(enrolment.secret_sha256) != len(NOBODYS_HASH) or any(time.tzinfo is None for time in times):
        raise ValueError("no SHA-256, or a time of no time zone")
    return enrolment


def _json(clients: dict[str, Enrolment]) -> bytes:
    entries = {}
    for name, client in sorted(clients.items()):
        entries[name] = {"secret_sha256": client.secret_sha256.hex(), "enrolled": client.enrolled.isoformat()}
        if client.enrolled_by:
            entries[name]["enrolled_by"] = client.enrolled_by
        if client.renewed is not None:
            entries[name]["renewed"] = client.renewed.isoformat()
    return (json.dumps({"format": FORMAT, "clients": entries}, indent=2) + "\n").encode()
