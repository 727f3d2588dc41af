"""Where and how the server listens, and whom it lets in."""

import ipaddress
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .certificates import given_certificate, own_certificate
from .config import ConfigError, ServerConfig
from .enrolment import Enrolments
from .listener import Limits

__all__ = ["Door", "enrolments_of", "open_door"]

logger = logging.getLogger("gpu_server")


@dataclass(frozen=True, kw_only=True)
class Door:
    """What `RunServer` has to know of it."""

    host: str
    port: int
    limits: Limits
    encryption: ssl.SSLContext | None = None
    admits: Callable[[str, str], bool] | None = None
    """Whether a name and a secret belong together; None lets everybody in."""
    enrolled: Callable[[], set[str]] | None = None
    """Who may still be in the run."""


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
    if config.insecure and not private:
        logger.warning(
            "without encryption whoever shares the network reads what %s", "passes, secrets too" if guarded else "passes"
        )
    if guarded and not enrolments.exists():
        logger.info("nobody is enrolled yet: splitlora-server enrol NAME --run-dir %s", config.run_dir)
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
        enrolled=(lambda: set(enrolments.clients())) if guarded else None,
    )


def enrolments_of(run_dir: str | None, clients_file: str | None) -> Enrolments:
    """
    Raises:
        ConfigError: neither place is given.
    """
    if clients_file is None and run_dir is None:
        raise ConfigError("say whose clients are meant: give --run-dir or --clients-file")
    return Enrolments(Path(clients_file) if clients_file is not None else Path(run_dir or "") / "clients.json")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
