"""Where and how the server listens, and whom it lets in."""

import os
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from protocol.invitation import Invitation, normal_host
from storage import RunDescription
from terminal import user_path

from .certificates import Certificate, Identity, given_certificate, next_certificate, own_certificate
from .config import ServerConfig, is_loopback
from .enrolment import Enrolment, Enrolments
from .errors import ConfigError, ServerError
from .listener import Limits
from .page.token import own_token
from .run_lock import is_served

__all__ = ["Door", "enrolments_of", "invite", "open_door"]

DEFAULT_PORT = 8765
EVERY_ADDRESS = ("0.0.0.0", "::", "")


@dataclass(frozen=True, kw_only=True)
class Door:
    """Where a run is served, what a connection may use, and who may come in."""

    host: str
    port: int
    limits: Limits
    identity: Identity | None = None
    """By which key devices know the server; without it nothing is encrypted."""
    admits: Callable[[str, str], Enrolment | None] | None = None
    """
    Called with a name and a secret: that device's enrolment, or None if it has none, or another secret. Without it everybody is
    let in.
    """
    enrolled: Callable[[], Mapping[str, Enrolment]] | None = None
    """By name, the devices that may still be in the run."""
    has_page: bool = False
    """Whether the run is shown to browsers and to tools that read metrics."""
    page_token: str | None = None
    """What they need to see it. Without it whoever is on this machine may."""
    notices: tuple[str, ...] = ()
    """What the operator is told once the server listens."""

    @property
    def encryption(self) -> ssl.SSLContext | None:
        return None if self.identity is None else self.identity.context

    def page_url(self, port: int) -> str | None:
        """Where the page is, its token included, once the server listens on this port; None where there is none."""
        if not self.has_page:
            return None
        host = self.host
        if host in EVERY_ADDRESS:
            try:
                host = _own_address()
            except ServerError:  # this machine is in no network
                host = "127.0.0.1"
        scheme = "http" if self.encryption is None else "https"
        query = "" if self.page_token is None else f"?token={self.page_token}"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/{query}"


def open_door(config: ServerConfig) -> Door:
    """
    Decide how a run is guarded. On loopback everybody is let in as long as nobody is enrolled. On other addresses the
    connection is encrypted and devices need secrets, unless the operator says ``insecure``.

    Raises:
        ServerError: the certificate or the file of enrolments cannot be used.
    """
    enrolments = Enrolments(Path(config.clients_file or Path(config.run_dir) / "clients.json"))
    given = given_certificate(config.tls_cert, config.tls_key)
    private = is_loopback(config.host)
    guarded = enrolments.exists() or not (private or config.insecure)
    certificate = given
    if given is None and guarded and not config.insecure:
        certificate = own_certificate(enrolments.path.parent)
    next_file = Path(config.next_tls_cert or next_certificate(enrolments.path.parent).certificate_file)
    notices = []
    if config.insecure and not private:
        secrets = "secrets too" if guarded or config.page_token else "and joins the run if it likes"
        what = f"passes, {secrets}"
        notices.append(f"insecure: without encryption whoever shares the network reads what {what}")
    if guarded and not enrolments.exists():
        notices.append(
            f"no device is enrolled yet, and no other is let in: splitlora-server enrol NAME --run-dir {config.run_dir}"
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
            pages=config.max_pages if config.has_page else 0,
        ),
        identity=None if certificate is None else Identity(certificate, next_file),
        admits=enrolments.admits if guarded else None,
        enrolled=enrolments.clients if guarded else None,
        has_page=config.has_page,
        page_token=own_token(Path(config.run_dir)) if config.has_page and config.page_token else None,
        notices=tuple(notices),
    )


def enrolments_of(run_dir: str | None, clients_file: str | None) -> Enrolments:
    """
    Those of a file, or of a run: in the file that its server was started with, else in clients.json in the run's folder.

    Raises:
        ConfigError: neither is given.
    """
    if clients_file is None and run_dir is not None:
        folder = user_path(run_dir)
        description = RunDescription.read(folder, ServerError)
        clients_file = (description and description.config.get("clients_file")) or os.fspath(folder / "clients.json")
    if clients_file is None:
        raise ConfigError("give --run-dir or --clients-file, to say whose enrolled devices are meant")
    return Enrolments(user_path(clients_file))


@dataclass(frozen=True, kw_only=True)
class Served:
    """How the server of a run directory listens, or listened when it was last started, as run.json says."""

    run_dir: Path
    host: str
    port: int
    encrypted: bool
    tls_cert: str | None
    insecure: bool

    @classmethod
    def described_in(cls, run_dir: Path) -> "Served | None":
        """
        None where no server has been started yet.

        Raises:
            ServerError: run.json cannot be read.
        """
        description = RunDescription.read(run_dir, ServerError)
        if description is None:
            return None
        config, url = description.config, urlsplit(description.url)
        try:
            return cls(
                run_dir=run_dir,
                host=config["host"],
                port=url.port or config["port"],
                encrypted=url.scheme == "wss",
                tls_cert=config["tls_cert"],
                insecure=config["insecure"],
            )
        except (KeyError, ValueError):
            raise ServerError(f"{run_dir / 'run.json'} does not say how the run's server listens; start it again") from None


def invite(
    enrolments: Enrolments,
    name: str,
    *,
    run_dir: str | None = None,
    address: str | None = None,
    tls_cert: str | None = None,
    insecure: bool = False,
    renew: bool = False,
) -> Invitation:
    """
    Enrol a device; give the string it joins with.

    Args:
        renew: give a device that is enrolled already a new secret, instead of enrolling one that is not.
        run_dir: the run's folder, whose run.json says where its server listens and how.
        address: HOST:PORT where devices reach the server; the default is where it listens, at this machine's own address.

    Raises:
        ServerError, InvalidName, InvalidInvitation: the name, the address or a file cannot be used, or the run's server listens
            in another way.
    """
    served = None if run_dir is None else Served.described_in(user_path(run_dir))
    pin = _pin_of(served, enrolments.path.parent, tls_cert, insecure)
    if address is not None:
        host, port = _split(address)
    elif served is not None:
        host, port = served.host if served.host not in EVERY_ADDRESS else _own_address(), served.port
    else:
        host, port = _own_address(), DEFAULT_PORT
    normal_host(host)  # before the name is taken
    secret = enrolments.renew(name) if renew else enrolments.enrol(name)
    return Invitation(host=host, port=port, name=name, secret=secret, pin=pin)


def _pin_of(served: Served | None, folder: Path, tls_cert: str | None, insecure: bool) -> str | None:
    """SHA-256 of the key that devices will meet; None where the server listens without encryption."""
    asked = None if tls_cert is None else _certificate(tls_cert).pin()
    if served is None:
        return None if insecure else asked or own_certificate(folder).pin()
    if not served.encrypted and not served.insecure and is_served(served.run_dir):
        raise ServerError(
            f"the server of {served.run_dir} was started before anybody was enrolled, and listens without encryption: stop it, "
            "enrol the device, and start it again with --resume"
        )
    if insecure and not served.insecure:
        raise ConfigError(
            f"the server of {served.run_dir} was not started with --insecure, and listens with encryption once a device is "
            "enrolled: leave --insecure out"
        )
    if served.insecure:
        if tls_cert is not None:
            raise ConfigError(f"the server of {served.run_dir} listens without encryption (--insecure): leave --tls-cert out")
        return None
    pin = own_certificate(folder).pin() if served.tls_cert is None else _certificate(served.tls_cert).pin()
    if asked not in (None, pin):
        has = "the one it has made itself" if served.tls_cert is None else served.tls_cert
        raise ConfigError(
            f"the server of {served.run_dir} has another certificate ({has}) than {tls_cert}: leave --tls-cert out"
        )
    return pin


def _certificate(path: str) -> Certificate:
    return Certificate(user_path(path), user_path(path))


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ConfigError(f"address must be HOST:PORT, got {address!r}")
    return host.strip("[]"), int(port)


def _own_address() -> str:
    """This machine's address as others of the network see it; nothing is sent to find it out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation, RFC 5737: only the route is looked up
        except OSError:
            raise ServerError("this machine's address cannot be found out; give --address HOST:PORT") from None
        host: str = probe.getsockname()[0]
        return host
