"""TLS to the server whose key the invitation names. Who signed its certificate, and for which host, does not matter."""

import hashlib
import ssl
from typing import Any, NoReturn

from protocol.public_key import InvalidCertificate, public_key_sha256

__all__ = ["CertificateChanged", "PinnedContext"]


class CertificateChanged(ConnectionError):
    """The server that answers is not the one with which this device was enrolled."""


class PinnedContext(ssl.SSLContext):
    """
    A client's context that accepts no other keys than those of ``pins``: the key that the server has, and the one that it will
    have next, if it has announced any. A pin is the SHA-256 of a certificate's SubjectPublicKeyInfo, 64 lowercase hexadecimal
    digits; in invitations that earlier versions made, that of the whole certificate.

    Authority, host name and date are not checked: the pin says more. In every TLS 1.3 handshake the server proves to OpenSSL
    that it has the key, and has not only copied the certificate.
    """

    def __new__(cls, *pins: str) -> "PinnedContext":
        return super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)

    def __init__(self, *pins: str) -> None:
        self.pins = pins
        self.minimum_version = ssl.TLSVersion.TLSv1_3
        self.check_hostname = False
        self.verify_mode = ssl.CERT_NONE

    def wrap_socket(self, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        """
        As of SSLContext. The pin is compared here, before anybody can send: the HTTP request that follows holds the secret.

        Raises:
            CertificateChanged: another key; the socket is closed and nothing was sent.
        """
        wrapped = super().wrap_socket(*arguments, **options)
        try:
            self._check(wrapped)
        except BaseException:
            wrapped.close()
            raise
        return wrapped

    def wrap_bio(self, *arguments: Any, **options: Any) -> NoReturn:
        """Not offered: the caller would do the handshake, and could forget the check."""
        raise NotImplementedError("PinnedContext checks sockets; use wrap_socket")

    def pin_of(self, certificate: bytes) -> str | None:
        """
        Which of the pins is that of a certificate in DER; None if none is.

        Raises:
            InvalidCertificate: it cannot be read.
        """
        found = (public_key_sha256(certificate), hashlib.sha256(certificate).hexdigest())
        return next((pin for pin in self.pins if pin in found), None)

    def _check(self, wrapped: ssl.SSLSocket) -> None:
        # If the handshake was put off, this raises ValueError: a socket is never handed out unchecked.
        certificate = wrapped.getpeercert(binary_form=True) or b""
        try:
            pin = self.pin_of(certificate)
        except InvalidCertificate as error:
            raise CertificateChanged(f"the server's certificate cannot be read: {error}") from None
        if pin is None:
            raise CertificateChanged(
                f"the server's key ({public_key_sha256(certificate)[:16]}…) is not the one this device was enrolled with "
                f"({self.pins[0][:16]}…): either somebody is between this device and the server, or the server has another key "
                "since, of which this device has not heard; in the second case enrol it again, with splitlora-server enrol "
                "NAME there (and --renew, where it is still enrolled), and splitlora-edge join INVITATION here"
            )
