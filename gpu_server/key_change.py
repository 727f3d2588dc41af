"""A planned change of the server's key: it is announced, devices hear of it, and then it is made."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from storage.run_description import RUN_FILE
from terminal import listed, user_path

from .certificates import Certificate, change_key, make_next_key
from .door import enrolments_of
from .enrolment import Enrolment
from .errors import ConfigError
from .history import RunFiles

__all__ = ["Announcement", "announce", "change"]


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """Which key comes next, and who has heard of it."""

    pin: str
    """SHA-256 of the public key, 64 hexadecimal digits."""
    knowing: list[str]
    unknowing: list[str]
    """Enrolled devices that would refuse a server with that key."""
    is_brought: bool
    """Whether it is the operator who puts keys in their place."""


def announce(run_dir: str, clients_file: str | None) -> Announcement:
    """
    Make the next key of a run's server if there is none; a server that runs announces it within a second.

    Raises:
        ConfigError: no server was started there and nobody enrolled; the server listens without encryption, or with a key that
            its operator brings and has not announced.
        ServerError: a file cannot be read or written.
    """
    files = _files(run_dir)
    enrolments = enrolments_of(run_dir, clients_file)
    if files is None and not enrolments.path.exists():  # else a key would be made in the folder of a mistyped name
        raise ConfigError(f"{run_dir} holds no run, and nobody was enrolled for one: there is no server whose key to renew")
    config = {} if files is None else files.description.config
    brought, upcoming = config.get("tls_cert"), config.get("next_tls_cert")
    if config.get("insecure"):
        raise ConfigError(f"the server of {run_dir} listens without encryption (--insecure): it has no key")
    if brought and not upcoming:
        raise ConfigError(
            f"the server of {run_dir} has the key of {brought}: give serve --next-tls-cert with a certificate of the next one"
        )
    certificate = Certificate(Path(upcoming), Path(upcoming)) if upcoming else make_next_key(enrolments.path.parent)
    pin, clients = certificate.pin(), enrolments.clients()
    knowing = _knowing(pin, clients, files)
    unknowing = [name for name in clients if name not in knowing]
    return Announcement(pin=pin, knowing=knowing, unknowing=unknowing, is_brought=bool(brought or upcoming))


def change(run_dir: str, clients_file: str | None, *, though_unknown: bool = False) -> None:
    """
    Give the run's server the key that was announced. A server that runs takes it within a second.

    Args:
        though_unknown: also where devices have not heard of it.

    Raises:
        ConfigError: devices have not heard of it, or its operator brings the keys.
        ServerError: there is no next key, or a file cannot be read or written.
    """
    announcement = announce(run_dir, clients_file)
    if announcement.is_brought:
        raise ConfigError(
            f"you bring the keys of {run_dir} yourself: put the next one and its certificate where --tls-key and --tls-cert are"
        )
    if announcement.unknowing and not though_unknown:
        raise ConfigError(
            f"{listed(announcement.unknowing)} would refuse the server, not having heard of its next key: wait until they have "
            "been connected; or add --force, and enrol them again"
        )
    change_key(enrolments_of(run_dir, clients_file).path.parent)


def _files(run_dir: str) -> RunFiles | None:
    """None where no server was started yet."""
    folder = user_path(run_dir)
    return RunFiles(folder) if (folder / RUN_FILE).exists() else None


def _knowing(pin: str, clients: Mapping[str, Enrolment], files: RunFiles | None) -> list[str]:
    """Devices that have said so, and did not join with another invitation since."""
    heard = {
        event.client: event.time
        for event in ([] if files is None else files.events())
        if event.kind == "next_key" and event.details.get("pin") == pin
    }
    return [
        name
        for name, client in clients.items()
        if heard.get(name, 0.0) > max(client.enrolled, client.renewed or client.enrolled).timestamp()
    ]
