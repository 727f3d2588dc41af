"""The one string that enrols a device: where the server is, who the device is there, and how each knows the other."""

import base64
import ipaddress
import re
from dataclasses import dataclass, field

from .errors import InvalidName
from .messages import check_name

__all__ = ["InvalidInvitation", "Invitation", "normal_host"]

SCHEME = "splitlora://"
FORM = f"{SCHEME}HOST:PORT/#NAME/SECRET/PIN"


class InvalidInvitation(ValueError):
    """Not an invitation; the message says which part is wrong and repeats none, because any of them may be the secret."""


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """
    What `splitlora-server enrol` prints and `splitlora-edge join` takes.

    Its characters are those that no shell changes in the middle of a word, so that it can be pasted without quotes.

    Raises:
        InvalidInvitation: a part cannot be.
    """

    host: str
    """A name or an address, without brackets; two spellings of one host are made one."""
    port: int
    name: str
    """The device's."""
    secret: str = field(repr=False)
    """32 random bytes as base64url without padding."""
    pin: str | None
    """
    SHA-256 of the server's public key (or, from earlier versions, of its certificate), 64 lowercase hexadecimal digits. None:
    the server speaks plain ws.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "host", normal_host(self.host))
        if type(self.port) is not int or not 1 <= self.port <= 65535:
            raise InvalidInvitation("the invitation's port is not one of 1 to 65535")
        if not _is_name(self.name):
            raise InvalidInvitation("the invitation's name is not 1 to 64 of A-Z a-z 0-9 . _ - after a letter or digit")
        if _bytes_of(self.secret) is None:
            raise InvalidInvitation("the invitation's secret is not 43 characters of base64url; copy all of it")
        if self.pin is not None and not re.fullmatch(r"[0-9a-f]{64}", self.pin):
            raise InvalidInvitation("the invitation's pin is not a SHA-256")

    @classmethod
    def parse(cls, text: str) -> "Invitation":
        """
        Of a text as it was pasted.

        Raises:
            InvalidInvitation: it is none.
        """
        address, found, device = text.strip().partition("/#")
        if not address.startswith(SCHEME):
            raise InvalidInvitation(f"an invitation looks like {FORM}; copy all that splitlora-server enrol prints")
        parts = device.split("/")
        if not found or len(parts) not in (2, 3):
            raise InvalidInvitation(f"an invitation looks like {FORM}; this has not NAME/SECRET or NAME/SECRET/PIN after '/#'")
        host, _, port = address.removeprefix(SCHEME).rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if bracketed != (":" in host):
            raise InvalidInvitation("the invitation's host is unclear: an IPv6 address, and nothing else, stands in [brackets]")
        return cls(
            host=host[1:-1] if bracketed else host,
            port=int(port) if re.fullmatch(r"[1-9][0-9]{0,4}", port) else 0,
            name=parts[0],
            secret=parts[1],
            pin=_pin_of(parts[2]) if len(parts) == 3 else None,
        )

    def text(self) -> str:
        """The string, secret included."""
        pin = "" if self.pin is None else f"/{_base64url(bytes.fromhex(self.pin))}"
        return f"{SCHEME}{self._address}/#{self.name}/{self.secret}{pin}"

    @property
    def url(self) -> str:
        """Of the server's WebSocket."""
        return f"{'ws' if self.pin is None else 'wss'}://{self._address}"

    @property
    def credentials(self) -> tuple[str, str]:
        """The device's name, and its secret."""
        return self.name, self.secret

    @property
    def _address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def normal_host(host: str) -> str:
    """
    The one spelling of a host's name or address: lowercase, IPv6 at its shortest and without brackets.

    Raises:
        InvalidInvitation: it is neither. An IPv6 zone (fe80::1%eth0) means something on one machine only.
    """
    host = host.lower()
    if re.fullmatch(r"[0-9a-f:.]*:[0-9a-f:.]*", host):
        try:
            return str(ipaddress.IPv6Address(host))
        except ValueError:
            pass  # it is said below
    elif re.fullmatch(r"[a-z0-9_][a-z0-9._-]{0,252}", host):
        return host
    raise InvalidInvitation("the invitation's host is neither a host name nor an address")


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except InvalidName:
        return False
    return True


def _pin_of(text: str) -> str:
    digest = _bytes_of(text)
    return "" if digest is None else digest.hex()


def _bytes_of(text: str) -> bytes | None:
    """The 32 bytes that ``text`` is base64url for, to the last bit; None if it is not."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{43}", text):
        return None
    data = base64.urlsafe_b64decode(text + "=")
    # The last character has two bits to spare: only where they are 0 have the bytes one text.
    return data if _base64url(data) == text else None


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")
