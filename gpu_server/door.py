"""Where and how the server listens, and whom it lets in."""

import ipaddress
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from protocol.invitation import Invitation, normal_host

from .certificates import Certificate, given_certificate, own_certificate
from .config import ConfigError, ServerConfig
from .enrolment import Enrolments
from .listener import Limits

__all__ = ["Door", "enrolments_of", "invite", "open_door"]

DEFAULT_PORT = 8765


@dataclass(frozen=True, kw_only=True)
class Door:
    """What `RunServer` has to know of it."""

    host: str
    port: int
    limits: Limits
    encryption: ssl.SSLContext | None = None
    admits: Callable[[str, str], datetime | None] | None = None
    """Since when a name and a secret belong together, None if they do not; without it everybody is let in."""
    enrolled: Callable[[], Mapping[str, datetime]] | None = None
    """Who may still be in the run, and since when."""
    notices: tuple[str, ...] = ()
    """What the operator has to be told."""


def open_door(config: ServerConfig) -> Door:
    """
    On loopback, where nobody is enrolled, everything is open. Elsewhere the connection is encrypted and devices have secrets,
    unless the operator says ``insecure``.

    Raises:
        ConfigError: the certificate or the file of enrolments cannot be used.
    """
    enrolments = enrolments_of(config.run_dir, config.clients_file)
    given = given_certificate(config.tls_cert, config.tls_key)
    private = _is_loopback(config.host)
    guarded = enrolments.exists() or not (private or config.insecure)
    certificate = given
    if given is None and guarded and not config.insecure:
        certificate = own_certificate(enrolments.path.parent)
    notices = []
    if config.insecure and not private:
        what = "passes, secrets too" if guarded else "passes, and joins the run if it likes"
        notices.append(f"insecure: without encryption whoever shares the network reads what {what}")
    if guarded and not enrolments.exists():
        notices.append(
            f"nobody is enrolled yet, and nobody else is let in: splitlora-server enrol NAME --run-dir {config.run_dir}"
        )
    return Door(
        host=config.host,
        port=config.port,
        limits=Limits(
            connections=config.max_connections,
            strangers=config.max_strangers,
            handshake_seconds=config.handshake_seconds,
            messages_per_second=config.max_messages_per_second,
            queue=config.max_queue,
        ),
        encryption=None if certificate is None else certificate.server_context(),
        admits=enrolments.admits if guarded else None,
        enrolled=enrolments.clients if guarded else None,
        notices=tuple(notices),
    )


def enrolments_of(run_dir: str | None, clients_file: str | None) -> Enrolments:
    """
    Raises:
        ConfigError: neither place is given.
    """
    if clients_file is None and run_dir is None:
        raise ConfigError("say whose clients are meant: give --run-dir or --clients-file")
    return Enrolments(Path(clients_file) if clients_file is not None else Path(run_dir or "") / "clients.json")


def invite(
    enrolments: Enrolments, name: str, *, address: str | None = None, tls_cert: str | None = None, insecure: bool = False
) -> Invitation:
    """
    Enrol a device; give the string it joins with.

    Args:
        address: HOST:PORT where devices reach the server; the default is this machine's own address.

    Raises:
        ConfigError, InvalidName, InvalidInvitation: the name, the address or a file cannot be used.
    """
    host, port = _split(address) if address is not None else (_own_address(), DEFAULT_PORT)
    normal_host(host)  # before the name is taken
    if insecure:
        pin = None
    elif tls_cert is not None:
        pin = Certificate(Path(tls_cert), Path(tls_cert)).fingerprint()
    else:
        pin = own_certificate(enrolments.path.parent).fingerprint()
    return Invitation(host=host, port=port, name=name, secret=enrolments.enrol(name), pin=pin)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ConfigError(f"address must be HOST:PORT, got {address!r}")
    return host.strip("[]"), int(port)


def _own_address() -> str:
    """The one that other machines of the network see; nothing is sent to find it out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation, RFC 5737: only the route is looked up
        except OSError:
            raise ConfigError("this machine's address cannot be found out; give --address HOST:PORT") from None
        host: str = probe.getsockname()[0]
        return host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
