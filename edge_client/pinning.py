"""TLS to one certificate: the server's that the invitation named, whoever signed it and whatever host it is for."""

import hashlib
import ssl
from typing import Any, NoReturn

__all__ = ["CertificateChanged", "PinnedContext"]


class CertificateChanged(ConnectionError):
    """Who answers is not the server this device was enrolled with."""


class PinnedContext(ssl.SSLContext):
    """
    A client's context that accepts one certificate only: its DER has the SHA-256 ``pin`` (64 lowercase hexadecimal digits).

    No authority and no host name is asked: the pin says more. That the server has the certificate's key, and did not only
    copy the certificate, is proved to OpenSSL in every TLS 1.3 handshake.
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
            CertificateChanged: another certificate; the socket is closed and nothing was sent.
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
        found = hashlib.sha256(wrapped.getpeercert(binary_form=True) or b"").hexdigest()
        if found != self.pin:
            raise CertificateChanged(
                f"the server's certificate ({found[:16]}…) is not the one this device was enrolled with ({self.pin[:16]}…): "
                "either somebody is between this device and the server, or the server was set up anew; in the second case "
                "enrol the device again, with splitlora-server revoke NAME and splitlora-server enrol NAME there, and "
                "splitlora-edge join INVITATION here"
            )
