"""The server's TLS identity: a key and its certificate, its own or brought by a user. Devices compare the key's SHA-256."""

import ssl
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from filelock import FileLock

from protocol.public_key import public_key_sha256
from storage import remove_unfinished, replace_file
from terminal import importing

from .errors import ConfigError, ServerError

__all__ = ["Certificate", "given_certificate", "own_certificate"]

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
        try:
            context.load_cert_chain(self.certificate_file, self.key_file, password=self._refuse_passphrase)
        except ssl.SSLError as error:
            reason = (error.reason or "not PEM").lower().replace("_", " ")
            raise ServerError(f"{self.certificate_file} and {self.key_file} cannot be used together: {reason}") from None
        except OSError as error:
            raise ServerError(f"{self.certificate_file} and {self.key_file} cannot be read: {error.strerror}") from None
        return context

    def _refuse_passphrase(self) -> str:
        # Without this OpenSSL asks at the terminal, and a server that was started by no person waits for ever.
        raise ServerError(f"{self.key_file} is encrypted; write it without a passphrase: openssl pkey -in OLD -out NEW")


def own_certificate(folder: Path) -> Certificate:
    """
    The certificate that the server has made for itself in ``folder``; it is made now if there is none.

    Raises:
        ServerError: one of its two files is missing, it is damaged, or it cannot be written.
    """
    own = Certificate(folder / "server-certificate.pem", folder / "server-key.pem")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # `serve` and `enrol` may both be first; the later one takes what the earlier one made.
        with FileLock(folder / "server-key.lock", mode=0o600):
            missing = [file for file in (own.key_file, own.certificate_file) if not file.exists()]
            if len(missing) == 2:
                for file in missing:
                    remove_unfinished(folder, file.name)
                _make(own)
    except OSError as error:
        raise ServerError(f"the server's certificate cannot be kept in {folder}: {error.strerror}") from None
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
