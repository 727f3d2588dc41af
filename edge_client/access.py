"""How a device reaches its server: the address, the secret that it shows, and the key that it expects."""

import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from protocol import Welcome, check_name
from protocol.invitation import SCHEME

from .connection import Connection
from .enrolment import Enrolment, EnrolmentError, find, keep_pins
from .pinning import PinnedContext

__all__ = ["Access", "default_name"]


@dataclass(frozen=True, kw_only=True)
class Access:
    """
    Args:
        name: under which this device is enrolled there; None if it is not.
        credentials: name and secret, which the server checks.
        encryption: checks the server's key. None leaves that to the certificate authorities that the system trusts; a ws://
            address has no encryption.
        enrolment: what this device keeps of its invitation in ``state_folder``; None if it is not enrolled.
    """

    url: str
    name: str | None = None
    credentials: tuple[str, str] | None = field(default=None, repr=False)
    encryption: PinnedContext | None = None
    enrolment: Enrolment | None = field(default=None, repr=False)
    state_folder: Path | None = None

    @classmethod
    def to(cls, url: str, state_folder: Path, name: str | None = None) -> "Access":
        """
        By what `splitlora-edge join` has stored for the server, if this device is enrolled there.

        Raises:
            EnrolmentError: what is stored cannot be read, is ambiguous without a name, or is of another scheme; or the address
                holds a secret, which the message does not repeat.
        """
        if url.strip().startswith(SCHEME):
            raise EnrolmentError(
                "this is an invitation, not a server's address: splitlora-edge join (EdgeClient.join) takes it, and after that "
                "the address is wss://HOST:PORT"
            )
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or (443 if parts.scheme == "wss" else 80)
        except ValueError:
            return cls(url=url)  # no address at all: the connection says so
        if "@" in parts.netloc:
            raise EnrolmentError(
                f"a server's address has no user and no password: give {parts.scheme}://{host or 'HOST'}:{port}"
            )
        enrolment = find(state_folder, host, port, name) if host else None
        if enrolment is None:
            return cls(url=url)
        invitation = enrolment.invitation
        if parts.scheme != urlsplit(invitation.url).scheme:
            # Never the secret in the clear to a server that can encrypt.
            raise EnrolmentError(f"this device is enrolled at {invitation.url}; use that address instead of {url}")
        return cls(
            url=url,
            name=invitation.name,
            credentials=invitation.credentials,
            encryption=None if invitation.pin is None else PinnedContext(*enrolment.pins),
            enrolment=enrolment,
            state_folder=state_folder,
        )

    def connect(self) -> Connection:
        """
        Raises:
            ConnectionFailed, Refused, CertificateChanged: see `Connection`, `PinnedContext`.
        """
        return Connection(self.url, credentials=self.credentials, encryption=self.encryption)

    def heard(self, connection: Connection, welcome: Welcome) -> None:
        """
        Keep which key the server has, and which one it says comes next: from now on these two are accepted, and no earlier one.
        A server whose own key was not compared has no say in that.

        Raises:
            EnrolmentError: it cannot be kept.
        """
        if self.encryption is None or self.enrolment is None or self.state_folder is None or connection.certificate is None:
            return
        has = self.encryption.pin_of(connection.certificate)
        pins = tuple(dict.fromkeys(pin for pin in (has, welcome.next_pin) if pin))
        if has is not None and pins != self.encryption.pins:
            keep_pins(self.state_folder, self.enrolment.invitation, pins)
            self.encryption.pins = pins


def default_name(data: Path) -> str:
    """
    For a device that is not enrolled and was given no name: made of the machine's name and the data file's, so that several
    devices on one machine have different names, and each has the same one again.

    Raises:
        InvalidName: nothing that can be a name is left of them.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{platform.node() or 'device'}-{data.stem}").strip("-._")
    return check_name(name[:64] or "device")
