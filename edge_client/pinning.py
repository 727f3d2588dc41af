"""TLS to one key: the server's that the invitation named, whoever signed its certificate and whatever host it is for."""

import hashlib
import ssl
from typing import Any, NoReturn

from protocol.public_key import InvalidCertificate, public_key_sha256

__all__ = ["CertificateChanged", "PinnedContext"]


class CertificateChanged(ConnectionError):
    """Who answers is not the server this device was enrolled with."""


class PinnedContext(ssl.SSLContext):
    """
    A client's context that accepts one key only: the certificate's SubjectPublicKeyInfo has the SHA-256 ``pin`` (64 lowercase
    hexadecimal digits). Of the invitations that earlier versions made, it is the whole certificate's.

    No authority, host name or date is asked: the pin says more. That the server has the key, and did not only copy the
    certificate, is proved to OpenSSL in every TLS 1.3 handshake.
    """

    def __new__(cls, pin: str) -> "PinnedContext":
        return super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)

    def __init__(self, pin: str) -> None:
        self.pin = pin
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
        """Not offered: the handshake would be the caller's, and so would be the check."""
        raise NotImplementedError("PinnedContext checks sockets; use wrap_socket")

    def _check(self, wrapped: ssl.SSLSocket) -> None:
        # ValueError where the handshake is put off: unchecked, a socket is not handed out.
        certificate = wrapped.getpeercert(binary_form=True) or b""
        try:
            found = public_key_sha256(certificate)
        except InvalidCertificate as error:
            raise CertificateChanged(f"the server's certificate cannot be read: {error}") from None
        if self.pin not in (found, hashlib.sha256(certificate).hexdigest()):
            raise CertificateChanged(
                f"the server's key ({found[:16]}…) is not the one this device was enrolled with ({self.pin[:16]}…): "
                "either somebody is between this device and the server, or the server was set up anew; in the second case "
                "enrol the device again, with splitlora-server revoke NAME and splitlora-server enrol NAME there, and "
                "splitlora-edge join INVITATION here"
            )
