"""The server's TLS identity: a key and its certificate, its own or brought by a user, and the key that comes next."""

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from filelock import FileLock

from protocol.public_key import public_key_sha256
from storage import remove_unfinished, replace_file
from terminal import importing

from .errors import ConfigError, ServerError
from .history import tell

__all__ = ["Certificate", "Identity", "change_key", "given_certificate", "make_next_key", "next_certificate", "own_certificate"]

DAYS_VALID = 3653  # devices compare the key and look at no date; other software may


@dataclass(frozen=True)
class Certificate:
    """A certificate and its private key, each a PEM file."""

    certificate_file: Path
    key_file: Path

    def pin(self) -> str:
        """
        SHA-256 of the public key, 64 hexadecimal digits: see `public_key_sha256`.

        Raises:
            ServerError: the file cannot be read or holds no certificate.
        """
        try:
            # Any text may stand between a PEM file's blocks. The first certificate is the server's; those of a chain follow.
            text = self.certificate_file.read_text(encoding="ascii", errors="replace")
            begin = text.index(ssl.PEM_HEADER)
            end = text.index(ssl.PEM_FOOTER, begin) + len(ssl.PEM_FOOTER)
            return public_key_sha256(ssl.PEM_cert_to_DER_cert(text[begin:end]))
        except OSError as error:
            raise ServerError(f"{self.certificate_file} cannot be read: {error.strerror}") from None
        except ValueError:
            raise ServerError(f"{self.certificate_file} holds no certificate in PEM") from None

    def server_context(self) -> ssl.SSLContext:
        """
        For the server's sockets: TLS 1.3 with this certificate.

        Raises:
            ServerError: a file cannot be read, or the key is encrypted or another certificate's.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # Nobody resumes a session, and its tickets do harm: they come just when a device sends its first request, so one of its
        # threads reads while another writes, which OpenSSL cannot stand. One connection in 200 was never established.
        context.num_tickets = 0
        self.load_into(context)
        return context

    def load_into(self, context: ssl.SSLContext) -> None:
        """Raises as `server_context`, and then may have spoilt the context."""
        try:
            context.load_cert_chain(self.certificate_file, self.key_file, password=self._refuse_passphrase)
        except ssl.SSLError as error:
            reason = (error.reason or "not PEM").lower().replace("_", " ")
            raise ServerError(f"{self.certificate_file} and {self.key_file} cannot be used together: {reason}") from None
        except OSError as error:
            raise ServerError(f"{self.certificate_file} and {self.key_file} cannot be read: {error.strerror}") from None

    def _refuse_passphrase(self) -> str:
        # Without this OpenSSL asks at the terminal, and a server that was started by no person waits for ever.
        raise ServerError(f"{self.key_file} is encrypted; write it without a passphrase: openssl pkey -in OLD -out NEW")


class Identity:
    """
    The key by which devices know the server, and the one that it announces to them, as their files are now.

    Args:
        certificate: the server's.
        next_file: a certificate of the key that comes next, which need not be there.

    Raises:
        ServerError: the certificate cannot be used.
    """

    def __init__(self, certificate: Certificate, next_file: Path) -> None:
        self._certificate, self._next_file = certificate, next_file
        self.context = certificate.server_context()
        """For the server's sockets: whoever connects meets the certificate that is in it then."""
        self.next_pin = ""
        """SHA-256 of the public key that comes next, 64 hexadecimal digits; empty where none is announced."""
        self._pin = certificate.pin()
        self._seen = self._look()
        self._read_next()

    def refresh(self) -> None:
        """
        See what has changed in the files. A certificate is taken if its key is the one before or the announced one: another
        would shut all devices out.
        """
        if (now := self._look()) == self._seen:
            return
        self._seen = now  # looked at before they are read: a change between the two is seen the next time
        try:
            pin = self._certificate.pin()
            if pin not in (self._pin, self.next_pin):
                raise ServerError(f"{self._certificate.certificate_file} has a key that was not announced to the devices")
            self._certificate.server_context()  # whether they can be used together, before the one in use is touched
            self._certificate.load_into(self.context)
        except ServerError as error:
            tell("note", f"{error}; the server goes on with the certificate that it has", level="warning")
        else:
            if pin != self._pin:
                tell("note", f"the server has its new key, {pin[:16]}…")
            self._pin = pin
        self._read_next()

    def _read_next(self) -> None:
        try:
            pin = Certificate(self._next_file, self._next_file).pin() if self._next_file.exists() else ""
        except ServerError as error:
            tell("note", f"{error}; the next key is not announced", level="warning")
            pin = ""
        if pin == self._pin:
            pin = ""  # it is the next one no longer
        if pin and pin != self.next_pin:
            tell("note", f"the server's next key is {pin[:16]}…, of which enrolled devices are told")
        self.next_pin = pin

    def _look(self) -> list[tuple[int, ...] | None]:
        return [_looks(file) for file in (self._certificate.certificate_file, self._certificate.key_file, self._next_file)]


def _looks(file: Path) -> tuple[int, ...] | None:
    """What a file looks like from outside, which another one does not; None where there is none."""
    try:
        stat = os.stat(file)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def next_certificate(folder: Path) -> Certificate:
    """Where the key that comes after the server's own one is, and its certificate, if there is any."""
    return Certificate(folder / "next-server-certificate.pem", folder / "next-server-key.pem")


def make_next_key(folder: Path) -> Certificate:
    """
    The key that comes after the server's own one in ``folder``, and its certificate; it is made now if there is none.

    Raises:
        ServerError: it cannot be written.
    """
    upcoming = next_certificate(folder)
    with _holding(folder):
        if not upcoming.certificate_file.exists():
            for file in (upcoming.key_file, upcoming.certificate_file):
                file.unlink(missing_ok=True)  # of a command that was killed: nobody was told of this one
                remove_unfinished(folder, file.name)
            _make(upcoming)
    return upcoming


def change_key(folder: Path) -> None:
    """
    Make the next key the server's own. It is done whole: `own_certificate` finishes what a kill has interrupted.

    Raises:
        ServerError: there is no next one, or a file cannot be written.
    """
    own, upcoming = _own(folder), next_certificate(folder)
    with _holding(folder):
        if not (upcoming.certificate_file.exists() and upcoming.key_file.exists()):
            raise ServerError(f"there is no next key in {folder}")
        upcoming.key_file.replace(own.key_file)
        _finish_change(own, upcoming)


def _finish_change(own: Certificate, upcoming: Certificate) -> None:
    if upcoming.certificate_file.exists() and not upcoming.key_file.exists():
        upcoming.certificate_file.replace(own.certificate_file)


@contextmanager
def _holding(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "server-key.lock", mode=0o600):
            yield
    except OSError as error:
        raise ServerError(f"the server's certificate cannot be kept in {folder}: {error.strerror}") from None


def _own(folder: Path) -> Certificate:
    return Certificate(folder / "server-certificate.pem", folder / "server-key.pem")


def own_certificate(folder: Path) -> Certificate:
    """
    The certificate that the server has made for itself in ``folder``; it is made now if there is none.

    Raises:
        ServerError: one of its two files is missing, it is damaged, or it cannot be written.
    """
    own = _own(folder)
    with _holding(folder):  # `serve` and `enrol` may both be first; the later one takes what the earlier one made
        _finish_change(own, next_certificate(folder))
        missing = [file for file in (own.key_file, own.certificate_file) if not file.exists()]
        if len(missing) == 2:
            for file in missing:
                remove_unfinished(folder, file.name)
            _make(own)
    if len(missing) == 1:
        other = own.key_file if missing == [own.certificate_file] else own.certificate_file
        raise ServerError(f"{other} is there and {missing[0].name} is not; bring that back, or {_start_anew(other)}")
    try:
        own.pin()
        own.server_context()
    except ServerError as error:
        raise ServerError(f"{error}; bring back the right ones, or {_start_anew(own.key_file, own.certificate_file)}") from None
    return own


def given_certificate(certificate: str | None, key: str | None) -> Certificate | None:
    """
    The certificate a user brings, as paths of PEM files; None if none is brought.

    Raises:
        ConfigError: only one of both is given.
        ServerError: they cannot be loaded.
    """
    if certificate is None and key is None:
        return None
    if certificate is None:
        raise ConfigError(f"the TLS key {key} needs its certificate; give both or neither")
    if key is None:
        raise ConfigError(f"the TLS certificate {certificate} needs its key; give both or neither")
    given = Certificate(Path(certificate), Path(key))
    given.pin()
    given.server_context()
    return given


def _start_anew(*files: Path) -> str:
    return f"delete {' and '.join(map(str, files))}: a new certificate is made, and every device must be enrolled again"


def _make(own: Certificate) -> None:
    """
    A new key and a certificate that it signs itself: devices are told the key's SHA-256, so no authority needs to vouch for it.
    """
    with importing("making a certificate", install="splitlora[server]"):
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "splitlora")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=DAYS_VALID))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("splitlora")]), critical=False)  # what Prometheus looks at
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    pkcs8, unencrypted = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    try:
        # The key first: a certificate without a key would look like an identity and be none.
        replace_file(own.key_file, key.private_bytes(pem, pkcs8, unencrypted))
        replace_file(own.certificate_file, certificate.public_bytes(pem))
    except BaseException:
        for file in (own.certificate_file, own.key_file):
            file.unlink(missing_ok=True)  # nobody knows it yet, and half a pair would be an obstacle
        raise
